"""The integer program behind the search: exact answers, proven in whole numbers.

Groups of choices (the layers), one choice to be made in each; every choice has a value, and every
row gives it a cost. The sum of the values is to be smallest while no row's costs exceed its limit.

Rows are few and groups are many, so the Lagrangian relaxation of the rows is almost tight. With
prices p >= 0 on the rows, every answer costs at least

    L(p) = sum over the groups of min over the choices of (value + p . cost)  -  p . limit,

and at least L(p) + r if it uses a choice that is r above the minimum of its group. So:

1. `limpq_ext.relaxation` maximises L by cutting planes. HiGHS solves their linear program, which
   has as many columns as there are rows here, whatever the number of groups.
2. `limpq_ext.sweep` drops the choices that are too far above the minimum, and goes through the
   groups that have some left, holding all partial answers at once. L of what is still open, at a
   few prices, bounds a partial answer; those above the best known answer go. Where more are left
   than may be held, the most promising stay, and the least bound of the others is remembered: a
   sweep is a heuristic and, once nothing was dropped that could be better, the proof.
3. What sweeps leave unproven, HiGHS solves as a mixed-integer program, `limpq_ext.mip`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np

from limpq_ext.columns import WholeTable, by_group, lay_out, undominated
from limpq_ext.extras import require
from limpq_ext.mip import TOLERANCE, Mip
from limpq_ext.relaxation import CuttingPlanes, around, rounded
from limpq_ext.rows import Link, NoSolutionError, Row, Solution, total
from limpq_ext.sweep import PartialAnswers, sweep

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
        highspy: Any = require("highspy", "search")
        sizes = [len(group) for group in values]
        _check_shapes(sizes, rows, links, tiebreaks)
        self._starts = np.cumsum([0, *sizes])
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
        whole_ties = [WholeTable(table, self._starts) for table in tiebreaks]
        self._exact = all(row.exact for row in self._whole_rows)
        self._exact_ties = all(ties.exact for ties in whole_ties)
        kept = undominated(self._whole, self._whole_rows, whole_ties, self._links, self._starts)
        self._layout, self._loose = lay_out(kept, self._starts, self._links)
        # of every column: value, costs, tiebreaks
        tables = [self._whole, *(whole.costs for whole in (*self._whole_rows, *whole_ties))]
        self._columns = np.stack([table[self._layout.source] for table in tables])
        self._costs = self._columns[1 : 1 + len(rows)]
        # no answer has more units
        self._most = float(np.maximum.reduceat(self._whole, self._starts[:-1]).sum())
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
        return Solution(tuple(task.best), bound, self._solver, stopped_by, task.shadow_prices())

    def choices(self, sources: np.ndarray) -> list[int]:
        """The choice in each group, of indices among all choices."""
        return (np.sort(sources) - self._starts[:-1]).tolist()

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
        if (program._layout.minima(program._costs)[2].sum(axis=-1) > self._room).any():
            raise NoSolutionError("a row cannot be kept even by the cheapest choices")
        floor, best_prices = program._cuts.maximise(self._room, self._deadline)
        self.lower = floor - self._margins(best_prices[None])[0]
        if self.lower > program._most:
            raise NoSolutionError("the rows cannot be kept together")
        self._prices = around(best_prices)
        self._round()
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

    def _round(self) -> None:
        """Offer the relaxed answer, rounded. Only what breaks no row is taken."""
        program = self._program
        penalties = 10 * self._prices[0] + program._most / np.maximum(program._cuts.most_costs, 1.0)
        table = program._columns[: 1 + len(self._limits)]
        sources = rounded(program._layout, table, self._prices[0], self._room, penalties)
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
            wanted = self._gap * abs(program.value(floor))
            return max(float(_shifted(wanted, program._decimals)), 1.0)
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
        )
        return answers is not None and self._take(answers), dropped

    def _take(self, answers: PartialAnswers) -> bool:
        """Take the best of the answers that a sweep ended with."""
        program = self._program
        best: tuple[list[int], list[int]] | None = None
        units = math.inf
        for value, sources in answers.answers():
            if value > units:
                break
            chosen = program.choices(sources)
            if not program._exact and not self._kept(chosen):
                continue
            units = value
            sums = [total(table, chosen) for table in program._tiebreaks]
            if best is None or sums < best[0]:
                best = sums, chosen
            if program._exact_ties or time.perf_counter() > self._deadline:
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
            above, least = layout.above(self._priced())
            most = self.upper + self._margins(self._prices[:1])[0] + self._prices[0] @ self._room
            reduced, _ = layout.only(above <= most - least)
            layout = layout if reduced is None else reduced
        sources = by_group(np.unique(layout.source), program._starts)
        left = zip(sources, program._starts[:-1], strict=True)
        mip = Mip([(some - first).tolist() for some, first in left], program._links)
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
