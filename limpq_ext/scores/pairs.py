"""Two tensors at a time: what they cost together beyond what each costs alone, as `Interactions`.

The sum of `layerwise` scores takes errors of different layers to be independent. CLADO
(arXiv 2307.05657) adds the second-order cross terms of the loss, e_i' H e_j for the errors of two
layers' weights, measured by forwards alone:

    L(both quantized) - L(one) - L(other) + L(none).

Here each pair stands once, beside the indicators. What is ours: the pairs are those within a block
by default, which are few and with which the search proves its answer fastest; activations are an
option; and the matrix is not made positive semi-definite, which an exact search does not need.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from limpq_ext.scores.one_at_a_time import MEMORY, OneAtATime, losing
from limpq_ext.scores.subject import KINDS, Key, Subject, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind
from limpq_ext.values.interactions import Interactions, Quantized
from limpq_ext.values.names import listed, matches

Within = Literal["block"] | int | Sequence[str]
"""Which layers are paired: those of a block by their names, those at most so many places apart, or
those that fit one pattern."""

Measure = Literal["kl", "loss"]

_BLOCKS: Final = (
    # layer1.0, features.4, stages.1.blocks.2
    re.compile(r"(?:[^.]+\.)*?\d+(?:\.(?:(?:blocks|layers)\.)?\d+)*(?=\.)"),
    re.compile(r"(?:[^.]+\.)*?[^.]*\d(?=\.)"),  # encoder_layer_0, block1
)
"""The part of a layer's name that is its block's, the first that fits."""


@torch.no_grad()
def interactions(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    within: Within = "block",
    kinds: Sequence[Kind] = ("weight",),
    measure: Measure = "kl",
    correct: bool = True,
    memory: int = MEMORY,
    **options: Any,
) -> Interactions:
    """What two quantized tensors move at the output beyond what each of them moves.

    CLADO's cross terms (arXiv 2307.05657), to be added to :func:`limpq_ext.scores.layerwise`, whose
    measure "kl" is. It needs no gradients, targets for "loss" alone, and for t tensors in p pairs
    ``1 + t * len(bits) + p * len(bits) ** 2`` forwards of each batch, which begin at the first of
    the layers: ResNet-50's weights within blocks are 60 pairs, 1,761 forwards at five bit-widths.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and targets, on any device.
        bits: Candidate bit-widths.
        within: Which layers are paired. ``"block"``: those whose names begin with the same numbered
            module (``layer1.0``, ``blocks.3``), or are in the same module where none has a number;
            a number: those at most so many places apart; patterns: those that fit the same one.
        kinds: ``"weight"``, ``"activation"`` or both. With both, a layer's weights and its input
            are a pair too.
        measure: ``"kl"``, the divergence from the float network, or ``"loss"``, the cross-entropy.
        correct: Batch normalisation and biases behind the tensors are corrected by what they move,
            as for :func:`limpq_ext.scores.layerwise`.
        memory: As for :func:`limpq_ext.scores.layerwise`.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each pair the mean over the samples, in nats; below 0 where errors cancel.

    Raises:
        ValueError: There are no batches or no pairs, kinds, measure or ``within`` are none, the
            targets are no classes where they are needed, the output is no table of scores, a value
            is NaN or infinite, or the model cannot be prepared.
    """
    _check_kinds(kinds)
    if measure not in ("kl", "loss"):
        raise ValueError(f"measure is {measure!r}, expected kl or loss")
    bench = OneAtATime(model, batches, bits, correct=correct, memory=memory, **options)
    pairs = _tensor_pairs(list(bench.subject.layers), within, kinds)
    tensors = dict.fromkeys(itertools.chain.from_iterable(pairs))
    asked: dict[tuple[Quantized, ...], list[tuple[int, ...]]] = {
        (tensor,): [(b,) for b in bits] for tensor in tensors
    }
    asked |= {pair: list(itertools.product(bits, repeat=2)) for pair in pairs}
    moved = _moved(bench, measure, asked)
    table = {
        (one, other): {
            (a, b): moved[(*one, a), (*other, b)] - moved[((*one, a),)] - moved[((*other, b),)]
            for a, b in itertools.product(bits, repeat=2)
        }
        for one, other in pairs
    }
    meta = {
        "score": "interactions",
        "measure": measure,
        "correct": correct,
        "within": within if isinstance(within, str | int) else list(within),
        "batches": len(bench.subject.batches),
    }
    return Interactions.from_table(table, meta=meta)


def products(
    indicators: Indicators,
    other: Indicators | None = None,
    *,
    within: Within = "block",
    kinds: Sequence[Kind] = ("weight",),
    scale: float = 1.0,
) -> Interactions:
    """Products of the scores of pairs of layers, a quadratic part after Mix-QViT.

    Mix-QViT (arXiv 2501.06357) searches with an integer quadratic program over pairs of layers.
    Its constants could not be seen: that a pair's term is the plain product of two scores, and
    ``scale``, are ours.

    Args:
        indicators: Scores s, such as relevance times sensitivity.
        other: Other scores r of the same layers: a term is then the mean of s_i r_j and r_i s_j.
            None: the same ones, so that it is s_i s_j.
        within: Which layers are paired, as for :func:`limpq_ext.scores.interactions`.
        kinds: Whose scores: ``"weight"``, ``"activation"`` or both.
        scale: What the products are multiplied by; they are in squares of the scores' unit.

    Returns:
        For each pair of tensors scale times the product, at every two bit-widths.

    Raises:
        ValueError: There are no pairs, kinds or ``within`` are none, the other scores are of other
            layers or bits, or a product is infinite.
    """
    _check_kinds(kinds)
    other = indicators if other is None else other
    names = [layer.name for layer in indicators.layers]
    if other.bits != indicators.bits or [layer.name for layer in other.layers] != names:
        raise ValueError("the two indicators are of different layers or bits")
    one, two = (
        {(layer.name, kind): getattr(layer, kind) for layer in scores.layers for kind in kinds}
        for scores in (indicators, other)
    )
    table = {
        (i, j): {
            (a, b): scale * (one[i][a] * two[j][b] + two[i][a] * one[j][b]) / 2
            for a, b in itertools.product(indicators.bits, repeat=2)
        }
        for i, j in _tensor_pairs(names, within, kinds)
    }
    return Interactions.from_table(
        table, meta={"score": "products", "scale": scale, "of": [indicators.meta, other.meta]}
    )


def _moved(
    bench: OneAtATime,
    measure: Measure,
    asked: Mapping[tuple[Quantized, ...], Sequence[tuple[int, ...]]],
) -> dict[tuple[Key, ...], float]:
    """How far quantized tensors move the output from the float network's.

    Args:
        bench: The network.
        measure: "kl" or "loss".
        asked: Tensors -> the bits that they are quantized to together.

    Returns:
        For each the mean over the samples, in nats.
    """
    sums: dict[tuple[Key, ...], Tensor] = {}
    samples = 0
    with bench.opened():
        for x, target in bench.batches:
            reference = log_probabilities(bench.begin(x))
            samples += len(reference)
            lost = losing(measure, reference, target)
            for tensors, every in asked.items():
                ways = [
                    tuple((*tensor, width) for tensor, width in zip(tensors, widths, strict=True))
                    for widths in every
                ]
                outputs = bench.run(_variants(bench.subject, ways))
                for way, output in zip(ways, outputs, strict=True):
                    sums[way] = sums.get(way, 0.0) + lost(log_probabilities(output))
    return {way: float(total) / samples for way, total in sums.items()}


def _variants(
    subject: Subject, ways: Sequence[tuple[Key, ...]]
) -> dict[str, list[Callable[[], AbstractContextManager[None]]]]:
    """For each layer what is quantized of it in each way."""
    return {
        layer: [
            partial(subject.all_quantized, *(key for key in way if key[0] == layer)) for way in ways
        ]
        for layer in dict.fromkeys(key[0] for key in ways[0])
    }


def _check_kinds(kinds: Sequence[Kind]) -> None:
    if not kinds or isinstance(kinds, str) or set(kinds) - set(KINDS):
        raise ValueError(f"kinds is {kinds!r}, expected some of {', '.join(KINDS)}")


def _tensor_pairs(
    names: Sequence[str], within: Within, kinds: Sequence[Kind]
) -> list[tuple[Quantized, Quantized]]:
    """The pairs of tensors of layers that are paired, in the network's order.

    Raises:
        ValueError: There are none.
    """
    kinds = [kind for kind in KINDS if kind in kinds]
    paired = _layer_pairs(names, within)
    found: list[tuple[Quantized, Quantized]] = []
    for place, name in enumerate(names):
        found += itertools.combinations([(name, kind) for kind in kinds], 2)
        for other in names[place + 1 :]:
            if (name, other) in paired:
                found += [((name, kind), (other, its)) for kind in kinds for its in kinds]
    if not found:
        raise ValueError(f"within={within!r} pairs no layers of {listed(names)}")
    return found


def _layer_pairs(names: Sequence[str], within: Within) -> set[tuple[str, str]]:
    """The pairs of layers, each in the network's order."""
    groups: Iterable[Sequence[str]]
    if isinstance(within, int) and not isinstance(within, bool):
        if within < 1:
            raise ValueError(f"within is {within}, expected 1 or more places")
        groups = [names[first : first + within + 1] for first in range(len(names))]
    elif within == "block":
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(block_of(name), []).append(name)
        groups = blocks.values()
    elif isinstance(within, str) or not isinstance(within, Sequence):
        raise ValueError(f"within is {within!r}, expected block, a number or patterns")
    else:
        groups = [[name for name in names if matches(name, [pattern])] for pattern in within]
    return {pair for group in groups for pair in itertools.combinations(group, 2)}


def block_of(name: str) -> str:
    """The block that a layer is in, by its name: its first numbered module, else its parent."""
    for pattern in _BLOCKS:
        if found := pattern.match(name):
            return found.group()
    return name.rpartition(".")[0]
