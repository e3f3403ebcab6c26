"""A quantized network as an ONNX graph in which its quantizers are still to be written.

PyTorch's own exporter makes the graph. In the place of each quantizer it puts a node of a domain of
ours, which a format then replaces by nodes of its own: none of them is ever in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from limpq_ext.export.tracing import (
    exporting,
    first_axis,
    one_sample,
    two_samples,
    with_quantizers,
)
from limpq_ext.nn.inputs import Inputs
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

OPSET: Final = 21
"""The first version of the standard operators that has 4-bit integers, and one that engines run."""

DOMAIN: Final = "limpq"
INPUT, WEIGHT = "Input", "Weight"

_MOST_BYTES: Final = 2**31 - 2**24
"""Of all constants in a file, which has some bytes of other things as well."""


class _Marker(nn.Module):
    """Stands where a quantizer does, and becomes a node that says of which layer."""

    def __init__(self, kind: str, layer: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer

    def forward(self, x: Tensor) -> Tensor:
        of: dict[str, Any] = {"layer": self.layer}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}", (x,), of, dtype=x.dtype, shape=x.shape
        )


def onnx_graph(
    model: nn.Module,
    example_input: Inputs,
    *,
    opset: int = OPSET,
    free_batch: bool = True,
    quantized: bool = True,
) -> ir.Model:
    """The graph of a quantized network; its quantizers are nodes ``limpq::Input`` and ``::Weight``.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        example_input: What the model's forward takes; its first axis is the batch.
        opset: The version of the standard operators; PyTorch writes none below 18.
        free_batch: The batch has any size; else it is one sample.
        quantized: Whether it has quantizers at all; else it is the graph of a float network.

    Raises:
        ValueError: PyTorch cannot export the network: its first reason; or the example holds no
            tensor.
        ImportError: onnxscript is not installed.
    """
    require("onnxscript", "export")
    marked = [partial(_Marker, kind) if quantized else _none for kind in (INPUT, WEIGHT)]
    network = with_quantizers(model, *marked)
    given = two_samples(example_input) if free_batch else one_sample(example_input)
    size = torch.export.Dim.DYNAMIC
    with exporting(model):
        program = torch.onnx.export(
            network,
            given[0],
            kwargs=given[1],
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=first_axis(network, given, size) if free_batch else None,
            verbose=False,
        )
    assert program is not None
    made: ir.Model = program.model
    made.graph.name = type(model).__name__
    made.producer_name = "limpq_ext"
    made.producer_version = None
    if free_batch:
        _name_batch(made.graph)
    return made


def quantizers(graph: ir.Graph) -> Iterator[tuple[ir.Node, str, str, str]]:
    """The nodes that stand for quantizers, which may be replaced meanwhile.

    Yields:
        The node, its kind, the layer, and what names of this run of the layer end in: nothing of
        its first, ".2" of its second.
    """
    runs: Counter[tuple[str, str]] = Counter()
    for node in list(graph):
        for kind in (INPUT, WEIGHT):
            if (layer := node_layer(node, kind)) is not None:
                runs[layer, kind] += 1
                number = runs[layer, kind]
                yield node, kind, layer, "" if number == 1 else f".{number}"


def node_layer(node: ir.Node | None, kind: str) -> str | None:
    """The layer whose quantizer a node stands for; None where it is another node."""
    if node is None or (node.domain, node.op_type) != (DOMAIN, kind):
        return None
    return node.attributes["layer"].as_string()


def constant(
    graph: ir.Graph, name: str, value: np.ndarray[Any, Any] | ir.TensorProtocol
) -> ir.Value:
    """An initializer of the graph: the one of that name, made where there is none."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor: Any = ir.tensor(value, name=name)
        made = ir.Value(
            name=name,
            shape=ir.Shape(list(tensor.shape)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(made)
    return graph.initializers[name]


def only_reader(node: ir.Node) -> ir.Node | None:
    """The node that is all that reads what a node puts out; None where there are more, or none."""
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 else None


def transposition(node: ir.Node) -> ir.Node | None:
    """The transposition that is all that reads weights: they may be stored as it leaves them."""
    reader = only_reader(node)
    if reader is None or reader.op_type != "Transpose":
        return None
    return reader if reader.attributes["perm"].as_ints() == [1, 0] else None


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: dict[str, Any] | None = None,
    domain: str = "",
) -> ir.Node:
    """A node of one output that is in no graph yet."""
    import onnx_ir as ir

    return ir.node(op_type, inputs, attributes, name=name, domain=domain)


def replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in the place of one; the last of them puts out what it did."""
    graph.insert_before(node, made)
    new, old = made[-1].outputs[0], node.outputs[0]
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def finish(model: ir.Model) -> None:
    """Leave nothing in a graph that is not used, nor anything of how it was made."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in graph.outputs:
            del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def serialized(model: ir.Model) -> bytes:
    """The bytes of an ONNX file.

    Raises:
        ValueError: It would have more than the 2 GB that such a file can have.
    """
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    constants = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in constants if tensor is not None)
    if size > _MOST_BYTES:
        raise ValueError(f"the ONNX file would have {size / 1e9:.1f} GB, and can have 2")
    written: bytes = proto.SerializeToString(deterministic=True)
    return written


def _none(_: str) -> nn.Module:
    """No quantizer."""
    return nn.Identity()


def _name_batch(graph: ir.Graph) -> None:
    """Call the first axis of the inputs "batch" wherever it comes."""
    symbols = {
        str(value.shape[0]) for value in graph.inputs if value.shape is not None and value.shape
    }
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is not None and not value.shape.frozen:
            for axis, size in enumerate(value.shape):
                if str(size) in symbols:
                    value.shape[axis] = "batch"
