"""Why there is no policy: which budgets and restrictions conflict, and what would help."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from limpq_ext.allocation.budgets import Budget, in_exact_words, in_words
from limpq_ext.allocation.problem import Problem
from limpq_ext.ilp.program import Program, nearest
from limpq_ext.ilp.rows import NoSolutionError
from limpq_ext.values.policy import Policy

_ANY: Final = 1.0
"""A gap that ends a solve at the first policy or so."""

_LONGEST: Final = 60.0
"""Seconds after which no more reasons are sought, where the search itself has no time limit."""


class InfeasibleError(ValueError):
    """No policy keeps the budgets and restrictions.

    Attributes:
        conflict: Names of budgets and restrictions that cannot be kept together, though any of
            them could be dropped to keep the others.
        smallest: For each budget among them the smallest limit (of the compression the largest
            ratio) that can be kept with all other budgets and restrictions, in the user's units;
            None where moving it alone does not help.
        nearest: The policy within the restrictions whose excess over the budgets, each as a share
            of its limit, has the smallest sum, and among those with no more of any excess the one
            with the smallest objective; None where restrictions alone conflict. What the activation
            memory exceeds is summed over the moments of the forward.
    """

    def __init__(
        self,
        message: str,
        conflict: tuple[str, ...],
        smallest: dict[str, int | float | None],
        nearest: Policy | None,
    ) -> None:
        super().__init__(message)
        self.conflict = conflict
        self.smallest = smallest
        self.nearest = nearest


def why_infeasible(problem: Problem) -> InfeasibleError:
    """Find the reasons why a problem has no policy.

    Args:
        problem: A problem that is proven to have none. The reasons are sought for as long again
            as its time limit, at most a minute; what is not found by then is left out.

    Returns:
        The error to raise.
    """
    deadline = min(problem.deadline(), time.perf_counter() + _LONGEST)
    names = [b.name for b in problem.budgets] + [rule.name for rule in problem.restrictions]
    try:
        conflict = _minimal(problem.without_pair_terms(), names, deadline)
    except TimeoutError:
        return InfeasibleError(
            "no policy keeps all budgets and restrictions; the time limit passed before it was"
            " found which of them conflict",
            tuple(names),
            {},
            None,
        )
    budgets = [budget for budget in problem.budgets if budget.name in conflict]
    smallest: dict[str, int | float | None] = {}
    closest = None
    try:
        for budget in budgets:
            least = least_limit(problem, budget.name, deadline)
            smallest[budget.name] = None if least is None else budget.measure.shown(least)
        closest = _nearest(problem, deadline)
    except TimeoutError:
        pass
    message = _in_words(problem, conflict, budgets, smallest, closest)
    return InfeasibleError(message, tuple(conflict), smallest, closest)


def least_limit(problem: Problem, name: str, deadline: float) -> int | None:
    """The smallest limit of one budget that can be kept with all others.

    Args:
        problem: The problem; its own limit of the budget does not count.
        name: Name of the budget.
        deadline: ``time.perf_counter()`` at which to give up.

    Returns:
        The limit in whole units, exact where the problem's gap is 0 and within that gap where it
        is not; None if the others cannot be kept.

    Raises:
        TimeoutError: If the deadline passed.
    """
    (budget,) = (b for b in problem.budgets if b.name == name)
    others = [
        row
        for own, rows in zip(problem.budgets, problem.rows_of, strict=True)
        for row in rows
        if own.name != name
    ]
    measure, columns = budget.measure, problem.columns
    ceiling = measure.rows(columns, None)
    tables = [row.costs for row in ceiling]
    added = [
        [sum(costs) for costs in zip(*layer, strict=True)] for layer in zip(*tables, strict=True)
    ]
    largest = max((cost for layer in added for cost in layer), default=0) or 1
    values = [[float(Fraction(cost, largest)) for cost in layer] for layer in added]
    kept = [row.limit for row in others]
    try:
        program = Program(values, [*others, *ceiling], links=problem.links)
    except NoSolutionError:
        return None

    def use_within(limit: int | None, gap: float) -> int | None:
        rows = measure.rows(columns, limit)
        try:
            found = program.solve([*kept, *(row.limit for row in rows)], gap=gap, deadline=deadline)
        except NoSolutionError:
            return None
        return measure.use(problem.chosen_pairs(found.chosen))

    # With a single sum the first answer is the smallest but for rounding, which the second proves.
    best = use_within(None, problem.gap)
    if best is None:
        return None
    low = max(
        constant + row.smallest for constant, row in zip(measure.constants, ceiling, strict=True)
    )
    while best - low > problem.gap * best and not (problem.gap and len(tables) == 1):
        middle = best - 1 if len(tables) == 1 else (low + best - 1) // 2
        found = use_within(middle, 0.0 if len(tables) == 1 else _ANY)
        if found is None:
            low = middle + 1
        else:
            best = found
    return best


def _minimal(problem: Problem, names: Sequence[str], deadline: float) -> list[str]:
    """A minimal set of names that conflict: each is dropped unless that makes a policy possible.

    The last ones are tried first, so restrictions are blamed only where budgets alone do not
    conflict.
    """
    conflict = []
    for name in reversed(names):
        without = problem.without(name)
        if _possible(without, deadline):
            conflict.append(name)
        else:
            problem = without
    return conflict[::-1]


def _possible(problem: Problem, deadline: float) -> bool:
    try:
        problem.program.solve(gap=_ANY, deadline=deadline)
    except NoSolutionError:
        return False
    return True


def _nearest(problem: Problem, deadline: float) -> Policy | None:
    """The nearest policy, with the best objective of those that exceed no budget by more."""
    weights = [
        Fraction(1, max(1, budget.limit))
        for budget, rows in zip(problem.budgets, problem.rows_of, strict=True)
        for _ in rows
    ]
    try:
        if not weights:
            return None
        chosen = nearest(problem.rows, weights, links=problem.links, deadline=deadline)
    except NoSolutionError:
        return None
    pairs = problem.chosen_pairs(chosen)
    widened = problem.with_limits(
        {b.name: max(b.limit, b.measure.use(pairs)) for b in problem.budgets}
    )
    solution = widened.program.solve(gap=problem.gap, deadline=deadline, start=chosen)
    return problem.plain_policy(problem.chosen_pairs(solution.chosen))


def _in_words(
    problem: Problem,
    conflict: Sequence[str],
    budgets: Sequence[Budget],
    smallest: dict[str, int | float | None],
    closest: Policy | None,
) -> str:
    words = {budget.name: budget.words for budget in budgets}
    named = " and ".join(words.get(name, name) for name in conflict)
    together = " together" if len(conflict) > 1 else ""
    parts = [f"no policy keeps {named}{together}"]
    for budget in budgets:
        if budget.name not in smallest:
            continue
        least = smallest[budget.name]
        most = "largest" if budget.measure.inverse else "smallest"
        parts.append(
            f"moving {budget.name} alone does not help"
            if least is None
            else f"the {most} {budget.name} that can be kept with all else is"
            f" {in_exact_words(budget.name, least)}"
        )
    if closest is not None:
        uses = []
        for use in closest.budgets:
            ratio = Fraction(str(use.used)) / Fraction(str(use.limit))
            how = "kept" if use.kept else _beyond(ratio)
            uses.append(f"{use.name} {in_words(use.name, use.used)} ({how})")
        parts.append(f"the nearest policy uses {', '.join(uses)}")
    return "; ".join(parts)


def _beyond(ratio: Fraction) -> str:
    """By how much a limit is missed: in per cent, and as a factor where that is a large number."""
    if Fraction(1, 2) <= ratio <= 2:
        side = "above" if ratio > 1 else "below"
        return f"{abs(float(ratio - 1)):.3%} {side} the limit"
    return f"{float(ratio):,.4g} times the limit"
