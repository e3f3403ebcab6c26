"""What the branches of a joint step share, found from the model's graph.

All branches run the same network on the same batch. Whatever comes before the first searchable
layer (the stem) has the same values in each of them, so it is computed once, forward and backward;
and a ReLU or ReLU6 that feeds only unsigned quantizers is left to them, since they clamp anyway.

Both need to know how values flow, which torch.fx shows. A model that it cannot follow, or whose
graph gives other values, runs as it is.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from limpq_ext.nn.attention import ProjectedAttention, ProjectedWindows
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import call
from limpq_ext.nn.layers import QuantizedLayer
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.nn.swapping import with_class
from limpq_ext.training.model_state import buffers_kept
from limpq_ext.values.reading import first_line

_SWITCHED = (QuantizedLayer, SwitchableBatchNorm, LsqQuantizer)
# Their forwards look at shapes, which a graph does not know.
_LEAVES = (*_SWITCHED, ProjectedAttention, ProjectedWindows)
_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_HALF_TYPES = (torch.float16, torch.bfloat16)
_HARDTANH = inspect.signature(F.hardtanh)


class UntraceableError(Exception):
    """The graph of a model is not known; the message says why."""


class BranchGraph:
    """A prepared model's forward, as a stem that the branches share and the rest that each runs.

    It computes with the model's own modules, parameters and buffers.

    Args:
        model: What :func:`limpq_ext.prepare` returned, in training mode.
        x: The inputs of a batch, as for `inputs.call`; the graph is checked on it.
        share_stem: Cut the stem off; else ``rest`` is the whole model.
        drop_relu: Let unsigned quantizers take over the ReLU or ReLU6 in front of them.

    Attributes:
        rest: Computes the model's output from what :meth:`forward_stem` returns.
        stem: The shared part; None where there is nothing to share.
        dropped_relus: How many calls of a ReLU or ReLU6 the quantizers took over.
        reason: Why a stem that exists is not shared; else "".

    Raises:
        UntraceableError: torch.fx cannot follow the model, or its graph gives other values.
    """

    def __init__(
        self, model: nn.Module, x: Any, *, share_stem: bool = True, drop_relu: bool = True
    ) -> None:
        self.dropped_relus = 0
        self.rest: nn.Module = model
        self.stem: nn.Module | None = None
        self.reason = ""
        self._norms: list[_NormBase] = []
        self._outputs: tuple[Any, ...] = ()
        self._values: tuple[Any, ...] = ()
        # What the model itself raises is no matter of its graph.
        values = _values(model, model, x)
        with _untraceable(model):
            graph_module = _trace(model, x)
            _check_same_values(values, model, graph_module, x)
            self._build(graph_module, x, share_stem=share_stem, drop_relu=drop_relu)

    def _build(
        self, graph_module: fx.GraphModule, x: Any, *, share_stem: bool, drop_relu: bool
    ) -> None:
        self.dropped_relus = _drop_relus(graph_module) if drop_relu else 0
        self.rest = graph_module
        shared = _shared_nodes(graph_module) if share_stem else []
        if not any(node.op == "call_module" for node in shared):
            return
        stem, rest, boundary = _cut(graph_module, shared)
        self.reason = _changes_in_place(graph_module, shared, boundary) or _differs_by_call(stem, x)
        if not self.reason:
            self.stem, self.rest = stem, rest
            self._norms = [module for module in stem.modules() if isinstance(module, _NormBase)]

    def forward_stem(self, x: Any, branches: int) -> Any:
        """Compute what the branches share.

        Args:
            x: The inputs of the batch.
            branches: How many branches will use it: the running statistics of the stem's batch
                normalisation become what that many updates leave.

        Returns:
            The inputs of ``rest``: ``x`` where there is no stem. Else tensors among them are leaves
            that collect the gradients of all branches until :meth:`backward_stem`.
        """
        if self.stem is None:
            return x
        with _counting_for(self._norms, branches):
            self._outputs = call(self.stem, x)
        self._values = tuple(_leaf(value) for value in self._outputs)
        return self._values

    def backward_stem(self) -> None:
        """Carry what the branches' gradients came to on to the stem's parameters."""
        reached = [
            (output, value.grad)
            for output, value in zip(self._outputs, self._values, strict=True)
            if isinstance(value, Tensor) and value.grad is not None
        ]
        self._outputs = self._values = ()
        if reached:
            outputs, grads = zip(*reached, strict=True)
            torch.autograd.backward(outputs, grads)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # else a change of a buffer would not stand in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, x: Any) -> fx.GraphModule:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise UntraceableError(f"module '{name}' has hooks, which a graph would not call")
    return fx.GraphModule(model, _Tracer().trace(_with_inputs_alone(model, x)))


def _with_inputs_alone(model: nn.Module, x: Any) -> nn.Module:
    """A twin whose forward has the inputs of a batch as its arguments, and no optional ones.

    torch.fx would take the defaults of others for tensors. It reads the arguments from the code of
    the forward, so that has to be made for them.
    """
    own: Any = type(model)
    if isinstance(x, Mapping):
        names = [str(name) for name in x]
        given = [f"{name}={name}" for name in names]
    else:
        names = given = (
            [f"input_{i}" for i in range(len(x))] if isinstance(x, tuple | list) else ["x"]
        )
    if not all(name.isidentifier() for name in names):
        raise UntraceableError(f"the inputs are called {names}")
    source = f"lambda self, {', '.join(names)}: own.forward(self, {', '.join(given)})"
    return with_class(model, type(own.__name__, (own,), {"forward": eval(source, {"own": own})}))


@contextmanager
def _untraceable(model: nn.Module) -> Iterator[None]:
    """Turn whatever a model's forward raises on proxies, or its graph, into one error."""
    try:
        yield
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(
            f"torch.fx cannot follow {type(model).__name__}.forward:"
            f" {first_line(error, typed=True)}"
        ) from error


