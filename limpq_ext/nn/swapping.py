"""Twins of modules: of another class, with the same tensors, put in the place of the former ones.

Every module here that takes the place of a float one *is* of the float one's class, often one that
is made at run time, and runs that class's own forward with other tensors in the place of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, SupportsIndex

from torch import Tensor, nn


def swap_modules(model: nn.Module, swap: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they stand, in place; a shared one stays shared.

    Returns:
        The model, or what replaces it.
    """
    if model in swap:
        return swap[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in swap:
                parent._modules[name] = swap[child]
    return model


def with_class(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A twin of ``module`` of another class: the same tensors and submodules, its own dicts."""
    twin = cls.__new__(cls)
    for key, value in module.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
    return twin


@contextmanager
def in_place_of(module: nn.Module, **tensors: Tensor | None) -> Iterator[None]:
    """Let ``module.name`` be another tensor for a while.

    The tensor goes where the module keeps its own one: torch.compile can follow that.
    """
    places = {name: _place(module, name) for name in tensors}
    own = {name: place[name] for name, place in places.items() if name in place}
    for name, place in places.items():
        place[name] = tensors[name]
    try:
        yield
    finally:
        for name, place in places.items():
            if name in own:
                place[name] = own[name]
            else:
                del place[name]


def _place(module: nn.Module, name: str) -> dict[str, Any]:
    if name in module._parameters:
        return module._parameters
    return module._buffers if name in module._buffers else module.__dict__


class OfMadeClass:
    """Copied and pickled although its class was made at run time, from that of a float module.

    Such a class has ``_made_by``: a function that can be imported, and the arguments to which it
    returns the class.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """As of any module, but for how another process finds the class."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        made_by = type(self).__dict__.get("_made_by")
        if made_by is None or isinstance(reduced, str):
            return reduced
        return (_blank, made_by, *reduced[2:])


def _blank(make_class: Any, *args: Any) -> Any:
    cls = make_class(*args)
    return cls.__new__(cls)


def made_class(name: str, mixin: type, own: type, *made_by: Any) -> Any:
    """A class of ``mixin`` and ``own``; ``made_by`` is as in :class:`OfMadeClass`."""
    members: dict[str, Any] = {"__module__": own.__module__, "_made_by": made_by}
    computed: Any = getattr(own, "weight", None)
    if isinstance(computed, property):
        # A parametrized weight; what is put in its place for a while comes first.
        def weight(self: Any) -> Any:
            return self.__dict__["weight"] if "weight" in self.__dict__ else compute(self)

        compute: Any = computed.fget
        members["weight"] = computed.getter(weight)
    return type(name, (mixin, own), members)


def float_class(module: nn.Module) -> Any:
    """The class that ``module`` had before it was quantized or made switchable."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, OfMadeClass))
