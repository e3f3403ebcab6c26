"""What a forward computed, call by call, written down so that something can be carried back.

Every call of an operator is noted with where in memory its arguments and outputs lie. What is
carried back lies in memory of the same form: so views need no rules, and what is changed in place
is what it is, the same memory at two times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from limpq_ext.nn.swapping import float_class

# Operators whose output has a tensor's shape and nothing of its values.
_SHAPES_ONLY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full"),
}


@dataclass
class Value:
    """A tensor at one moment of a forward.

    Attributes:
        memory: Which memory it lies in.
        elements: How many elements that memory has.
        offset: Its place there, in elements.
        shape: Its shape.
        strides: Its strides, in elements.
        depends: It comes from an input of the model, or from a module that is watched.
        content: Its values, where they were kept.
    """

    memory: int
    elements: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    depends: bool
    content: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Its values, in a type that is precise enough to divide by them."""
        assert self.content is not None
        return self.content.to(computing_type(self.content))


@dataclass(frozen=True)
class Call:
    """One call of an operator that has an argument which depends on an input.

    Attributes:
        function: The operator.
        name: Its name, without the underscore of one that works in place.
        arguments: By name; each tensor is a `Value`.
        outputs: Those of floating point, and what was written in place.
        made: Memory that did not exist before.
        module: The name of the module that ran it, and its class.
    """

    function: Any
    name: str
    arguments: dict[str, Any]
    outputs: tuple[Value, ...]
    made: tuple[int, ...]
    module: tuple[str, str]

    def values(self) -> list[Value]:
        """All tensors among the arguments."""
        return [leaf for leaf in _leaves(self.arguments) if isinstance(leaf, Value)]


@dataclass(frozen=True)
class Passed:
    """The output of a module that is watched, when it came out of it."""

    name: str
    value: Value


