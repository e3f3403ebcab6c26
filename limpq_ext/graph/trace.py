"""What happens in a model's forward, found with fake tensors: no computation, no memory, no data.

From one traced forward come the order of the quantizable layers, what each costs, which layer
feeds each batch normalisation, and which tensors are held between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from limpq_ext.graph.liveness import Flow, Kind
from limpq_ext.graph.proof import UnfollowedError, Watch, fakes_only, refusal, with_probes
from limpq_ext.nn.attention import ProjectedAttention, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import Inputs, example_arguments
from limpq_ext.nn.layers import QuantizedLayer, quantizable_base
from limpq_ext.values.costs import LiveTensor


@dataclass(frozen=True)
class TracedLayer:
    """A quantizable layer as it was executed, per sample.

    Attributes:
        name: Its name in ``named_modules()``; a shared module has one name.
        kind: The class that is quantized: "conv2d", "convtranspose1d", "linear", ...
        macs: Multiply-accumulates, over all its calls.
        weights: Elements of its weight.
        activations: Elements of the inputs that are quantized, over all its calls.
    """

    name: str
    kind: str
    macs: int
    weights: int
    activations: int


@dataclass(frozen=True)
class Trace:
    """One forward of a model.

    Attributes:
        layers: The quantizable layers, in the order in which they first ran.
        norm_sources: For each batch normalisation, the layer whose output reaches it last.
        unused: Quantizable layers that did not run.
        shared_inputs: Groups of layers that read one and the same tensor.
        tensors: What is held between the layers; liveness.py has the rules.
        parameters: Elements of all parameters, each counted once.
        float_parameters: Elements of those that are no weight of these layers, or of another
            module too, each counted once.
    """

    layers: tuple[TracedLayer, ...]
    norm_sources: dict[str, str]
    unused: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    tensors: tuple[LiveTensor, ...]
    parameters: int
    float_parameters: int


# Modules that compute with weights that this package would leave in float, and why.
_REFUSED: dict[type[nn.Module], str] = {
    torch.jit.ScriptModule: "it was compiled by torch.jit, where no quantizer can be put",
    nn.MultiheadAttention: "it changes nn.MultiheadAttention.forward, which multiplies by weights",
    nn.RNNBase: "it computes all its steps in one fused call that has no place for quantizers",
    nn.RNNCellBase: "it computes its gates in one fused call that has no place for quantizers",
    nn.Bilinear: "a product of two inputs and a weight has no quantized form here",
}

# Functions that compute each of their values from many.
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    [
        F.linear,
        F.bilinear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.multi_head_attention_forward,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.mm,
        Tensor.bmm,
    ]
)

# Functions by what they do with values, where their outputs' memory does not show it.
_SAME = {
    *("reshape", "flatten", "contiguous", "clone", "to", "roll", "flip"),
    *("channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
}
_MOVES = {
    *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "pad", "repeat"),
    *("repeat_interleave", "unfold", "__getitem__", "index_select", "gather", "take_along_dim"),
}


def trace(
    model: nn.Module,
    example_input: Inputs,
    *,
    exclude: Sequence[str] = (),
) -> Trace:
    """Follow one sample through a model, without computing anything.

    Args:
        model: Any module; it is not changed.
        example_input: What its forward takes, with a leading batch axis of at least 1; the values
            do not matter. A tuple or list: several inputs. A dict: inputs by keyword.
        exclude: Names or patterns (``"head.*"``) of modules to leave in float and not count.

    Raises:
        ValueError: The model has parts that cannot be quantized truly and are not excluded, all of
            which are named, a pattern matches nothing, the model is prepared already, or its
            forward cannot be followed.
    """

    def excluded(name: str) -> bool:
        return matches(name, exclude)

    _check_is_float(model)
    # A copy: a forward may keep what it computed, and fake tensors must not stay in the model.
    model = with_layers(model, lambda name: not excluded(name)).eval()
    modules = dict(model.named_modules())
    check_patterns(exclude, modules, "exclude")
    refused = _refused(modules, excluded)
    probed = with_probes(model, lambda name: excluded(name) or name in refused)
    watch = Watch(probed, excluded)
    recorder = _Recorder({module: name for name, module in watch.modules.items()}, exclude)
    inputs = example_arguments(example_input)
    recorder.register_hooks()
    with fakes_only() as fake_mode:
        positional, keywords = tree_map_only(
            Tensor, lambda value: fake_mode.from_tensor(value[:1].detach()), inputs
        )
        fakes = [leaf for leaf in tree_leaves((positional, keywords)) if isinstance(leaf, Tensor)]
        recorder.start(fakes)
        try:
            with fake_mode:
                output = watch.follow(probed, positional, keywords, recorder)
        except UnfollowedError as error:
            if refused:
                raise ValueError(refusal(modules, refused)) from error
            raise
    refused |= watch.refusals(refused)
    if refused:
        raise ValueError(refusal(modules, refused))
    return recorder.result(output, *_count_parameters(model, set(recorder.order)))


def split_layers(
    found: Trace, fixed: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a traced model's searchable and of its fixed layers, in order of execution.

    Args:
        found: What :func:`trace` returned.
        fixed: Names or patterns; None for the first and the last layer.

    Raises:
        ValueError: A name fits no layer, or no layer is left to search.
    """
    names = [layer.name for layer in found.layers]
    if fixed is None:
        kept = set(names[:1] + names[-1:])
    else:
        check_patterns(fixed, names, "fixed")
        kept = {name for name in names if matches(name, fixed)}
    searchable = tuple(name for name in names if name not in kept)
    if not searchable:
        raise ValueError(
            f"no layer is left to search: the model runs {len(names)} quantizable layers and"
            f" {len(kept)} of them are fixed"
        )
    return searchable, tuple(name for name in names if name in kept)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's name, or that of a module around it, fits one of the patterns."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(parent, pattern) for parent in parents for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Any, argument: str) -> None:
    """Raise ValueError for a pattern that fits no name."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{argument}: the model has no module '{pattern}'")


def _check_is_float(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer | SwitchableBatchNorm):
            raise ValueError(
                f"{type(model).__name__} is prepared or quantized already, as '{name}' shows: pass"
                " the float model"
            )


def _refused(modules: Mapping[str, nn.Module], excluded: Callable[[str], bool]) -> dict[str, str]:
    """The modules that cannot be quantized whatever their forward does, and why.

    Raises:
        ValueError: A layer has no shape yet.
    """
    refused: dict[str, str] = {}
    for name, module in modules.items():
        if excluded(name) or matches(name, list(map(escape, refused))):
            continue
        for kind, reason in _REFUSED.items():
            if isinstance(module, kind) and not isinstance(module, ProjectedAttention):
                refused[name] = reason
        if quantizable_base(module) is None:
            continue
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()
        ):
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) has no shape yet: run the model on one"
                " batch first"
            )
    return refused


def _count_parameters(model: nn.Module, layers: set[str]) -> tuple[int, int]:
    """Elements of all parameters, and of those that stay in float, each counted once."""
    every: dict[int, int] = {}
    in_float: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every[id(parameter)] = parameter.numel()
        owner = name.split(".parametrizations.weight.")[0].removesuffix(".weight")
        if owner not in layers or owner == name:
            in_float[id(parameter)] = parameter.numel()
    return sum(every.values()), sum(in_float.values())


class _Recorder(TorchFunctionMode):
    """Sees every module call (hooks) and every function call (as a mode) of a forward."""

    def __init__(self, names: dict[nn.Module, str], exclude: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.exclude = exclude
        self.order: list[str] = []
        self.totals: dict[str, TracedLayer] = {}
        self.norm_sources: dict[str, str] = {}
        self.flow = Flow()
        # The layer, by its place in the order, that each value comes from last.
        self.sources: dict[int, int] = {}
        self.values: dict[tuple[int, ...], int] = {}
        self.memories: dict[tuple[int, int], int] = {}
        # Their memory must not be used again: values are known by their place in it.
        self.kept: list[Tensor] = []
        self.read: list[int] = []
        self.watching = True

    def quantizable(self, module: nn.Module) -> bool:
        return quantizable_base(module) is not None and not matches(
            self.names[module], self.exclude
        )

    def register_hooks(self) -> None:
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def start(self, inputs: Sequence[Tensor]) -> None:
        for value in inputs:
            self._set_value(value, self.flow.add_input(value.numel()))

    def result(self, output: Any, parameters: int, float_parameters: int) -> Trace:
        unused = [
            name
            for module, name in self.names.items()
            if self.quantizable(module) and name not in self.totals
        ]
        layers = tuple(self.totals[name] for name in self.order)
        self.flow.set_outputs(self._values_of(output))
        return Trace(
            layers,
            self.norm_sources,
            tuple(unused),
            self.flow.shared_inputs(),
            self.flow.tensors(),
            parameters,
            float_parameters,
        )

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, _BatchNorm):
            sources = [self.sources.get(value, -1) for value in self._values_of((inputs, kwargs))]
            if max(sources, default=-1) >= 0:
                self.norm_sources.setdefault(self.names[module], self.order[max(sources)])
        if self.quantizable(module):
            x = _tensors((inputs, kwargs))[0]
            values = self._values_of(x) or [self.flow.add_input(x.numel(), held=False)]
            self._set_value(x, values[0])
            self.read.append(values[0])

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        base = quantizable_base(module)
        if base is None or not self.quantizable(module):
            return
        name = self.names[module]
        weight = cast(Tensor, module.weight)
        before = self.totals.get(name)
        if before is None:
            self.order.append(name)
            before = TracedLayer(name, base.__name__.lower(), 0, weight.numel(), 0)
        value = self.read.pop()
        elements = self.flow.elements(value)
        # Each output element sums the weights of one output channel; transposed, each input
        # element is multiplied by those of its channel.
        times = elements if getattr(module, "transposed", False) else output.numel()
        self.totals[name] = replace(
            before,
            macs=before.macs + times * (weight.numel() // weight.shape[0]),
            activations=before.activations + elements,
        )
        result = self.flow.add_call(Kind.LAYER, [value], output.numel(), name)
        self._set_value(output, result)
        self.sources[result] = self.order.index(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.watching:
            return func(*args, **kwargs)
        inputs = self._values_of((args, kwargs))
        # Within a layer, what goes in and comes out is all that counts.
        if not inputs or self.read:
            return func(*args, **kwargs)
        before = [(leaf, self._key(leaf)) for leaf in _tensors((args, kwargs))]
        output = func(*args, **kwargs)
        changed = [leaf for leaf, key in before if self._key(leaf) != key]
        self._record(func, inputs, [*_tensors(output), *changed])
        return output

    def _record(self, func: Callable[..., Any], inputs: list[int], outputs: list[Tensor]) -> None:
        """Note what a function put out, or changed in place."""
        name = getattr(func, "__name__", "")
        source = max((self.sources.get(value, -1) for value in inputs), default=-1)
        for tensor in outputs:
            key = self._key(tensor)
            if key in self.values:
                continue
            viewed = self.memories.get(key[:2])
            read = inputs if viewed is None else [viewed]
            if viewed is not None or name in _SAME or name in _MOVES:
                whole = len(read) == 1 and self.flow.elements(read[0]) == tensor.numel()
                kind = Kind.SAME if whole and name not in _MOVES else Kind.MOVE
            elif "max_pool" in name:
                kind = Kind.MAXIMUM
            elif func in _PRODUCTS or "pool" in name or name == "scaled_dot_product_attention":
                kind = Kind.COMPUTE
            else:
                kind = Kind.ELEMENTWISE
            value = self.flow.add_call(kind, read, tensor.numel())
            self._set_value(tensor, value)
            self.sources[value] = source

    def _key(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """Where and when its values stand in memory, whatever its shape."""
        self.watching = False
        try:
            memory = tensor.untyped_storage()._cdata
            # Those of inference mode do not count their changes.
            version = 0 if tensor.is_inference() else tensor._version
            return memory, version, int(tensor.storage_offset()), tensor.numel()
        finally:
            self.watching = True

    def _values_of(self, content: Any) -> list[int]:
        """The values among the tensors in ``content`` that are known: what depends on an input."""
        keys = [self._key(tensor) for tensor in _tensors(content)]
        values = [self.values.get(key, self.memories.get(key[:2])) for key in keys]
        return [value for value in values if value is not None]

    def _set_value(self, tensor: Tensor, value: int) -> None:
        key = self._key(tensor)
        self.values[key] = value
        self.memories.setdefault(key[:2], value)
        self.kept.append(tensor)


def _tensors(content: Any) -> list[Tensor]:
    """The tensors in ``content``, but for parameters."""
    return [
        leaf
        for leaf in tree_leaves(content)
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
    ]
