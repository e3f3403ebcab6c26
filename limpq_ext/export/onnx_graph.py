"""A quantized network as an ONNX graph in which its quantizers are still to be written.

PyTorch's own exporter makes the graph. In the place of each quantizer it puts a node of a domain of
ours, which a format then replaces by nodes of its own: none of them is ever in a file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from limpq_ext.nn.attention import copied
from limpq_ext.nn.inputs import Inputs, arguments, example_arguments
from limpq_ext.nn.network import quantized_layers
from limpq_ext.values.optional import require
from limpq_ext.values.reading import first_line

if TYPE_CHECKING:
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


def onnx_graph(model: nn.Module, example_input: Inputs, *, quantized: bool = True) -> ir.Model:
    """The graph of a quantized network; its quantizers are nodes ``limpq::Input`` and ``::Weight``.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        example_input: What the model's forward takes; its first axis becomes the batch, of any
            size.
        quantized: Whether it has quantizers at all; else it is the graph of a float network.

    Raises:
        ValueError: PyTorch cannot export the network: its first reason; or the example holds no
            tensor.
        ImportError: onnxscript is not installed.
    """
    require("onnxscript", "export")
    network = copied(model).cpu().float().eval()
    for name, layer in quantized_layers(network).items():
        for kind in (INPUT, WEIGHT):
            stands_in = _Marker(kind, name) if quantized else nn.Identity()
            setattr(layer, f"{kind.lower()}_quantizer", stands_in)
    args, kwargs = tree_map(_two_samples, example_arguments(example_input))
    shapes = tree_map(_first_axis_dynamic, (args, kwargs))
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                network,
                args,
                kwargs=kwargs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=_by_name(network, *shapes),
                verbose=False,
            )
    except Exception as error:  # whatever torch or the model raise
        raise ValueError(
            f"{type(model).__name__} cannot be exported: {_first_reason(error)}"
        ) from error
    assert program is not None
    made: ir.Model = program.model
    made.graph.name = type(model).__name__
    made.producer_name = "limpq_ext"
    made.producer_version = None
    _name_batch(made.graph)
    return made


def input_arrays(network: nn.Module, inputs: Inputs) -> list[np.ndarray[Any, Any]]:
    """The tensors that a forward takes, in the order of the graph's inputs."""
    args, kwargs = arguments(inputs)
    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    return [leaf.cpu().numpy() for leaf in tree_leaves(dict(bound)) if isinstance(leaf, Tensor)]


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
    for node in graph:
        node.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()


def serialized(model: ir.Model) -> bytes:
    """The bytes of an ONNX file.

    Raises:
        ValueError: It would have more than the 2 GB that such a file can have.
    """
    import onnx_ir as ir

    proto: Any = ir.to_proto(model)
    size = sum(
        value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value
    )
    if size > _MOST_BYTES:
        raise ValueError(f"the ONNX file would have {size / 1e9:.1f} GB, and can have 2")
    written: bytes = proto.SerializeToString(deterministic=True)
    return written


def _two_samples(value: Any) -> Any:
    """An exporter takes a batch of 1 for a batch of always 1."""
    return torch.cat([value, value]) if isinstance(value, Tensor) and len(value) == 1 else value


def _first_axis_dynamic(value: Any) -> Any:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(value, Tensor) else None


def _by_name(network: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


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


def _first_reason(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its own steps."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
