"""Quantized networks as programs of torch.export, and compiled by AOTInductor.

What comes into a layer is quantized to 8-bit integers from 0 to 255, cut to the range of its bits
and dequantized; weights are 8-bit integers that are dequantized. The operators are PyTorch's own,
``quantized_decomposed``, which its backends know, so that a file needs PyTorch alone.

* The cut comes after the quantization, as a minimum and a maximum of integers: a backend that puts
  an integer kernel in the place of a layer keeps no other range than that of 8 bits.
* PyTorch's quantization multiplies by the inverse of a scale, which moves ties: about one code in
  10^6 would be another than the network's. It is given the quotient, and a scale of 1.
* Weights have a scale for each channel, also where all are equal: Inductor has integer kernels for
  no others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

# Registers the operators.
from torch.ao.quantization.fx import _decomposed  # noqa: F401

from limpq_ext.export.codes import ZERO, LayerCodes, check_widths, layer_codes
from limpq_ext.export.tracing import exporting, first_axis, two_samples, with_quantizers
from limpq_ext.nn.inputs import Inputs
from limpq_ext.nn.network import quantized_layers

_FULL: Final = (0, 255, torch.uint8)
"""The range that inputs are stored in, and its type."""


class _Input(nn.Module):
    """Quantizes and dequantizes what comes into a layer."""

    low: Tensor
    high: Tensor

    def __init__(self, layer: LayerCodes) -> None:
        super().__init__()
        grid = layer.input_range
        self.scale = float(grid.scale.float())
        self.zero = ZERO if grid.signed else 0
        ends = (grid.quant_min + self.zero, grid.quant_max + self.zero)
        self.cut = ends != _FULL[:2]
        if self.cut:
            self.register_buffer("low", torch.tensor(ends[0], dtype=torch.uint8))
            self.register_buffer("high", torch.tensor(ends[1], dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        of = torch.ops.quantized_decomposed
        codes: Any = of.quantize_per_tensor(x / self.scale, 1.0, self.zero, *_FULL)
        if self.cut:
            codes = torch.minimum(torch.maximum(codes, self.low), self.high)
        found: Tensor = of.dequantize_per_tensor(codes, self.scale, self.zero, *_FULL)
        return found


class _Weights(nn.Module):
    """Holds the codes of a layer's weights and dequantizes them."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, layer: LayerCodes) -> None:
        super().__init__()
        grid = layer.weight_range
        self.axis = 0 if grid.axis is None else grid.axis
        self.range = (grid.quant_min, grid.quant_max, torch.int8)
        channels = layer.weights.shape[self.axis]
        self.register_buffer("codes", layer.weights)
        self.register_buffer("scales", grid.scale.float().expand(channels).clone())
        self.register_buffer("zero_points", torch.zeros(channels, dtype=torch.int64))

    def forward(self, weight: Tensor) -> Tensor:
        found: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel(
            self.codes, self.scales, self.zero_points, self.axis, *self.range
        )
        return found


def exported_program(model: nn.Module, example_input: Inputs) -> torch.export.ExportedProgram:
    """A quantized network as a program of PyTorch's own operators.

    ``torch.export.save`` writes it to a .pt2 file; before ``torch.export.load`` reads one, the
    module of PyTorch that has its operators, ``torch.ao.quantization.fx._decomposed``, is imported.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        example_input: What the model's forward takes; its first axis becomes the batch, of any
            size.

    Raises:
        ValueError: A layer has more than 8 bits, or as in `layer_codes`; PyTorch cannot export the
            network: its first reason.
    """
    layers = layer_codes(model)
    check_widths(layers, 8, "torch.export")
    network = with_quantizers(
        model, lambda name: _Input(layers[name]), lambda name: _Weights(layers[name])
    )
    for layer in quantized_layers(network).values():
        # Else the program holds the float weights too.
        if (weight := layer._parameters.pop("weight", None)) is not None:
            layer.__dict__["weight"] = weight.detach()
    args, kwargs = given = two_samples(example_input)
    shapes = first_axis(network, given, torch.export.Dim("batch", min=1))
    with exporting(model):
        return torch.export.export(network, args, kwargs, dynamic_shapes=shapes)


def aot_package(program: torch.export.ExportedProgram, path: str | Path) -> Path:
    """Compile a program with AOTInductor, into a package for processors like this one.

    Args:
        program: Of `exported_program`.
        path: The package's file, with ".pt2" at its end;
            ``torch._inductor.aoti_load_package`` loads it.

    Returns:
        Where the package is.

    Raises:
        ValueError: The path ends in something else.
        torch._inductor.exc.InductorError: There is no C++ compiler.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"AOTInductor's packages end in .pt2, got {Path(path).name}")
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))
