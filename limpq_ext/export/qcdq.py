"""Quantized networks in ONNX's standard operators, which every engine reads.

What comes into a layer is quantized to 8-bit integers, cut to the range of its bits and dequantized
(QuantizeLinear, Clip, DequantizeLinear); weights are integers that are dequantized. Brevitas and
QONNX call it QCDQ. Engines put an integer kernel in the place of a layer between the two where they
have one, on which the form of the nodes depends:

* a clip comes after the quantization, in integers: in float, before it, the layer stays in float;
* 4-bit weights are widened to 8 bits before they are dequantized, for the same reason;
* what is signed has codes from 0 to 255 around 128: on x86 signed codes are not fused;
* zero points are always given, and constants are initializers;
* a ReLU6 that quantizers alone read is in their range: what is above 6 gets the code of 6.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import nn

from limpq_ext.export.batch_norm import Folded, fold_batch_norms
from limpq_ext.export.codes import ZERO, LayerCodes, check_widths, layer_codes
from limpq_ext.export.onnx_graph import (
    INPUT,
    constant,
    finish,
    new_node,
    node_layer,
    only_reader,
    onnx_graph,
    quantizers,
    replace,
    transposition,
)
from limpq_ext.export.residual import RESIDUAL_CODES
from limpq_ext.nn.inputs import Inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

CODES: Final = "input_codes"
"""What the codes of a layer's input are called, after its name."""

_SMALL: Final = 4
"""Bits that fit into ONNX's 4-bit integers."""

_PRODUCTS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES: Final = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


def qcdq_model(model: nn.Module, example_input: Inputs, *, shift: bool = True) -> ir.Model:
    """A quantized network as an ONNX model of standard operators.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        example_input: What the model's forward takes; its first axis becomes the batch.
        shift: Multiply codes of weights by a power of two and divide their scales by it, which is
            exact: an engine that rounds biases to the product of both scales rounds them less.

    Raises:
        ValueError: A layer has more than 8 bits, or as in `layer_codes` and `onnx_graph`.
        ImportError: onnxscript is not installed.
    """
    layers = layer_codes(model)
    check_widths(layers, 8, "ONNX")
    made = onnx_graph(model, example_input)
    write_codes(made, layers, shift=shift)
    return made


def write_codes(made: ir.Model, layers: Mapping[str, LayerCodes], *, shift: bool = True) -> None:
    """Write the quantizers of a graph, and name what multiplies by their weights after the layers.

    Args:
        made: Of `onnx_graph`; it becomes that of `qcdq_model`.
        layers: Its layers in integers, at most 8 bits.
        shift: As in `qcdq_model`.
    """
    graph = made.graph
    folded = fold_batch_norms(graph, layers)
    weights: dict[ir.Node, str] = {}
    most = _drop_clips(graph, layers)
    for node, kind, name, run in quantizers(graph):
        if kind == INPUT:
            _write_input(graph, node, layers[name], run, most.get(node))
        else:
            written = _write_weights(graph, node, layers[name], run, folded.get(node), shift)
            weights[written] = name
    _name_products(graph, weights)
    finish(made)


def codes_in(graph: ir.Graph) -> dict[str, ir.Value]:
    """The codes of what comes into layers, by "LAYER.input_codes", ".2" being of its second run.

    And those of what enters additions, where that is quantized.
    """
    values = {str(value.name): value for node in graph for value in node.outputs}
    kinds = (f".{CODES}", f".{RESIDUAL_CODES}")
    return {name: value for name, value in values.items() if any(kind in name for kind in kinds)}


def forget_types(graph: ir.Graph) -> None:
    """Leave out of a file the shapes and types that engines find out for themselves."""
    known = codes_in(graph)
    for node in graph:
        for value in node.outputs:
            if value.name not in known and not value.is_graph_output():
                value.shape = value.type = None


def _drop_clips(graph: ir.Graph, layers: Mapping[str, LayerCodes]) -> dict[ir.Node, float]:
    """Take out of a graph what cuts to 0 and a highest value, where unsigned quantizers read it.

    Rounding keeps the order of values, so that the code of the highest one can do the same.

    Returns:
        That value, by the nodes of the inputs.
    """
    found: dict[ir.Node, float] = {}
    for clip in [node for node in graph if node.op_type == "Clip" and not node.domain]:
        ends = [_number(value) for value in clip.inputs[1:3]]
        readers = [use.node for use in clip.outputs[0].uses()]
        names = [node_layer(reader, INPUT) for reader in readers]
        unsigned = [name is not None and not layers[name].input_range.signed for name in names]
        if len(ends) < 2 or ends[0] != 0 or ends[1] is None or clip.outputs[0].is_graph_output():
            continue
        if clip.inputs[0] is not None and readers and all(unsigned):
            clip.outputs[0].replace_all_uses_with(clip.inputs[0])
            graph.remove(clip, safe=True)
            found |= dict.fromkeys(readers, ends[1])
    return found


