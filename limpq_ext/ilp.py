"""The integer program behind the search: exact answers, proven in whole numbers.

Groups of choices (the layers), one choice to be made in each; every choice has a value, and every
row gives it a cost. The sum of the values is to be smallest while no row's costs exceed its limit.

Rows are few and groups are many, so the Lagrangian relaxation of the rows is almost tight. With
prices p >= 0 on the rows, every answer costs at least

    L(p) = sum over the groups of min over the choices of (value + p . cost)  -  p . limit,

and at least L(p) + r if it uses a choice that is r above the minimum of its group. So:

1. `CuttingPlanes` maximises L by cutting planes. HiGHS solves their linear program, which has as
   many columns as there are rows here, whatever the number of groups.
2. `_Task._sweep` drops the choices that are too far above the minimum, and goes through the
   groups that have some left, holding all partial answers at once. L of what is still open, at a
   few prices, bounds a partial answer; those above the best known answer go. Where more are left
   than may be held, the most promising stay, and the least bound of the others is remembered: a
   sweep is a heuristic and, once nothing was dropped that could be better, the proof.
3. What sweeps leave unproven, HiGHS solves as a mixed-integer program (`Mip`).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np

from limpq_ext.columns import Layout, WholeTable, components, numbered
from limpq_ext.extras import require
from limpq_ext.mip import TOLERANCE, Mip
from limpq_ext.relaxation import CuttingPlanes, around
from limpq_ext.rows import Link, NoSolutionError, Row, Solution, total
from limpq_ext.sweep import PartialAnswers

__all__ = [
    "TOLERANCE",
    "Link",
    "NoSolutionError",
    "Program",
    "Row",
    "Solution",
    "minimise",
    "nearest",
]

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
    program = Mip([range(len(group)) for group in rows[0].costs], links)
    for row, weight in zip(rows, weights, strict=True):
        program.add(row, weight)
    nothing = [[0] * len(group) for group in rows[0].costs]
    return program.solve(nothing, gap=0.0, deadline=deadline).chosen


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
        self._whole_rows = [WholeTable(row.costs, self._starts) for row in rows]
        self._whole_ties = [WholeTable(table, self._starts) for table in tiebreaks]
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
        self._cuts = CuttingPlanes(
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

    def _columns(self) -> Layout:
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
        for groups, links in components(self._links):
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
        cell, option = [numbered(owner[mine])] if mine.any() else [], [np.arange(alone.sum())]
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
        return Layout(*(np.concatenate(parts) for parts in (source, cell, group, option, block)))

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
        self._prices = best_prices * around(int((best_prices > 0).sum()), best_prices > 0)
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
        partial = PartialAnswers(layout, tests, bounds, len(prices), shifts, table[1 + rows :])
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

    def _take(self, partial: PartialAnswers, value: int) -> bool:
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
            sums = [total(table, answer) for table in program._tiebreaks]
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
        mip = Mip(groups, program._links)
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
            mip.add(Row(done, total(done, self.best)))
            answer = mip.solve(table, gap=0.0, deadline=self._deadline, start=self.best)
            self.best = list(answer.chosen)
            if answer.late:
                raise TimeoutError
        return "optimal"


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
