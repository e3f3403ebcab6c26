"""The integer program behind the search: exact answers, proven in whole numbers.

Groups of choices (the layers), one choice to be made in each; every choice has a value, and every
row gives it a cost. The sum of the values is to be smallest while no row's costs exceed its limit.

Rows are few and groups are many, so the Lagrangian relaxation of the rows is almost tight. With
prices p >= 0 on the rows, every answer costs at least

    L(p) = sum over the groups of min over the choices of (value + p . cost)  -  p . limit,

and at least L(p) + r if it uses a choice that is r above the minimum of its group. So:

1. `_CuttingPlanes` maximises L by cutting planes. HiGHS solves their linear program, which has as
   many columns as there are rows here, whatever the number of groups.
2. `_Task._sweep` drops the choices that are too far above the minimum, and goes through the
   groups that have some left, holding all partial answers at once. L of what is still open, at a
   few prices, bounds a partial answer; those above the best known answer go. Where more are left
   than may be held, the most promising stay, and the least bound of the others is remembered: a
   sweep is a heuristic and, once nothing was dropped that could be better, the proof.
3. What sweeps leave unproven, HiGHS solves as a mixed-integer program (`_Mip`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np

from limpq_ext.extras import require

TOLERANCE: Final = 1e-9
"""HiGHS's feasibility tolerance. Rows and values are scaled to at most 1024, so that one unit of
most rows is well above it; where it is not, the exact check notices."""

MOST_TUPLES: Final = 2048
"""So many combinations of labels may a set of linked groups have; above that HiGHS takes over."""

EXCHANGED: Final = 200
"""Choices among which the best exchange of two is looked for."""

WIDTHS: Final = (256, 2048, 16384, 131072)
"""Partial answers that a sweep holds, one sweep after the other. Of more the best ones stay."""

FEW: Final = 500
"""Where no more choices are left HiGHS takes over after sweeps of `PROOF_WIDTH`."""

PROOF_WIDTH: Final = 16384
"""From here on a sweep through few choices is only of use as a proof: it ends if it drops any."""

LAST_WIDTH: Final = 65536
"""Partial answers that the sweep may hold that proves what HiGHS found."""


class NoSolutionError(ValueError):
    """The rows and links cannot be kept together, which was proven."""


@dataclass(frozen=True)
class Row:
    """A limit on the sum of the chosen costs.

    Attributes:
        costs: Cost of every choice of every group, not negative.
        limit: The largest sum that is allowed.
    """

    costs: list[list[int]]
    limit: int

    def use(self, chosen: Sequence[int]) -> int:
        """The sum of the costs of the chosen ones, exactly."""
        return _total(self.costs, chosen)

    @property
    def smallest(self) -> int:
        """The sum of the cheapest ones, exactly."""
        return sum(map(min, self.costs))


@dataclass(frozen=True)
class Link:
    """Groups that have to agree.

    Attributes:
        labels: For each of the groups, by its index, a label of every choice. The labels of the
            chosen ones are the same in all groups of the link.
    """

    labels: dict[int, list[int]]

    def kept(self, chosen: Sequence[int]) -> bool:
        """Whether the chosen ones agree."""
        return len({labels[chosen[group]] for group, labels in self.labels.items()}) < 2


@dataclass(frozen=True)
class Solution:
    """What was found.

    Attributes:
        chosen: Index of the choice in each group.
        bound: No choice within the limits has a smaller sum of values, as was proven.
        solver: Name and version of the solver.
        stopped_by: Why the search ended: ``"optimal"``, the answer is proven; ``"gap"``, it is
            within the gap that was asked for; ``"time"``, the deadline passed.
        prices: Shadow price of each row in the relaxed program: by how much the sum of values
            falls for one unit more of the limit. 0 where the limit does not bind.
    """

    chosen: tuple[int, ...]
    bound: float
    solver: str
    stopped_by: Literal["optimal", "gap", "time"]
    prices: tuple[float, ...]


def minimise(
    values: Sequence[Sequence[float]],
    rows: Sequence[Row],
    *,
    gap: float,
    deadline: float,
    links: Sequence[Link] = (),
    tiebreaks: Sequence[list[list[int]]] = (),
    start: Sequence[int] | None = None,
) -> Solution:
    """Make one choice in each group with the smallest sum of values within the limits.

    See `Program` and `Program.solve`, which this calls.
    """
    program = Program(values, rows, links=links, tiebreaks=tiebreaks)
    return program.solve(gap=gap, deadline=deadline, start=start)


def nearest(
    rows: Sequence[Row],
    weights: Sequence[Fraction],
    *,
    links: Sequence[Link] = (),
    deadline: float,
) -> tuple[int, ...]:
    """The choice that comes nearest to keeping rows that cannot all be kept.

    Args:
        rows: The limits; one at least.
        weights: What one unit above each row's limit counts, positive.
        links: Groups that have to agree; links are kept.
        deadline: ``time.perf_counter()`` at which to return the best that was found.

    Returns:
        The choice with the smallest sum over the rows of weight * max(0, use - limit), up to
        HiGHS's tolerance.

    Raises:
        NoSolutionError: If the links cannot be kept together.
        TimeoutError: If the deadline passed before anything was found.
        RuntimeError: If HiGHS fails.
        ImportError: If highspy is not installed.
    """
    program = _Mip([range(len(group)) for group in rows[0].costs], links)
    for row, weight in zip(rows, weights, strict=True):
        program.add(row, weight)
    nothing = [[0] * len(group) for group in rows[0].costs]
    return program.solve(nothing, gap=0.0, deadline=deadline).chosen


def _total(table: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return sum(group[i] for group, i in zip(table, chosen, strict=True))


class _Whole:
    """A table of integers as floats, above the least of each group and in their largest unit.

    Floats count integers up to 2^53. Where the sums are larger the unit is raised and costs are
    rounded down. A limit rounded down in the same way then admits every answer that the true limit
    admits, and some more, which are recognised when they are counted exactly.

    Attributes:
        costs: The costs of all groups in one array.
        base: What the cheapest choices cost together.
        unit: The unit of ``costs``.
        exact: Whether nothing was rounded.
        above: The costs above the least of each group as integers.
    """

    def __init__(self, table: Sequence[Sequence[int]], starts: np.ndarray) -> None:
        flat = list(itertools.chain.from_iterable(table))
        try:
            costs = np.array(flat, dtype=np.int64)
        except OverflowError:
            costs = np.array(flat, dtype=object)
        least = np.minimum.reduceat(costs, starts[:-1])
        self.above = costs - np.repeat(least, np.diff(starts))
        self.base = sum(least.tolist())
        self.unit = int(np.gcd.reduce(self.above)) or 1
        most = sum(np.maximum.reduceat(self.above, starts[:-1]).tolist())
        excess = max(0, (most // self.unit).bit_length() - 53)
        self.unit <<= excess
        self.exact = excess == 0
        self.costs = (self.above // self.unit).astype(float)

    def room(self, limit: int) -> float:
        """A limit above the base, in the unit."""
        return float(min((limit - self.base) // self.unit, 2**53))

    @property
    def comparable(self) -> np.ndarray:
        """Numbers in the order of the costs, exactly."""
        return self.costs if self.exact else np.unique(self.above, return_inverse=True)[1]


@dataclass(frozen=True)
class _Layout:
    """How columns make up cells, cells options, and options blocks.

    A block is a set of groups that are linked, or a group on its own. An option of a block is a
    combination of the links' labels; in it each group has a cell, with the columns (choices) that
    carry these labels. A block takes one option, and each of its groups a column of that cell. A
    group on its own has one option with one cell.

    Attributes:
        source: The column's index among all choices.
        cell: The column's cell.
        group: The cell's group.
        option: The cell's option.
        block: The option's block.
    """

    source: np.ndarray
    cell: np.ndarray
    group: np.ndarray
    option: np.ndarray
    block: np.ndarray

    def minima(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The least of every cell, option and block, of functions (rows) of the columns."""
        cells = np.minimum.reduceat(columns, _firsts(self.cell), axis=-1)
        options = np.add.reduceat(cells, _firsts(self.option), axis=-1)
        return cells, options, np.minimum.reduceat(options, _firsts(self.block), axis=-1)

    def above(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much using a column raises the sum of the minima at least; that sum."""
        cells, options, blocks = self.minima(columns)
        options = options - blocks[..., self.block]
        above = columns - cells[..., self.cell] + options[..., self.option][..., self.cell]
        return above, blocks.sum(axis=-1)

    def cheapest(self, columns: np.ndarray) -> tuple[np.ndarray, float]:
        """The columns that make up the sum of the minima, one for each group; that sum."""
        cells, options, blocks = self.minima(columns)
        best = np.flatnonzero(options == blocks[self.block])
        taken = np.zeros(len(options), bool)
        taken[best[_firsts(self.block[best])]] = True
        hits = np.flatnonzero((columns == cells[self.cell]) & taken[self.option][self.cell])
        return hits[_firsts(self.cell[hits])], float(blocks.sum())

    def only(self, kept: np.ndarray) -> tuple[_Layout | None, np.ndarray]:
        """Without the columns that are not kept, and without options that lack a cell then.

        Returns:
            The layout, None if a block has no option left; and the columns that are left.
        """
        whole = np.zeros(len(self.group), bool)
        whole[self.cell[kept]] = True
        whole = np.logical_and.reduceat(whole, _firsts(self.option))
        if not np.logical_or.reduceat(whole, _firsts(self.block)).all():
            return None, kept
        kept = np.flatnonzero(kept & whole[self.option][self.cell])
        cells = self.cell[kept[_firsts(self.cell[kept])]]
        options = self.option[cells[_firsts(self.option[cells])]]
        layout = _Layout(
            self.source[kept],
            _numbered(self.cell[kept]),
            self.group[cells],
            _numbered(self.option[cells]),
            self.block[options],
        )
        return layout, kept


def _firsts(sorted_ids: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))


def _numbered(sorted_ids: np.ndarray) -> np.ndarray:
    """The runs of equal numbers, numbered from 0."""
    return np.cumsum(np.concatenate(([0], sorted_ids[1:] != sorted_ids[:-1])))


def _components(links: Sequence[Link]) -> list[tuple[list[int], list[Link]]]:
    """The sets of groups that links connect, with these links."""
    parts: list[tuple[set[int], list[Link]]] = []
    for link in links:
        groups, own = set(link.labels), [link]
        rest = []
        for other_groups, others in parts:
            if groups & other_groups:
                groups, own = groups | other_groups, others + own
            else:
                rest.append((other_groups, others))
        parts = [*rest, (groups, own)]
    return [(sorted(groups), own) for groups, own in parts if groups]


class Program:
    """A program that is built once and solved for as many limits as one likes.

    Values are counted in whole units: a power of ten so small that all groups together span at
    most 2^52 units, and at least a tenth of that. A sum of G values is rounded by at most G / 2
    units, which is G * 1.2e-15 of the span (the sum over the groups of largest - smallest value).
    Decimals of up to 15 - log10(span) places are exact. In these units the objective, the ties and
    the proof are facts about integers: two answers are equal if they have as many units, and an
    answer is optimal if no other that keeps the limits has fewer.

    Args:
        values: Value of every choice of every group, finite.
        rows: The limits.
        links: Groups that have to agree. A group may be in several.
        tiebreaks: Tables of costs like a row's. Of equal answers the one with the smallest sum of
            the first table is taken, of those that are equal in it too the one with the smallest
            sum of the second, and so on.

    Raises:
        ValueError: If there is no group, a group has no choice, a value is not finite, or a row,
            link or tiebreak is of another shape than the values.
        NoSolutionError: If the links cannot be kept together.
        ImportError: If highspy is not installed.
    """

    def __init__(
        self,
        values: Sequence[Sequence[float]],
        rows: Sequence[Row],
        *,
        links: Sequence[Link] = (),
        tiebreaks: Sequence[list[list[int]]] = (),
    ) -> None:
        self._highspy: Any = require("highspy", "search")
        self._sizes = [len(group) for group in values]
        _check_shapes(self._sizes, rows, links, tiebreaks)
        self._starts = np.cumsum([0, *self._sizes])
        self._values = np.array(list(itertools.chain.from_iterable(values)), dtype=float)
        if not np.isfinite(self._values).all():
            raise ValueError("a value is not finite")
        self._rows, self._links, self._tiebreaks = list(rows), list(links), list(tiebreaks)
        lowest = np.minimum.reduceat(self._values, self._starts[:-1])
        above = self._values - np.repeat(lowest, np.diff(self._starts))
        self._base = float(lowest.sum())
        span = float(np.maximum.reduceat(above, self._starts[:-1]).sum())
        if not math.isfinite(span):
            raise ValueError("the values are too large to be added up")
        self._decimals = min(math.floor(math.log10(2**52 / span)), 300) if span else 0
        self._whole = np.rint(_shifted(above, self._decimals))
        self._step = int(np.gcd.reduce(self._whole.astype(np.int64))) or 1  # of all sums
        self._whole_rows = [_Whole(row.costs, self._starts) for row in rows]
        self._whole_ties = [_Whole(table, self._starts) for table in tiebreaks]
        self._exact = all(row.exact for row in self._whole_rows)
        self._exact_ties = all(table.exact for table in self._whole_ties)
        # of every choice: value, costs, tiebreaks
        self._table = np.stack(
            [self._whole, *(whole.costs for whole in (*self._whole_rows, *self._whole_ties))]
        )
        self._layout = self._columns()
        self._most = float(
            np.maximum.reduceat(self._whole, self._starts[:-1]).sum()
        )  # no answer has more units
        self._cuts = _CuttingPlanes(
            self._highspy, self._layout, self._table[: 1 + len(rows), self._layout.source]
        )
        self.solver = f"HiGHS {self._highspy.Highs().version()}"

    def solve(
        self,
        limits: Sequence[int] | None = None,
        *,
        gap: float,
        deadline: float,
        start: Sequence[int] | None = None,
    ) -> Solution:
        """Make one choice in each group with the smallest sum of values within the limits.

        Args:
            limits: Limits of the rows, instead of their own.
            gap: Gap, relative to the sum of values, at which to stop early; with 0 the answer is
                proven and unique: ties are broken by the tiebreaks.
            deadline: ``time.perf_counter()`` at which to return the best that was found.
            start: A choice that may be good, such as the answer for similar limits. It need not
                keep the limits.

        Returns:
            The choice, which keeps every limit and link in exact integers, and its proof. What only
            HiGHS could prove is optimal, and its ties broken, up to HiGHS's tolerance of 1e-9.

        Raises:
            NoSolutionError: If the rows and links cannot be kept together.
            TimeoutError: If the deadline passed before anything was found.
            RuntimeError: If HiGHS fails.
        """
        limits = [row.limit for row in self._rows] if limits is None else [*map(int, limits)]
        task = _Task(self, limits, gap, deadline)
        if start is not None:
            task.offer(start)
        stopped_by: Literal["optimal", "gap", "time"]
        try:
            stopped_by = task.run()
        except TimeoutError:
            if task.best is None:
                raise TimeoutError("no policy was found within the time limit") from None
            stopped_by = "time"
        assert task.best is not None
        objective = math.fsum(self._values[self._starts[:-1] + task.best])
        bound = objective if stopped_by == "optimal" else min(objective, self.value(task.lower))
        return Solution(tuple(task.best), bound, self.solver, stopped_by, task.shadow_prices())

    def _columns(self) -> _Layout:
        """The columns of the choices that are worth keeping, and how the links combine them."""
        kept = np.flatnonzero(self._undominated())
        owner = np.searchsorted(self._starts, kept, side="right") - 1
        choices: list[list[int]] = [[] for _ in self._sizes]
        for group, index in zip(owner.tolist(), kept.tolist(), strict=True):
            choices[group].append(index)
        alone = np.ones(len(self._sizes), bool)
        self._loose = False
        # (choices, group) of each cell, by option, by block
        linked: list[list[list[tuple[list[int], int]]]] = []
        for groups, links in _components(self._links):
            options = self._options(groups, links, choices)
            if options is None:
                self._loose = True  # the relaxation does without these links
                continue
            if not options:
                raise NoSolutionError("the links cannot be kept together")
            linked.append(options)
            alone[groups] = False
        mine = alone[owner]
        source, group = [kept[mine]], [np.flatnonzero(alone)]
        cell, option = [_numbered(owner[mine])] if mine.any() else [], [np.arange(alone.sum())]
        block = [np.arange(alone.sum())]
        cells = options_so_far = blocks = int(alone.sum())
        for options in linked:
            for members in options:
                for indices, which in members:
                    source.append(np.array(indices))
                    cell.append(np.full(len(indices), cells))
                    group.append(np.array([which]))
                    option.append(np.array([options_so_far]))
                    cells += 1
                block.append(np.array([blocks]))
                options_so_far += 1
            blocks += 1
        return _Layout(*(np.concatenate(parts) for parts in (source, cell, group, option, block)))

    def _options(
        self, groups: list[int], links: list[Link], choices: list[list[int]]
    ) -> list[list[tuple[list[int], int]]] | None:
        """The combinations of labels that linked groups can have, None if there are too many.

        Returns:
            For each combination the choices of each group.
        """
        combined: list[dict[int, int]] = [{}]  # labels by the number of the link
        by_labels: list[tuple[int, list[int], dict[tuple[int, ...], list[int]]]] = []
        for group in groups:
            mine = [number for number, link in enumerate(links) if group in link.labels]
            members: dict[tuple[int, ...], list[int]] = {}
            for index in choices[group]:
                choice = index - int(self._starts[group])
                labels = tuple(links[number].labels[group][choice] for number in mine)
                members.setdefault(labels, []).append(index)
            by_labels.append((group, mine, members))
            extended = []
            for known, labels in itertools.product(combined, members):
                asked = dict(zip(mine, labels, strict=True))
                if all(known.get(number, label) == label for number, label in asked.items()):
                    extended.append(known | asked)
            combined = list({tuple(sorted(each.items())): each for each in extended}.values())
            if len(combined) > MOST_TUPLES:
                return None
        return [
            [(members[tuple(each[n] for n in mine)], group) for group, mine, members in by_labels]
            for each in combined
        ]

    def _undominated(self) -> np.ndarray:
        """The choices that no other one of their group, with the same labels, beats.

        One beats another if it costs no more in any row and comes before it in the order of value,
        tiebreaks and index. Taking it instead is then always possible and better.
        """
        count = len(self._values)
        rank = np.empty(count, dtype=int)
        ties = [whole.comparable for whole in reversed(self._whole_ties)]
        rank[np.lexsort((*ties, self._whole))] = np.arange(count)
        costs = [whole.comparable for whole in self._whole_rows]
        for link in self._links:
            for group, labels in link.labels.items():
                own = np.zeros(count)
                numbers = np.unique(np.array(labels, dtype=object), return_inverse=True)[1]
                own[self._starts[group] : self._starts[group + 1]] = numbers
                costs += [own, -own]
        kept = np.ones(count, bool)
        sizes = np.diff(self._starts)
        for size in np.unique(sizes).tolist():
            batch = max(1, 2**22 // size**2)
            groups = np.flatnonzero(sizes == size)
            for first in range(0, len(groups), batch):
                some = self._starts[groups[first : first + batch], None] + np.arange(size)
                beats = rank[some][:, :, None] < rank[some][:, None, :]
                for cost in costs:
                    beats &= cost[some][:, :, None] <= cost[some][:, None, :]
                kept[some] = ~beats.any(axis=1)
        return kept

    def value(self, units: float) -> float:
        """The sum of values that has so many units above the smallest values."""
        return self._base + float(_shifted(units, -self._decimals))


class _Task:
    """One solve: the best answer so far and what is proven.

    Attributes:
        best: The best answer that keeps the limits, None before there is one.
        upper: Its units.
        lower: No answer has fewer units.
    """

    def __init__(self, program: Program, limits: list[int], gap: float, deadline: float) -> None:
        self._program, self._limits, self._gap, self._deadline = program, limits, gap, deadline
        wholes = zip(program._whole_rows, limits, strict=True)
        self._room = np.array([whole.room(limit) for whole, limit in wholes], dtype=float)
        self._prices = np.zeros((1, len(limits)))
        self.best: list[int] | None = None
        self.upper = math.inf
        self.lower = -math.inf

    def offer(self, chosen: Sequence[int]) -> None:
        """Take a choice as the best one if it is, and keeps everything."""
        program = self._program
        units = float(program._whole[program._starts[:-1] + np.asarray(chosen)].sum())
        if units < self.upper and self._kept(chosen):
            self.best, self.upper = [int(i) for i in chosen], units

    def _kept(self, chosen: Sequence[int]) -> bool:
        rows = zip(self._program._rows, self._limits, strict=True)
        return all(row.use(chosen) <= limit for row, limit in rows) and all(
            link.kept(chosen) for link in self._program._links
        )

    def shadow_prices(self) -> tuple[float, ...]:
        """The multipliers, in value for a unit of the rows as they were given."""
        program = self._program
        units = [whole.unit for whole in program._whole_rows]
        prices = _shifted(self._prices[0], -program._decimals).tolist()
        return tuple(price / unit for price, unit in zip(prices, units, strict=True))

    def run(self) -> Literal["optimal", "gap"]:
        """Search until the answer is proven or within the gap."""
        program = self._program
        costs = program._table[1 : 1 + len(self._limits), program._layout.source]
        if (program._layout.minima(costs)[2].sum(axis=-1) > self._room).any():
            raise NoSolutionError("a row cannot be kept even by the cheapest choices")
        floor, best_prices = program._cuts.maximise(self._room, self._deadline)
        self.lower = floor - self._margins(best_prices[None])[0]
        if self.lower > program._most:
            raise NoSolutionError("the rows cannot be kept together")
        self._prices = best_prices * _around(int((best_prices > 0).sum()), best_prices > 0)
        self._exchange()
        if program._loose:
            return self._branch()
        reach, widths = self._reach(floor), iter(WIDTHS)
        width = next(widths)
        while width:
            target = min(self.upper, floor + reach, program._most)
            found, dropped = self._sweep(target, width)
            self.lower = max(self.lower, min(self.upper if found else target, dropped))
            if self._proven(found, dropped):
                return "optimal"
            if self._within_gap():
                return "gap"
            if not found and target < min(self.upper, program._most):
                reach *= 4
            elif not found and dropped == math.inf:
                raise NoSolutionError("the rows cannot be kept together")
            else:
                width = 0 if dropped == -math.inf else next(widths, 0)
        return self._branch()

    def _proven(self, found: bool, dropped: float) -> bool:
        """Whether the answer is the best one, after a sweep up to its units."""
        if found and dropped > self.upper:
            return True
        # others may be as good
        return self.lower > self.upper - self._program._step and not self._program._tiebreaks

    def _within_gap(self) -> bool:
        """Whether the proven gap is as small as was asked for."""
        if self._gap == 0 or self.best is None:
            return False
        objective = self._program.value(self.upper)
        return objective - self._program.value(self.lower) <= self._gap * abs(objective)

    def _exchange(self) -> None:
        """Round the relaxed answer, and exchange the choices of up to two groups at a time.

        Of all pairs of the choices that are nearest to the relaxed answer the best one is made,
        until none is better. Breaking a row counts so much that it soon ends.
        """
        program, rows = self._program, len(self._limits)
        layout, table = program._layout, program._table[: 1 + rows, program._layout.source]
        columns = table[0] + self._prices[0] @ table[1:]
        cheapest, _ = layout.cheapest(columns)
        taken = np.empty(len(program._sizes), dtype=int)
        taken[layout.group[layout.cell[cheapest]]] = cheapest
        above, _ = layout.above(columns)
        most = min(EXCHANGED, 4 * len(taken))
        near = np.sort(np.argsort(above, kind="stable")[:most])
        groups = layout.group[layout.cell[near]]
        apart = groups[:, None] != groups
        apart &= np.isin(layout.option[layout.cell[near]], layout.option[layout.cell[taken]])
        apart &= apart.T
        spans = np.maximum(program._cuts.most_costs, 1.0)
        penalties = 10 * self._prices[0] + program._most / spans

        def merit(sums: np.ndarray) -> np.ndarray:
            excess = np.maximum(sums[1:].T - self._room, 0.0)
            return sums[0] + (excess @ penalties).T

        while True:
            sums = table[:, taken].sum(axis=1)
            change = table[:, near] - table[:, taken[groups]]
            merits = merit(sums[:, None, None] + change[:, :, None] + change[:, None, :])
            best = np.argmin(np.where(apart, merits, math.inf))
            if not merits.flat[best] < merit(sums):
                break
            pair = list(np.unravel_index(best, merits.shape))
            taken[groups[pair]] = near[pair]
        self.offer((layout.source[taken] - program._starts[:-1]).tolist())

    def _reach(self, floor: float) -> float:
        """How far above the floor to look first.

        To the gap that is asked for, else to where half as many choices as groups are left.
        """
        program = self._program
        if self._gap:
            wanted = self._gap * abs(program.value(floor))
            return max(float(_shifted(wanted, program._decimals)), 1.0)
        columns = program._table[0] + self._prices[0] @ program._table[1 : 1 + len(self._limits)]
        above, _ = program._layout.above(columns[program._layout.source])
        above = above[above > 0]
        count = min(len(above) - 1, len(program._sizes) // 2)
        return max(float(np.partition(above, count)[count]), 1.0) if len(above) else 1.0

    def _margins(self, prices: np.ndarray) -> np.ndarray:
        """What sums of floats may be wrong by, for each of some sets of prices."""
        most = prices @ (self._program._cuts.most_costs + self._room) + self._program._most
        return most * (len(self._program._sizes) + 64) * 2.0**-52

    def _sweep(self, target: float, width: int) -> tuple[bool, float]:
        """Go through all answers of up to ``target`` units, holding ``width`` partial ones.

        The widest ones give up as soon as there are more, where HiGHS does better.

        Returns:
            Whether one was found (it is offered already), and a bound of those that were dropped.
        """
        program, rows = self._program, len(self._limits)
        table = program._table[:, program._layout.source]
        # The tests of an answer: relaxations at several prices, the last of them 0, which leaves
        # the value itself, exactly; then the rows.
        prices = np.concatenate((self._prices, np.zeros((1, rows))))
        margins = self._margins(prices)
        margins[-1] = 0.0
        shifts = -margins - prices @ self._room
        bounds = np.concatenate((target - shifts, self._room))
        layout = program._layout
        for some in (slice(0, 1), slice(None)):
            tests = np.concatenate(
                (table[0] + prices[some] @ table[1 : 1 + rows], table[1 : 1 + rows])
            )
            limits = np.concatenate(((target - shifts)[some], self._room))
            above, least = layout.above(tests)
            reduced, kept = layout.only((above <= (limits - least)[:, None]).all(axis=0))
            if reduced is None:
                return False, math.inf
            layout = reduced
            table, tests = table[:, kept], tests[:, kept]
        partial = _Partial(layout, tests, bounds, len(prices), shifts, table[1 + rows :])
        dropped = math.inf
        for level in partial.levels(self._prices[0]):
            if not partial.states.shape[1]:
                return False, dropped
            if time.perf_counter() > self._deadline:
                raise TimeoutError
            dropped = min(dropped, partial.extend(level, width, program._exact))
            if dropped < math.inf and width >= PROOF_WIDTH and len(layout.source) <= FEW:
                return False, -math.inf
        return self._take(partial, len(prices) - 1), dropped

    def _take(self, partial: _Partial, value: int) -> bool:
        """Take the best of the answers that a sweep ended with, whose values are in that row."""
        program = self._program
        values, ties = partial.states[value], partial.states[value + 1 + len(self._limits) :]
        best: tuple[list[int], list[int]] | None = None
        units = math.inf
        for index in np.lexsort((*ties[::-1], values)):
            if values[index] > units:
                break
            chosen = np.zeros(len(program._sizes), dtype=int)
            columns = partial.columns(int(index))
            groups = partial.layout.group[partial.layout.cell[columns]]
            chosen[groups] = partial.layout.source[columns] - program._starts[groups]
            answer = chosen.tolist()
            if not program._exact and not self._kept(answer):
                continue
            units = float(values[index])
            sums = [_total(table, answer) for table in program._tiebreaks]
            if best is None or sums < best[0]:
                best = sums, answer
            if program._exact_ties:
                break
            if time.perf_counter() > self._deadline:
                break
        if best is None:
            return False
        assert self._kept(best[1])
        self.best, self.upper = best[1], units
        return True

    def _branch(self) -> Literal["optimal", "gap"]:
        """Let HiGHS solve what is left as a mixed-integer program, then break ties in the same way.

        Every objective that is settled becomes a row: its sum may not rise again.
        """
        program = self._program
        layout = program._layout
        if self.best is not None:
            rows = slice(1, 1 + len(self._limits))
            columns = program._table[:, layout.source]
            above, least = layout.above(columns[0] + self._prices[0] @ columns[rows])
            most = self.upper + self._margins(self._prices[:1])[0] + self._prices[0] @ self._room
            reduced, _ = layout.only(above <= most - least)
            layout = layout if reduced is None else reduced
        groups: list[list[int]] = [[] for _ in program._sizes]
        sources = np.unique(layout.source)
        owners = np.searchsorted(program._starts, sources, side="right") - 1
        for group, source in zip(owners.tolist(), sources.tolist(), strict=True):
            groups[group].append(source - int(program._starts[group]))
        mip = _Mip(groups, program._links)
        for row, limit in zip(program._rows, self._limits, strict=True):
            mip.add(Row(row.costs, limit))
        ends = itertools.pairwise(program._starts.tolist())
        units = [[int(unit) for unit in program._whole[first:end]] for first, end in ends]
        answer = mip.solve(
            units,
            gap=self._gap,
            deadline=self._deadline,
            start=self.best,
            offset=_shifted(program._base, program._decimals),
        )
        self.offer(answer.chosen)
        self.lower = max(self.lower, min(self.upper, answer.bound))
        if answer.late:
            raise TimeoutError
        if self._gap:
            return "gap"
        assert self.best is not None
        if not program._loose and self._proven(*self._sweep(self.upper, LAST_WIDTH)):
            return "optimal"
        for done, table in itertools.pairwise([units, *program._tiebreaks]):
            mip.add(Row(done, _total(done, self.best)))
            answer = mip.solve(table, gap=0.0, deadline=self._deadline, start=self.best)
            self.best = list(answer.chosen)
            if answer.late:
                raise TimeoutError
        return "optimal"


@dataclass(frozen=True)
class _Level:
    """A group to go through.

    Attributes:
        columns: Its columns.
        options: Their options, counted within the block.
        first: Whether the group is the first of its block, and so picks the option.
        rest: For every test and option the least that the groups still to come add.
    """

    columns: np.ndarray
    options: np.ndarray
    first: bool
    rest: np.ndarray


class _Partial:
    """Answers for some of the groups, all at once.

    What an answer has to pass are tests: linear functions of its value and costs that may not
    exceed a bound. Those of a partial answer are known but for the groups still to come, which add
    a known least.

    Args:
        layout: The columns that are left.
        tests: The tests of every column.
        bounds: Their bounds.
        relaxations: How many of the tests, the first ones, are relaxations of the whole program.
        shifts: What makes the sum of a relaxation a bound of the value.
        ties: The tiebreaks of every column.

    Attributes:
        layout: The columns that are left.
        states: Tests and tiebreaks (rows) of every partial answer (columns).
    """

    def __init__(
        self,
        layout: _Layout,
        tests: np.ndarray,
        bounds: np.ndarray,
        relaxations: int,
        shifts: np.ndarray,
        ties: np.ndarray,
    ) -> None:
        self.layout = layout
        self._table, self._bounds = np.concatenate((tests, ties)), bounds
        self._relaxations, self._shifts = relaxations, shifts
        self._cells, _, self._blocks = layout.minima(tests)
        cell_blocks = layout.block[layout.option]
        counts = np.bincount(cell_blocks[layout.cell])
        self._single = (counts == np.bincount(cell_blocks)) & (np.bincount(layout.block) == 1)
        self._fixed = np.flatnonzero(self._single[cell_blocks[layout.cell]])
        possible = bool((self._blocks.sum(axis=1) <= bounds).all())
        self.states = self._table[:, self._fixed].sum(axis=1, keepdims=True)[:, :possible]
        self._labels = np.zeros(self.states.shape[1], dtype=int)
        self._trail: list[tuple[np.ndarray, np.ndarray]] = []

    def levels(self, prices: np.ndarray) -> Iterator[_Level]:
        """The groups with columns to choose from, those of a block together.

        Blocks whose choice matters most for the rows come first: what is open is then soon so
        small that the bounds are tight.

        Args:
            prices: Prices of the rows, whose costs are the last tests.
        """
        layout, tests = self.layout, len(self._bounds)
        cell_blocks = layout.block[layout.option]
        firsts = _firsts(layout.cell)
        costs = self._table[tests - len(prices) : tests]
        ranges = np.maximum.reduceat(costs, firsts, axis=1)
        ranges -= np.minimum.reduceat(costs, firsts, axis=1)
        ranges *= prices[:, None]
        weights = np.maximum.reduceat(ranges.max(axis=0, initial=0.0), _firsts(cell_blocks))
        order = np.argsort(-weights, kind="stable")
        order = order[~self._single[order]]
        rests = np.cumsum(self._blocks[:, order[::-1]], axis=1)[:, ::-1]
        rests = np.concatenate((rests[:, 1:], np.zeros((len(rests), 1))), axis=1)
        block_cells = np.append(_firsts(cell_blocks), len(cell_blocks))
        cell_columns = np.append(firsts, len(layout.cell))
        options = np.bincount(layout.block)
        for place, block in enumerate(order.tolist()):
            begin, end = block_cells[block], block_cells[block + 1]
            columns = np.arange(cell_columns[begin], cell_columns[end])
            rest = rests[:, place, None]
            if end - begin == 1:
                yield _Level(columns, np.zeros(len(columns), dtype=int), True, rest)
                continue
            groups = (end - begin) // options[block]
            cells = layout.cell[columns] - begin
            minima = self._cells[:, begin:end].reshape(len(rest), -1, groups)
            for which in range(groups):
                mine = cells % groups == which
                later = rest + minima[:, :, which + 1 :].sum(axis=2)
                yield _Level(columns[mine], cells[mine] // groups, which == 0, later)

    def extend(self, level: _Level, width: int, exact: bool) -> float:
        """Add every column of a group to every partial answer, and drop what fails a test.

        Args:
            level: The group.
            width: How many may be held.
            exact: Whether equal states are equal answers, so that one of them is enough.

        Returns:
            The least bound of those that were dropped because there were too many, or infinity.
        """
        tests = len(self._bounds)
        columns = self._table[:, level.columns]
        rest = level.rest[:, level.options] if level.rest.shape[1] > 1 else level.rest
        most = self._bounds[:, None] - rest - columns[:tests]
        passed = np.ones((len(level.columns), self.states.shape[1]), dtype=bool)
        if not level.first:
            passed &= self._labels == level.options[:, None]
        for some in (slice(first, first + 16) for first in range(0, tests, 16)):
            passed &= (self.states[:tests][some, None] <= most[some, :, None]).all(axis=0)
        # column by column: one index into all rows of a large array at once takes ten times as long
        parts = [np.flatnonzero(each) for each in passed]
        states = np.concatenate(
            [
                self.states.take(part, axis=1, mode="clip") + columns[:, which, None]
                for which, part in enumerate(parts)
            ],
            axis=1,
        )
        parents = np.concatenate(parts)
        which = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        dropped, kept = math.inf, None
        if len(parents) > width and exact:
            kept = self._different(states, level.options[which])
        if len(parents if kept is None else kept) > width:
            labels = level.options[which] if level.rest.shape[1] > 1 else np.zeros_like(which)
            bound = states[: self._relaxations] + self._shifts[:, None]
            bound = (bound + level.rest[: self._relaxations].take(labels, axis=1)).max(axis=0)
            kept = np.arange(len(parents)) if kept is None else kept
            order = np.argpartition(bound[kept], width)
            dropped = float(bound[kept[order[width]]])
            kept = np.sort(kept[order[:width]])
        if kept is not None:
            states, parents, which = states.take(kept, axis=1), parents[kept], which[kept]
        labels = level.options[which]
        self.states, self._labels = states, labels
        self._trail.append((parents, level.columns[which]))
        return dropped

    def _different(self, states: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The first by the tiebreaks of those that agree in value, costs and option."""
        settled = states[self._relaxations - 1 : len(self._bounds)]  # the value and the costs
        ties = states[len(self._bounds) :]
        values = np.sort(settled[0])
        if (values[1:] != values[:-1]).all():
            return np.arange(len(values))
        order = np.lexsort((*ties[::-1], *settled, labels))
        keys = np.vstack((settled[:, order], labels[order]))
        new = np.concatenate(([True], (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
        return np.sort(order[new])

    def columns(self, index: int) -> np.ndarray:
        """The columns of one of the answers."""
        taken = []
        for parents, columns in reversed(self._trail):
            taken.append(columns[index])
            index = parents[index]
        return np.concatenate((self._fixed, np.array(taken[::-1], dtype=int)))


def _around(binding: int, which: np.ndarray) -> np.ndarray:
    """Factors that give prices around the best ones; the first are all 1.

    The best prices bound the whole, others are better for what is still open in a partial answer.
    """
    if binding > 3:  # all combinations would be too many
        one_each = [
            np.where(np.eye(binding)[k], f, 1.0) for k in range(binding) for f in (0.8, 1.25)
        ]
        factors = np.array([np.ones(binding), *one_each, *np.full((2, binding), [[0.8], [1.25]])])
    else:
        factors = np.array(list(itertools.product((1.0, 0.8, 1.25), repeat=binding)))
    spread = np.ones((len(factors), len(which)))
    spread[:, which] = factors.reshape(len(factors), binding)
    return spread


class _CuttingPlanes:
    """Maximises L of the module's docstring.

    The choices that are cheapest at some prices give a plane that L lies below, at every limit: an
    answer for one limit begins with the planes of those before it.

    Attributes:
        most_costs: What each row's dearest choices cost together.
    """

    def __init__(self, highspy: Any, layout: _Layout, table: np.ndarray) -> None:
        self._highspy, self._layout = highspy, layout
        self._units = np.maximum(table.max(axis=1), 1.0)
        self._table = table / self._units[:, None]
        dearest = np.maximum.reduceat(table, _firsts(layout.cell), axis=1)
        self.most_costs = dearest.sum(axis=1)[1:]
        self._master: Any = None

    def maximise(self, room: np.ndarray, deadline: float) -> tuple[float, np.ndarray]:
        """The largest L and its prices, nearly: any prices give a valid L."""
        room = room / self._units[1:]
        best, at = -math.inf, np.zeros(len(room))
        if len(room) == 0:
            return self._cut(at)[0] * self._units[0], at
        if self._master is None or self._master.getNumRow() > 300:
            self._begin()
            trial = at
        else:
            trial = self._peak(room)[1]
        for _ in range(200):
            if time.perf_counter() > deadline:
                raise TimeoutError
            value, use = self._cut(trial)
            floor = value + trial @ (use - room)
            if floor > best:
                best, at = floor, trial
            ones = np.arange(1 + len(room), dtype=np.int32)
            self._master.addRow(-math.inf, value, len(ones), ones, np.concatenate(([1.0], -use)))
            upper, peak = self._peak(room)
            if (peak >= 0.999 * self._box).any() and self._box < 1e9:
                self._widen()
                trial = peak
                continue
            if upper - best <= 1e-8 * abs(upper):
                break
            # halfway first: the peak of few planes is far off
            trial = peak if upper - best < 1e-3 * abs(upper) else (peak + at) / 2
        return best * self._units[0], at * self._units[0] / self._units[1:]

    def _cut(self, prices: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and use of the cheapest choices."""
        columns, _ = self._layout.cheapest(self._table[0] + prices @ self._table[1:])
        sums = self._table[:, columns].sum(axis=1)
        return float(sums[0]), sums[1:]

    def _begin(self) -> None:
        """The program of the planes: the height above all of them, and the prices."""
        self._box = 1.0
        self._master = _silent(self._highspy)
        self._master.changeObjectiveSense(self._highspy.ObjSense.kMaximize)
        self._master.addVar(-math.inf, math.inf)
        self._master.changeColCost(0, 1.0)
        for _ in range(len(self._units) - 1):
            self._master.addVar(0.0, self._box)

    def _widen(self) -> None:
        self._box *= 8
        for column in range(1, len(self._units)):
            self._master.changeColBounds(column, 0.0, self._box)

    def _peak(self, room: np.ndarray) -> tuple[float, np.ndarray]:
        """The highest point below all planes, an upper bound of L, and where it is."""
        for column, most in enumerate(room.tolist(), 1):
            self._master.changeColCost(column, -most)
        self._master.run()
        if self._master.getModelStatus() != self._highspy.HighsModelStatus.kOptimal:
            return -math.inf, np.zeros(len(room))
        solution = np.array(self._master.getSolution().col_value)
        return float(solution[0] - solution[1:] @ room), np.maximum(solution[1:], 0.0)


def _silent(highspy: Any) -> Any:
    """A new HiGHS with the tolerances and without output."""
    highs = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "presolve": "off",
        "primal_feasibility_tolerance": TOLERANCE,
        "dual_feasibility_tolerance": TOLERANCE,
    }.items():
        highs.setOptionValue(name, value)
    return highs


@dataclass(frozen=True)
class _Answer:
    """What HiGHS answered: the choice, a bound of the objective, and whether time ran out."""

    chosen: tuple[int, ...]
    bound: float
    late: bool


class _Mip:
    """A mixed-integer program for HiGHS, whose answers are checked in exact integers.

    Args:
        groups: The choices that each group may still take.
        links: Groups that have to agree.

    Raises:
        NoSolutionError: If the links leave a group without a choice.
    """

    def __init__(self, groups: Sequence[Sequence[int]], links: Sequence[Link]) -> None:
        self._highspy: Any = require("highspy", "search")
        self._groups = [list(group) for group in groups]
        shared = [self._share(link) for link in links]
        while any(self._share(link) != old for link, old in zip(links, shared, strict=True)):
            shared = [self._share(link) for link in links]
        self._starts = np.cumsum([0, *map(len, self._groups)]).tolist()
        self._count = self._starts[-1]  # of columns; those of labels and excesses come at the end
        self._excesses: dict[int, Fraction] = {}
        self._exact: list[Row] = []
        # rows as (columns, coefficients, lower, upper)
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        for first, end in itertools.pairwise(self._starts):
            self._rows.append(([*range(first, end)], [1.0] * (end - first), 1.0, 1.0))
        for link, labels in zip(links, shared, strict=True):
            for label, group in itertools.product(sorted(labels), link.labels):
                members = [
                    place
                    for place, choice in enumerate(self._groups[group], self._starts[group])
                    if link.labels[group][choice] == label
                ]
                column = self._count + sorted(labels).index(label)
                coefficients = [1.0] * len(members) + [-1.0]
                self._rows.append(([*members, column], coefficients, 0.0, 0.0))
            self._count += len(labels)

    def _share(self, link: Link) -> set[int]:
        """The labels that all groups of a link still have; choices with others are dropped."""
        shared = set.intersection(
            *({labels[i] for i in self._groups[group]} for group, labels in link.labels.items())
        )
        if not shared:
            raise NoSolutionError("the links cannot be kept together")
        for group, labels in link.labels.items():
            self._groups[group] = [i for i in self._groups[group] if labels[i] in shared]
        return shared

    def _above(self, table: Sequence[Sequence[int]]) -> tuple[list[int], int]:
        """The costs of the columns above the least of their groups, and the sum of the least."""
        above: list[int] = []
        base = 0
        for costs, group in zip(table, self._groups, strict=True):
            least = min(costs[i] for i in group)
            above += [costs[i] - least for i in group]
            base += least
        return above, base

    def add(self, row: Row, weight: Fraction | None = None) -> None:
        """Add a row without what every choice costs, in its largest unit, and scaled.

        The scale is a power of two, so that only integers above 2^53 are rounded.

        Args:
            row: The row.
            weight: What a unit above the limit adds to the objective; None: the limit holds.

        Raises:
            NoSolutionError: If even the cheapest choices are above a limit that holds.
        """
        above, base = self._above(row.costs)
        unit = math.gcd(*above)
        if weight is None and row.limit < base:
            raise NoSolutionError("a row cannot be kept even by the cheapest choices")
        if unit == 0:  # every choice costs the same
            return
        exponent = min(0, 10 - (max(above) // unit).bit_length())
        columns = [column for column, cost in enumerate(above) if cost]
        costs = [math.ldexp(above[column] // unit, exponent) for column in columns]
        if weight is None:
            self._exact.append(row)
            # Half a unit more admits no other integers, and keeps HiGHS's rounding from excluding
            # an answer that uses the limit up. Where a unit is below HiGHS's tolerance this admits
            # answers that break the limit: they are found in exact integers and cut off.
            limit = math.ldexp((row.limit - base) // unit, exponent)
            limit += max(math.ldexp(0.5, exponent), 8 * TOLERANCE)
        else:
            limit = float(Fraction(row.limit - base, unit) * Fraction(2) ** exponent)
            columns.append(self._count)
            costs.append(-1.0)
            self._excesses[self._count] = weight * unit / Fraction(2) ** exponent
            self._count += 1
        self._rows.append((columns, costs, -math.inf, limit))

    def solve(
        self,
        table: Sequence[Sequence[int]],
        *,
        gap: float,
        deadline: float,
        start: Sequence[int] | None = None,
        offset: float = 0.0,
    ) -> _Answer:
        """The choice with the smallest sum of a table and of weighted excesses.

        Args:
            table: What the choices count.
            gap: Gap, relative to the sum and the offset, at which HiGHS may stop.
            deadline: ``time.perf_counter()`` at which it has to stop.
            start: A choice to begin with.
            offset: What is added to the sum.

        Raises:
            NoSolutionError: If there is none.
            TimeoutError: If the deadline passed before anything was found.
            RuntimeError: If HiGHS fails.
        """
        above, base = self._above(table)
        largest = max([Fraction(max(above)), *self._excesses.values()]) or Fraction(1)
        scale = Fraction(1024) / largest
        objective = np.zeros(self._count)
        objective[: len(above)] = [float(cost * scale) for cost in above]
        for column, weight in self._excesses.items():
            objective[column] = float(weight * scale)
        model = self._model(objective)
        model.offset_ = (base + offset) * float(scale)
        known = self._highspy.HighsModelStatus
        while True:
            self._set_rows(model)
            highs = self._run(model, gap, deadline, start)
            info, status = highs.getInfo(), highs.getModelStatus()
            if status == known.kInfeasible:
                raise NoSolutionError("the rows and links cannot be kept together")
            if status not in (known.kOptimal, known.kTimeLimit):
                raise RuntimeError(f"HiGHS: {highs.modelStatusToString(status)}")
            feasible = int(self._highspy.SolutionStatus.kSolutionStatusFeasible)
            if info.primal_solution_status != feasible:
                raise TimeoutError("no policy was found within the time limit")
            values = highs.getSolution().col_value
            ends = zip(self._groups, itertools.pairwise(self._starts), strict=True)
            chosen = tuple(group[int(np.argmax(values[a:b]))] for group, (a, b) in ends)
            violated = [row for row in self._exact if row.use(chosen) > row.limit]
            if not violated:
                bound = info.mip_dual_bound / float(scale) - offset
                return _Answer(chosen, bound, status == known.kTimeLimit)
            self._cut_off(violated, chosen)

    def _cut_off(self, violated: Sequence[Row], chosen: Sequence[int]) -> None:
        """Exclude the last answer, which breaks rows by less than HiGHS's tolerance.

        A cover inequality: if every group of a set costs as much as it does in this answer, the
        limit is broken, so one of them has to cost less. It is exact, and excludes no answer that
        keeps the limit, which a tightened limit could.
        """
        for row in violated:
            parts = list(zip(row.costs, chosen, self._groups, strict=True))
            above = [costs[i] - min(costs[j] for j in group) for costs, i, group in parts]
            excess = row.use(chosen) - row.limit
            cover = []
            for which in sorted(range(len(above)), key=above.__getitem__):
                if above[which] < excess:
                    excess -= above[which]  # broken without this group too
                else:
                    cover.append(which)
            columns = [
                column
                for which in cover
                for column, choice in enumerate(self._groups[which], self._starts[which])
                if row.costs[which][choice] >= row.costs[which][chosen[which]]
            ]
            self._rows.append((columns, [1.0] * len(columns), -math.inf, len(cover) - 1.0))

    def _model(self, objective: np.ndarray) -> Any:
        """The columns as HiGHS gets them."""
        model = self._highspy.HighsLp()
        model.num_col_ = self._count
        model.col_cost_ = objective
        model.col_lower_ = np.zeros(self._count)
        upper = np.ones(self._count)
        upper[list(self._excesses)] = math.inf
        model.col_upper_ = upper
        kinds = [self._highspy.HighsVarType.kInteger] * self._count
        for column in self._excesses:
            kinds[column] = self._highspy.HighsVarType.kContinuous
        model.integrality_ = kinds
        return model

    def _set_rows(self, model: Any) -> None:
        """The rows as HiGHS gets them."""
        columns, coefficients, lower, upper = zip(*self._rows, strict=True)
        model.num_row_ = len(self._rows)
        model.row_lower_, model.row_upper_ = np.array(lower), np.array(upper)
        model.a_matrix_.format_ = self._highspy.MatrixFormat.kRowwise
        model.a_matrix_.num_col_, model.a_matrix_.num_row_ = self._count, len(self._rows)
        model.a_matrix_.start_ = np.cumsum([0, *map(len, columns)])
        model.a_matrix_.index_ = np.concatenate([np.array(c, dtype=np.int32) for c in columns])
        model.a_matrix_.value_ = np.concatenate([np.array(c, dtype=float) for c in coefficients])

    def _run(self, model: Any, gap: float, deadline: float, start: Sequence[int] | None) -> Any:
        highs = _silent(self._highspy)
        for name, value in {
            "mip_rel_gap": gap,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": TOLERANCE,
            "time_limit": max(0.0, deadline - time.perf_counter()),
            "mip_allow_restart": False,
            # from a good start it only costs time to look for better ones
            "mip_heuristic_effort": 0.05 if start is None else 0.0,
            "mip_heuristic_run_feasibility_jump": start is None,
        }.items():
            highs.setOptionValue(name, value)
        highs.passModel(model)
        if start is not None:
            values = np.zeros(self._starts[-1])
            for group, first, choice in zip(self._groups, self._starts, start, strict=False):
                if choice in group:
                    values[first + group.index(choice)] = 1.0
            highs.setSolution(len(values), np.arange(len(values), dtype=np.int32), values)
        highs.run()
        return highs


def _check_shapes(
    sizes: list[int],
    rows: Sequence[Row],
    links: Sequence[Link],
    tiebreaks: Sequence[Sequence[Sequence[int]]],
) -> None:
    """Everything has to be about the same groups and choices."""
    if not sizes:
        raise ValueError("there is no group to choose for")
    if 0 in sizes:
        raise ValueError(f"group {sizes.index(0)} has no choice")
    tables: list[tuple[str, int, Sequence[Sequence[int]]]] = [
        ("row", index, row.costs) for index, row in enumerate(rows)
    ]
    tables += [("tiebreak", index, table) for index, table in enumerate(tiebreaks)]
    for kind, index, table in tables:
        if [len(group) for group in table] != sizes:
            raise ValueError(f"{kind} {index} has other groups or choices than the values")
    for index, link in enumerate(links):
        for group, labels in link.labels.items():
            if not 0 <= group < len(sizes) or len(labels) != sizes[group]:
                raise ValueError(f"link {index} has other choices in group {group} than the values")


def _shifted(number: Any, decimals: int) -> Any:
    """A number or an array times a power of ten, which may be a small one."""
    return number * 10.0**decimals if decimals >= 0 else number / 10.0**-decimals
