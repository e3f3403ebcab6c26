"""Where a model is, and what of its state is put back after a block: modes, buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from limpq_ext.nn.quantizers import LsqQuantizer


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Put every module back into the mode it was in, training or evaluation, after the block."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back, but for those of quantizers, which keep the start that they made."""
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, LsqQuantizer)
        for buffer in module.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
