"""Restrictions: which bits a layer may have, and which layers have to agree.

Every restriction has a name, so that an error can say which ones contradict each other, and so that
each can be left out on trial. All of them hold at once: where several fit a layer, it may have what
all of them allow.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limpq_ext.allocation.measures import Pair
from limpq_ext.allocation.target import Target
from limpq_ext.ilp.rows import Link
from limpq_ext.values.bits import check_bits
from limpq_ext.values.costs import Costs
from limpq_ext.values.names import matches


class ContradictionError(ValueError):
    """Restrictions leave a layer no bits; the message names restrictions and layers."""


@dataclass(frozen=True)
class Limited:
    """Some layers may have some pairs of bits only.

    Attributes:
        name: What the user would call it.
        layers: Names of these layers.
        allows: Whether a pair is allowed.
    """

    name: str
    layers: frozenset[str]
    allows: Callable[[Pair], bool]


@dataclass(frozen=True)
class Tied:
    """Some layers have equal bits.

    Attributes:
        name: What the user would call it.
        groups: Names of searchable layers whose bits agree, a group at a time.
        activations_only: Whether only their activation bits agree.
        given: For each group the activation bits that it has because a fixed layer is in it, and
            the name of that layer.
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    activations_only: bool
    given: tuple[tuple[int, str] | None, ...]


Restriction = Limited | Tied


def make_restrictions(
    costs: Costs,
    bits: Sequence[int],
    *,
    pairs: Mapping[str, Iterable[Pair]] | None = None,
    fixed: Mapping[str, Pair] | None = None,
    tied: str | Iterable[str | Iterable[str]] = (),
    tie_shared_inputs: bool = False,
    tie_added_inputs: bool = False,
    min_bits: Mapping[str, int | Pair] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    target: Target | None = None,
) -> tuple[Restriction, ...]:
    """Check what a user asked for, as `search` takes it.

    Args:
        costs: Costs of the network.
        bits: Candidate bits of the indicators.
        pairs: See `search`, as all that follow.
        fixed: Layers with given bits.
        tied: Layers with equal bits.
        tie_shared_inputs: Whether layers that read the same tensor have equal activation bits.
        tie_added_inputs: Whether those do that read the operands of one addition, or its sum.
        min_bits: Fewest bits of layers.
        weight_bits: Bits of all weights that are not fixed.
        activation_bits: Bits of all activations that are not fixed.
        target: What the policy is to run on.

    Returns:
        The restrictions, one for each entry.

    Raises:
        TypeError: If something has another type.
        ValueError: If bits are no candidates or outside 2 to 16, or a pattern fits no searchable
            layer, or a group is of one layer.
    """
    found: list[Restriction] = []
    for pattern, allowed in _entries("pairs", pairs):
        name = f"pairs[{pattern!r}]"
        try:
            set_of = frozenset(_pair(name, pair) for pair in allowed)
        except TypeError as error:
            raise TypeError(f"{name} must be a list of (weight bits, activation bits)") from error
        for pair in sorted(set_of):
            for side, given in zip(pair, (weight_bits, activation_bits), strict=True):
                if side not in bits and side != given:
                    raise ValueError(
                        f"{name}: {pair} has {side} bits, the indicators have {list(bits)}"
                    )
        if not set_of:
            raise ContradictionError(f"{name} allows nothing")
        found.append(Limited(name, _fitting(name, pattern, costs), set_of.__contains__))
    held: set[str] = set()
    for pattern, pair in _entries("fixed", fixed):
        name = f"fixed[{pattern!r}]"
        layers = _fitting(name, pattern, costs)
        found.append(Limited(name, layers, _pair(name, pair).__eq__))
        held |= layers
    free = frozenset(layer.name for layer in costs.layers) - held
    for name, given, side in (
        ("weight_bits", weight_bits, 0),
        ("activation_bits", activation_bits, 1),
    ):
        if given is not None:
            found.append(Limited(name, free, _equals(side, check_bits(name, given))))
    for pattern, least in _entries("min_bits", min_bits):
        name = f"min_bits[{pattern!r}]"
        both = _pair(name, least if isinstance(least, Iterable) else (least, least))
        found.append(Limited(name, _fitting(name, pattern, costs), _at_least(both)))
    if not isinstance(tied, Iterable):
        raise TypeError(f"tied must be a list of patterns or of lists of patterns, got {tied!r}")
    for group in [tied] if isinstance(tied, str) else tied:
        patterns = (group,) if isinstance(group, str) else tuple(group)
        name = f"tied[{', '.join(map(repr, patterns))}]"
        layers = frozenset().union(*(_fitting(name, pattern, costs) for pattern in patterns))
        if len(layers) < 2:
            raise ValueError(f"{name}: is one layer, {min(layers, default='none')!r}: name two")
        ordered = tuple(layer.name for layer in costs.layers if layer.name in layers)
        found.append(Tied(name, (ordered,), False, (None,)))
    for name, tie, groups in (
        ("tie_shared_inputs", tie_shared_inputs, costs.shared_inputs),
        ("tie_added_inputs", tie_added_inputs, costs.added_inputs),
    ):
        if not isinstance(tie, bool):
            raise TypeError(f"{name} must be True or False, got {tie!r}")
        if tie:
            found.append(tied_inputs(costs, groups, name))
    if target is not None:
        found += _of_target(costs, target)
    return tuple(found)


