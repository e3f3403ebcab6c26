"""What is left for HiGHS: a mixed-integer program whose answers are checked in exact integers."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np

from limpq_ext.ilp.rows import Link, NoSolutionError, Row
from limpq_ext.values.optional import require

TOLERANCE: Final = 1e-9
"""HiGHS's feasibility tolerance. Rows and values are scaled to at most 1024, so that one unit of
most rows is well above it; where it is not, the exact check notices."""


_MOST: Final = 1e300
"""Larger than any number that HiGHS is given."""


def _near(number: Fraction) -> float:
    """A number as a float, a huge one cut."""
    return float(max(-Fraction(_MOST), min(number, Fraction(_MOST))))


def _scaled(number: int, exponent: int) -> float:
    """An integer times a power of two that is 1 at most, however large the integer is."""
    return number / (1 << -exponent)


def silent_highs(highspy: Any) -> Any:
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
class Answer:
    """What HiGHS answered.

    Attributes:
        chosen: The choice in each group.
        bound: A bound of the objective, less what HiGHS's tolerances can make of it.
        late: Whether time ran out.
    """

    chosen: tuple[int, ...]
    bound: Fraction
    late: bool


class Mip:
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
        shared: list[set[int]] = []
        while shared != (left := [self._share(link) for link in links]):
            shared = left
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
        costs = [_scaled(above[column] // unit, exponent) for column in columns]
        if weight is None:
            self._exact.append(row)
            # Half a unit more admits no other integers, and keeps HiGHS's rounding from excluding
            # an answer that uses the limit up. Where a unit is below HiGHS's tolerance this admits
            # answers that break the limit: they are found in exact integers and cut off.
            limit = _scaled(min((row.limit - base) // unit, sum(above) // unit), exponent)
            limit += max(math.ldexp(0.5, exponent), 8 * TOLERANCE)
        else:
            limit = _near(Fraction(row.limit - base, unit) * Fraction(2) ** exponent)
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
        offset: Fraction | int = 0,
    ) -> Answer:
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
        # Only a relative gap needs to know what is added; as a float it costs digits.
        added = _near((base + offset) * scale) if gap else 0.0
        model.offset_ = added
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
                # A value of 1024 may be off by the tolerance in every group.
                bound = Fraction(max(info.mip_dual_bound, -_MOST)) - Fraction(added)
                bound = (bound - 1024 * len(self._groups) * Fraction(TOLERANCE)) / scale + base
                return Answer(chosen, bound, status == known.kTimeLimit)
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
        highs = silent_highs(self._highspy)
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
