"""The step sizes of a network, and of a checkpoint of its joint training: what indicators are."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from limpq_ext.nn.layers import QuantizedLayer
from limpq_ext.nn.quantizers import mean_step_sizes
from limpq_ext.training.checkpoint import FORMAT, read_sealed
from limpq_ext.values.indicators import KINDS, Kind, StepSizes
from limpq_ext.values.reading import FileFormatError, reading, shown


def step_sizes(model: nn.Module) -> Iterator[StepSizes]:
    """The step sizes of all quantized layers as they stand now, in the order of their names.

    Raises:
        ValueError: If a step size has no start value yet.
    """
    quantizers = {
        name: (module.weight_quantizer, module.input_quantizer)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
    }
    _check_started(
        (name, kind, quantizer.bits, quantizer.initialized.tolist())
        for name, pair in quantizers.items()
        for kind, quantizer in zip(KINDS, pair, strict=True)
    )
    for name, (weight, activation) in quantizers.items():
        yield name, weight.values(), activation.values()


def read_step_sizes(path: str | os.PathLike[str]) -> Iterator[StepSizes]:
    """The step sizes of all layers in a checkpoint of a joint training.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it holds no joint training, or is damaged.
        ValueError: If a step size has no start value yet.
    """
    content, sealed = read_sealed(path, "checkpoint")
    with reading(path):
        state = _joint_state(content)
    if state is None:
        raise FileFormatError(f"{os.fspath(path)}: holds no state of a joint training")
    if content.get("format") == FORMAT and not sealed:
        raise FileFormatError(f"{os.fspath(path)}: damaged: its checksum is missing")
    return _step_sizes_of_state(state)


def _step_sizes_of_state(state: Mapping[str, Any]) -> Iterator[StepSizes]:
    """The step sizes in the state of a JointTrainer.

    Raises:
        FileFormatError: Something in it is of another kind.
    """
    bits, model = state["bits"], state["model"]
    if not isinstance(bits, list) or not all(type(b) is int for b in bits):
        raise FileFormatError(f"bits: {shown(bits)} are no bit-widths")
    if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
        raise FileFormatError("model: is no state of a network")
    bounds = state.get("scale_bounds", {})
    ending = ".weight_quantizer.scale"
    for name in (key.removesuffix(ending) for key in model if key.endswith(ending)):
        quantizers = [f"{name}.weight_quantizer", f"{name}.input_quantizer"]
        _check_started(
            (name, kind, bits, _started(model, f"{quantizer}.initialized", bits))
            for kind, quantizer in zip(KINDS, quantizers, strict=True)
        )
        weight, activation = (
            _by_bits(model, f"{quantizer}.scale", bits, _bounds(bounds, quantizer))
            for quantizer in quantizers
        )
        yield name, weight, activation


def _started(model: Mapping[str, Any], key: str, bits: Sequence[int]) -> list[bool]:
    """Which step sizes of a quantizer have their start value."""
    initialized = model.get(key)
    if not isinstance(initialized, torch.Tensor) or initialized.shape != (len(bits),):
        raise FileFormatError(f"{key}: is missing, or does not say which step sizes have begun")
    return [bool(value) for value in initialized.tolist()]


def _bounds(bounds: Any, quantizer: str) -> tuple[float, float] | tuple[()]:
    """The least and the largest step size of a quantizer; () where a checkpoint does not say."""
    found = bounds.get(quantizer, ()) if isinstance(bounds, dict) else None
    if found == ():
        return ()
    if not isinstance(found, list) or [type(value) for value in found] != [float, float]:
        raise FileFormatError(f"scale_bounds: {shown(quantizer)} has no two bounds")
    return found[0], found[1]


def _by_bits(
    model: Mapping[str, Any],
    key: str,
    bits: Sequence[int],
    bounds: tuple[float, float] | tuple[()],
) -> dict[int, float]:
    """The step sizes of one quantizer, a mean where it has several."""
    scale = model.get(key)
    if not isinstance(scale, torch.Tensor) or not scale.is_floating_point():
        raise FileFormatError(f"{key}: is missing, or no tensor of step sizes")
    if scale.dim() == 0 or len(scale) != len(bits) or scale.numel() == 0:
        raise FileFormatError(f"{key}: has shape {tuple(scale.shape)}, not one for each of {bits}")
    return dict(zip(bits, mean_step_sizes(scale, *bounds).tolist(), strict=True))


def _joint_state(content: Any) -> dict[str, Any] | None:
    """The first state of a JointTrainer in containers of states."""
    if not isinstance(content, dict):
        return None
    if {"bits", "model", "seed"} <= content.keys():
        return content
    return next(filter(None, map(_joint_state, content.values())), None)


def _check_started(
    found: Iterable[tuple[str, Kind, Sequence[int], Sequence[bool]]],
) -> None:
    """Make sure that step sizes are learned ones, or at least start values.

    Args:
        found: Layer, kind, candidate bits, and for each of them whether it has its start value.

    Raises:
        ValueError: One has none; the message names all such layers.
    """
    lacking = [
        f"layer {name!r} ({kind}s at {', '.join(str(b) for b in absent)} bits)"
        for name, kind, bits, started in found
        if (absent := [b for b, has in zip(bits, started, strict=True) if not has])
    ]
    if lacking:
        raise ValueError(
            f"step sizes without a start value: {', '.join(lacking)}; no training batch has gone"
            " through them yet: train the model with JointTrainer, or calibrate it"
        )
