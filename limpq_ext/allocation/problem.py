"""What a search is asked: layers, pairs of bits, indicators, budgets and restrictions in one value.

With x[l, bw, ba] in {0, 1}, one choice for each layer l:

    minimise    sum of (activation[l, ba] + alpha * weight[l, bw]) * x[l, bw, ba]
    subject to  sum of cost_k[l, bw, ba] * x[l, bw, ba] <= limit_k     for every sum k of a budget
                the labels of what is chosen agree                     for every link

with the learned indicators of layer l (LIMPQ, arXiv 2203.08368), and what pairs of layers add to
that, see `limpq_ext.allocation.pairwise`. A problem is immutable; its variations (a restriction
less, another limit, a layer held at some bits) are problems too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, TypedDict

from limpq_ext.allocation.budgets import (
    BUDGETS,
    Asked,
    Budget,
    Number,
    exact_number,
    make_budgets,
)
from limpq_ext.allocation.measures import Pair
from limpq_ext.allocation.pairwise import (
    INTERACTIONS,
    SMOOTHNESS,
    PairTerm,
    interaction_terms,
    make_products,
    smoothness_terms,
)
from limpq_ext.allocation.restrictions import (
    Limited,
    Restriction,
    allowed_pairs,
    given_bits,
    make_links,
    make_restrictions,
    tied_inputs,
)
from limpq_ext.allocation.target import Target
from limpq_ext.ilp.program import Program
from limpq_ext.ilp.quadratic import QuadraticProgram
from limpq_ext.ilp.rows import Link, Row, Solution
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators, NonMonotone, Rule
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.latency import LatencyTable
from limpq_ext.values.policy import BudgetUse, LayerBits, Policy

EXACT_LAYERS: Final = 200
"""Up to so many searchable layers the default is a gap of 0, above it `LARGE_GAP`."""

LARGE_GAP: Final = 1e-6


class Question(TypedDict, total=False):
    """The budgets, restrictions and options of a search; `limpq_ext.search` describes them."""

    bitops: Asked | None
    size: Asked | None
    total_size: Asked | None
    compression: Asked | None
    mean_weight_bits: Asked | None
    mean_activation_bits: Asked | None
    bits_per_weight: Asked | None
    bits_per_activation: Asked | None
    activation_memory: Asked | None
    latency: Asked | None
    latency_table: LatencyTable | None
    pairs: Mapping[str, Iterable[Pair]] | None
    fixed: Mapping[str, Pair] | None
    tied: str | Iterable[str | Iterable[str]]
    tie_shared_inputs: bool
    tie_added_inputs: bool
    min_bits: Mapping[str, int | Pair] | None
    weight_bits: int | None
    activation_bits: int | None
    target: Target | None
    alpha: Number
    normalise: bool
    non_monotone: Rule
    interactions: Interactions | None
    smoothness: Number
    time_limit: Number | None
    gap: Number | None


@dataclass(frozen=True)
class Problem:
    """A search, checked.

    Attributes:
        costs: Costs of the network.
        indicators: The indicators, normalised and repaired as it was asked.
        alpha: Weight of the weight indicators.
        terms: Layer -> pair of bits that it could have without restrictions -> its two terms of
            the objective, exactly: an indicator is the decimal that it is written as. A bit-width
            that was given by the user and has no indicator counts 0.
        pair_terms: What pairs of layers add to the objective.
        budgets: The budgets.
        restrictions: The restrictions that the user asked for.
        latency_table: The table of a latency budget.
        gap: Relative gap at which to stop.
        time_limit: Seconds for one solve.
        meta: What a policy's ``meta`` says about the question.
    """

    costs: Costs
    indicators: Indicators
    alpha: float
    terms: Mapping[str, Mapping[Pair, tuple[Fraction, Fraction]]]
    pair_terms: tuple[PairTerm, ...]
    budgets: tuple[Budget, ...]
    restrictions: tuple[Restriction, ...]
    latency_table: LatencyTable | None
    gap: float
    time_limit: float
    meta: Mapping[str, Any]

    @functools.cached_property
    def in_force(self) -> tuple[Restriction, ...]:
        """The restrictions, with those that a budget brings.

        Tensors are quantized once, so the activation memory has one bit-width for each.
        """
        if any(budget.name == "activation_memory" for budget in self.budgets):
            shared = self.costs.shared_inputs
            inputs = tied_inputs(self.costs, shared, "shared inputs, for activation_memory")
            return (*self.restrictions, inputs)
        return self.restrictions

    @functools.cached_property
    def pairs(self) -> dict[str, tuple[Pair, ...]]:
        """Layer -> pairs of bits that it can have, layers in the order of the costs.

        Raises:
            ContradictionError: If a layer has none.
        """
        table = self.latency_table if self.has_budget("latency") else None
        base = {
            name: [pair for pair in pairs if table is None or table.has(name, pair)]
            for name, pairs in self.terms.items()
        }
        return allowed_pairs(base, self.in_force)

    @functools.cached_property
    def links(self) -> tuple[Link, ...]:
        """Which layers agree."""
        return make_links(self.pairs, self.in_force)

    @functools.cached_property
    def columns(self) -> list[tuple[Pair, ...]]:
        """The pairs of each layer as a list, places being those of the program's groups."""
        return list(self.pairs.values())

    @functools.cached_property
    def values(self) -> list[list[Fraction]]:
        """Term of the objective of each column, exactly."""
        return [
            [operator.add(*self.terms[name][pair]) for pair in pairs]
            for name, pairs in self.pairs.items()
        ]

    @functools.cached_property
    def rows_of(self) -> list[list[Row]]:
        """The rows of each budget."""
        return [budget.rows(self.columns) for budget in self.budgets]

    @property
    def rows(self) -> list[Row]:
        """The rows of all budgets."""
        return [row for rows in self.rows_of for row in rows]

    @functools.cached_property
    def program(self) -> Program | QuadraticProgram:
        """The integer program; of equally good policies, fewer BitOps and then bytes count.

        Raises:
            NoSolutionError: If the layers that are tied cannot agree.
        """
        return self._program(math.inf)

    def _program(self, deadline: float) -> Program | QuadraticProgram:
        """The same, with a TimeoutError where it is not there by then."""
        layers = list(zip(self.costs.layers, self.columns, strict=True))
        bitops = [[layer.macs * bw * ba for bw, ba in pairs] for layer, pairs in layers]
        sizes = [[layer.weights * bw for bw, _ in pairs] for layer, pairs in layers]
        ties = (bitops, sizes)
        if not self.pair_terms:
            return Program(
                self.values, self.rows, links=self.links, tiebreaks=ties, deadline=deadline
            )
        return QuadraticProgram(
            self.values,
            self.rows,
            make_products(self.pair_terms, self.pairs),
            links=self.links,
            tiebreaks=ties,
            deadline=deadline,
        )

    def solve(self, *, start: Sequence[Pair] | None = None, began: float | None = None) -> Solution:
        """Solve it within its time limit.

        Args:
            start: Bits of the searchable layers to start from.
            began: ``time.perf_counter()`` from which the time limit counts; None: from now.

        Raises:
            ContradictionError: If restrictions leave a layer no bits.
            NoSolutionError: If no policy keeps everything.
            TimeoutError: If the time limit passed before there was a policy.
            RuntimeError: If HiGHS fails.
        """
        deadline = self.deadline() if began is None else began + self.time_limit
        program = self.__dict__.get("program") or self._program(deadline)
        self.__dict__["program"] = program
        return program.solve(
            gap=self.gap, deadline=deadline, start=self.places(start) if start else None
        )

    def deadline(self) -> float:
        """When a solve that starts now has to stop."""
        return time.perf_counter() + self.time_limit

    def has_budget(self, name: str) -> bool:
        """Whether one of the budgets has a name."""
        return any(budget.name == name for budget in self.budgets)

    def without(self, name: str) -> Problem:
        """The same without a budget or restriction."""
        return dataclasses.replace(
            self,
            budgets=tuple(budget for budget in self.budgets if budget.name != name),
            restrictions=tuple(rule for rule in self.restrictions if rule.name != name),
        )

    def without_pair_terms(self) -> Problem:
        """The same with layers on their own; both have policies or neither has."""
        return dataclasses.replace(self, pair_terms=())

    def with_limits(self, limits: Mapping[str, int]) -> Problem:
        """The same with other limits, in whole units, of some of the budgets."""
        budgets = tuple(
            dataclasses.replace(
                budget,
                limit=limits[budget.name],
                asked=budget.measure.shown(limits[budget.name]),
            )
            if budget.name in limits
            else budget
            for budget in self.budgets
        )
        return dataclasses.replace(self, budgets=budgets)

    def with_layer_at(self, layer: str, pair: Pair) -> Problem:
        """The same with a layer held at a pair of bits."""
        held = Limited(f"{layer!r} at W{pair[0]}A{pair[1]}", frozenset([layer]), pair.__eq__)
        return dataclasses.replace(self, restrictions=(*self.restrictions, held))

    def chosen_pairs(self, chosen: Sequence[int]) -> tuple[Pair, ...]:
        """The bits of the searchable layers that an answer of the program means."""
        return tuple(pairs[i] for pairs, i in zip(self.columns, chosen, strict=True))

    def places(self, pairs: Sequence[Pair]) -> tuple[int, ...] | None:
        """The answer of the program that means these bits, None if they are not allowed."""
        if not self.allows(pairs):
            return None
        return tuple(own.index(pair) for own, pair in zip(self.columns, pairs, strict=True))

    def allows(self, pairs: Sequence[Pair]) -> bool:
        """Whether bits of the searchable layers keep all restrictions; budgets do not count."""
        if any(pair not in own for own, pair in zip(self.columns, pairs, strict=True)):
            return False
        chosen = [own.index(pair) for own, pair in zip(self.columns, pairs, strict=True)]
        return all(
            len({labels[chosen[group]] for group, labels in link.labels.items()}) == 1
            for link in self.links
        )

    def keeps(self, pairs: Sequence[Pair]) -> bool:
        """Whether bits of the searchable layers keep all budgets, in exact integers."""
        return all(budget.measure.use(pairs) <= budget.limit for budget in self.budgets)

    def objective(self, pairs: Sequence[Pair]) -> float:
        """The objective of bits of the searchable layers, rounded once."""
        return float(sum(self._parts(pairs).values()))

    def added_by_pairs(self, pairs: Sequence[Pair]) -> float:
        """What pairs of layers add to the objective, rounded once."""
        bits = dict(zip(self.terms, pairs, strict=True))
        return float(sum((term.value(bits) for term in self.pair_terms), Fraction(0)))

    def _parts(self, pairs: Sequence[Pair]) -> dict[str, Fraction]:
        """The parts of the objective, exactly."""
        bits = dict(zip(self.terms, pairs, strict=True))
        nothing = Fraction(0)
        parts = {
            "indicators": sum(
                (t for name, own in self.terms.items() for t in own[bits[name]]), nothing
            )
        }
        for term in self.pair_terms:
            parts[term.name] = parts.get(term.name, nothing) + term.value(bits)
        return parts

    def policy(self, solution: Solution, *, seconds: float | None = None) -> Policy:
        """The policy of an answer, checked against every budget and restriction in integers.

        Args:
            solution: The answer of the program.
            seconds: How long the search took; None leaves ``meta`` empty.

        Raises:
            RuntimeError: If the answer breaks a budget or restriction.
        """
        pairs = self.chosen_pairs(solution.chosen)
        if not (self.keeps(pairs) and self.allows(pairs)):
            raise RuntimeError("the solver's answer does not pass the check in exact integers")
        objective = self.objective(pairs)
        optimal = solution.stopped_by == "optimal"
        bound = objective if optimal else min(objective, solution.bound)
        left = (objective - bound) / abs(objective) if objective else 0.0
        meta = {
            **self.facts(pairs),
            "objective_parts": {name: float(part) for name, part in self._parts(pairs).items()},
            "solver": solution.solver,
            "stopped_by": solution.stopped_by,
            "seconds": seconds,
        }
        return dataclasses.replace(
            self.plain_policy(pairs),
            objective=objective,
            bound=bound,
            gap=left,
            meta={} if seconds is None else meta,
        )

    def facts(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """What a policy's ``meta`` says of its question, and of its use in exact integers."""
        return {
            **self.meta,
            "restrictions": [rule.name for rule in self.in_force],
            "check": [
                {
                    "name": budget.name,
                    "unit": budget.measure.unit,
                    "limit": budget.limit,
                    "used": budget.measure.use(pairs),
                }
                for budget in self.budgets
            ],
            "sizes": self.costs.sizes(dict(zip(self.pairs, pairs, strict=True))),
        }

    def plain_policy(self, pairs: Sequence[Pair]) -> Policy:
        """Bits of the searchable layers as a policy that says what it uses of the budgets."""
        costs = self.costs
        return Policy(
            layers=tuple(
                LayerBits(layer.name, *pair)
                for layer, pair in zip(costs.layers, pairs, strict=True)
            ),
            fixed=tuple(LayerBits(f.name, costs.fixed_bits, costs.fixed_bits) for f in costs.fixed),
            objective=self.objective(pairs),
            budgets=tuple(
                BudgetUse(b.name, b.asked, b.measure.shown(b.measure.use(pairs)))
                for b in self.budgets
            ),
        )


def make_problem(
    indicators: Indicators,
    costs: Costs,
    *,
    latency_table: LatencyTable | None = None,
    pairs: Mapping[str, Iterable[Pair]] | None = None,
    fixed: Mapping[str, Pair] | None = None,
    tied: str | Iterable[str | Iterable[str]] = (),
    tie_shared_inputs: bool = False,
    tie_added_inputs: bool = False,
    min_bits: Mapping[str, int | Pair] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    target: Target | None = None,
    alpha: Number = 1.0,
    normalise: bool = False,
    non_monotone: Rule = "forbid",
    interactions: Interactions | None = None,
    smoothness: Number = 0.0,
    time_limit: Number | None = None,
    gap: Number | None = None,
    **budgets: Asked | None,
) -> Problem:
    """Check a question; `limpq_ext.search` describes the arguments and the errors."""
    unknown = budgets.keys() - BUDGETS.keys()
    if unknown:
        raise TypeError(f"there is no budget or option {min(unknown)!r}")
    exact_alpha = exact_number("alpha", alpha, zero=True)
    weight_of_weights = float(exact_alpha)
    if gap is None:
        gap = 0.0 if len(costs.layers) <= EXACT_LAYERS else LARGE_GAP
    _check_names(indicators, costs)
    if interactions is not None and not isinstance(interactions, Interactions):
        raise TypeError(f"interactions must be Interactions, got {type(interactions).__name__}")
    if interactions is not None and normalise:
        raise ValueError(
            "interactions are in the units of the indicators: they do not go with normalise"
        )
    per_bit = exact_number("smoothness", smoothness, zero=True)
    if normalise:
        indicators = indicators.normalised()
    usable, records = indicators.monotone(non_monotone)
    restrictions = make_restrictions(
        costs,
        indicators.bits,
        pairs=pairs,
        fixed=fixed,
        tied=tied,
        tie_shared_inputs=tie_shared_inputs,
        tie_added_inputs=tie_added_inputs,
        min_bits=min_bits,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        target=target,
    )
    given = given_bits(costs, fixed, weight_bits, activation_bits)
    widths = {*indicators.bits, *(b for both in given.values() for side in both for b in side)}
    pair_terms = smoothness_terms(per_bit, indicators, sorted(widths))
    if interactions is not None:
        pair_terms += interaction_terms(interactions, indicators, costs)
    problem = Problem(
        costs=costs,
        indicators=usable,
        alpha=weight_of_weights,
        terms=_terms(usable, given, costs, records, exact_alpha),
        pair_terms=tuple(pair_terms),
        budgets=(),
        restrictions=restrictions,
        latency_table=None,
        gap=float(exact_number("gap", gap, zero=True)),
        time_limit=math.inf
        if time_limit is None
        else float(exact_number("time_limit", time_limit)),
        meta={
            "alpha": weight_of_weights,
            "normalised": normalise,
            "non_monotone": non_monotone,
            "non_monotone_records": [dataclasses.asdict(record) for record in records],
            INTERACTIONS: None
            if interactions is None
            else {"pairs": len(interactions.pairs), **interactions.meta},
            SMOOTHNESS: float(per_bit),
        },
    )
    asked = make_budgets(costs, problem.columns, budgets, latency_table)
    problem = dataclasses.replace(problem, budgets=asked, latency_table=latency_table)
    if sum(map(max, problem.values)) >= 2**1024:
        raise ValueError(f"alpha {alpha} is too large for these indicators")
    return problem


def _terms(
    indicators: Indicators,
    given: Mapping[str, tuple[set[int], set[int]]],
    costs: Costs,
    records: Sequence[NonMonotone],
    alpha: Fraction,
) -> dict[str, dict[Pair, tuple[Fraction, Fraction]]]:
    """The terms of each pair of each layer, in the order of the costs, without forbidden bits."""
    forbidden = {(r.layer, r.kind, r.bits) for r in records if r.action == "forbidden"}
    by_name = {layer.name: layer for layer in indicators.layers}
    terms = {}
    for cost in costs.layers:
        layer = by_name[cost.name]
        weights, activations = (
            sorted(own | {b for b in indicators.bits if (layer.name, kind, b) not in forbidden})
            for kind, own in zip(("weight", "activation"), given[cost.name], strict=True)
        )
        of_weights = {bits: alpha * _decimal(layer.weight.get(bits, 0.0)) for bits in weights}
        of_inputs = {bits: _decimal(layer.activation.get(bits, 0.0)) for bits in activations}
        terms[cost.name] = {
            (bw, ba): (of_inputs[ba], of_weights[bw]) for bw in weights for ba in activations
        }
    return terms


def _decimal(number: float) -> Fraction:
    """A float as the decimal that it is written as."""
    return Fraction(Decimal(repr(float(number))))


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
