"""Forwards that begin at a layer: what ran before it returns what it returned, and runs no more.

Modules are called in the same order in every forward of a network that does not branch on values.
Until the first call of a layer nothing differs from the float forward, so that every call that has
ended by then can return a copy of what it returned, a whole block as one. All else is computed
again: functions between modules, and calls that change what they are given or return a part of it.
Whether that is the same is tried on two samples, for each layer. Where it is not, its forwards run
in full, and so do all of a network whose modules change what they hold.

One forward may hold several copies of a batch, one after the other on the axis of the samples. On
which axis that is, for each module, and that samples do not mix, is found on two samples as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from limpq_ext.nn.inputs import arguments, samples_in
from limpq_ext.nn.quantizers import LsqQuantizer

Forward = Callable[..., Any]

Treatment = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
"""What takes the place of a module's forward, which it is given with the arguments."""


@dataclass(frozen=True)
class Axes:
    """On which axis the samples lie that a module takes and puts out.

    Attributes:
        given: Of its first argument; None: that does not depend on the samples.
        splits: Whether that is the only tensor among its arguments.
        returned: Of each tensor that it returns, likewise.
    """

    given: int | None
    splits: bool
    returned: tuple[int | None, ...]


class Replay:
    """Forwards of a network that begin at one of its layers.

    Args:
        network: In evaluation mode, without dropout and the like. Its forwards are replaced for as
            long as the block of :meth:`opened` lasts.
        memory: The most bytes that outputs are kept in. What has no room is computed again. 0:
            nothing is kept, and all forwards run in full, one copy of the batch at a time.

    Attributes:
        treatments: What takes the place of modules' forwards in :meth:`run`.
        widest: Bytes of the largest output in the last :meth:`first`.
        held: Bytes that are kept.
    """

    def __init__(self, network: nn.Module, memory: int) -> None:
        self._network = network
        self._memory = memory
        self.treatments: dict[nn.Module, Treatment] = {}
        self.widest = 0
        self._axes: dict[nn.Module, Axes] | None = None
        self._proven: set[nn.Module] = set()
        self._proven_order: list[nn.Module] = []
        self._changes_itself = False
        # Of the forward of the inputs: its calls in the order in which they begin, where each ends.
        self._inputs: Any = None
        self._order: list[nn.Module] = []
        self._ends: list[int] = []
        self._kept: dict[int, _Kept] = {}
        self.held = 0
        self._all_kept = True
        self._advanced = 0
        # Of the forward that runs.
        self._next = 0
        self._ordering = self._keeping = False
        self._replayed_until = 0
        self._stops = False
        self._copies = 1
        self._treated = False
        self._watched: list[_Watched] | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let all calls of modules be seen for as long as the block lasts."""
        own: list[tuple[nn.Module, Any]] = []
        try:
            for module in self._network.modules():
                if not isinstance(module, LsqQuantizer | torch.jit.ScriptModule):
                    own.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = self._in_place_of(module)
            yield
        finally:
            for module, forward in own:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def prove(self, layers: Iterable[nn.Module], inputs: Any) -> None:
        """Find out on two samples what :meth:`run` may do.

        Args:
            layers: That forwards are to begin at.
            inputs: Of a batch; its first and its last sample are taken.
        """
        if not self._memory:
            return
        try:
            last = samples_in(inputs) - 1
            two = _rows(inputs, [0, last])
            seen = self._watching(two)
            self._proven_order = self._order
            expected = seen[-1].returned
            for layer in self.in_order(layers):
                output = tree_leaves(self._from(self._begin(layer)))
                if len(output) == len(expected) and all(map(_alike, output, expected)):
                    self._proven.add(layer)
            if last > 0:
                self._axes = _found_axes(seen, self._watching(_rows(inputs, [0, last, last, last])))
        except Exception:  # whatever a network's own parts raise: what is not proven is not done
            return

    def first(self, inputs: Any) -> Any:
        """Run the inputs of a batch in float, which :meth:`run` then goes on with.

        Returns:
            The network's output.
        """
        self._inputs = inputs
        self._order, self._ends, self._kept = [], [], {}
        self.held = self._advanced = self.widest = 0
        self._all_kept = True
        before = _state_of(self._network)
        output = self._forward(ordering=True, keeping=bool(self._memory))
        self._changes_itself |= not _are_equal(before, _state_of(self._network))
        return output

    def in_order(self, layers: Iterable[nn.Module]) -> list[nn.Module]:
        """The layers in the order in which they ran in the last :meth:`first`."""
        begin = {layer: self._begin(layer) for layer in layers}
        return sorted(begin, key=lambda layer: begin[layer])

    def most_copies(self, layers: Iterable[nn.Module], others: Iterable[nn.Module] = ()) -> int:
        """How many copies of the inputs one forward may hold: as many as let four outputs fit.

        Args:
            layers: Whose inputs are taken apart into the copies.
            others: Likewise, but they may be the same for all.
        """
        axes = self._axes
        if axes is None or axes[self._network].returned != (0,) or self._unlike():
            return 1
        for module in (*layers, *others):
            own = axes.get(module)
            if own is not None and not (own.splits and len(own.returned) == 1):
                return 1
        if any(layer in axes and axes[layer].given is None for layer in layers):
            return 1
        return max(1, self._memory // (4 * max(1, self.widest)))

    def run(self, layer: nn.Module | None, copies: int = 1) -> Any:
        """A forward of the last inputs, with the treatments, from a layer on.

        Args:
            layer: The treated one that runs first; None: all runs. Less is computed where layers
                come in the order of :meth:`in_order`.
            copies: How many copies of the inputs, one after the other.

        Returns:
            The network's output for all copies.
        """
        proven = layer in self._proven and not self._changes_itself and not self._unlike()
        begin = 0 if layer is None or not proven else self._begin(layer)
        return self._from(begin, copies=copies, treated=True)

    def _from(self, begin: int, **how: Any) -> Any:
        """A forward that begins at a call, or in full where later ones were begun at before."""
        if begin > self._advanced:
            self._advance(begin)
        return self._forward(replayed_until=begin if begin == self._advanced else 0, **how)

    def _advance(self, begin: int) -> None:
        """Have what ended before a call begins, and nothing that lies within another of these."""
        self._advanced = begin
        self._drop_inner()
        if not self._all_kept:
            self._forward(replayed_until=begin, stops=True, keeping=True)
            self._drop_inner()

    def _drop_inner(self) -> None:
        covered = 0
        for number in sorted(self._kept):
            if number < covered:
                self.held -= _bytes(self._kept.pop(number).leaves)
            elif self._ends[number] <= self._advanced:
                covered = self._ends[number]

    def copies_of(self, module: nn.Module, x: Tensor, copies: int) -> tuple[Tensor, ...]:
        """The parts of what a module is given that belong to each of the copies."""
        axis = self._axis_given(module)
        return (x,) if copies == 1 or axis is None else x.chunk(copies, axis)

    def joined(self, module: nn.Module, outputs: Sequence[Tensor]) -> Tensor:
        """What a module returns for all copies, from what it returns for each."""
        if len(outputs) == 1:
            return outputs[0]
        assert self._axes is not None
        (axis,) = self._axes[module].returned
        assert axis is not None
        return torch.cat(list(outputs), axis)

    def _axis_given(self, module: nn.Module) -> int | None:
        return None if self._axes is None else self._axes[module].given

    def _unlike(self) -> bool:
        """Whether the last inputs ran otherwise than the two samples."""
        return self._order != self._proven_order

    def _begin(self, layer: nn.Module) -> int:
        return self._order.index(layer) if layer in self._order else len(self._order)

    def _watching(self, inputs: Any) -> list[_Watched]:
        seen: list[_Watched] = []
        self._watched = seen
        try:
            self.first(inputs)
        finally:
            self._watched = None
        return seen

    def _forward(
        self,
        *,
        ordering: bool = False,
        keeping: bool = False,
        treated: bool = False,
        replayed_until: int = 0,
        stops: bool = False,
        copies: int = 1,
    ) -> Any:
        self._next = 0
        self._ordering, self._keeping, self._treated = ordering, keeping, treated
        self._replayed_until, self._stops, self._copies = replayed_until, stops, copies
        positional, keywords = arguments(_repeated(self._inputs, copies))
        try:
            return self._network(*positional, **keywords)
        except _ReachedError:
            return None
        finally:  # a parametrization is a module that may be called at any time
            self._ordering = self._keeping = self._treated = self._stops = False
            self._replayed_until = 0

    def _in_place_of(self, module: nn.Module) -> Forward:
        forward: Any = module.forward

        def called(*args: Any, **kwargs: Any) -> Any:
            return self._called(module, forward, args, kwargs)

        return called

    def _called(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        number = self._next
        if number in self._kept and self._ends[number] <= self._replayed_until:
            self._next = self._ends[number]
            return self._again(module, self._kept[number])
        if self._stops and number == self._replayed_until:
            raise _ReachedError
        self._next += 1
        given = _Given(args, kwargs) if self._keeping else None
        watched = None if self._watched is None else _Watched(module, args, kwargs)
        if self._ordering:
            self._order.append(module)
            self._ends.append(0)
        treatment = self.treatments.get(module) if self._treated else None
        output = forward(*args, **kwargs) if treatment is None else treatment(forward, args, kwargs)
        if self._ordering:
            self._ends[number] = self._next
            self.widest = max(self.widest, _bytes(tree_leaves(output)))
        if watched is not None and self._watched is not None:
            watched.returned = _copied(tree_leaves(output))
            self._watched.append(watched)
        if given is not None and given.only_led_to(output):
            self._keep(number, output)
        return output

    def _keep(self, number: int, output: Any) -> None:
        """Keep what a call returned, if there is room."""
        leaves, form = tree_flatten(output)
        if self.held + _bytes(leaves) > self._memory:
            self._all_kept = False
            return
        self._kept[number] = _Kept(_copied(leaves), form)
        self.held += _bytes(leaves)

    def _again(self, module: nn.Module, kept: _Kept) -> Any:
        """What a call returned, in tensors of its own, for all copies."""
        leaves = _copied(kept.leaves) if self._copies == 1 else list(kept.leaves)
        if self._copies > 1:
            assert self._axes is not None
            places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            for place, axis in zip(places, self._axes[module].returned, strict=True):
                own = leaves[place]
                leaves[place] = (
                    own.clone() if axis is None else torch.cat([own] * self._copies, axis)
                )
        return tree_unflatten(leaves, kept.form)


class _ReachedError(BaseException):
    """The call was reached that a forward was to stop at; networks that catch errors do not."""


@dataclass(frozen=True)
class _Kept:
    leaves: list[Any]
    form: Any


class _Watched:
    """A call: what it was given, and what it returned."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.splits = len(tensors) == 1 and bool(args) and tensors[0] is args[0]
        self.given = tensors[0].clone() if tensors else None
        self.returned: list[Any] = []