def _of_target(costs: Costs, target: Target) -> list[Restriction]:
    """The pairs of bits that a target has kernels for, and its ties."""
    if not isinstance(target, Target):
        raise TypeError(f"target must be a Target, of load_target, got {target!r}")
    name = f"target {target.name!r}"
    layers = frozenset(layer.name for layer in costs.layers)
    found: list[Restriction] = [Limited(name, layers, frozenset(target.pairs).__contains__)]
    if target.tie_shared_inputs:
        found.append(tied_inputs(costs, costs.shared_inputs, f"shared inputs, for {name}"))
    if target.tie_added_inputs:
        found.append(tied_inputs(costs, costs.added_inputs, f"added inputs, for {name}"))
    return found


def tied_inputs(costs: Costs, groups: Iterable[tuple[str, ...]], name: str) -> Tied:
    """The activation bits of the layers of a group agree, with those of fixed layers too."""
    searchable = {layer.name for layer in costs.layers}
    joined = merged(groups)
    fixed = [[name for name in group if name not in searchable] for group in joined]
    return Tied(
        name,
        tuple(tuple(name for name in group if name in searchable) for group in joined),
        True,
        tuple((costs.fixed_bits, names[0]) if names else None for names in fixed),
    )


def given_bits(
    costs: Costs,
    fixed: Mapping[str, Pair] | None,
    weight_bits: int | None,
    activation_bits: int | None,
) -> dict[str, tuple[set[int], set[int]]]:
    """Layer -> weight bits and activation bits that the user gave it.

    These can be had although they are not among the candidates, or are forbidden there. The
    arguments are as `make_restrictions` has checked them.
    """
    given: dict[str, tuple[set[int], set[int]]] = {
        layer.name: (
            set() if weight_bits is None else {operator.index(weight_bits)},
            set() if activation_bits is None else {operator.index(activation_bits)},
        )
        for layer in costs.layers
    }
    for pattern, pair in (fixed or {}).items():
        for name in given:
            if matches(name, [pattern]):
                for bits, side in zip(given[name], pair, strict=True):
                    bits.add(operator.index(side))
    return given


def allowed_pairs(
    base: Mapping[str, Sequence[Pair]], restrictions: Sequence[Restriction]
) -> dict[str, tuple[Pair, ...]]:
    """The pairs of every layer that its restrictions allow, and that those tied to it can match.

    Args:
        base: Layer -> pairs that it could have without restrictions.
        restrictions: The restrictions.

    Returns:
        Layer -> pairs, in the order of ``base``.

    Raises:
        ContradictionError: If a layer has none.
    """
    allowed = {}
    for layer, pairs in base.items():
        own = [r for r in restrictions if isinstance(r, Limited) and layer in r.layers]
        allowed[layer] = tuple(pair for pair in pairs if all(r.allows(pair) for r in own))
        if not allowed[layer]:
            names = ", ".join(r.name for r in own) or "the indicators"
            raise ContradictionError(f"layer {layer!r} has no bits left that {names} allow")
    changed = True
    while changed:  # a group that loses bits may take them from a group that shares a layer with it
        changed = False
        for activations_only, group, given, names in _all_groups(restrictions):
            label = _label(activations_only)
            common = set.intersection(*({label(pair) for pair in allowed[n]} for n in group))
            if given is not None:
                common &= {given[0]}
            if not common:
                sides = "activation bits" if activations_only else "bits"
                had = "; ".join(f"{n!r}: {_listed(allowed[n], activations_only)}" for n in group)
                if given is not None:
                    had += (
                        f"; {given[1]!r}: {given[0]}, fixed by the costs, which fixed= can give the"
                        " others too"
                    )
                raise ContradictionError(f"{names} need equal {sides}, which is impossible: {had}")
            for name in group:
                kept = tuple(pair for pair in allowed[name] if label(pair) in common)
                changed |= len(kept) < len(allowed[name])
                allowed[name] = kept
    return allowed


