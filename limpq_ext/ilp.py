"""The integer program behind the search, solved by HiGHS and checked in exact integers.

Groups of choices (the layers), one choice to be made in each; every choice has a value, and every
row gives it a cost. The sum of the values is to be smallest while no row's costs exceed its limit.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from limpq_ext.extras import require

TOLERANCE: Final = 1e-9
"""HiGHS's feasibility tolerance. Rows and values are scaled to at most 1024, so that one unit of
most rows is well above it; where it is not, the exact check notices."""


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
        return sum(group[i] for group, i in zip(self.costs, chosen, strict=True))

    @property
    def smallest(self) -> int:
        """The sum of the cheapest ones, exactly."""
        return sum(map(min, self.costs))


@dataclass(frozen=True)
class Solution:
    """What `minimise` found.

    Attributes:
        chosen: Index of the choice in each group.
        bound: No choice within the limits has a smaller sum of values, as HiGHS proved.
        solver: Name and version of the solver.
    """

    chosen: tuple[int, ...]
    bound: float
    solver: str


def minimise(
    values: list[list[float]], rows: Sequence[Row], *, gap: float, deadline: float
) -> Solution:
    """Make one choice in each group with the smallest sum of values within the limits.

    Args:
        values: Value of every choice of every group, finite and not negative, not all zero.
        rows: The limits; some choice has to keep them all.
        gap: Relative gap at which to stop early; 0 proves optimality.
        deadline: ``time.perf_counter()`` at which to return the best that was found.

    Returns:
        The choice, which keeps every limit exactly, and its proof.

    Raises:
        TimeoutError: If the deadline passed before anything was found.
        RuntimeError: If HiGHS fails.
        ImportError: If highspy is not installed.
    """
    program = _Program(values, rows, gap)
    while violated := program.solve(deadline):
        program.cut_off(violated)
    return Solution(tuple(program.chosen), program.bound, program.solver)


class _Program:
    """The program as HiGHS gets it, and what HiGHS answered last.

    Attributes:
        chosen: Index of each group's choice in the answer.
        bound: Proven lower bound of the sum of values.
        solver: Name and version of the solver.
    """

    def __init__(self, values: list[list[float]], rows: Sequence[Row], gap: float) -> None:
        self._highspy: Any = require("highspy", "search")
        self._exact = rows
        self._gap = gap
        self._options = {
            "output_flag": False,
            # its reductions were seen to lose the optimum where coefficients differ by 10^8
            "presolve": "off",
            "mip_rel_gap": gap,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": TOLERANCE,
            "primal_feasibility_tolerance": TOLERANCE,
            "dual_feasibility_tolerance": TOLERANCE,
            # the relaxed program is so close that looking for better starts only costs time
            "mip_allow_restart": False,
            "mip_heuristic_effort": 0.0,
            "mip_heuristic_run_feasibility_jump": False,
        }
        self._starts = np.cumsum([0, *map(len, values)])
        flat = list(itertools.chain.from_iterable(values))
        self._exponent = 10 - math.frexp(max(flat))[1]
        self._values = [math.ldexp(value, self._exponent) for value in flat]
        # rows as (columns, coefficients, lower, upper)
        self._rows: list[tuple[Any, Any, float, float]] = []
        for first, end in itertools.pairwise(self._starts):
            self._rows.append((np.arange(first, end), np.ones(end - first), 1.0, 1.0))
        for row in rows:
            self._add(row)
        self.chosen: list[int] = []
        self.bound = -math.inf
        self.solver = f"HiGHS {self._highspy.Highs().version()}"

    def _add(self, row: Row) -> None:
        """Add a row without what every choice costs, in its largest unit, and scaled.

        The scale is a power of two, so that only integers above 2^53 are rounded.
        """
        above = [cost - min(group) for group in row.costs for cost in group]
        unit = math.gcd(*above)
        if unit == 0:  # every choice costs the same
            return
        exponent = min(0, 10 - (max(above) // unit).bit_length())
        columns = [column for column, cost in enumerate(above) if cost]
        costs = [math.ldexp(above[column] // unit, exponent) for column in columns]
        # Half a unit more admits no other integers, and keeps HiGHS's rounding from excluding an
        # answer that uses the limit up. Where a unit is below HiGHS's tolerance this admits answers
        # that break the limit: they are found in exact integers and cut off.
        limit = math.ldexp((row.limit - row.smallest) // unit, exponent)
        limit += max(math.ldexp(0.5, exponent), 8 * TOLERANCE)
        self._rows.append((np.array(columns), np.array(costs), -math.inf, limit))

    def solve(self, deadline: float) -> list[Row]:
        """Solve, and return the rows that the answer breaks when counted in exact integers.

        The relaxed program comes first, in milliseconds. By duality, an answer that uses a column
        whose reduced cost is above r has a sum above the relaxed one + r. So a small core, the
        columns up to some r, is solved as integers; if its best lies within r, it is the best of
        all, else r is raised to it. That is some three times faster than all columns at once.
        """
        relaxed, _, late = self._run(deadline)
        if late:
            raise TimeoutError("no policy was found within the time limit")
        floor = relaxed.getInfo().objective_function_value
        reduced = np.asarray(relaxed.getSolution().col_dual)
        reach = np.partition(reduced, k := min(3 * len(self._starts), len(reduced)) - 1)[k]
        best = math.inf
        while True:
            core = reduced <= reach
            if core.all():
                reach = math.inf
            highs, solved, late = self._run(deadline, core)
            info = highs.getInfo()
            if solved and info.objective_function_value < best:
                best = info.objective_function_value
                values = np.asarray(highs.getSolution().col_value)
                groups = itertools.pairwise(self._starts)
                self.chosen = [int(np.argmax(values[first:end])) for first, end in groups]
            elif best == math.inf and late:
                raise TimeoutError("no policy was found within the time limit")
            elif best == math.inf and reach == math.inf:
                raise RuntimeError("HiGHS finds no policy, although there is one")
            bound = max(floor, min(info.mip_dual_bound, floor + reach))
            enough = best <= floor + reach or best - bound <= self._gap * best
            if best < math.inf and (enough or late):
                self.bound = math.ldexp(bound, -self._exponent)
                return [row for row in self._exact if row.use(self.chosen) > row.limit]
            reach = best - floor + TOLERANCE * best  # above any rounding, so the next one is enough

    def _run(self, deadline: float, core: Any = None) -> tuple[Any, bool, bool]:
        """Run HiGHS on the relaxed program, or in integers on the columns of a core.

        Returns:
            The solver, whether it has a solution, and whether the deadline stopped it.
        """
        highs = self._highspy.Highs()
        for name, value in self._options.items():
            highs.setOptionValue(name, value)
        highs.setOptionValue("time_limit", max(0.0, deadline - time.perf_counter()))
        highs.passModel(self._model(core))
        highs.run()
        status, known = highs.getModelStatus(), self._highspy.HighsModelStatus
        infeasible = status == known.kInfeasible and core is not None  # then it takes more columns
        if not infeasible and status not in (known.kOptimal, known.kTimeLimit):
            raise RuntimeError(f"HiGHS: {highs.modelStatusToString(status)}")
        feasible = int(self._highspy.SolutionStatus.kSolutionStatusFeasible)
        found = highs.getInfo().primal_solution_status == feasible
        return highs, found, status == known.kTimeLimit

    def cut_off(self, violated: Sequence[Row]) -> None:
        """Exclude the last answer, which breaks rows by less than HiGHS's tolerance.

        A cover inequality: if every group of a set costs as much as it does in this answer, the
        limit is broken, so one of them has to cost less. It is exact, and excludes no answer that
        keeps the limit, which a tightened limit could.
        """
        for row in violated:
            pairs = list(zip(row.costs, self.chosen, strict=True))
            above = [group[i] - min(group) for group, i in pairs]
            excess = row.use(self.chosen) - row.limit
            cover = []
            for which in sorted(range(len(above)), key=above.__getitem__):
                if above[which] < excess:
                    excess -= above[which]  # broken without this group too
                else:
                    cover.append(which)
            columns = np.array(
                [
                    self._starts[which] + column
                    for which in cover
                    for column, cost in enumerate(row.costs[which])
                    if cost >= row.costs[which][self.chosen[which]]
                ]
            )
            self._rows.append((columns, np.ones(len(columns)), -math.inf, len(cover) - 1.0))

    def _model(self, core: Any) -> Any:
        """The relaxed program, or the one in integers with the columns of a core only."""
        highspy, count = self._highspy, len(self._values)
        model = highspy.HighsLp()
        columns, costs, lower, upper = zip(*self._rows, strict=True)
        model.num_col_, model.num_row_ = count, len(self._rows)
        model.col_cost_ = np.array(self._values)
        model.col_lower_ = np.zeros(count)
        model.col_upper_ = np.ones(count) if core is None else core.astype(float)
        model.row_lower_, model.row_upper_ = np.array(lower), np.array(upper)
        if core is not None:
            model.integrality_ = [highspy.HighsVarType.kInteger] * count
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.num_col_, model.a_matrix_.num_row_ = count, len(self._rows)
        model.a_matrix_.start_ = np.cumsum([0, *map(len, columns)])
        model.a_matrix_.index_ = np.concatenate(columns)
        model.a_matrix_.value_ = np.concatenate(costs)
        return model
