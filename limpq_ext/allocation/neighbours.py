"""Policies beside others: what one swap of bits leads to, and random ones at the budget.

Everything is counted in the exact rows of the integer program. Tied tensors have one bit-width, so
what changes is always all of a tie.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np

from limpq_ext.allocation.measures import Pair
from limpq_ext.allocation.problem import Problem
from limpq_ext.allocation.restrictions import Tied, merged

Pairs = tuple[Pair, ...]
"""Weight bits and activation bits of the searchable layers, in the costs' order."""

AT_BUDGET: Final = Fraction(99, 100)
"""The least share of a budget that a policy uses which is called at the budget."""

_ATTEMPTS: Final = 50
"""Random policies that are begun before one at the budget is given up."""


@dataclass(frozen=True)
class Change:
    """Other bits of a layer, and of those that are tied to it.

    Attributes:
        bits: Place of each layer -> its new bits.
        costs: What it adds to each row.
        rises: Whether a tensor gets more bits.
        falls: Whether a tensor gets fewer bits.
        single: Whether one tensor alone changes, or what is tied to it, or two because the layer
            may have no bits that differ in one.
    """

    bits: Mapping[int, Pair]
    costs: tuple[int, ...]
    rises: bool
    falls: bool
    single: bool


class Neighbours:
    """What can be reached from policies of a search within its budgets and restrictions.

    Args:
        problem: The search; its indicators do not matter but for the bits that they forbid.

    Raises:
        ContradictionError: Restrictions leave a layer no bits.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._columns = [
            {pair: column for column, pair in enumerate(own)} for own in problem.columns
        ]
        self._rows = problem.rows
        self._tied = _tied(problem)

    def changes(self, pairs: Sequence[Pair]) -> list[Change]:
        """All that restrictions allow to change in one layer and what is tied to it."""
        found: dict[frozenset[tuple[int, Pair]], Change] = {}
        for place, own in enumerate(self._columns):
            targets = [target for target in own if target != pairs[place]]
            moves = {target: self._follow(pairs, place, target) for target in targets}
            possible = {target: bits for target, bits in moves.items() if bits is not None}
            apart = {target: _differ(target, pairs[place]) for target in possible}
            for target, bits in possible.items():
                single = apart[target] == 1 or 1 not in apart.values()
                found.setdefault(frozenset(bits.items()), self._change(pairs, bits, single))
        return list(found.values())

    def within(self, pairs: Sequence[Pair]) -> Iterator[dict[int, Pair]]:
        """All neighbours within the budgets: place -> new bits of what differs.

        They are the raises of one layer that fit, the exchanges within a layer, and the swaps: a
        tensor gets more bits, for which no room is left, and one of another layer fewer. What only
        takes bits away is none.

        Args:
            pairs: A policy within the budgets.
        """
        left = self._room(pairs)
        changes = self.changes(pairs)
        rising = []
        for change in changes:
            if change.rises and _fits(change.costs, left):
                yield dict(change.bits)
            elif change.single and change.rises and not change.falls:
                rising.append(change)
        falling = [change for change in changes if change.single and not change.rises]
        for more, less in itertools.product(rising, falling):
            if more.bits.keys().isdisjoint(less.bits) and all(
                a + b <= room for a, b, room in zip(more.costs, less.costs, left, strict=True)
            ):
                yield {**more.bits, **less.bits}

    def is_at_budget(self, pairs: Sequence[Pair], share: Fraction = AT_BUDGET) -> bool:
        """Whether a policy keeps all budgets and uses this share of one at least."""
        return self._problem.keeps(pairs) and any(
            budget.measure.use(pairs) >= share * budget.limit for budget in self._problem.budgets
        )

    def random(
        self, start: Sequence[Pair], generator: np.random.Generator, share: Fraction = AT_BUDGET
    ) -> Pairs | None:
        """A random policy at the budget.

        Bits are drawn for each layer, then bits of random tensors lowered until every budget is
        kept, and raised until one is used to the share. What no budget counts is at its highest.

        Args:
            start: A policy within the restrictions.
            generator: Draws.
            share: The least share of one of the budgets that it uses.

        Returns:
            The policy; None where no draw came to be at the budget.
        """
        for _ in range(_ATTEMPTS):
            pairs = self._lowered(self._drawn(start, generator), generator)
            if pairs is None:
                continue
            pairs = self._raised(pairs, generator, share)
            if self.is_at_budget(pairs, share):
                return tuple(pairs)
        return None

    def _drawn(self, start: Sequence[Pair], generator: np.random.Generator) -> list[Pair]:
        pairs = list(start)
        for place in generator.permutation(len(pairs)).tolist():
            own = list(self._columns[place])
            target = own[int(generator.integers(len(own)))]
            _put(pairs, self._follow(pairs, place, target) or {})
        return pairs

    def _lowered(self, pairs: list[Pair], generator: np.random.Generator) -> list[Pair] | None:
        """The policy with fewer bits here and there, so that it keeps all budgets."""
        while True:
            over = [room < 0 for room in self._room(pairs)]
            if not any(over):
                return pairs
            for change in self._shuffled(pairs, generator):
                moved = [cost for cost, above in zip(change.costs, over, strict=True) if above]
                if max(moved) <= 0 and min(moved) < 0:
                    _put(pairs, change.bits)
                    break
            else:
                return None

    def _raised(
        self, pairs: list[Pair], generator: np.random.Generator, share: Fraction
    ) -> list[Pair]:
        """The policy with more bits here and there, as long as they fit and are missing."""
        while True:
            enough = self.is_at_budget(pairs, share)
            room = self._room(pairs)
            for change in self._shuffled(pairs, generator):
                wanted = not enough or not any(change.costs)
                if change.rises and not change.falls and wanted and _fits(change.costs, room):
                    _put(pairs, change.bits)
                    break
            else:
                return pairs

    def _shuffled(self, pairs: list[Pair], generator: np.random.Generator) -> Iterator[Change]:
        """Changes of one layer in random order, those of one bit-width before those of two."""
        for sides in (1, 2):
            targets = [
                (place, target)
                for place, own in enumerate(self._columns)
                for target in own
                if _differ(target, pairs[place]) == sides
            ]
            for index in generator.permutation(len(targets)).tolist():
                bits = self._follow(pairs, *targets[index])
                if bits is not None:
                    yield self._change(pairs, bits, sides == 1)

    def _room(self, pairs: Sequence[Pair]) -> list[int]:
        """What is left of the limit of each row."""
        chosen = [own[pair] for own, pair in zip(self._columns, pairs, strict=True)]
        return [row.limit - row.use(chosen) for row in self._rows]

    def _follow(self, pairs: Sequence[Pair], place: int, target: Pair) -> dict[int, Pair] | None:
        """All that changes with a layer; None where restrictions do not allow it."""
        changed: dict[int, Pair] = {}
        for side in (0, 1):
            if target[side] == pairs[place][side]:
                continue
            for other in self._tied[side][place]:
                weight, activation = changed.get(other, pairs[other])
                changed[other] = (target[0], activation) if side == 0 else (weight, target[1])
        allowed = all(pair in self._columns[other] for other, pair in changed.items())
        return changed if allowed else None

    def _change(self, pairs: Sequence[Pair], bits: Mapping[int, Pair], single: bool) -> Change:
        costs = tuple(
            sum(
                row.costs[place][self._columns[place][new]]
                - row.costs[place][self._columns[place][pairs[place]]]
                for place, new in bits.items()
            )
            for row in self._rows
        )
        sides = [
            (before, after)
            for place, new in bits.items()
            for before, after in zip(pairs[place], new, strict=True)
        ]
        return Change(
            bits,
            costs,
            rises=any(after > before for before, after in sides),
            falls=any(after < before for before, after in sides),
            single=single,
        )


def largest_uniform(problem: Problem) -> list[Pairs]:
    """The uniform policies within budgets and restrictions that none of them has more bits than.

    Layers with one choice only keep that. Of W4A4, W3A5 and W3A4 the first two are the largest.
    """
    widths = [sorted({pair[side] for own in problem.columns for pair in own}) for side in (0, 1)]
    found: dict[Pair, Pairs] = {}
    for weight, activation in itertools.product(*widths):
        pair = weight, activation
        pairs = tuple(own[0] if len(own) == 1 else pair for own in problem.columns)
        if problem.allows(pairs) and problem.keeps(pairs):
            found[pair] = pairs
    largest = {
        pairs: None
        for (weight, activation), pairs in found.items()
        if not any(
            bw >= weight and ba >= activation and (bw, ba) != (weight, activation)
            for bw, ba in found
        )
    }
    return list(largest)


def changed(pairs: Sequence[Pair], bits: Mapping[int, Pair]) -> Pairs:
    """A policy with other bits in some places."""
    return tuple(bits.get(place, pair) for place, pair in enumerate(pairs))


def _put(pairs: list[Pair], bits: Mapping[int, Pair]) -> None:
    for place, pair in bits.items():
        pairs[place] = pair


def _fits(costs: Sequence[int], left: Sequence[int]) -> bool:
    return all(cost <= room for cost, room in zip(costs, left, strict=True))


def _differ(one: Pair, other: Pair) -> int:
    """How many of the two bit-widths differ."""
    return (one[0] != other[0]) + (one[1] != other[1])


def _tied(problem: Problem) -> tuple[list[list[int]], list[list[int]]]:
    """For weights and for activations: place -> the places whose bits agree with its own."""
    places = {layer.name: place for place, layer in enumerate(problem.costs.layers)}
    both = [[[name] for name in places] for _ in range(2)]
    for rule in problem.in_force:
        if isinstance(rule, Tied):
            for side in (1,) if rule.activations_only else (0, 1):
                both[side] += [list(group) for group in rule.groups]
    found = []
    for groups in both:
        of = {name: group for group in merged(groups) for name in group}
        found.append([[places[name] for name in of[own]] for own in places])
    return found[0], found[1]
