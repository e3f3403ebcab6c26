"""What a few batches tell without training: where scales begin, how statistics moved."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from .distributed import broadcast_state
from .evaluation import Batches
from .prepare import quantized_layers, select_bits
from .training import device_of


@torch.no_grad()
def calibrate(model: nn.Module, batches: Batches) -> None:
    """Make a quantized model usable without training, for a first look.

    Activation scales take their start values (LSQ's) from the first batch, at all bit-widths. Where
    every layer has one bit-width, batch normalisation is estimated anew from all batches.

    Args:
        model: What :func:`limpq_ext.prepare` or :func:`limpq_ext.apply_policy` returned; it is put
            back into the mode it was in.
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
    training = model.training
    model.train()
    x = first[0].to(device_of(model))
    candidates = {layer.weight_quantizer.bits for layer in layers.values()}
    several = any(len(bits) > 1 for bits in candidates)
    if several:
        for bits in sorted({b for choice in candidates for b in choice}):
            select_bits(model, bits)
            model(x)
    else:
        model(x)
    model.train(training)
    if not several:
        reestimate_batch_norm(model, itertools.chain([first], rest))


def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Compute the running statistics of batch normalisation anew, as plain means over batches.

    Quantization moves the statistics that were collected in float or in the course of a training.
    In a run of several processes all get the statistics of process 0.

    Args:
        model: Runs the batches in training mode; it is put back into the mode it was in, and
            nothing but the statistics changes.
        batches: Some batches; their targets do not matter.

    Raises:
        ValueError: There are no batches.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("there are no batches to estimate batch normalisation from")
    update_bn(itertools.chain([first], rest), model, device_of(model))
    broadcast_state(model, buffers_only=True)