def _values(forward: nn.Module, model: nn.Module, x: Any) -> list[Any]:
    """What a forward gives; the model's buffers and the random state are put back."""
    with torch.no_grad(), buffers_kept(model), torch.random.fork_rng(_gpus(model)):
        return tree_leaves(call(forward, x))


def _check_same_values(
    values: list[Any], model: nn.Module, graph_module: nn.Module, x: Any
) -> None:
    """A forward may do what a graph does not show; then it computes something else."""
    others = _values(graph_module, model, x)
    same = len(values) == len(others) and all(map(_nearly_equal, values, others))
    if not same:
        raise UntraceableError(
            f"{type(model).__name__}.forward computes other values than its torch.fx graph"
        )


def _nearly_equal(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return bool(torch.equal(first, second)) if isinstance(first, Tensor) else first == second
    if first.shape != second.shape:
        return False
    # Not to the bit: some GPU kernels add in an order that varies.
    return torch.allclose(first.float(), second.float(), rtol=1e-2, atol=1e-3, equal_nan=True)


# --- ReLUs -------------------------------------------------------------------------------------


def _drop_relus(graph_module: fx.GraphModule) -> int:
    """Let quantizers take over the ReLUs that feed nothing else; how many those are."""
    modules = dict(graph_module.named_modules())
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(modules[node.target], []).append(node)

    def layer_of(user: fx.Node, relu: fx.Node) -> QuantizedLayer | None:
        module = modules.get(str(user.target)) if user.op == "call_module" else None
        if not isinstance(module, QuantizedLayer) or module.input_quantizer.signed:
            return None
        return module if user.args[:1] == (relu,) and user.all_input_nodes == [relu] else None

    relus = {
        node: relu_max
        for node in graph_module.graph.nodes
        if (relu_max := _relu_max(node, modules)) is not None
        and _can_go(node, modules)
        and all(layer_of(user, node) for user in node.users)
    }
    # A layer that is called twice needs the same ReLU in front of both calls.
    while True:
        lacking = {
            relu
            for relu, relu_max in relus.items()
            for user in relu.users
            for call in calls[modules[str(user.target)]]
            if relus.get(call.args[0]) != relu_max
        }
        if not lacking:
            break
        relus = {relu: relu_max for relu, relu_max in relus.items() if relu not in lacking}
    for relu, relu_max in relus.items():
        for user in relu.users:
            layer = layer_of(user, relu)
            assert layer is not None
            layer.input_quantizer.relu_max = relu_max
        relu.replace_all_uses_with(relu.all_input_nodes[0])
        graph_module.graph.erase_node(relu)
    graph_module.recompile()
    return len(relus)


def _relu_max(node: fx.Node, modules: dict[str, nn.Module]) -> float | None:
    """The upper bound of ``min(relu(x), bound)``, infinity for ReLU; None where it is neither.

    torch.clamp gives these values too, but its gradient passes at the bounds, and theirs does not.
    A bound that a half type lacks stays as well: PyTorch rounds it forward and not backward.
    """
    bounds: tuple[Any, Any] | None = None
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.ReLU:
            return math.inf
        if type(module) in (nn.ReLU6, nn.Hardtanh):
            bounds = module.min_val, module.max_val
    elif node.op == "call_method" and node.target in ("relu", "relu_"):
        return math.inf
    elif node.op == "call_function":
        if node.target in _RELU_FUNCTIONS:
            return math.inf
        if node.target is F.relu6:
            return 6.0
        if node.target is F.hardtanh:
            given = _HARDTANH.bind(*node.args, **node.kwargs)
            given.apply_defaults()
            bounds = given.arguments["min_val"], given.arguments["max_val"]
    if bounds is None or any(isinstance(bound, fx.Node) for bound in bounds) or bounds[0] != 0:
        return None
    relu_max = float(bounds[1])
    exact = all(float(torch.tensor(relu_max, dtype=half)) == relu_max for half in _HALF_TYPES)
    return relu_max if exact else None


def _can_go(relu: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether it may go: something uses it, and it changes nothing in place that others read."""
    if len(relu.all_input_nodes) != 1 or not relu.users:
        return False
    return not _is_in_place(relu, modules) or len(relu.all_input_nodes[0].users) == 1


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (
        node.target is operator.setitem
        or (name.endswith("_") and not name.endswith("__"))
        or any(value is True for value in (*node.args, node.kwargs.get("inplace")))
        or "out" in node.kwargs
    )


# --- the stem ----------------------------------------------------------------------------------


def _shared_nodes(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that no searchable layer has a part in."""
    modules = dict(graph_module.named_modules())
    calls = Counter(
        modules[node.target] for node in graph_module.graph.nodes if node.op == "call_module"
    )
    shared: list[fx.Node] = []
    branching: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        varies = any(source in branching for source in node.all_input_nodes)
        if node.op == "call_module":
            module = modules[node.target]
            # State that several calls update depends on the order of the branches' calls.
            state = calls[module] > 1 and any(True for _ in module.buffers())
            switched = any(isinstance(part, _SWITCHED) for part in module.modules())
            varies = varies or switched or state
        if varies:
            branching.add(node)
        else:
            shared.append(node)
    return shared


def _cut(
    graph_module: fx.GraphModule, shared: Sequence[fx.Node]
) -> tuple[fx.GraphModule, fx.GraphModule, list[fx.Node]]:
    """The stem, which returns the values at the boundary; the rest, which takes them; and those."""
    inside = set(shared)
    nodes = list(graph_module.graph.nodes)
    boundary = [
        node
        for node in nodes
        if (node in inside or node.op == "placeholder")
        and node.op != "get_attr"
        and any(user not in inside for user in node.users)
    ]
    copies: dict[fx.Node, fx.Node] = {}
    stem = fx.Graph()
    for node in nodes:
        if node in inside or node.op == "placeholder":
            copies[node] = stem.node_copy(node, lambda source: copies[source])
    stem.output(tuple(copies[node] for node in boundary))

    copies = {}
    rest = fx.Graph()
    for node in boundary:
        copies[node] = rest.placeholder(node.name)
    for node in nodes:
        if node.op == "placeholder" or node in copies:
            continue
        if node.op == "get_attr" or node not in inside:
            copies[node] = rest.node_copy(node, lambda source: copies[source])
    return fx.GraphModule(graph_module, stem), fx.GraphModule(graph_module, rest), boundary


def _changes_in_place(
    graph_module: fx.GraphModule, shared: Sequence[fx.Node], boundary: Sequence[fx.Node]
) -> str:
    """Why a branch would change a shared value; "" where none does."""
    modules = dict(graph_module.named_modules())
    inside = set(shared)
    for node in boundary:
        for user in node.users:
            if user not in inside and user.op != "output" and _is_in_place(user, modules):
                return f"'{user.name}' changes the shared value '{node.name}' in place"
    return ""


def _differs_by_call(stem: fx.GraphModule, x: Any) -> str:
    """Why the stem's values or state are not the same in every branch; "" where they are."""
    own = {
        id(buffer)
        for module in stem.modules()
        if isinstance(module, _NormBase)
        for buffer in module.buffers(recurse=False)
    }
    others = {name: buffer for name, buffer in stem.named_buffers() if id(buffer) not in own}
    versions = {name: buffer._version for name, buffer in others.items()}
    gpus = _gpus(stem)
    with torch.no_grad(), buffers_kept(stem), torch.random.fork_rng(gpus):
        before = _random_states(gpus)
        call(stem, x)
        after = _random_states(gpus)
        if any(not torch.equal(old, new) for old, new in zip(before, after, strict=True)):
            return "it draws random numbers"
        changed = [name for name, buffer in others.items() if buffer._version != versions[name]]
    return f"it changes the buffer '{changed[0]}'" if changed else ""


def _gpus(module: nn.Module) -> list[int]:
    """The GPUs that have a part of the module."""
    tensors = (*module.parameters(), *module.buffers())
    return sorted({tensor.get_device() for tensor in tensors if tensor.is_cuda})


def _random_states(gpus: Sequence[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(gpu) for gpu in gpus)]


@contextmanager
def _counting_for(norms: Sequence[_NormBase], branches: int) -> Iterator[None]:
    """Let one update of the running statistics count for as many as there are branches.

    ``running = (1 - m) * running + m * batch``, n times with the same batch, is one update with
    ``m = 1 - (1 - m)**n``; a cumulative average (momentum None) counts the batch n times.
    """
    updating = [norm for norm in norms if norm.training and norm.track_running_stats]
    momenta = [norm.momentum for norm in updating]
    for norm in updating:
        if norm.momentum is None:
            assert norm.num_batches_tracked is not None
            norm.momentum = branches / (int(norm.num_batches_tracked) + branches)
        else:
            norm.momentum = 1 - (1 - norm.momentum) ** branches
    try:
        yield
    finally:
        for norm, momentum in zip(updating, momenta, strict=True):
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(branches - 1)


def _leaf(value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        return value.detach().requires_grad_()
    return value