def make_links(
    columns: Mapping[str, Sequence[Pair]], restrictions: Sequence[Restriction]
) -> tuple[Link, ...]:
    """The ties of the restrictions, for the integer program.

    Args:
        columns: Layer -> pairs, layers in the order of the program's groups.
        restrictions: The restrictions.
    """
    places = {name: place for place, name in enumerate(columns)}
    links = []
    for activations_only, group, _, _ in _all_groups(restrictions):
        # One number for each label, the same one in all layers.
        if len(group) > 1:
            label = _label(activations_only)
            links.append(Link({places[n]: [label(pair) for pair in columns[n]] for n in group}))
    return tuple(links)


def merged(groups: Iterable[Iterable[str]]) -> list[list[str]]:
    """Groups, of which those that share a name are one, in the order of their first names."""
    found: list[list[str]] = []
    for group in groups:
        members = list(dict.fromkeys(group))
        touching = [other for other in found if set(other) & set(members)]
        rest = [other for other in found if not set(other) & set(members)]
        joined = list(dict.fromkeys([name for other in [*touching, members] for name in other]))
        found = [*rest, joined]
    return found


def _all_groups(
    restrictions: Sequence[Restriction],
) -> list[tuple[bool, list[str], tuple[int, str] | None, str]]:
    """Groups of tied layers: activations only?, layers, given bits, names of the restrictions."""
    found = []
    for activations_only in (False, True):
        ties = [
            r
            for r in restrictions
            if isinstance(r, Tied) and r.activations_only == activations_only
        ]
        for group in merged(group for tie in ties for group in tie.groups):
            parts = [
                (tie.name, given)
                for tie in ties
                for own, given in zip(tie.groups, tie.given, strict=True)
                if set(own) & set(group)
            ]
            given = next((given for _, given in parts if given is not None), None)
            names = ", ".join(dict.fromkeys(name for name, _ in parts))
            if group:
                found.append((activations_only, group, given, names))
    return found


def _label(activations_only: bool) -> Callable[[Pair], int]:
    """What has to be equal, as a number."""
    return (lambda pair: pair[1]) if activations_only else (lambda pair: 100 * pair[0] + pair[1])


def _listed(pairs: Sequence[Pair], activations_only: bool) -> str:
    if activations_only:
        return ", ".join(map(str, sorted({pair[1] for pair in pairs})))
    return ", ".join(f"W{pair[0]}A{pair[1]}" for pair in pairs)


def _entries(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must map patterns of layer names, got {value!r}")
    return value.items()


def _pair(name: str, value: Any) -> Pair:
    try:
        weight, activation = value
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (weight bits, activation bits), got {value!r}") from None
    return check_bits(name, weight), check_bits(name, activation)


def _fitting(name: str, pattern: Any, costs: Costs) -> frozenset[str]:
    """The searchable layers that a pattern fits; a pattern of a module fits all layers in it."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name}: a pattern is a string, got {pattern!r}")
    found = frozenset(layer.name for layer in costs.layers if matches(layer.name, [pattern]))
    if not found:
        out = [layer.name for layer in costs.fixed if matches(layer.name, [pattern])]
        why = f"layer {out[0]!r} is fixed by the costs" if out else "no layer has such a name"
        raise ValueError(f"{name}: {pattern!r} fits no searchable layer: {why}")
    return found


def _equals(side: int, bits: int) -> Callable[[Pair], bool]:
    return lambda pair: pair[side] == bits


def _at_least(least: Pair) -> Callable[[Pair], bool]:
    return lambda pair: pair[0] >= least[0] and pair[1] >= least[1]
