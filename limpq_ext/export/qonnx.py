"""Quantized networks in QONNX, which FINN and hls4ml read.

A quantizer is one node, Quant, that rounds to ``scale * q`` in float, as the network's own does and
in the same order: divide, clip, round to even, multiply. It stands before every layer and after
every weight; weights are initializers of whole multiples of their scale, which it leaves as they
are. Normalisations are not folded: both compilers turn them into thresholds or scales themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import nn

from limpq_ext.export.codes import LayerCodes, Range, layer_codes
from limpq_ext.export.onnx_graph import (
    INPUT,
    constant,
    finish,
    new_node,
    onnx_graph,
    quantizers,
    replace,
    transposition,
)
from limpq_ext.nn.inputs import Inputs

if TYPE_CHECKING:
    import onnx_ir as ir

QONNX_DOMAIN: Final = "qonnx.custom_op.general"
"""Of the operators that are QONNX's own."""

_OPSET: Final = 18
"""The lowest that PyTorch writes: compilers know older operators better."""

_OPSET_OF_WRAP: Final = 19
"""The first whose Pad goes round, as circular padding does; else what is used here is equal."""


def qonnx_model(model: nn.Module, example_input: Inputs) -> ir.Model:
    """A quantized network as a QONNX model for one sample.

    Its compilers want sizes that are fixed; ``qonnx-cleanup --override-inpsize`` changes them.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        example_input: What the model's forward takes; of its first axis, the batch, the first.

    Returns:
        The model, of 2 to 16 bits. Input quantizers are nodes "LAYER.input", those of weights
        "LAYER.weight", with ".2" behind them in the layer's second run.

    Raises:
        ValueError: As in `layer_codes` and `onnx_graph`.
        ImportError: onnxscript is not installed.
    """
    layers = layer_codes(model)
    made = onnx_graph(model, example_input, opset=_OPSET, free_batch=False)
    graph = made.graph
    for node, kind, name, run in quantizers(graph):
        if kind == INPUT:
            x, grid = node.inputs[0], layers[name].input_range
            replace(graph, node, [_quant(graph, x, grid, grid.scale.numpy(), f"{name}.input", run)])
        else:
            _write_weights(graph, node, layers[name], run)
    if any(node.op_type == "Pad" and _mode(node) == "wrap" for node in graph):
        made.opset_imports[""] = _OPSET_OF_WRAP
    made.opset_imports[QONNX_DOMAIN] = 1
    finish(made)
    return made


def _write_weights(graph: ir.Graph, node: ir.Node, layer: LayerCodes, run: str) -> None:
    grid, weights = layer.weight_range, layer.dequantized()
    scale = grid.along(weights).numpy()
    stored, stored_as = weights.numpy(), f"{layer.name}.weight"
    turned = transposition(node)
    if turned is not None:
        stored, scale = stored.T, scale.T
        stored_as += "_transposed"
    # Values of the graph's own weight have its name, which may be the same.
    values = constant(graph, f"{stored_as}_values", stored.astype(np.float32))
    quant = _quant(graph, values, grid, scale, stored_as, run)
    replace(graph, turned or node, [quant])
    if turned is not None:
        graph.remove(node, safe=True)


def _quant(
    graph: ir.Graph,
    x: ir.Value | None,
    grid: Range,
    scale: np.ndarray[Any, Any],
    name: str,
    run: str,
) -> ir.Node:
    inputs = [
        x,
        constant(graph, f"{name}_scale", scale.astype(np.float32)),
        constant(graph, f"{name}_zero_point", np.array(0, np.float32)),
        constant(graph, f"{name}_bits", np.array(grid.bits, np.float32)),
    ]
    attributes = {
        "signed": int(grid.signed),
        "narrow": int(grid.signed and grid.quant_min == -grid.quant_max),
        "rounding_mode": "ROUND",
    }
    return new_node("Quant", inputs, f"{name}{run}", attributes, QONNX_DOMAIN)


def _mode(node: ir.Node) -> str:
    return node.attributes["mode"].as_string() if "mode" in node.attributes else ""
