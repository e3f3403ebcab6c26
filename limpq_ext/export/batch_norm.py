"""Batch normalisation folded into the scales of weights, whose codes stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from limpq_ext.export.codes import LayerCodes
from limpq_ext.export.onnx_graph import WEIGHT, constant, node_layer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

_MOST: Final = 2.0**30
"""Of a bias in the unit of the products of codes, which engines hold in 32 bits."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Folded:
    """What a layer's outputs are multiplied by, one factor for each channel."""

    factors: Array
    axis: int


def fold_batch_norms(graph: ir.Graph, layers: Mapping[str, LayerCodes]) -> dict[ir.Node, Folded]:
    """Take the normalisations out of a graph that follow a quantized layer and nothing else does.

    The bias that the layer then has is put in, in float32. A normalisation stays where the scales
    could not hold it: after a transposed convolution in groups, whose scales are shared by the
    groups, or with so small a factor that the bias would be beyond what engines add in.

    Args:
        graph: Of `onnx_graph`; its normalisations are taken out.
        layers: Of `layer_codes`.

    Returns:
        What the scales of weights are to be multiplied by, by the node of the weights.
    """
    found: dict[ir.Node, Folded] = {}
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        x = norm.inputs[0]
        layer = None if x is None else x.producer()
        if layer is None or x is None or len(x.uses()) > 1 or x.is_graph_output():
            continue
        axis = _channel_axis(layer)
        weights = None if axis is None or layer.inputs[1] is None else layer.inputs[1].producer()
        name = node_layer(weights, WEIGHT)
        if axis is None or weights is None or name is None or len(weights.outputs[0].uses()) > 1:
            continue
        gamma, beta, mean, variance = (_array(value) for value in norm.inputs[1:])
        factors = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        own = _array(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] else 0.0
        bias = beta + (own - mean) * factors
        if not _fits(bias, factors, layers[name]):
            continue
        found[weights] = Folded(factors, axis)
        stored = constant(graph, _free(graph, f"{name}.bias"), bias.astype(np.float32))
        layer.resize_inputs(3)
        layer.replace_input_with(2, stored)
        norm.outputs[0].replace_all_uses_with(layer.outputs[0], replace_graph_outputs=True)
        graph.remove(norm, safe=True)
    return found


def _channel_axis(layer: ir.Node) -> int | None:
    """The axis of the output channels in a layer's weights, if they have one of their own."""
    if layer.domain:
        return None
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        grouped = "group" in layer.attributes and layer.attributes["group"].as_int() != 1
        return None if grouped else 1
    if layer.op_type == "Gemm":
        turned = "transB" in layer.attributes and layer.attributes["transB"].as_int() == 1
        return 0 if turned else None
    return None


def _fits(bias: Array, factors: Array, layer: LayerCodes) -> bool:
    """Whether biases are no more than engines add to the products of codes."""
    scale = layer.weight_range.scale.double().numpy() * np.abs(factors)
    unit = scale * float(layer.input_range.scale)
    return bool(np.all((np.abs(bias) <= _MOST * unit) & np.isfinite(bias)))


def _array(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _free(graph: ir.Graph, name: str) -> str:
    """A name that no initializer has; a layer that runs twice has two biases."""
    number = 1
    free = f"{name}_folded"
    while free in graph.initializers:
        number += 1
        free = f"{name}_folded_{number}"
    return free
