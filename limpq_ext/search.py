"""The search: one integer linear program picks the bits of every layer under budgets.

With x[l, bw, ba] in {0, 1}, one choice for each layer l:

    minimise    sum of (activation[l, ba] + alpha * weight[l, bw]) * x[l, bw, ba]
    subject to  sum of cost_k[l, bw, ba] * x[l, bw, ba] <= limit_k     for every budget k

with the learned indicators of layer l (LIMPQ, arXiv 2203.08368). Costs and limits are exact
integers here: a limit that the user gives as a decimal is taken as that decimal and rounded down to
a whole bit or BitOp, which loses nothing. HiGHS solves the program in floating point; its answer is
checked in integers afterwards.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from limpq_ext.bits import check_bits
from limpq_ext.costs import FLOAT_BITS, Costs
from limpq_ext.ilp import TOLERANCE, Row, minimise
from limpq_ext.indicators import Indicators, NonMonotone, Rule
from limpq_ext.policy import BudgetUse, LayerBits, Policy

Number = int | float | Fraction | Decimal

_Definition = tuple[
    str,
    Callable[[Any, "_Choice"], int],
    Callable[[Fraction], Fraction],
    Callable[[int], Fraction],
]


class InfeasibleError(ValueError):
    """No policy keeps the budgets.

    Attributes:
        conflict: Names of the budgets that cannot be kept.
        smallest: For each of them the smallest limit that can be kept (of the compression the
            largest ratio), in the user's units. Fewer bits never cost more, so the lowest bits of
            every layer are at the minimum of every budget at once: these limits can be kept
            alone, and all together.
    """

    def __init__(
        self, message: str, conflict: tuple[str, ...], smallest: dict[str, int | float]
    ) -> None:
        super().__init__(message)
        self.conflict = conflict
        self.smallest = smallest


@dataclass(frozen=True)
class UniformLevel:
    """A budget given as what the uniform policy of these bits uses; see `uniform`.

    Attributes:
        weight_bits: Bit-width of the weights of all searchable layers.
        activation_bits: Bit-width of their activations.

    Raises:
        TypeError: If a bit-width is not an integer.
        ValueError: If a bit-width is outside 2 to 16.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        check_bits("uniform level, weights", self.weight_bits)
        check_bits("uniform level, activations", self.activation_bits)


def uniform(weight_bits: int, activation_bits: int) -> UniformLevel:
    """The budget that a uniform policy uses: ``search(..., bitops=uniform(3, 4))``.

    Args:
        weight_bits: Bit-width of the weights of all searchable layers.
        activation_bits: Bit-width of their activations; a size budget takes no notice of it.

    Returns:
        The level, for ``bitops`` or ``size``.

    Raises:
        TypeError: If a bit-width is not an integer.
        ValueError: If a bit-width is outside 2 to 16.
    """
    return UniformLevel(weight_bits, activation_bits)