class Tape(TorchDispatchMode):
    """Notes the operators of a forward as long as the block lasts.

    Args:
        model: Gets hooks for as long. It should run in evaluation mode.
        watched: The modules whose outputs are marked, and followed from there.
        needs: The operators to note, and whether the values of their arguments are needed. Others
            are taken apart where they are made of others.

    Attributes:
        events: What happened, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, nn.Module],
        needs: Mapping[str, bool],
    ) -> None:
        super().__init__()
        self.events: list[Call | Passed] = []
        self._needs = needs
        self._model = model
        self._watched = watched
        self._active: list[tuple[str, str]] = [("", float_class(model).__name__)]
        self._depending: set[int] = set()
        # As long as these live, no other memory is known by the same number.
        self._memories: dict[int, StorageWeakRef] = {}
        self._kept: dict[int, list[Value]] = {}

    @contextmanager
    def running(self) -> Iterator[Tape]:
        """The mode, its hooks, and attention in its parts."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks
                at = name, float_class(module).__name__
                enter = module.register_forward_pre_hook(self._enter(at))
                stack.callback(enter.remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            for name, module in self._watched.items():
                stack.callback(module.register_forward_hook(self._pass(name)).remove)
            stack.callback(self._kept.clear)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(self)
            yield self

    def begin(self, tensor: Tensor) -> Value:
        """Let all that comes from a tensor of floating point be noted."""
        self._depending.add(self._memory(tensor))
        return self.value(tensor)

    def value(self, tensor: Tensor) -> Value:
        """Where a tensor is now."""
        memory = self._memory(tensor)
        storage = tensor.untyped_storage()
        return Value(
            memory=memory,
            elements=storage.nbytes() // tensor.element_size(),
            offset=int(tensor.storage_offset()),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
            depends=_carries(tensor) and memory in self._depending,
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks what a tensor is
            return func(*args, **kwargs)
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        arguments |= kwargs
        written = _written(func, arguments)
        name = func._schema.name.removeprefix("aten::")  # others keep their namespace
        name = name.removesuffix("_") if written else name
        if name not in self._needs:
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        for tensor in written:
            self._save(self._memory(tensor))
        tensors = _tensors(arguments)
        before = {self._memory(tensor) for tensor in tensors}
        depends = name not in _SHAPES_ONLY and any(
            _carries(tensor) and self._memory(tensor) in self._depending for tensor in tensors
        )
        if not depends:
            return func(*args, **kwargs)
        held = {self._memory(tensor) for tensor in written}
        keeps = self._needs.get(name, False)
        noted = tree_map_only(Tensor, lambda tensor: self._noted(tensor, keeps, held), arguments)
        output = func(*args, **kwargs)
        computed = [
            tensor
            for tensor in _tensors(output)
            if _carries(tensor) and self._memory(tensor) not in before
        ]
        made = [self._memory(tensor) for tensor in computed]
        computed += [tensor for tensor in written if _carries(tensor)]
        if not computed:
            self._check_view(func, tensors, output)
            return output
        self._depending.update(self._memory(tensor) for tensor in computed)
        self.events.append(
            Call(
                function=func,
                name=name,
                arguments=noted,
                outputs=tuple(self.value(tensor) for tensor in computed),
                made=tuple(made),
                module=self._active[-1],
            )
        )
        return output

    def _noted(self, tensor: Tensor, keeps: bool, held: set[int]) -> Value:
        value = self.value(tensor)
        if keeps:
            value.content = tensor.detach()
            if value.memory in held:  # is about to change
                value.content = value.content.clone()
            else:
                self._kept.setdefault(value.memory, []).append(value)
        return value

    def _save(self, memory: int) -> None:
        """Keep what lies in memory that is about to change."""
        for value in self._kept.pop(memory, ()):
            assert value.content is not None
            value.content = value.content.clone()

    def _memory(self, tensor: Tensor) -> int:
        reference = StorageWeakRef(tensor.untyped_storage())
        return self._memories.setdefault(reference.cdata, reference).cdata

    def _check_view(self, func: Any, tensors: Sequence[Tensor], output: Any) -> None:
        """Refuse a view that takes the same memory for numbers of another type."""
        types = {self._memory(tensor): tensor.dtype for tensor in tensors}
        for tensor in _tensors(output):
            if types.get(self._memory(tensor), tensor.dtype) != tensor.dtype:
                raise ValueError(no_rule(str(func._schema.name), self._active[-1]))

    def _enter(self, at: tuple[str, str]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._active.append(at)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._active.pop()

    def _pass(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.events.append(Passed(name, self.begin(output)))

        return hook


class Carried:
    """What is carried back: a number for every element of the memory that it has come to."""

    def __init__(self) -> None:
        self._memories: dict[int, Tensor] = {}

    def add(self, value: Value, more: Tensor) -> None:
        """Add to what a tensor has; nothing, where it does not depend on an input."""
        if not value.depends:
            return
        if value.memory not in self._memories:
            self._memories[value.memory] = more.new_zeros(value.elements)
        memory = self._memories[value.memory]
        shape, strides = list(value.shape), list(value.strides)
        for axis, stride in enumerate(strides):
            if stride == 0 and shape[axis] > 1:  # one element, many times
                more = more.sum(dim=axis, keepdim=True)
                shape[axis] = 1
        if _overlaps(shape, strides):
            places = torch.arange(value.elements, device=more.device)
            places = places.as_strided(shape, strides, value.offset)
            memory.index_add_(0, places.flatten(), more.reshape(-1))
        else:
            memory.as_strided(shape, strides, value.offset).add_(more)

    def at(self, value: Value) -> Tensor | None:
        """What a tensor has; None: nothing has come to its memory."""
        memory = self._memories.get(value.memory)
        return None if memory is None else memory.as_strided(*_geometry(value))

    def take(self, value: Value) -> Tensor | None:
        """What a tensor has, which it then has no more."""
        found = self.at(value)
        if found is None:
            return None
        taken = found.clone()
        found.zero_()
        return taken

    def drop(self, memory: int) -> None:
        """Forget memory that did not exist before."""
        self._memories.pop(memory, None)


def computing_type(tensor: Tensor) -> torch.dtype:
    """The type in which a tensor's values are computed with."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def no_rule(operator: str, module: tuple[str, str]) -> str:
    """The sentence about an operator that has no rule, and where it ran."""
    name, kind = module
    where = f"'{name}' ({kind})" if name else f"the model itself ({kind})"
    return f"relevance has no rule for {operator.replace('::', '.')}, which {where} runs"


def _geometry(value: Value) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    return value.shape, value.strides, value.offset


def _overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two places of a tensor may be one in memory."""
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _written(func: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator changes the values of."""
    if torch.Tag.inplace_view in func.tags:
        return []
    return [
        tensor
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(arguments.get(argument.name))
    ]


def _carries(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _leaves(content: Any) -> list[Any]:
    return tree_leaves(content, is_leaf=lambda leaf: isinstance(leaf, Value))


def _tensors(content: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