class _Given:
    """The arguments of a call, and whether it did nothing but return other tensors."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._content = args, kwargs
        self._leaves, self._form = tree_flatten(self._content)
        self._versions = list(map(_version, self._leaves))

    def only_led_to(self, output: Any) -> bool:
        leaves, form = tree_flatten(self._content)
        results = tree_leaves(output)
        if not all(_is_plain(leaf) for leaf in (*self._leaves, *leaves, *results)):
            return False
        same = len(leaves) == len(self._leaves) and all(
            one is other for one, other in zip(leaves, self._leaves, strict=True)
        )
        if not same or form != self._form or list(map(_version, leaves)) != self._versions:
            return False
        tensors = [leaf for leaf in results if isinstance(leaf, Tensor)]
        memories = [leaf.untyped_storage()._cdata for leaf in tensors]
        given = {leaf.untyped_storage()._cdata for leaf in self._leaves if isinstance(leaf, Tensor)}
        return bool(tensors) and len({*memories} - given) == len(tensors)


_State = tuple[list[tuple[Any, int]], Any]


def _state_of(network: nn.Module) -> _State:
    """What modules hold beside other modules, tensors with their versions."""
    values = [
        {key: value for key, value in vars(module).items() if key != "_modules"}
        for module in network.modules()
        if not isinstance(module, LsqQuantizer)
    ]
    leaves, form = tree_flatten(values)
    return [(leaf, _version(leaf)) for leaf in leaves], form


def _are_equal(before: _State, after: _State) -> bool:
    """Whether nothing has another value; a tensor that is computed anew may be the same again."""
    if before[1] != after[1]:
        return False
    return all(
        version == new_version if one is other else _have_same_value(one, other)
        for (one, version), (other, new_version) in zip(before[0], after[0], strict=True)
    )


def _have_same_value(one: Any, other: Any) -> bool:
    if not (_is_plain(one) and _is_plain(other)) or type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def _version(leaf: Any) -> int:
    """How often a tensor was changed in place."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