def search(
    indicators: Indicators,
    costs: Costs,
    *,
    bitops: Number | UniformLevel | None = None,
    size: Number | UniformLevel | None = None,
    compression: Number | None = None,
    mean_weight_bits: Number | None = None,
    mean_activation_bits: Number | None = None,
    alpha: float = 1.0,
    non_monotone: Rule = "forbid",
    time_limit: float | None = None,
    gap: float = 0.0,
) -> Policy:
    """Find the bits of every layer with the smallest sum of indicators within the budgets.

    Any number of budgets counts at once; without one, every layer gets its best bits.

    Args:
        indicators: Learned indicators of the searchable layers.
        costs: Costs of the same layers and of the fixed ones.
        bitops: Most BitOps (MACs * weight bits * activation bits) of the searchable layers for one
            sample, or a `uniform` level.
        size: Largest size of all weights in bytes, with the fixed layers at their bits and without
            biases and batch normalisation; or a `uniform` level of the searchable layers.
        compression: Smallest ratio of the weights at 32 bits to the weights as in ``size``.
        mean_weight_bits: Largest mean of the weight bits over the searchable layers.
        mean_activation_bits: The same for the activation bits.
        alpha: Weight of the weight indicators against the activation indicators.
        non_monotone: What to do with indicators that do not fall as bits grow, see
            `Indicators.monotone`; what was done stands in ``meta["non_monotone_records"]``.
        time_limit: Most seconds to solve for; the best policy found until then is returned.
        gap: Relative gap at which to stop early; 0 proves optimality.

    Returns:
        The policy, layers in the order of ``costs``. Its objective is summed from the chosen
        indicators, its bound and gap are what HiGHS proved (to a relative 1e-9), and its budgets
        were checked in exact integers: ``meta["check"]`` holds those.

    Raises:
        TypeError: If a budget or option is not a number.
        ValueError: If a budget is not positive and finite, an option is out of range, or the
            layers of indicators and costs differ.
        InfeasibleError: If no policy keeps the budgets.
        TimeoutError: If the time limit passed before there was any policy.
        RuntimeError: If HiGHS fails.
        ImportError: If highspy is not installed.
    """
    start = time.perf_counter()
    alpha = float(_number("alpha", alpha, zero=True))
    gap = float(_number("gap", gap, zero=True))
    if time_limit is not None:
        time_limit = float(_number("time_limit", time_limit))
    _check_names(indicators, costs)
    usable, records = indicators.monotone(non_monotone)
    choices = _choices(usable, costs, records, alpha)
    budgets = _budgets(
        costs,
        choices,
        bitops=bitops,
        size=size,
        compression=compression,
        mean_weight_bits=mean_weight_bits,
        mean_activation_bits=mean_activation_bits,
    )
    _check_feasible(budgets)
    values = [[math.fsum(choice.terms) for choice in layer] for layer in choices]
    if not math.isfinite(max(map(max, values))):
        raise ValueError(f"alpha {alpha} is too large for these indicators")
    solution = minimise(
        values,
        [budget.row for budget in budgets],
        gap=gap,
        deadline=start + (math.inf if time_limit is None else time_limit),
    )
    chosen = [layer[i] for layer, i in zip(choices, solution.chosen, strict=True)]
    objective = math.fsum(term for choice in chosen for term in choice.terms)
    bound = min(objective, solution.bound)
    proven = (objective - bound) / objective if objective else 0.0
    uses = {budget.name: budget.row.use(solution.chosen) for budget in budgets}
    return Policy(
        layers=tuple(
            LayerBits(layer.name, choice.weight_bits, choice.activation_bits)
            for layer, choice in zip(costs.layers, chosen, strict=True)
        ),
        fixed=tuple(LayerBits(f.name, costs.fixed_bits, costs.fixed_bits) for f in costs.fixed),
        objective=objective,
        bound=bound,
        gap=proven if proven > TOLERANCE else 0.0,
        budgets=tuple(BudgetUse(b.name, b.asked, b.shown(uses[b.name])) for b in budgets),
        meta={
            "alpha": alpha,
            "non_monotone": non_monotone,
            "non_monotone_records": [dataclasses.asdict(record) for record in records],
            "check": [
                {"name": b.name, "unit": b.unit, "limit": b.row.limit, "used": uses[b.name]}
                for b in budgets
            ],
            "solver": solution.solver,
            "seconds": time.perf_counter() - start,
        },
    )


@dataclass(frozen=True)
class _Choice:
    """One column of the program: a pair of bits of one layer and its terms of the objective."""

    weight_bits: int
    activation_bits: int
    terms: tuple[float, float]


@dataclass(frozen=True)
class _Budget:
    """One row of the program, in whole units of its own, and the way back to the user's units."""

    name: str
    unit: str
    asked: int | float
    row: Row
    in_units: Callable[[int], Fraction]

    def shown(self, use: int) -> int | float:
        """A use in the user's units, rounded such that it can be asked for as a limit again."""
        exact = self.in_units(use)
        if exact.denominator == 1:
            return int(exact)
        value = float(exact)
        if self.name == "compression":
            return value if Fraction(str(value)) <= exact else math.nextafter(value, -math.inf)
        return value if Fraction(str(value)) >= exact else math.nextafter(value, math.inf)


def _choices(
    indicators: Indicators, costs: Costs, records: Sequence[NonMonotone], alpha: float
) -> list[list[_Choice]]:
    """The columns of each layer, in the order of the costs, without forbidden bits."""
    forbidden = {(r.layer, r.kind, r.bits) for r in records if r.action == "forbidden"}
    by_name = {layer.name: layer for layer in indicators.layers}
    return [
        [
            _Choice(bw, ba, (layer.activation[ba], alpha * layer.weight[bw]))
            for bw in indicators.bits
            if (layer.name, "weight", bw) not in forbidden
            for ba in indicators.bits
            if (layer.name, "activation", ba) not in forbidden
        ]
        for layer in (by_name[cost.name] for cost in costs.layers)
    ]


