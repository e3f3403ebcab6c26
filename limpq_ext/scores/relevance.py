"""Scores from layer-wise relevance propagation: how much of the decision passes through a layer.

After LRP-QViT (arXiv 2401.11243) and Mix-QViT (arXiv 2501.06357), whose exact constants are not
repeated here. What is ours: the rules that :mod:`limpq_ext.scores.propagation` names so, the same
importance for the weights and the input of a layer, and how the two scores are put together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.nn.inputs import call
from limpq_ext.scores.one_at_a_time import MEMORY, OneAtATime
from limpq_ext.scores.propagation import propagate
from limpq_ext.scores.subject import KINDS, Key, Subject, checked_classes, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind

Error = Literal["power", "measured"]


def relevance(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    error: Error = "power",
    **options: Any,
) -> Indicators:
    """How much of the decision passes through a layer, times the error of a bit-width.

    The importance of a layer is the sum of ``|R|`` over its output, the mean over the samples,
    divided by the sum of that over all layers. Relevance ``R`` begins at the score of the target
    class, where a batch has targets, else of the class that the model predicts. A layer that runs
    several times has the sum over its calls. The rules are those of
    :mod:`limpq_ext.scores.propagation`, after Chefer et al. (arXiv 2012.09838); the score is after
    LRP-QViT (arXiv 2401.11243).

    Relevance is kept from layer to layer, so layers are told apart by where a network branches:
    residuals, attention, gates. In a chain of layers without branches all are equally important.

    It needs no gradients of the loss, and of each batch one forward and a way back that costs as
    much as three (ResNet-18) to eleven (DeiT-Tiny) more; another forward where the error is
    measured. One batch at a time is in memory, with what its forward computes.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, or inputs and None, on any device.
        bits: Candidate bit-widths.
        error: What the importance is multiplied by: "power", ``4 ** -bits``, or "measured", the
            squared error of the quantized weights or inputs over the sum of their squares.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, which are the same where the error
        is not measured. No unit.

    Raises:
        ValueError: There are no batches, there is no such error, the targets are no classes, the
            output is no table of finite scores, an operator has no rule (the message names it and
            its module), no layer gets any relevance, or the model cannot be prepared.
    """
    _check_error(error)
    subject = Subject(model, batches, bits, **options)
    found = subject.scores("relevance", bits, _relevances(subject, bits, error))
    return dataclasses.replace(found, meta=found.meta | {"error": error})


def relevance_sensitivity(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    base_bits: int = 8,
    mix: Literal["product"] | float = "product",
    error: Error = "power",
    correct: bool = True,
    **options: Any,
) -> Indicators:
    """A layer's importance together with what it does to the output, all others at a base width.

    After Mix-QViT (arXiv 2501.06357). The sensitivity of a tensor at a bit-width is the divergence
    KL(float || quantized) of the network in which every searchable layer has ``base_bits`` for its
    weights and its input, but for this one tensor. Weights and input are measured apart, each with
    the other at ``base_bits``, since a search chooses both.

    It needs what :func:`relevance` needs, and ``1 + 2 * layers * len(bits)`` forwards of each batch
    more, which have several bit-widths on the axis of the samples.

    Args:
        model: As for :func:`relevance`.
        batches: As for :func:`relevance`.
        bits: Candidate bit-widths.
        base_bits: The bit-width of all other tensors, 2 to 16; it need not be a candidate.
        mix: "product": importance times sensitivity. A number from 0 to 1: so much of the score is
            that of :func:`relevance`, and the rest is the sensitivity, both divided by their means
            (:meth:`Indicators.normalised`).
        error: That of :func:`relevance`; counts where ``mix`` is a number.
        correct: Measure with batch normalisation and biases corrected by what quantization moves,
            as :func:`limpq_ext.calibrate` corrects them with a reference, in the same forward. All
            batches then run as one.
        **options: As for :func:`relevance`.

    Returns:
        For each layer the score of its weights and of its input, in nats where ``mix`` is
        "product", else without a unit.

    Raises:
        ValueError: As for :func:`relevance`; or ``mix`` is neither.
    """
    _check_error(error)
    if mix != "product" and not (isinstance(mix, float | int) and 0 <= mix <= 1):
        raise ValueError(f"mix is {mix!r}, expected 'product' or a number from 0 to 1")
    bench = OneAtATime(
        model,
        batches,
        sorted({*bits, base_bits}),
        correct=correct,
        memory=MEMORY,
        **options,
    )
    subject = bench.subject
    sensitivities = _sensitivities(bench, bits, base_bits)
    name = "relevance_sensitivity"
    if mix == "product":
        shares = _importance(subject)
        found = subject.scores(name, bits, lambda *key: shares[key[0]] * sensitivities[key])
    else:
        first = subject.scores(name, bits, _relevances(subject, bits, error)).normalised()
        second = subject.scores(name, bits, lambda *key: sensitivities[key]).normalised()
        tables = [_table(part) for part in (first, second)]
        found = subject.scores(
            name, bits, lambda *key: mix * tables[0][key] + (1 - mix) * tables[1][key]
        )
    chosen = {"base_bits": base_bits, "mix": mix, "correct": correct}
    counting = {} if mix == "product" else {"error": error}
    return dataclasses.replace(found, meta=found.meta | chosen | counting)


def _check_error(error: str) -> None:
    if error not in get_args(Error):
        raise ValueError(f"error is {error!r}, expected one of {', '.join(get_args(Error))}")


def _table(indicators: Indicators) -> dict[Key, float]:
    return {
        (layer.name, kind, width): value
        for layer in indicators.layers
        for kind in KINDS
        for width, value in getattr(layer, kind).items()
    }


def _relevances(subject: Subject, bits: Sequence[int], error: Error) -> Callable[..., float]:
    """The score of each tensor and bit-width: importance times error."""
    shares = _importance(subject)
    if error == "power":
        return lambda name, kind, width: shares[name] * 4.0**-width
    errors = _relative_errors(subject, bits)
    return lambda name, kind, width: shares[name] * errors[name, kind, width]


def _importance(subject: Subject) -> dict[str, float]:
    """Each layer's share of ``|R|`` at the outputs of all layers."""
    sums: dict[str, Tensor] = {}

    def visit(name: str, at_output: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + at_output.abs().sum(dtype=torch.float64)

    for x, target in subject.batches:
        propagate(subject.network, subject.layers, x, _start(target), visit)
    amounts = {name: float(sums.get(name, 0.0)) for name in subject.layers}
    total = sum(amounts.values())
    if not total:
        raise ValueError(
            "no layer gets any relevance: the scores that it begins at are 0, or come from no layer"
        )
    return {name: amount / total for name, amount in amounts.items()}


def _start(target: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The score of the target class, or of the one that is predicted; 0 elsewhere."""

    def start(output: Tensor) -> Tensor:
        scores = log_probabilities(output)
        if not bool(torch.isfinite(scores).all()):
            raise ValueError("the model puts out a NaN or an infinity")
        classes = scores.argmax(dim=1) if target is None else checked_classes(target, scores)
        chosen = classes[:, None]
        computing = output if output.dtype == torch.float64 else output.float()
        return torch.zeros_like(computing).scatter(1, chosen, computing.gather(1, chosen))

    return start


@torch.no_grad()
def _relative_errors(subject: Subject, bits: Sequence[int]) -> dict[Key, float]:
    """The squared error of each tensor at each bit-width, over the sum of its squares."""
    errors: dict[Key, Tensor] = {}
    squares: dict[tuple[str, Kind], Tensor] = {}

    def note(name: str, kind: Kind, x: Tensor) -> None:
        layer = subject.layers[name]
        quantizer = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
        for width in bits:
            with subject.quantized(name, kind, width):
                error = (quantizer.forward(x) - x).square().sum(dtype=torch.float64)
            key = name, kind, width
            errors[key] = errors[key] + error if key in errors else error
        square = x.square().sum(dtype=torch.float64)
        squares[name, kind] = squares.get((name, kind), 0.0) + square

    with ExitStack() as stack:
        for name, layer in subject.layers.items():
            note(name, "weight", layer.weight)

            def before(module: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                note(name, "activation", inputs[0])

            handle = layer.input_quantizer.register_forward_pre_hook(before)
            stack.callback(handle.remove)
        for x, _ in subject.batches:
            call(subject.network, x)
    return {
        (name, kind, width): float(error / squares[name, kind])
        for (name, kind, width), error in errors.items()
    }


@torch.no_grad()
def _sensitivities(bench: OneAtATime, bits: Sequence[int], base_bits: int) -> dict[Key, float]:
    """The divergence with one tensor at a bit-width and all others at the base."""
    subject = bench.subject
    sums: dict[Key, Tensor] = {}
    samples = 0
    with bench.opened():
        for x, _ in bench.batches:
            reference = log_probabilities(bench.begin(x))
            samples += len(reference)
            for layer in subject.layers:
                keys = [(layer, kind, width) for kind in KINDS for width in bits]
                variants = {
                    other: [
                        partial(subject.all_quantized, *_at_base(other, base_bits, key))
                        for key in keys
                    ]
                    for other in subject.layers
                }
                for key, output in zip(keys, bench.run(variants), strict=True):
                    divergence = F.kl_div(
                        log_probabilities(output), reference, reduction="sum", log_target=True
                    )
                    sums[key] = sums.get(key, 0.0) + divergence
    # Below 0 by rounding only.
    return {key: float(total.clamp(min=0.0)) / samples for key, total in sums.items()}


def _at_base(layer: str, base_bits: int, key: Key) -> list[Key]:
    """Both tensors of a layer at the base, but for the one that the key gives other bits."""
    return [(layer, kind, key[2] if key[:2] == (layer, kind) else base_bits) for kind in KINDS]
