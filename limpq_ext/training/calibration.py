"""What a few batches tell without training: where scales begin, how statistics moved."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.network import quantized_layers, select_bits
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.batches import Batches
from limpq_ext.training.distributed import broadcast_state
from limpq_ext.training.model_state import buffers_kept, device_of, modes_kept


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches) -> None:
    """Make a quantized model usable without training, for a first look.

    Activation scales take their start values (LSQ's) from the first batch, at all bit-widths. Where
    every layer has one bit-width, batch normalisation is estimated anew from all batches; else it
    stays as it is.

    Args:
        model: What :func:`limpq_ext.prepare` or :func:`limpq_ext.apply_policy` returned; its
            modules are put back into the modes, and its layers to the bits, that they had.
        batches: Some training batches, on any device; their targets do not matter.

    Raises:
        ValueError: The model has no quantized layers, or there are no batches.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers to calibrate")
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("there are no batches to calibrate with")
    x, _ = moved(first, device_of(model))
    candidates = {layer.weight_quantizer.bits for layer in layers.values()}
    several = any(len(bits) > 1 for bits in candidates)
    with modes_kept(model), buffers_kept(model):
        _start_training(model)
        for module in model.modules():
            if isinstance(module, LsqQuantizer):
                module.train()
        if several:
            selected = {
                name: (layer.weight_bits, layer.activation_bits) for name, layer in layers.items()
            }
            try:
                for bits in sorted({b for choice in candidates for b in choice}):
                    select_bits(model, bits)
                    call(model, x)
            finally:
                select_bits(model, selected)
        else:
            call(model, x)
    if not several:
        reestimate_batch_norm(model, itertools.chain([first], rest))


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