def _budgets(
    costs: Costs, choices: list[list[_Choice]], **asked: Number | UniformLevel | None
) -> list[_Budget]:
    """The rows of the budgets that were asked for."""
    count = len(costs.layers)
    fixed = costs.fixed_bits * sum(layer.weights for layer in costs.fixed)
    everything = FLOAT_BITS * costs.all_weights
    # unit of the row; cost of a choice; limit of the row from the user's; the user's units from it
    definitions: dict[str, _Definition] = {
        "bitops": (
            "BitOps",
            lambda layer, c: layer.macs * c.weight_bits * c.activation_bits,
            lambda limit: limit,
            Fraction,
        ),
        "size": (
            "bits of the searchable weights",
            lambda layer, c: layer.weights * c.weight_bits,
            lambda limit: limit * 8 - fixed,
            lambda use: Fraction(use + fixed, 8),
        ),
        "compression": (
            "bits of the searchable weights",
            lambda layer, c: layer.weights * c.weight_bits,
            lambda limit: everything / limit - fixed,
            lambda use: Fraction(everything, use + fixed),
        ),
        "mean_weight_bits": (
            "bits, summed over the searchable layers",
            lambda layer, c: c.weight_bits,
            lambda limit: limit * count,
            lambda use: Fraction(use, count),
        ),
        "mean_activation_bits": (
            "bits, summed over the searchable layers",
            lambda layer, c: c.activation_bits,
            lambda limit: limit * count,
            lambda use: Fraction(use, count),
        ),
    }
    budgets = []
    for name, (unit, cost, limit, in_units) in definitions.items():
        value = asked[name]
        if value is None:
            continue
        if name == "compression" and everything == 0:
            raise ValueError("compression: the costs hold no weights")
        if isinstance(value, UniformLevel) and name in ("bitops", "size"):
            wanted = _level(name, value, costs)
        else:
            wanted = _number(name, value)
        pairs = zip(costs.layers, choices, strict=True)
        rows = [[cost(layer, choice) for choice in columns] for layer, columns in pairs]
        row = Row(rows, math.floor(limit(wanted)))
        shown = int(wanted) if wanted.denominator == 1 else float(wanted)
        budgets.append(_Budget(name, unit, shown, row, in_units))
    return budgets


def _level(name: str, level: UniformLevel, costs: Costs) -> Fraction:
    """What the uniform policy uses of a budget, in the user's units."""
    policy = Policy.uniform(costs, level.weight_bits, level.activation_bits).bits()
    return (
        Fraction(costs.bitops(policy)) if name == "bitops" else Fraction(costs.size_bits(policy), 8)
    )


def _number(name: str, value: Any, *, zero: bool = False) -> Fraction:
    """The number that the user typed, exactly: 12.2 is 122/10, not the nearest binary fraction."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    finite = isinstance(value, numbers.Rational) or math.isfinite(value)
    if not finite or value < 0 or (value == 0 and not zero):
        wanted = "finite and not negative" if zero else "positive and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    return Fraction(str(value))


def _check_names(indicators: Indicators, costs: Costs) -> None:
    """Indicators and costs have to be of the same layers."""
    learned = [layer.name for layer in indicators.layers]
    counted = [layer.name for layer in costs.layers]
    problems = []
    for names, others, problem in (
        (learned, set(counted), "have indicators and no searchable cost"),
        (counted, set(learned), "have a cost and no indicators"),
    ):
        odd = [name for name in names if name not in others]
        if odd:
            shown = ", ".join(map(repr, odd[:3])) + (", ..." if len(odd) > 3 else "")
            problems.append(f"{len(odd)} layers {problem}: {shown}")
    if problems:
        raise ValueError(f"indicators and costs do not match: {'; '.join(problems)}")


def _check_feasible(budgets: Sequence[_Budget]) -> None:
    """The lowest bits of every layer are at the minimum of every budget at once."""
    broken = [budget for budget in budgets if budget.row.limit < budget.row.smallest]
    if broken:
        smallest = {budget.name: budget.shown(budget.row.smallest) for budget in broken}
        parts = []
        for budget in broken:
            most, sign = ("largest", ">=") if budget.name == "compression" else ("smallest", "<=")
            parts.append(
                f"{budget.name} {sign} {budget.asked}"
                f" (the {most} that can be kept is {smallest[budget.name]})"
            )
        raise InfeasibleError(
            f"no policy keeps {' and '.join(parts)}, even with the lowest allowed bits everywhere",
            tuple(smallest),
            smallest,
        )
