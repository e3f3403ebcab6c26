"""What `trace` notes of one forward: which layers ran, what they cost, what flowed between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from limpq_ext.graph.liveness import Flow, Kind
from limpq_ext.nn.layers import quantizable_base
from limpq_ext.values.costs import LayerCost

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
_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class Recorder(TorchFunctionMode):
    """Sees every module call (hooks) and every function call (as a mode) of a forward.

    Args:
        names: The modules to watch, and their names.
        excluded: Whether what has this name is no layer here.

    Attributes:
        layers: The quantizable layers by name, in the order in which they first ran; their counts
            are over all their calls.
        norm_sources: For each batch normalisation, the layer whose output reaches it last.
        flow: What the calls read and put out.
    """

    def __init__(self, names: dict[nn.Module, str], excluded: Callable[[str], bool]) -> None:
        super().__init__()
        self._names = names
        self._excluded = excluded
        self.layers: dict[str, LayerCost] = {}
        self.norm_sources: dict[str, str] = {}
        self.flow = Flow()
        # The layer, by its place in the order, that each value comes from last.
        self._sources: dict[int, int] = {}
        self._values: dict[tuple[int, ...], int] = {}
        self._memories: dict[tuple[int, int], int] = {}
        # Their memory must not be used again: values are known by their place in it.
        self._kept: list[Tensor] = []
        self._read: list[int] = []
        self._watching = True

    def register_hooks(self) -> None:
        """Let the modules tell when they are called."""
        for module in self._names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave)

    def start(self, inputs: Sequence[Tensor]) -> None:
        """The inputs of the forward that follows."""
        for value in inputs:
            self._set_value(value, self.flow.add_input(value.numel()))

    def end(self, output: Any) -> None:
        """What the forward put out."""
        self.flow.set_outputs(self._values_of(output))

    def unused(self) -> tuple[str, ...]:
        """The quantizable layers that did not run."""
        return tuple(
            name
            for module, name in self._names.items()
            if self._quantizable(module) and name not in self.layers
        )

    def _quantizable(self, module: nn.Module) -> bool:
        return quantizable_base(module) is not None and not self._excluded(self._names[module])

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(module, _BatchNorm):
            sources = [self._sources.get(value, -1) for value in self._values_of((inputs, kwargs))]
            if max(sources, default=-1) >= 0:
                self.norm_sources.setdefault(self._names[module], list(self.layers)[max(sources)])
        if self._quantizable(module):
            x = _tensors((inputs, kwargs))[0]
            values = self._values_of(x) or [self.flow.add_input(x.numel(), held=False)]
            self._set_value(x, values[0])
            self._read.append(values[0])

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        base = quantizable_base(module)
        if base is None or not self._quantizable(module):
            return
        name = self._names[module]
        weight = cast(Tensor, module.weight)
        before = self.layers.get(name) or LayerCost(
            name, base.__name__.lower(), 0, weight.numel(), 0
        )
        value = self._read.pop()
        elements = self.flow.elements(value)
        # Each output element sums the weights of one output channel; transposed, each input
        # element is multiplied by those of its channel.
        times = elements if getattr(module, "transposed", False) else output.numel()
        self.layers[name] = replace(
            before,
            macs=before.macs + times * (weight.numel() // weight.shape[0]),
            activations=before.activations + elements,
        )
        result = self.flow.add_call(Kind.LAYER, [value], output.numel(), name)
        self._set_value(output, result)
        self._sources[result] = list(self.layers).index(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._watching:
            return func(*args, **kwargs)
        inputs = self._values_of((args, kwargs))
        # Within a layer, what goes in and comes out is all that counts.
        if not inputs or self._read:
            return func(*args, **kwargs)
        before = [(leaf, self._key(leaf)) for leaf in _tensors((args, kwargs))]
        output = func(*args, **kwargs)
        changed = [leaf for leaf, key in before if self._key(leaf) != key]
        self._record(func, inputs, [*_tensors(output), *changed])
        return output

    def _record(self, func: Callable[..., Any], inputs: list[int], outputs: list[Tensor]) -> None:
        """Note what a function put out, or changed in place."""
        name = getattr(func, "__name__", "")
        source = max((self._sources.get(value, -1) for value in inputs), default=-1)
        for tensor in outputs:
            key = self._key(tensor)
            if key in self._values:
                continue
            viewed = self._memories.get(key[:2])
            read = inputs if viewed is None else [viewed]
            if viewed is not None or name in _SAME or name in _MOVES:
                whole = len(read) == 1 and self.flow.elements(read[0]) == tensor.numel()
                kind = Kind.SAME if whole and name not in _MOVES else Kind.MOVE
            elif "max_pool" in name:
                kind = Kind.MAXIMUM
            elif func in _PRODUCTS or "pool" in name or name == "scaled_dot_product_attention":
                kind = Kind.COMPUTE
            elif name in _SUMS:
                kind = Kind.SUM
            else:
                kind = Kind.ELEMENTWISE
            value = self.flow.add_call(kind, read, tensor.numel())
            self._set_value(tensor, value)
            self._sources[value] = source

    def _key(self, tensor: Tensor) -> tuple[int, int, int, int]:
        """Where and when its values stand in memory, whatever its shape."""
        self._watching = False
        try:
            memory = tensor.untyped_storage()._cdata
            # Those of inference mode do not count their changes.
            version = 0 if tensor.is_inference() else tensor._version
            return memory, version, int(tensor.storage_offset()), tensor.numel()
        finally:
            self._watching = True

    def _values_of(self, content: Any) -> list[int]:
        """The values among the tensors in ``content`` that are known: what depends on an input."""
        keys = [self._key(tensor) for tensor in _tensors(content)]
        values = [self._values.get(key, self._memories.get(key[:2])) for key in keys]
        return [value for value in values if value is not None]

    def _set_value(self, tensor: Tensor, value: int) -> None:
        key = self._key(tensor)
        self._values[key] = value
        self._memories.setdefault(key[:2], value)
        self._kept.append(tensor)


def _tensors(content: Any) -> list[Tensor]:
    """The tensors in ``content``, but for parameters."""
    return [
        leaf
        for leaf in tree_leaves(content)
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)
    ]