def _is_plain(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return not leaf.is_inference()
    return leaf is None or isinstance(leaf, int | float | complex | str | torch.dtype)


def _copied(leaves: Iterable[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _bytes(leaves: Iterable[Any]) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _of_samples(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with a change to each tensor that has the samples on its first axis."""
    samples = samples_in(inputs)

    def changed(leaf: Tensor) -> Tensor:
        return change(leaf) if leaf.dim() and len(leaf) == samples else leaf

    positional, keywords = tree_map_only(Tensor, changed, arguments(inputs))
    return keywords or positional


def _rows(inputs: Any, rows: Sequence[int]) -> Any:
    return _of_samples(inputs, lambda leaf: leaf[list(rows)])


def _repeated(inputs: Any, copies: int) -> Any:
    """Tensors of their own: a forward may change its inputs in place."""
    return _of_samples(inputs, lambda leaf: torch.cat([leaf] * copies))


def _alike(one: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    relative = min(1e4 * torch.finfo(one.dtype).eps, 0.05)
    magnitude = torch.nan_to_num(one, 0.0, 0.0, 0.0).abs().max() if one.numel() else 0.0
    return torch.allclose(one, other, relative, relative * float(magnitude), equal_nan=True)


class _MixedError(Exception):
    """A forward of several copies would not be several forwards."""


def _found_axes(two: list[_Watched], four: list[_Watched]) -> dict[nn.Module, Axes]:
    """The axes of the samples, from calls with samples (a, b) and from those with (a, b, b, b).

    Raises:
        _MixedError: There is none, or samples mix.
    """
    found: dict[nn.Module, Axes] = {}
    for one, other in itertools.zip_longest(two, four):
        if one is None or other is None or one.module is not other.module:
            raise _MixedError
        returned = [leaf for leaf in one.returned if isinstance(leaf, Tensor)]
        more = [leaf for leaf in other.returned if isinstance(leaf, Tensor)]
        if len(returned) != len(more):
            raise _MixedError
        axes = Axes(
            None if one.given is None else _axis(one.given, other.given),
            one.splits,
            tuple(map(_axis, returned, more)),
        )
        if found.setdefault(one.module, axes) != axes:
            raise _MixedError
    return found


def _axis(two: Tensor, four: Tensor | None) -> int | None:
    """The axis on which a tensor of samples (a, b) has those of (a, b, b, b); None: it has none."""
    if four is None or two.dim() != four.dim():
        raise _MixedError
    longer = [axis for axis in range(two.dim()) if two.shape[axis] != four.shape[axis]]
    if not longer:
        if not _alike(two, four):
            raise _MixedError
        return None
    axis = longer[0]
    if len(longer) > 1 or four.shape[axis] != 2 * two.shape[axis] or two.shape[axis] % 2:
        raise _MixedError
    last = two.chunk(2, axis)[1]
    if not _alike(torch.cat([two, last, last], axis), four):
        raise _MixedError
    return axis
