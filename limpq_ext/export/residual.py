"""What enters additions, quantized as well, so that engines stay in integers from end to end.

A layer whose output is added to another stays in float in engines that fuse a layer with the
quantization after it. Eight bits between the two are not what was trained; they are calibrated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from torch import nn

from limpq_ext.export.engines import OnnxRuntime
from limpq_ext.export.onnx_graph import constant, serialized
from limpq_ext.export.tracing import input_arrays
from limpq_ext.training.batches import Batches

if TYPE_CHECKING:
    import onnx_ir as ir

RESIDUAL_CODES: Final = "residual_codes"
"""What the codes of an addition's operand are called, after the name of the operand."""


def quantize_additions(model: ir.Model, network: nn.Module, batches: Batches) -> int:
    """Quantize both operands of the additions in a graph to 8 bits, from the least to the largest.

    Args:
        model: Of `qcdq_model`; it is changed.
        network: What it was made of, whose inputs the batches are.
        batches: What the ranges are of; targets do not matter.

    Returns:
        How many operands there are.
    """
    import onnx_ir as ir

    graph = model.graph
    additions = [node for node in graph if node.op_type == "Add" and all(map(_varies, node.inputs))]
    operands = {str(v.name): v for node in additions for v in node.inputs if v is not None}
    ranges = _ranges(model, list(operands), network, batches)
    for name, value in operands.items():
        low, high = ranges[name]
        scale = np.float32((high - low) / 255 or 1.0)
        zero = np.uint8(round(-low / scale))
        parts = [
            value,
            constant(graph, f"{name}.residual_scale", np.array(scale)),
            constant(graph, f"{name}.residual_zero_point", np.array(zero)),
        ]
        quantize = ir.node("QuantizeLinear", parts, name=f"{name}.quantize_residual")
        codes = quantize.outputs[0]
        codes.name = f"{name}.{RESIDUAL_CODES}"
        codes.type = ir.TensorType(ir.DataType.UINT8)
        codes.shape = value.shape
        dequantize = ir.node(
            "DequantizeLinear", [codes, *parts[1:]], name=f"{name}.dequantize_residual"
        )
        for node in additions:
            for place, operand in enumerate(node.inputs):
                if operand is value:
                    node.replace_input_with(place, dequantize.outputs[0])
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, [quantize, dequantize])
    return len(operands)


def _varies(value: ir.Value | None) -> bool:
    """Whether a value is a float tensor that a node computes from the input."""
    import onnx_ir as ir

    if value is None or value.dtype != ir.DataType.FLOAT:
        return False
    return value.producer() is not None


def _ranges(
    model: ir.Model, names: list[str], network: nn.Module, batches: Batches
) -> dict[str, tuple[float, float]]:
    """The least and the largest of values in the batches, 0 among them."""
    observed = model.clone()
    values = {str(value.name): value for node in observed.graph for value in node.outputs}
    observed.graph.outputs.extend(
        values[name] for name in names if not values[name].is_graph_output()
    )
    engine = OnnxRuntime(serialized(observed), optimized=False)
    found: dict[str, tuple[float, float]] = dict.fromkeys(names, (0.0, 0.0))
    for inputs, _ in batches:
        outputs = engine.run(dict(zip(engine.inputs, input_arrays(network, inputs), strict=True)))
        for name in names:
            low, high = found[name]
            ends = float(outputs[name].min()), float(outputs[name].max())
            found[name] = min(low, ends[0]), max(high, ends[1])
    return found
