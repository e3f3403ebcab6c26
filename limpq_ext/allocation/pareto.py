"""The trade-off curve: exact optima for a whole range of one budget, the others kept."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from limpq_ext.allocation.budgets import (
    Asked,
    exact_limit,
    find_budget,
    in_exact_words,
    in_short_words,
)
from limpq_ext.allocation.infeasible import least_limit, why_infeasible
from limpq_ext.allocation.measures import Measure, Pair
from limpq_ext.allocation.problem import Problem, Question, make_problem
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import Document, Strict, open_atomically
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import BudgetUse, Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SHOWN: Final = 12  # points that the printed table has, about


@dataclass(frozen=True)
class CurvePoint(Strict):
    """The best policy within one limit.

    Attributes:
        limit: The limit of the budget that moves, in its unit.
        used: What the policy uses of it.
        policy: The policy, with its objective, gap and budgets.
    """

    limit: int | float
    used: int | float
    policy: Policy


@dataclass(frozen=True)
class UniformPoint(Strict):
    """A uniform policy beside the curve; layers with one choice only keep that.

    Attributes:
        weight_bits: Bit-width of the weights.
        activation_bits: Bit-width of the activations.
        objective: Its sum of indicators and of what pairs of layers add.
        used: What it uses of the budget that moves.
        allowed: Whether it keeps the restrictions and the other budgets.
        best: The objective of the curve's best point that uses no more; None if there is none.
    """

    weight_bits: int
    activation_bits: int
    objective: float
    used: int | float
    allowed: bool
    best: float | None


@dataclass(frozen=True)
class Curve(Document):
    """What `pareto` found.

    Attributes:
        over: Name of the budget that moves.
        points: The optima, from the strictest limit to the loosest.
        uniform: Uniform policies, for comparison.
        knee: Place of the knee in ``points``: with use and objective scaled to 0 .. 1, the point
            that lies farthest below the straight line from the first point to the last. None where
            no point lies below it.
        meta: The question; anything that JSON has a form for.

    Raises:
        ValueError: If there is no point, or the knee is not one of them.
    """

    over: str
    points: tuple[CurvePoint, ...]
    uniform: tuple[UniformPoint, ...] = ()
    knee: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-curve"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(self.points))
        object.__setattr__(self, "uniform", tuple(self.uniform))
        if not self.points:
            raise ValueError("curve: there are no points")
        if self.knee is not None and not 0 <= self.knee < len(self.points):
            raise ValueError(f"curve: knee {self.knee} is not one of {len(self.points)} points")

    def save_csv(self, path: str | os.PathLike[str]) -> None:
        """Write points and uniform policies as a table, atomically.

        The column ``policy`` is ``searched`` or, for example, ``W3A4``. Use and limit of the budget
        that moves are in its unit; the other budgets have a column each.

        Args:
            path: The file to write or to replace.

        Raises:
            OSError: If the file cannot be written.
        """
        others = [b.name for b in self.points[0].policy.budgets if b.name != self.over]
        text = io.StringIO(newline="")
        lines = csv.writer(text, lineterminator="\n")
        lines.writerow(
            ["policy", f"{self.over}_limit", self.over, "objective", "gap", "knee",
             "mean_weight_bits", "mean_activation_bits", *(f"{name}_used" for name in others)]
        )  # fmt: skip
        for place, point in enumerate(self.points):
            uses = {budget.name: budget.used for budget in point.policy.budgets}
            lines.writerow(
                ["searched", point.limit, point.used, point.policy.objective, point.policy.gap,
                 int(place == self.knee), *point.policy.mean_bits(),
                 *(uses[name] for name in others)]
            )  # fmt: skip
        for own in self.uniform:
            name = f"W{own.weight_bits}A{own.activation_bits}"
            lines.writerow(
                [name, "", own.used, own.objective, "", "", own.weight_bits, own.activation_bits,
                 *[""] * len(others)]
            )  # fmt: skip
        with open_atomically(path) as file:
            file.write(text.getvalue().encode())

    def text(self) -> str:
        """A short table: some of the points with the knee, and the uniform policies."""
        last = len(self.points) - 1
        places = {round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)}
        if self.knee is not None:
            places.add(self.knee)
        lines = [f"{self.over + ' limit':>24}  {'used':>20}  {'objective':>12}  mean bits"]
        for place in sorted(places):
            point = self.points[place]
            means = "W{:.2f} A{:.2f}".format(*point.policy.mean_bits())
            mark = "  knee" if place == self.knee else ""
            lines.append(
                f"{in_short_words(self.over, point.limit):>24}"
                f"  {in_short_words(self.over, point.used):>20}"
                f"  {point.policy.objective:>12.6f}  {means}{mark}"
            )
        for own in self.uniform:
            above = ""
            if own.best:
                above = f"{(own.objective - own.best) / abs(own.best):+.1%} above the curve"
            kept = above if own.allowed else "breaks another budget or restriction"
            lines.append(
                f"{f'W{own.weight_bits}A{own.activation_bits}':>24}"
                f"  {in_short_words(self.over, own.used):>20}"
                f"  {own.objective:>12.6f}  {kept}".rstrip()
            )
        return "\n".join(lines)


def pareto(
    indicators: Indicators,
    costs: Costs,
    *,
    over: str = "bitops",
    points: int = 100,
    start: Asked | None = None,
    stop: Asked | None = None,
    **question: Unpack[Question],
) -> Curve:
    """Find the best policy for each limit in a range of one budget.

    Each point is solved as `search` would solve it, starting from its neighbour's answer.

    Args:
        indicators: Learned indicators of the searchable layers.
        costs: Costs of the same layers and of the fixed ones.
        over: The budget that moves; any name of a budget of `search`.
        points: Number of limits, evenly spaced in whole units (for the compression: in bits of the
            weights). Where the range has fewer units than that, each is one point.
        start: The strictest limit, a number, level or share; by default the smallest that can be
            kept (of the compression the largest).
        stop: The loosest limit; by default what the best policy without this budget uses.
        question: Budgets, restrictions and options as `search` takes them. The time limit is for
            each point.

    Returns:
        The curve.

    Raises:
        TypeError: If something has another type.
        ValueError: If there is no such budget, it has a limit of its own, there are fewer than 2
            points, ``start`` cannot be kept, the range is empty, or as in `search`.
        InfeasibleError: If no policy keeps the other budgets and restrictions.
        TimeoutError: If the time limit passed before there was a policy for a point.
    """
    find_budget(over)
    if question.get(over) is not None:
        raise ValueError(f"{over} is the budget that moves: give start and stop instead of a limit")
    if isinstance(points, bool) or not isinstance(points, int):
        raise TypeError(f"points must be an integer, got {points!r}")
    if points < 2:
        raise ValueError(f"points must be 2 or more, got {points}")
    without_limit = 1e-300 if over == "compression" else 1e300
    problem = make_problem(indicators, costs, **{**question, over: without_limit})  # type: ignore[arg-type]
    measure = next(budget.measure for budget in problem.budgets if budget.name == over)
    limits = _limits(problem, measure, points, start, stop)
    found = []
    previous: Sequence[int] | None = None
    for limit in limits:
        solution = problem.program.solve(
            _row_limits(problem, over, limit),
            gap=problem.gap,
            deadline=problem.deadline(),
            start=previous,
        )
        previous = solution.chosen
        found.append(_point(problem.policy(solution), over, measure.shown(limit)))
    uniform = _uniform(problem, over, question)
    knee = _knee([_below(measure, point) for point in found])
    best = [(own, _best_within(found, own, measure)) for own in uniform]
    return Curve(
        over,
        tuple(found),
        tuple(dataclasses.replace(own, best=objective) for own, objective in best),
        knee,
        {
            **problem.meta,
            "budgets": {b.name: b.asked for b in problem.budgets if b.name != over},
            "restrictions": [rule.name for rule in problem.in_force],
            "solver": solution.solver,
        },
    )


def _limits(
    problem: Problem, measure: Measure, points: int, start: Asked | None, stop: Asked | None
) -> list[int]:
    """The limits in whole units, from the strictest to the loosest."""
    least = least_limit(problem, measure.name, problem.deadline())
    if least is None:
        raise why_infeasible(problem.without(measure.name))

    def whole(value: Asked) -> int:
        return measure.whole(exact_limit(measure, value, problem.costs, problem.latency_table))

    def words(limit: int) -> str:
        return in_exact_words(measure.name, measure.shown(limit) if limit > 0 else 0)

    first = least if start is None else whole(start)
    if first < least:
        most = "largest" if measure.inverse else "smallest"
        raise ValueError(
            f"start: {measure.name} {words(first)} cannot be kept with the other budgets;"
            f" the {most} that can is {words(least)}"
        )
    if stop is None:
        last = max(first, measure.use(problem.chosen_pairs(problem.solve().chosen)))
    else:
        last = whole(stop)
    if last < first:
        raise ValueError(
            f"stop: {measure.name} {words(last)} is stricter than the start, {words(first)}"
        )
    return sorted({first + (last - first) * i // (points - 1) for i in range(points)})


def _row_limits(problem: Problem, over: str, limit: int) -> list[int]:
    """The limits of all rows with another limit of one budget."""
    limits = []
    for budget, rows in zip(problem.budgets, problem.rows_of, strict=True):
        for constant, row in zip(budget.measure.constants, rows, strict=True):
            limits.append(min(limit - constant, row.limit) if budget.name == over else row.limit)
    return limits


def _point(policy: Policy, over: str, limit: int | float) -> CurvePoint:
    budgets = tuple(
        BudgetUse(over, limit, use.used) if use.name == over else use for use in policy.budgets
    )
    (own,) = (use for use in budgets if use.name == over)
    if not own.kept:
        raise RuntimeError(f"the solver's answer uses {over} {own.used}, the limit is {limit}")
    return CurvePoint(limit, own.used, dataclasses.replace(policy, budgets=budgets))


def _uniform(problem: Problem, over: str, question: Question) -> list[UniformPoint]:
    """The uniform policies of all candidates, of those given by the user in the first place."""
    bits = problem.indicators.bits
    weight, activation = question.get("weight_bits"), question.get("activation_bits")
    weights = bits if weight is None else (weight,)
    activations = bits if activation is None else (activation,)
    by_name = {layer.name: layer for layer in problem.indicators.layers}
    found = []
    for pair in ((bw, ba) for bw in weights for ba in activations):
        pairs: list[Pair] = [own[0] if len(own) == 1 else pair for own in problem.pairs.values()]
        named = list(zip(problem.pairs, pairs, strict=True))
        table = problem.latency_table
        if table is not None and not all(table.has(name, own) for name, own in named):
            continue  # nobody measured it
        objective = sum(
            by_name[name].activation.get(ba, 0.0)
            + problem.alpha * by_name[name].weight.get(bw, 0.0)
            for name, (bw, ba) in named
        ) + problem.added_by_pairs(pairs)
        measure = next(b.measure for b in problem.budgets if b.name == over)
        used = measure.shown(measure.use(pairs))
        allowed = problem.allows(pairs) and problem.keeps(pairs)
        found.append(UniformPoint(*pair, objective, used, allowed, None))
    return found


def _best_within(points: Sequence[CurvePoint], own: UniformPoint, measure: Measure) -> float | None:
    """The best objective of points that use no more than a uniform policy."""
    within = [
        point.policy.objective
        for point in points
        if point.policy.objective is not None
        and (point.used >= own.used if measure.inverse else point.used <= own.used)
    ]
    return min(within, default=None)


def _below(measure: Measure, point: CurvePoint) -> tuple[float, float]:
    """Use and objective, where less use is better also for the compression."""
    used = 1 / point.used if measure.inverse else point.used
    return float(used), point.policy.objective or 0.0


def _knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The place of the point that lies farthest below the line from the first to the last."""
    (first, high), (last, low) = points[0], points[-1]
    if not (last > first and high > low):
        return None
    depths = [1 - (x - first) / (last - first) - (y - low) / (high - low) for x, y in points]
    deepest = max(range(len(points)), key=depths.__getitem__)
    return deepest if depths[deepest] > 1e-12 else None
