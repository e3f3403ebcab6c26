"""What a quantized layer is in integers: the codes of its weights, and the range of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from limpq_ext.nn.layers import QuantizedLayer
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.values.names import listed

ZERO: Final = 128
"""The code of 0 among 8-bit codes from 0 to 255 where what comes in is signed; else that is 0."""


@dataclass(frozen=True)
class Range:
    """The grid that a quantizer rounds to: ``scale * q`` for whole q from quant_min to quant_max.

    Attributes:
        bits: The bit-width.
        quant_min: The lowest q, 0 or less.
        quant_max: The highest.
        scale: The step size in use: a scalar, or one for each channel. In the type that the kernels
            compute in: float32, float64 where the weights have that.
        axis: The axis of the channels; None: one scale for the tensor.
    """

    bits: int
    quant_min: int
    quant_max: int
    scale: Tensor
    axis: int | None = None

    @property
    def signed(self) -> bool:
        """Whether it has negative values."""
        return self.quant_min < 0

    def along(self, x: Tensor) -> Tensor:
        """The scale in a shape that multiplies a tensor of this grid."""
        if self.axis is None:
            return self.scale
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape)


@dataclass(frozen=True)
class LayerCodes:
    """A quantized layer in integers.

    Attributes:
        name: Of the layer.
        weights: The codes of its weights, in their shape: int8, int16 above 8 bits.
        weight_range: Their grid.
        input_range: That of what comes into the layer.
    """

    name: str
    weights: Tensor
    weight_range: Range
    input_range: Range

    def dequantized(self) -> Tensor:
        """The weights that the layer computes with, in the type of their scale."""
        scale = self.weight_range.along(self.weights)
        return self.weights.to(scale.dtype) * scale


@torch.no_grad()
def layer_codes(model: nn.Module) -> dict[str, LayerCodes]:
    """The quantized layers of a model in integers, at the bits that are selected.

    Args:
        model: What :func:`limpq_ext.apply_policy` returned, calibrated or trained.

    Returns:
        The codes by the names of the layers, on the CPU.

    Raises:
        ValueError: The model has no quantized layers, one has no step sizes yet, or weights or step
            sizes that are NaN or infinite.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layers: give it a policy first")
    return {name: _codes(name, layer) for name, layer in layers.items()}


def check_widths(layers: Mapping[str, LayerCodes], most: int, what: str) -> None:
    """Refuse layers with more bits than a format holds.

    Args:
        layers: Of `layer_codes`.
        most: The largest bit-width of the format.
        what: The format's name.

    Raises:
        ValueError: A layer has more.
    """
    wide = [
        name
        for name, layer in layers.items()
        if max(layer.weight_range.bits, layer.input_range.bits) > most
    ]
    if wide:
        first = layers[wide[0]]
        raise ValueError(
            f"{what} holds at most {most} bits, but W{first.weight_range.bits}"
            f"A{first.input_range.bits} is asked for in {listed(wide)}"
        )


def float_bytes(model: nn.Module) -> int:
    """The size in float32 of a network's parameters and statistics, without its quantizers."""
    quantizers = {
        id(tensor)
        for module in model.modules()
        if isinstance(module, LsqQuantizer)
        for tensor in (*module.parameters(), *module.buffers())
    }
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return 4 * sum(
        tensor.numel()
        for key, tensor in tensors.items()
        if key not in quantizers and tensor.is_floating_point()
    )


def _codes(name: str, layer: QuantizedLayer) -> LayerCodes:
    computing = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    weight_range = _range(f"layer '{name}': weight quantizer", layer.weight_quantizer, computing)
    input_range = _range(f"layer '{name}': input quantizer", layer.input_quantizer, computing)
    weight = layer.quantized_weight().detach().cpu()
    if not weight.isfinite().all():
        raise ValueError(f"layer '{name}' has weights that are NaN or infinite")
    # Whole multiples of the scale, but for their rounding.
    scale = weight_range.along(weight)
    codes = (weight.to(scale.dtype) / scale).round()
    integer = torch.int8 if weight_range.bits <= 8 else torch.int16
    return LayerCodes(name, codes.to(integer), weight_range, input_range)


def _range(where: str, quantizer: LsqQuantizer, computing: torch.dtype) -> Range:
    index = quantizer.bits.index(quantizer.selected_bits)
    if not bool(quantizer.initialized[index]):
        raise ValueError(f"{where} has no step size yet: calibrate or train the network first")
    scale = quantizer.scale.detach()[index].cpu().to(computing)
    scale = scale.clamp(quantizer.scale_min, quantizer.scale_max)
    if not scale.isfinite().all():
        raise ValueError(f"{where} has step sizes that are NaN or infinite")
    low, high = quantizer.thresholds(quantizer.selected_bits)
    return Range(quantizer.selected_bits, low, high, scale, quantizer.channel_axis)