def _number(value: ir.Value | None) -> float | None:
    """The constant that a value is; None where it is none."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy()) if tensor is not None and tensor.size == 1 else None


def _write_input(
    graph: ir.Graph, node: ir.Node, layer: LayerCodes, run: str, most: float | None
) -> None:
    import onnx_ir as ir

    grid, name = layer.input_range, layer.name
    zero = ZERO if grid.signed else 0
    scale = constant(graph, f"{name}.input_scale", grid.scale.float().numpy())
    zero_point = constant(graph, f"{name}.input_zero_point", np.array(zero, np.uint8))
    made = [
        new_node("QuantizeLinear", [node.inputs[0], scale, zero_point], f"{name}.quantize{run}")
    ]
    highest = grid.quant_max
    if most is not None:
        scale_of = grid.scale.float().numpy()
        highest = min(highest, int(np.rint(np.float32(most) / scale_of)))
    ends = {"min": grid.quant_min + zero, "max": highest + zero}
    if tuple(ends.values()) != (0, 255):
        values = [
            constant(graph, f"{name}.input_{which}_{end}", np.array(end, np.uint8))
            for which, end in ends.items()
        ]
        made.append(new_node("Clip", [made[0].outputs[0], *values], f"{name}.clip{run}"))
    codes = made[-1].outputs[0]
    codes.name = f"{name}.{CODES}{run}"
    codes.shape, codes.type = node.outputs[0].shape, ir.TensorType(ir.DataType.UINT8)
    made.append(new_node("DequantizeLinear", [codes, scale, zero_point], f"{name}.dequantize{run}"))
    replace(graph, node, made)


def _write_weights(
    graph: ir.Graph,
    node: ir.Node,
    layer: LayerCodes,
    run: str,
    folded: Folded | None,
    shift: bool,
) -> ir.Node:
    grid, name = layer.weight_range, layer.name
    codes, scale, axis = layer.weights.numpy(), grid.scale.double().numpy(), grid.axis
    if folded is not None:
        scale, axis = scale * folded.factors, folded.axis
    turned = transposition(node)
    stored_as = f"{name}.weight_codes"
    if turned is not None:
        codes, axis = codes.T, None if axis is None else 1 - axis
        stored_as += "_transposed"
    factor = _factor(layer) if shift else 1
    if grid.bits <= _SMALL:
        made, stored = _small_codes(graph, stored_as, codes, factor, f"{name}.weight{run}")
    else:
        made, stored = [], constant(graph, stored_as, codes * np.int8(factor))
    scales = (scale / factor).astype(np.float32)
    of_run = run if folded is not None else ""
    values = [
        stored,
        constant(graph, f"{name}.weight_scale{of_run}", scales),
        constant(graph, f"{name}.weight_zero_point{of_run}", np.zeros(scales.shape, np.int8)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    made.append(new_node("DequantizeLinear", values, f"{name}.weight{run}.dequantize", attributes))
    replace(graph, turned or node, made)
    if turned is not None:
        graph.remove(node, safe=True)
    return made[-1]


def _name_products(graph: ir.Graph, weights: Mapping[ir.Node, str]) -> None:
    """Call what multiplies by a layer's weights "LAYER", "LAYER.2" in its second run."""
    runs: Counter[str] = Counter()
    for node in graph:
        if node.domain or node.op_type not in _PRODUCTS:
            continue
        for value in node.inputs:
            source = None if value is None else value.producer()
            while source is not None and source.op_type in _MOVES and source.inputs[0] is not None:
                source = source.inputs[0].producer()
            if source is not None and source in weights:
                name = weights[source]
                runs[name] += 1
                run = "" if runs[name] == 1 else f".{runs[name]}"
                node.name = f"{name}{run}"
                reader = only_reader(node)
                if node.op_type == "MatMul" and reader is not None and reader.op_type == "Add":
                    reader.name = f"{name}.add_bias{run}"


def _factor(layer: LayerCodes) -> int:
    """The power of two that 8-bit codes of weights have room for.

    Some processors add two products in 16 bits: 2 * 127 * 128 and 2 * 255 * 64 are within.
    """
    room = 8 if layer.input_range.bits < 8 else 7
    return 1 << max(0, room - layer.weight_range.bits)


def _small_codes(
    graph: ir.Graph, stored_as: str, codes: np.ndarray[Any, Any], factor: int, name: str
) -> tuple[list[ir.Node], ir.Value]:
    """Codes that are stored in 4 bits, as 8-bit ones times a factor."""
    import ml_dtypes
    import onnx_ir as ir

    stored = constant(graph, stored_as, ir.tensor(codes.astype(ml_dtypes.int4)))
    if factor == 1:
        widened = new_node("Cast", [stored], f"{name}.widen", {"to": ir.DataType.INT8})
        return [widened], widened.outputs[0]
    # Engines have no product of 8-bit integers; of constants they compute this one when they load.
    widened = new_node("Cast", [stored], f"{name}.widen", {"to": ir.DataType.INT32})
    by = constant(graph, f"{stored_as}_factor", np.array(factor, np.int32))
    shifted = new_node("Mul", [widened.outputs[0], by], f"{name}.shift")
    narrow = new_node("Cast", shifted.outputs, f"{name}.narrow", {"to": ir.DataType.INT8})
    return [widened, shifted, narrow], narrow.outputs[0]
