"""What if: why a layer got its bits, what each budget is worth, and what other limits would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from limpq_ext.allocation.budgets import in_short_words, in_words
from limpq_ext.allocation.infeasible import why_infeasible
from limpq_ext.allocation.problem import Problem, Question, make_problem
from limpq_ext.allocation.restrictions import ContradictionError
from limpq_ext.ilp.rows import NoSolutionError, Solution
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

PERCENTS: Final = (-10.0, -5.0, -2.0, 2.0, 5.0, 10.0)
"""By how much each budget is moved for the sensitivity table."""

_NAMED: Final = 3  # layers that a line of the printed table names


@dataclass(frozen=True)
class Choice:
    """One pair of bits that a layer can have.

    Attributes:
        weight_bits: Bit-width of its weights.
        activation_bits: Bit-width of its activations.
        own: The layer's own term of the objective at these bits, without what pairs of layers add.
        price: What the layer's use of all budgets is worth at their shadow prices, in units of the
            objective; a choice is good where ``own + price`` is small.
        objective: The best objective with the layer held at these bits; None if no policy is left.
        change: ``objective`` less the objective of the optimum.
        moved: The other layers whose bits differ from the optimum's.
    """

    weight_bits: int
    activation_bits: int
    own: float
    price: float
    objective: float | None
    change: float | None
    moved: tuple[str, ...]


@dataclass(frozen=True)
class Price:
    """What a budget is worth.

    Attributes:
        budget: Its name.
        limit: Its limit, in the user's unit.
        used: What the optimum uses.
        per_unit: The shadow price: by how much the objective of the relaxed program falls per
            whole unit that the limit rises. With interactions or smoothness it may be the price
            without them: where they connect many layers, the relaxed program leaves them out.
        unit: That unit.
        per_percent: By how much it falls where the limit rises by 1% of its whole units.
    """

    budget: str
    limit: int | float
    used: int | float
    per_unit: float
    unit: str
    per_percent: float


@dataclass(frozen=True)
class Move:
    """The optimum with one limit moved.

    Attributes:
        budget: Name of the budget.
        percent: By how much its limit is moved, in whole units; above 0 is looser, also for the
            compression.
        limit: The limit then, in the user's unit.
        objective: The best objective; None if no policy keeps it.
        changed: The layers whose bits differ from the optimum's.
    """

    budget: str
    percent: float
    limit: int | float
    objective: float | None
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """Why a layer got its bits.

    Attributes:
        layer: Name of the layer.
        policy: The optimum.
        choices: All pairs of bits that the layer can have.
        prices: One for each budget.
        moves: The sensitivity table: every budget moved by several per cent.
        pairwise: Whether pairs of layers add to the objective, so that shadow prices may not hold.
    """

    layer: str
    policy: Policy
    choices: tuple[Choice, ...]
    prices: tuple[Price, ...]
    moves: tuple[Move, ...]
    pairwise: bool = False

    @property
    def chosen(self) -> Choice:
        """The choice that the optimum has."""
        bits = self.policy.bits()[self.layer]
        return next(c for c in self.choices if (c.weight_bits, c.activation_bits) == bits)

    def text(self) -> str:
        """The explanation as tables."""
        best, own = self.policy.objective, self.chosen
        lines = [
            f"{self.layer}: W{own.weight_bits}A{own.activation_bits} in the optimum {best:.9f};"
            " forced to other bits, all else searched again:",
            f"{'bits':>8}  {'own':>10}  {'price':>10}  {'objective':>12}  {'change':>10}  others",
        ]
        for choice in self.choices:
            name = f"W{choice.weight_bits}A{choice.activation_bits}"
            start = f"{name:>8}  {choice.own:>10.6f}  {choice.price:>10.6f}  "
            if choice.objective is None:
                lines.append(start + "no policy keeps the budgets and restrictions")
            else:
                mark = "  <- chosen" if choice is own else f"  {len(choice.moved)} change"
                lines.append(f"{start}{choice.objective:>12.6f}  {choice.change:>+10.6f}{mark}")
        for price in self.prices:
            lines.append(
                f"{price.budget}: limit {in_words(price.budget, price.limit)},"
                f" used {in_words(price.budget, price.used)}; 1% more lowers"
                f" the objective by about {price.per_percent:.6f}"
                f" (shadow price {price.per_unit:.3e}, counted in {price.unit})"
            )
        if self.pairwise and self.prices:
            lines.append(
                "shadow prices may leave out what pairs of layers add; objectives have all of it"
            )
        if self.moves:
            lines.append(f"{'budget':>20}  {'moved':>6}  {'limit':>20}  {'objective':>12}  changed")
        for move in self.moves:
            limit = in_short_words(move.budget, move.limit)
            start = f"{move.budget:>20}  {move.percent:>+5g}%  {limit:>20}  "
            if move.objective is None:
                lines.append(start + "no policy keeps it")
                continue
            names = ", ".join(move.changed[:_NAMED])
            more = ", ..." if len(move.changed) > _NAMED else ""
            shown = f" layers: {names}{more}" if names else " layers"
            lines.append(f"{start}{move.objective:>12.6f}  {len(move.changed)}{shown}")
        return "\n".join(lines)


def explain(
    indicators: Indicators,
    costs: Costs,
    layer: str,
    *,
    percents: Sequence[float] = PERCENTS,
    **question: Unpack[Question],
) -> Explanation:
    """Say why a layer got its bits, by solving again with other bits and other limits.

    Args:
        indicators: Learned indicators of the searchable layers.
        costs: Costs of the same layers and of the fixed ones.
        layer: Name of a searchable layer.
        percents: By how much each limit is moved, each above -100.
        question: Budgets, restrictions and options as `search` takes them. The time limit is for
            each solve.

    Returns:
        The explanation; every objective in it is that of an exact optimum.

    Raises:
        TypeError: If something has another type.
        ValueError: If there is no such searchable layer, or as in `search`.
        InfeasibleError: If no policy keeps the budgets and restrictions.
        TimeoutError: If the time limit passed before a solve found a policy.
    """
    problem = make_problem(indicators, costs, **question)
    check_layer(costs, layer)
    for percent in percents:
        if not -100 < percent < 1e6:
            raise ValueError(f"percents: a limit cannot move by {percent}%")
    try:
        solution = problem.solve()
    except NoSolutionError:
        raise why_infeasible(problem) from None
    policy = problem.policy(solution)
    return Explanation(
        layer,
        policy,
        tuple(_choices(problem, layer, solution, policy)),
        tuple(_prices(problem, solution, policy)),
        tuple(
            _moved(problem, place, percent, policy)
            for place in range(len(problem.budgets))
            for percent in percents
        ),
        bool(problem.pair_terms),
    )


def check_layer(costs: Costs, layer: str) -> None:
    """Raise ValueError if a layer is not among the searchable ones."""
    if any(own.name == layer for own in costs.fixed):
        raise ValueError(f"layer {layer!r} is fixed at {costs.fixed_bits} bits: nothing to explain")
    if all(own.name != layer for own in costs.layers):
        raise ValueError(f"there is no searchable layer {layer!r} in the network")


def _choices(problem: Problem, layer: str, solution: Solution, policy: Policy) -> list[Choice]:
    place = list(problem.pairs).index(layer)
    chosen = policy.bits()[layer]
    rows = list(zip(problem.rows, solution.prices, strict=True))
    found = []
    for column, pair in enumerate(problem.columns[place]):
        best = policy if pair == chosen else _best(problem.with_layer_at(layer, pair))
        change = None
        if best is not None and best.objective is not None and policy.objective is not None:
            change = best.objective - policy.objective
        found.append(
            Choice(
                *pair,
                own=float(problem.values[place][column]),
                price=sum(price * row.costs[place][column] for row, price in rows),
                objective=None if best is None else best.objective,
                change=change,
                moved=tuple(n for n in _differing(policy, best) if n != layer),
            )
        )
    return found


def _prices(problem: Problem, solution: Solution, policy: Policy) -> list[Price]:
    found, prices = [], list(solution.prices)
    for budget, rows, use in zip(problem.budgets, problem.rows_of, policy.budgets, strict=True):
        own = sum(prices[: len(rows)])
        del prices[: len(rows)]
        found.append(
            Price(
                budget.name,
                budget.asked,
                use.used,
                own,
                budget.measure.unit,
                float(Fraction(own) * budget.limit / 100),
            )
        )
    return found


def _moved(problem: Problem, place: int, percent: float, policy: Policy) -> Move:
    budget = problem.budgets[place]
    limit = max(1, math.floor(budget.limit * (1 + Fraction(str(percent)) / 100)))
    best = _best(problem.with_limits({budget.name: limit}))
    return Move(
        budget.name,
        percent,
        budget.measure.shown(limit),
        None if best is None else best.objective,
        _differing(policy, best),
    )


def _best(problem: Problem) -> Policy | None:
    """The optimum of a variation, None if it has no policy."""
    try:
        return problem.policy(problem.solve())
    except (NoSolutionError, ContradictionError):
        return None


def _differing(policy: Policy, other: Policy | None) -> tuple[str, ...]:
    if other is None:
        return ()
    both = zip(policy.layers, other.layers, strict=True)
    return tuple(one.name for one, two in both if one != two)
