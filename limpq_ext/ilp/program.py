"""The integer program behind the search: exact answers, proven in whole numbers.

Groups of choices (the layers), one choice to be made in each; every choice has a value, and every
row gives it a cost. The sum of the values is to be smallest while no row's costs exceed its limit.

Rows are few and groups are many, so the Lagrangian relaxation of the rows is almost tight. With
prices p >= 0 on the rows, every answer costs at least

    L(p) = sum over the groups of min over the choices of (value + p . cost)  -  p . limit,

and at least L(p) + r if it uses a choice that is r above the minimum of its group. So:

1. `relaxation` maximises L by cutting planes. HiGHS solves their linear program, which
   has as many columns as there are rows here, whatever the number of groups.
2. `sweep` drops the choices that are too far above the minimum, and goes through the
   groups that have some left, holding all partial answers at once. L of what is still open, at a
   few prices, bounds a partial answer; those above the best known answer go. Where more are left
   than may be held, the most promising stay, and the least bound of the others is remembered: a
   sweep is a heuristic and, once nothing was dropped that could be better, the proof.
3. Where values are of so different sizes that a float cannot hold the sums, sweeps count in a unit
   in which small values are nothing. What is worse than the best known answer then goes, and what
   is left makes a program of its own, with a finer unit.
4. What sweeps leave unproven, HiGHS solves as a mixed-integer program, `mip`. Its answer
   is optimal up to its tolerance, which the solution says.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

import numpy as np

from limpq_ext.ilp.columns import Layout, WholeTable, by_group, in_time, lay_out, undominated
from limpq_ext.ilp.mip import TOLERANCE, Mip
from limpq_ext.ilp.relaxation import CuttingPlanes, around, rounded
from limpq_ext.ilp.rows import Link, NoSolutionError, Row, Solution, Stop, total
from limpq_ext.ilp.sweep import PartialAnswers, sweep
from limpq_ext.values.optional import require

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

WIDTHS: Final = (256, 2048, 16384, 131072)
"""Partial answers that a sweep holds, one sweep after the other. Of more the best ones stay."""

LAST_WIDTH: Final = 65536
"""Partial answers that the sweep may hold that proves what HiGHS found."""

FINER: Final = 10
"""By so many bits at least has the unit of the values to become finer for a program of its own."""

Value = float | Fraction


def minimise(
    values: Sequence[Sequence[Value]],
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

    Values are exact: a float is the decimal that it is written as, and all of them are whole
    numbers of a common unit. Objective, ties and proof are facts about integers: two answers are
    equal if they have as many units, and an answer is optimal if no other that keeps the limits
    has fewer.

    Args:
        values: Value of every choice of every group, finite.
        rows: The limits.
        links: Groups that have to agree. A group may be in several.
        tiebreaks: Tables of costs like a row's. Of equal answers the one with the smallest sum of
            the first table is taken, of those that are equal in it too the one with the smallest
            sum of the second, and so on.

        deadline: ``time.perf_counter()`` at which to give up what is not built yet.

    Raises:
        TimeoutError: If the deadline passed.
        ValueError: If there is no group, a group has no choice, a value is not finite, or a row,
            link or tiebreak is of another shape than the values.
        NoSolutionError: If the links cannot be kept together.
        ImportError: If highspy is not installed.
    """

    def __init__(
        self,
        values: Sequence[Sequence[Value]],
        rows: Sequence[Row],
        *,
        links: Sequence[Link] = (),
        tiebreaks: Sequence[list[list[int]]] = (),
        deadline: float = math.inf,
    ) -> None:
        highspy: Any = require("highspy", "search")
        sizes = [len(group) for group in values]
        _check_shapes(sizes, rows, links, tiebreaks)
        self._starts = np.cumsum([0, *sizes])
        self._highspy = highspy
        self._values = exact_values(values)
        flat = list(itertools.chain.from_iterable(self._values))
        denominator = math.lcm(*{value.denominator for value in flat})
        units = [
            [value.numerator * (denominator // value.denominator) for value in group]
            for group in self._values
        ]
        largest = sum(max(map(abs, group)) for group in units)
        if largest >= denominator * 2**1024:
            raise ValueError("the values are too large to be added up")
        self._rows, self._links, self._tiebreaks = list(rows), list(links), list(tiebreaks)
        self._whole = WholeTable(units, self._starts)
        self._base = Fraction(self._whole.base, denominator)
        self._unit = Fraction(self._whole.unit, denominator)
        self._whole_rows = [WholeTable(row.costs, self._starts) for row in in_time(rows, deadline)]
        whole_ties = [WholeTable(table, self._starts) for table in tiebreaks]
        self._exact = all(row.exact for row in self._whole_rows)
        self._exact_ties = all(ties.exact for ties in whole_ties)
        kept = undominated(
            self._whole.comparable,
            self._whole_rows,
            whole_ties,
            self._links,
            self._starts,
            deadline,
        )
        self._layout, self._loose = lay_out(kept, self._starts, self._links)
        # of every column: value, costs, what rounding left of the value, tiebreaks
        tables = [self._whole.costs, *(whole.costs for whole in self._whole_rows)]
        tables += [*self._whole.limbs(), *(whole.costs for whole in whole_ties)]
        self._columns = np.stack([table[self._layout.source] for table in tables])
        self._costs = self._columns[1 : 1 + len(rows)]
        # no answer has more units
        self._most = float(self._whole.most // self._whole.unit)
        self._cuts = CuttingPlanes(highspy, self._layout, self._columns[: 1 + len(rows)])
        self._solver = f"HiGHS {highspy.Highs().version()}"

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
            HiGHS could prove is optimal, and its ties broken, up to HiGHS's tolerance of 1e-9; its
            bound is lower by that.

        Raises:
            NoSolutionError: If the rows and links cannot be kept together.
            TimeoutError: If the deadline passed before anything was found.
            RuntimeError: If HiGHS fails.
        """
        limits = [row.limit for row in self._rows] if limits is None else [*map(int, limits)]
        task = _Task(self, limits, gap, deadline)
        if start is not None:
            task.offer(start)
        stopped_by: Stop
        try:
            stopped_by = task.run()
        except TimeoutError:
            if task.best is None:
                raise TimeoutError("no policy was found within the time limit") from None
            stopped_by = "time"
        assert task.best is not None
        objective = self.objective(task.best)
        bound = objective if stopped_by == "optimal" else min(objective, task.bound)
        return Solution(tuple(task.best), _below(bound), self._solver, stopped_by, task.prices())

    def objective(self, chosen: Sequence[int]) -> Fraction:
        """The sum of values of a choice, exactly."""
        return self._base + Fraction(self.above(chosen), self._whole.unit) * self._unit

    def above(self, chosen: Sequence[int]) -> int:
        """The same above the smallest values, in the unit before it is rounded."""
        return sum(self._whole.above[self._starts[:-1] + np.asarray(chosen)].tolist())

    def choices(self, sources: np.ndarray) -> list[int]:
        """The choice in each group, of indices among all choices."""
        return (np.sort(sources) - self._starts[:-1]).tolist()

    def value(self, units: float) -> Fraction:
        """The sum of values that has so many units above the smallest values."""
        return self._base + Fraction(units) * self._unit

    def units(self, value: Fraction) -> float:
        """How many units a difference of values is, at most what all answers can have."""
        return float(min(value / self._unit, Fraction(self._most)))

    def only(self, sources: np.ndarray) -> tuple[Program, list[list[int]]] | None:
        """The same program of some of the choices, if its unit is much finer.

        Args:
            sources: Sorted indices among all choices.

        Returns:
            The program, and the choices of each group that it has. None where it is not finer.
        """
        above = self._whole.above[sources]
        groups = by_group(sources, self._starts)
        first = np.cumsum([0, *map(len, groups)])[:-1]
        span = np.maximum.reduceat(above, first) - np.minimum.reduceat(above, first)
        if self._whole.exact or sum(span.tolist()) >> (self._whole.most.bit_length() - FINER):
            return None
        left = [
            (group - start).tolist() for group, start in zip(groups, self._starts, strict=False)
        ]

        def some(table: Sequence[Sequence[Any]]) -> list[list[Any]]:
            return [[own[i] for i in kept] for own, kept in zip(table, left, strict=True)]

        program = Program(
            some(self._values),
            [Row(some(row.costs), row.limit) for row in self._rows],
            links=[
                Link({g: [labels[i] for i in left[g]] for g, labels in link.labels.items()})
                for link in self._links
            ],
            tiebreaks=[some(table) for table in self._tiebreaks],
        )
        return program, left


class _Task:
    """One solve: the best answer so far and what is proven.

    Attributes:
        best: The best answer that keeps the limits, None before there is one.
        upper: Its units, rounded down. No answer that is as good has costs of more units.
        lower: No answer has fewer units.
        bound: No answer has a smaller sum of values.
    """

    def __init__(self, program: Program, limits: list[int], gap: float, deadline: float) -> None:
        self._program, self._limits, self._gap, self._deadline = program, limits, gap, deadline
        wholes = zip(program._whole_rows, limits, strict=True)
        self._room = np.array([whole.room(limit) for whole, limit in wholes], dtype=float)
        self._prices = np.zeros((1, len(limits)))
        self.best: list[int] | None = None
        self.upper = math.inf
        self.lower = 0.0
        self.bound = program._base
        self._finer: _Task | None = None
        self._units = 0  # of the best answer, before rounding

    def offer(self, chosen: Sequence[int]) -> None:
        """Take a choice as the best one if it is, and keeps everything."""
        units = self._program.above(chosen)
        if (self.best is None or units < self._units) and self._kept(chosen):
            self._set_best(chosen)

    def _set_best(self, chosen: Sequence[int]) -> None:
        self.best = [int(i) for i in chosen]
        self._units = self._program.above(self.best)
        self.upper = float(self._units // self._program._whole.unit)

    def _raise_lower(self, units: float) -> None:
        """Take a number of units that no answer is below."""
        self.lower = max(self.lower, units)
        self.bound = max(self.bound, self._program.value(self.lower))

    def _kept(self, chosen: Sequence[int]) -> bool:
        rows = zip(self._program._rows, self._limits, strict=True)
        return all(row.use(chosen) <= limit for row, limit in rows) and all(
            link.kept(chosen) for link in self._program._links
        )

    def prices(self) -> tuple[float, ...]:
        """The shadow prices, in value for a unit of the rows as they were given."""
        if self._finer is not None:
            return self._finer.prices()
        program = self._program
        units = [whole.unit for whole in program._whole_rows]
        return tuple(
            float(Fraction(price) * program._unit / unit)
            for price, unit in zip(self._prices[0].tolist(), units, strict=True)
        )

    def run(self) -> Stop:
        """Search until the answer is proven or within the gap."""
        program = self._program
        if (program._layout.minima(program._costs)[2].sum(axis=-1) > self._room).any():
            raise NoSolutionError("a row cannot be kept even by the cheapest choices")
        floor, best_prices = program._cuts.maximise(self._room, self._deadline)
        self._raise_lower(floor - self._margins(best_prices[None])[0])
        if self.lower > program._most:
            raise NoSolutionError("the rows cannot be kept together")
        self._prices = around(best_prices, program._cuts.most_costs)
        self._round()
        if program._loose:
            return self._finer_or_branch()
        reach, widths = self._reach(floor), iter(WIDTHS)
        width = next(widths)
        while width:
            target = min(self.upper, floor + reach, program._most)
            found, dropped = self._sweep(target, width)
            swept = target if self._beyond(target) else self.upper
            self._raise_lower(min(swept, dropped))
            if self._proven(found, dropped, target):
                return "optimal"
            if self._within_gap():
                return "gap"
            nothing = not found or dropped == math.inf
            if nothing and target < min(self.upper, program._most):
                reach *= 4
            elif not found and dropped == math.inf:
                raise NoSolutionError("the rows cannot be kept together")
            else:
                if (stopped_by := self._search_finer()) is not None:
                    return stopped_by
                width = 0 if dropped == -math.inf else next(widths, 0)
        return self._branch()

    def _beyond(self, target: float) -> bool:
        """Whether there may be answers of more units than ``target`` that are as good as the best.

        A sweep sees the sum of the rounded values, which may be below the rounded sum.
        """
        return self.upper > target

    def _proven(self, found: bool, dropped: float, target: float) -> bool:
        """Whether the answer is the best one, after a sweep up to some units."""
        if found and dropped > self.upper and not self._beyond(target):
            return True
        # others may be as good
        program = self._program
        return program._whole.exact and self.lower > self.upper - 1 and not program._tiebreaks

    def _finer_or_branch(self) -> Stop:
        return self._search_finer() or self._branch()

    def _search_finer(self) -> Stop | None:
        """Search only what is not worse than the best answer, if it can be counted more finely.

        Returns:
            How that ended, None where it was not done.
        """
        program = self._program
        if self.best is None or program._whole.exact:
            return None
        sub = program.only(np.unique(self._left().source))
        if sub is None:
            return None
        self._finer = task = _Task(sub[0], self._limits, self._gap, self._deadline)
        if all(choice in left for choice, left in zip(self.best, sub[1], strict=True)):
            task.offer([left.index(i) for i, left in zip(self.best, sub[1], strict=True)])
        try:
            return task.run()
        except NoSolutionError:  # HiGHS's tolerance: there is one
            return None
        finally:
            self.bound = max(self.bound, task.bound)
            if task.best is not None:
                self._set_best([left[i] for left, i in zip(sub[1], task.best, strict=True)])

    def _left(self) -> Layout:
        """The columns with which there may be an answer that is as good as the best one."""
        layout = self._program._layout
        if self.best is None:
            return layout
        above, least = layout.above(self._priced())
        most = self.upper + self._margins(self._prices[:1])[0] + self._prices[0] @ self._room
        kept = above <= most - least
        above, least = layout.above(self._program._columns[0])
        reduced, _ = layout.only(kept & (above <= self.upper - least))
        return layout if reduced is None else reduced

    def _within_gap(self) -> bool:
        """Whether the proven gap is as small as was asked for."""
        if self._gap == 0 or self.best is None:
            return False
        objective = self._program.objective(self.best)
        return objective - self.bound <= Fraction(self._gap) * abs(objective)

    def _round(self) -> None:
        """Offer the relaxed answer, rounded. Only what breaks no row is taken."""
        program = self._program
        penalties = 10 * self._prices[0] + program._most / np.maximum(program._cuts.most_costs, 1.0)
        table = program._columns[: 1 + len(self._limits)]
        sources = rounded(
            program._layout, table, self._prices[0], self._room, penalties, self._deadline
        )
        self.offer(program.choices(sources))

    def _priced(self) -> np.ndarray:
        """Value and costs of the columns, at the best prices."""
        return self._program._columns[0] + self._prices[0] @ self._program._costs

    def _reach(self, floor: float) -> float:
        """How far above the floor to look first.

        To the gap that is asked for, else to where half as many choices as groups are left.
        """
        program = self._program
        if self._gap:
            return max(program.units(Fraction(self._gap) * abs(program.value(floor))), 1.0)
        above, _ = program._layout.above(self._priced())
        above = above[above > 0]
        count = min(len(above) - 1, (len(program._starts) - 1) // 2)
        return max(float(np.partition(above, count)[count]), 1.0) if len(above) else 1.0

    def _margins(self, prices: np.ndarray) -> np.ndarray:
        """What sums of floats may be wrong by, for each of some sets of prices."""
        most = prices @ (self._program._cuts.most_costs + self._room) + self._program._most
        return most * (len(self._program._starts) + 63) * 2.0**-52

    def _sweep(self, target: float, width: int) -> tuple[bool, float]:
        """Go through all answers of up to ``target`` units, holding ``width`` partial ones.

        Returns:
            Whether one was found (it is taken already), and a bound of those that were dropped.
        """
        program = self._program
        prices = np.concatenate((self._prices, np.zeros((1, len(self._limits)))))
        margins = self._margins(prices)
        margins[-1] = 0.0  # the value itself is a sum of integers
        answers, dropped = sweep(
            program._layout,
            program._columns,
            prices,
            -margins - prices @ self._room,
            self._room,
            target=target,
            width=width,
            exact=program._exact,
            deadline=self._deadline,
            widths=program._whole.widths,
        )
        return answers is not None and self._take(answers), dropped

    def _take(self, answers: PartialAnswers) -> bool:
        """Take the best of the answers that a sweep ended with."""
        program = self._program
        best: tuple[int, list[int], list[int]] | None = None
        for sources in answers.answers():
            chosen = program.choices(sources)
            units = program.above(chosen)
            if best is not None and units > best[0]:
                break
            if not program._exact and not self._kept(chosen):
                continue
            sums = [total(table, chosen) for table in program._tiebreaks]
            if best is None or sums < best[1]:
                best = units, sums, chosen
            if program._exact_ties or time.perf_counter() > self._deadline:
                break
        if best is None or (self.best is not None and best[0] > self._units):
            return False
        assert self._kept(best[2])
        self._set_best(best[2])
        return True

    def _branch(self) -> Stop:
        """Let HiGHS solve what is left as a mixed-integer program, then break ties in the same way.

        Every objective that is settled becomes a row: its sum may not rise again.
        """
        program = self._program
        sources = by_group(np.unique(self._left().source), program._starts)
        left = zip(sources, program._starts[:-1], strict=True)
        mip = Mip([(some - first).tolist() for some, first in left], program._links)
        limits = zip(program._rows, self._limits, strict=True)
        for row, limit in in_time(limits, self._deadline):
            mip.add(Row(row.costs, limit))
        ends = itertools.pairwise(program._starts.tolist())
        units = [program._whole.above[first:end].tolist() for first, end in ends]
        unit = program._whole.unit
        try:
            answer = mip.solve(
                units,
                gap=self._gap,
                deadline=self._deadline,
                start=self.best,
                offset=program._base / program._unit * unit if self._gap else 0,
            )
        except NoSolutionError:
            if self.best is None:
                raise
            return "tolerance"
        self.offer(answer.chosen)
        self._raise_lower(float(min(Fraction(self.upper), answer.bound / unit)))
        if answer.late:
            raise TimeoutError
        if self._gap and self._within_gap():
            return "gap"
        assert self.best is not None
        if not program._loose:
            swept = self._sweep(self.upper, LAST_WIDTH)
            if self._proven(*swept, self.upper):
                return "optimal"
        if self._gap:
            return "tolerance"
        for done, table in itertools.pairwise([units, *program._tiebreaks]):
            mip.add(Row(done, total(done, self.best)))
            answer = mip.solve(table, gap=0.0, deadline=self._deadline, start=self.best)
            self._set_best(answer.chosen)
            if answer.late:
                raise TimeoutError
        return "tolerance"


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


def exact_values(values: Sequence[Sequence[Value]]) -> list[list[Fraction]]:
    """Values as fractions, a float as the decimal that it is written as."""
    flat = itertools.chain.from_iterable(values)
    if not all(isinstance(value, Fraction) or math.isfinite(value) for value in flat):
        raise ValueError("a value is not finite")
    return [
        [
            value if isinstance(value, Fraction) else Fraction(Decimal(repr(float(value))))
            for value in group
        ]
        for group in values
    ]


def _below(number: Fraction) -> float:
    """The largest float that is not above a number."""
    near = float(number)
    return near if Fraction(near) <= number else math.nextafter(near, -math.inf)
