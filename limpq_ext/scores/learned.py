"""LIMPQ's joint training as a score: the step sizes that it learns, or the sensitivities beside.

`learned` runs a short joint training on a copy of a float model; `learned_by` reads what a trainer
of one's own came to.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.conversion.prepare import prepare
from limpq_ext.joint.trainer import JointTrainer
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.network import quantized_layers, select_bits
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.training.batches import Batches
from limpq_ext.training.model_state import device_of, modes_kept
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.indicators import Indicators, LayerIndicators

LearnedKind = Literal["raw", "normalised", "loss_aware"]

LEARNED_KINDS: Final[tuple[LearnedKind, ...]] = get_args(LearnedKind)


def learned(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    kind: LearnedKind = "loss_aware",
    steps: int | None = None,
    lr: float | None = None,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    seed: int = 0,
    scale_start: ScaleStart = "mse",
    **options: Any,
) -> Indicators:
    """What a short joint training learns (LIMPQ, arXiv 2203.08368, section 3.3).

    It needs targets and gradients, and ``len(bits) + 1`` forwards and backwards of a batch in each
    step. The training is SGD with momentum 0.9 on a copy of the model.

    Args:
        model: The float model; it is left as it is.
        batches: Batches of inputs and targets, on any device; taken again from the first where
            there are fewer than steps.
        bits: Candidate bit-widths.
        kind: "raw": the step sizes, LIMPQ's indicators. "normalised" (ours): each over the mean
            magnitude of what it quantizes, which LSQ's start values are proportional to.
            "loss_aware" (ours): what the errors at each bit-width add to the loss of the branch at
            the highest one, see :meth:`JointTrainer.sensitivities`.
        steps: Joint steps; None: 40, and 16 for "loss_aware". The first one gives step sizes their
            start, and measures nothing.
        lr: Learning rate; None: 0.01, and 0 for "loss_aware", whose errors and gradients then stay
            those near the float network.
        loss_fn: ``loss_fn(output, target)``, for "loss_aware" the mean over the samples of a batch.
        seed: Of the bits of the random branch.
        scale_start: Where step sizes begin, as for :func:`limpq_ext.prepare`.
        **options: ``fixed``, ``exclude``, ``per_channel_weights`` and ``symmetric_weights``, as for
            :func:`limpq_ext.prepare`.

    Returns:
        For each layer the indicator of its weights and of its input.

    Raises:
        ValueError: There is no such kind, there are no batches, too few steps, or the model cannot
            be prepared.
        NonFiniteError: A loss or gradient is NaN or infinite.
    """
    _check_kind(kind)
    aware = kind == "loss_aware"
    steps = (16 if aware else 40) if steps is None else steps
    fewest = 2 if aware else 1
    if steps < fewest:
        raise ValueError(f"steps is {steps}, expected {fewest} or more")
    device = device_of(model)
    batches = [moved(batch, device) for batch in batches]
    if not batches:
        raise ValueError("there are no batches to train on")
    x, _ = batches[0]
    prepared = prepare(
        copy.deepcopy(model), bits, example_input=x, scale_start=scale_start, **options
    ).requires_grad_(True)
    trainer = JointTrainer(
        prepared,
        make_optimizer(prepared, lr=(0.0 if aware else 0.01) if lr is None else lr),
        loss_fn,
        seed=seed,
        sensitivity_every=int(aware),
    )
    for x, target in itertools.islice(itertools.cycle(batches), steps):
        trainer.step(x, target)
    trainer.check()
    return learned_by(trainer, kind=kind, batches=batches)


def learned_by(
    trainer: JointTrainer, *, kind: LearnedKind = "loss_aware", batches: Batches = ()
) -> Indicators:
    """What a joint training came to, as :func:`learned` has it.

    Args:
        trainer: It took some steps; "loss_aware" needs its ``sensitivity_every``.
        kind: As for :func:`learned`.
        batches: For "normalised": batches of inputs and targets, whose activations are measured, in
            a forward of each.

    Raises:
        ValueError: There is no such kind, no step was measured, or there are no batches where they
            are needed.
    """
    _check_kind(kind)
    if kind == "loss_aware":
        return trainer.sensitivities()
    indicators = trainer.indicators()
    if kind == "normalised":
        indicators = _normalised(indicators, trainer.model, batches)
    meta = {**indicators.meta, "score": "learned", "kind": kind}
    return dataclasses.replace(indicators, meta=meta)


def _check_kind(kind: str) -> None:
    if kind not in LEARNED_KINDS:
        raise ValueError(f"kind is {kind!r}: not one of {', '.join(LEARNED_KINDS)}")


def _normalised(indicators: Indicators, model: nn.Module, batches: Batches) -> Indicators:
    """Step sizes over the mean magnitudes of the weights and of what came into the layers."""
    inputs = _input_magnitudes(model, batches)
    layers = []
    for layer in indicators.layers:
        weight = model.get_submodule(layer.name).weight
        assert isinstance(weight, Tensor)
        magnitudes = (float(weight.detach().double().abs().mean()), inputs[layer.name])
        tables = (layer.weight, layer.activation)
        layers.append(
            LayerIndicators(
                layer.name,
                *(
                    {bits: step / magnitude for bits, step in table.items()}
                    for table, magnitude in zip(tables, magnitudes, strict=True)
                ),
            )
        )
    return dataclasses.replace(indicators, layers=tuple(layers))


@torch.no_grad()
def _input_magnitudes(model: nn.Module, batches: Batches) -> dict[str, float]:
    """The mean magnitude of every layer's input, all quantizers off."""
    layers = quantized_layers(model)
    sums: dict[str, list[Tensor]] = {name: [] for name in layers}
    counts = dict.fromkeys(layers, 0)
    quantizers = [module for module in model.modules() if isinstance(module, LsqQuantizer)]

    def adding(name: str) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            sums[name].append(x.double().abs().sum())
            counts[name] += x.numel()

        return add

    with modes_kept(model):
        model.eval()
        select_bits(model, max(layers[next(iter(layers))].weight_quantizer.bits))
        try:
            for quantizer in quantizers:
                quantizer.observe = _nothing
            for name, layer in layers.items():
                layer.input_quantizer.observe = adding(name)
            for batch in batches:
                x, _ = moved(batch, device_of(model))
                call(model, x)
        finally:
            for quantizer in quantizers:
                quantizer.observe = None
    magnitudes = {}
    for name, parts in sums.items():
        if not counts[name]:
            raise ValueError(f"layer '{name}': no batch came through it, so it has no magnitude")
        magnitudes[name] = float(torch.stack(parts).sum()) / counts[name]
    return magnitudes


def _nothing(x: Tensor) -> None:
    """Observes nothing."""
