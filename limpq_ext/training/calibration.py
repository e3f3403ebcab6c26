"""What a few batches tell without training: where scales begin, how statistics moved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.network import quantized_layers, select_bits
from limpq_ext.nn.quantizers import ActivationQuantizer, LsqQuantizer
from limpq_ext.nn.start_values import Histogram
from limpq_ext.training.batches import Batches
from limpq_ext.training.correction import correct_statistics
from limpq_ext.training.distributed import broadcast_state
from limpq_ext.training.model_state import buffers_kept, device_of, modes_kept


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches, *, reference: nn.Module | None = None) -> None:
    """Make a quantized model usable without training, for a first look.

    Activation scales take their start values by the rule that their quantizers have: LSQ's from the
    first batch, run at each bit-width; the others from all batches, run in float. Batch
    normalisation, and biases without one, are corrected by what quantization moves, where there is
    a reference. Without one batch normalisation is estimated anew from the batches, where every
    layer has one bit-width, else it stays as it is.

    Args:
        model: What :func:`limpq_ext.prepare` or :func:`limpq_ext.apply_policy` returned; its
            modules are put back into the modes, and its layers to the bits, that they had.
        batches: Some training batches, on any device; their targets do not matter.
        reference: The float model that it was made from, see
            :func:`limpq_ext.training.correction.correct_statistics`.

    Raises:
        ValueError: The model has no quantized layers, there are no batches, a layer sees nothing
            but zeros or what is not finite, or the reference is another network.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers to calibrate")
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to calibrate with")
    candidates = sorted({bits for layer in layers.values() for bits in layer.weight_quantizer.bits})
    several = any(len(layer.weight_quantizer.bits) > 1 for layer in layers.values())
    with modes_kept(model):
        start_scales_from(model, batches)
    with modes_kept(model), buffers_kept(model):
        _start_training(model)
        for module in model.modules():
            if isinstance(module, LsqQuantizer):
                module.train()
        x, _ = moved(batches[0], device_of(model))
        for _ in _each_selected(model, candidates if several else []):
            call(model, x)
    if reference is not None:
        for _ in _each_selected(model, candidates if several else []):
            correct_statistics(model, reference, batches)
    elif not several:
        reestimate_batch_norm(model, batches)


def _each_selected(model: nn.Module, candidates: Sequence[int]) -> Iterator[None]:
    """Once for each bit-width, selected in all layers; once as it is where there are none."""
    if not candidates:
        yield
        return
    selected = {
        name: (layer.weight_bits, layer.activation_bits)
        for name, layer in quantized_layers(model).items()
    }
    try:
        for bits in candidates:
            select_bits(model, bits)
            yield
    finally:
        select_bits(model, selected)


def start_scales_from(model: nn.Module, batches: Batches) -> None:
    """Start the activation scales that do not begin as LSQ's do: all batches in float, observed.

    Args:
        model: What :func:`limpq_ext.prepare` or :func:`limpq_ext.apply_policy` returned; it is left
            in evaluation mode.
        batches: Some batches; their targets do not matter.

    Raises:
        ValueError: A layer sees nothing but zeros, or what is not finite.
    """
    quantizers = [module for module in model.modules() if isinstance(module, LsqQuantizer)]
    waiting = {
        quantizer: Histogram()
        for quantizer in quantizers
        if isinstance(quantizer, ActivationQuantizer)
        and quantizer.scale_start != "lsq"
        and not quantizer.initialized.all()
    }
    if not waiting:
        return
    model.eval()
    try:
        for quantizer in quantizers:
            quantizer.observe = _nothing
        for quantizer, histogram in waiting.items():
            quantizer.observe = _counting(quantizer, histogram)
        for batch in batches:
            x, _ = moved(batch, device_of(model))
            call(model, x)
    finally:
        for quantizer in quantizers:
            quantizer.observe = None
    for quantizer, histogram in waiting.items():
        if histogram.counts is not None:  # else no batch came through it
            quantizer.start_from(histogram)


def _nothing(x: Tensor) -> None:
    """Observes nothing."""


def _counting(quantizer: ActivationQuantizer, histogram: Histogram) -> Callable[[Tensor], None]:
    def count(x: Tensor) -> None:
        try:
            histogram.add(x)
        except ValueError as error:
            raise ValueError(f"{quantizer.name or 'activation quantizer'}: {error}") from None

    return count


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Compute the running statistics of batch normalisation anew, as plain means over batches.

    Quantization moves the statistics that were collected in float or in the course of a training.
    Of a prepared model those at the selected bits are computed, the others are kept. In a run of
    several processes all get the statistics of process 0.

    Args:
        model: Runs the batches in training mode; its modules are put back into the modes they were
            in, and nothing but the statistics changes. Where the model is in training mode, a batch
            normalisation that is in evaluation mode keeps its statistics.
        batches: Some batches; their targets do not matter.

    Raises:
        ValueError: There are no batches.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("there are no batches to estimate batch normalisation from")
    device = device_of(model)
    momenta = [norm.momentum for norm in norms]
    with modes_kept(model):
        _start_training(model)
        for norm in norms:
            if norm.training:
                _reset(norm)
                norm.momentum = None  # a plain mean over the batches since the reset
        try:
            for batch in itertools.chain([first], rest):
                x, _ = moved(batch, device)
                call(model, x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    broadcast_state(model, buffers_only=True)


def _start_training(model: nn.Module) -> None:
    """Training mode, but what is in evaluation mode within a model that trains stays frozen."""
    if not model.training:
        model.train()


def _reset(norm: _BatchNorm) -> None:
    """Forget the statistics, of a switchable one those of the selected row."""
    if not isinstance(norm, SwitchableBatchNorm):
        norm.reset_running_stats()
        return
    row = norm.row(norm._row)
    for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        value = row[name]
        assert value is not None
        value.fill_(start)
