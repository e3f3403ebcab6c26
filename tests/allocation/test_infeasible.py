from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from search_cases import (
    BUDGETS,
    LIMITS,
    best_policy,
    every_policy,
    excess,
    latency_tables,
    problems,
    uses,
    within,
)

from limpq_ext.allocation.budgets import uniform
from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.search import search
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.latency import LatencyEntry, LatencyTable


def example():
    values = {b: 1 / b for b in (2, 3, 4)}
    layers = tuple(LayerIndicators(f"layer{i}", values, values) for i in range(3))
    costs = tuple(LayerCost(f"layer{i}", "linear", 100 + i, 10, 5) for i in range(3))
    return Indicators((2, 3, 4), layers), Costs(costs, (LayerCost("first", "conv2d", 7, 5, 3),))


def infeasible(indicators, costs, limits, question, table):
    """The error of a search without a policy; rejects examples that have one."""
    assume(best_policy(indicators, costs, question, limits, 1.0, table) is None)
    given = {**limits, **question, "latency_table": table if "latency" in limits else None}
    with pytest.raises(InfeasibleError) as caught:
        search(indicators, costs, **given)
    return caught.value


@st.composite
def conflicts(draw):
    """Problems with budgets, some of which are tight, and a few restrictions that hold alone."""
    indicators, costs = draw(problems(smallest_count=2, most=(3, 2)))
    names = draw(st.sets(st.sampled_from(BUDGETS), min_size=1, max_size=3))
    limits = {name: draw(LIMITS[name]) for name in BUDGETS if name in names}
    table = draw(latency_tables(costs, indicators.bits)) if "latency" in limits else None
    question = {}
    layers = [layer.name for layer in costs.layers]
    if draw(st.booleans()):
        question["tied"] = [layers[:2]]
    if draw(st.booleans()):
        question["min_bits"] = {layers[-1]: indicators.bits[-1]}
    return indicators, costs, limits, question, table


@settings(max_examples=120, deadline=None)
@given(problem=conflicts())
def test_the_conflict_is_minimal(problem):
    indicators, costs, limits, question, table = problem
    error = infeasible(*problem)
    in_conflict = {n: v for n, v in limits.items() if n in error.conflict}
    own = {n: v for n, v in question.items() if any(c.startswith(n) for c in error.conflict)}
    assert len(in_conflict) + len(own) == len(error.conflict)
    assert best_policy(indicators, costs, own, in_conflict, 1.0, table) is None
    for name in error.conflict:
        fewer = {n: v for n, v in in_conflict.items() if n != name}
        less = {n: v for n, v in own.items() if not name.startswith(n)}
        assert best_policy(indicators, costs, less, fewer, 1.0, table) is not None


@settings(max_examples=120, deadline=None)
@given(problem=conflicts())
def test_the_smallest_limits_are_the_smallest_that_help_alone(problem):
    indicators, costs, limits, question, table = problem
    error = infeasible(*problem)
    assert list(error.smallest) == [name for name in limits if name in error.conflict]
    for name, smallest in error.smallest.items():
        others = {n: v for n, v in limits.items() if n != name}
        used = [
            use[name]
            for _, bits in every_policy(indicators, costs, {**question, **limits}, 1.0)
            for use in [uses(costs, bits, table)]
            if all(within(n, use[n], v) for n, v in others.items())
        ]
        if not used:
            assert smallest is None
        else:
            best = max(used) if name == "compression" else min(used)
            assert smallest == pytest.approx(float(best), rel=1e-15)
            given = {**limits, **question, name: smallest}
            assert search(
                indicators, costs, **given, latency_table=table if "latency" in limits else None
            ).budgets


@settings(max_examples=120, deadline=None)
@given(problem=conflicts())
def test_the_nearest_policy_has_the_smallest_sum_of_relative_excess(problem):
    indicators, costs, limits, question, table = problem
    assume("activation_memory" not in limits)  # counted moment by moment
    error = infeasible(*problem)

    def far(bits):
        use = uses(costs, bits, table)
        return sum((excess(n, use[n], floored(n, v)) for n, v in limits.items()), start=Fraction(0))

    def floored(name, limit):
        """The limit in whole units, which is what counts."""
        if name == "compression":
            everything = 32 * costs.all_weights
            return Fraction(everything, max(1, int(everything / Fraction(str(limit)))))
        total = {
            "bitops": 1,
            "size": 8,
            "total_size": 8,
            "mean_weight_bits": len(costs.layers),
            "mean_activation_bits": len(costs.layers),
            "bits_per_weight": sum(layer.weights for layer in costs.layers),
            "bits_per_activation": sum(layer.activations for layer in costs.layers),
            "latency": 1 if table is None else table.per_second,
        }[name]
        return Fraction(max(1, int(Fraction(str(limit)) * total)), total)

    policies = list(every_policy(indicators, costs, question, 1.0))
    every = [bits for _, bits in policies]
    best = min(map(far, every))
    found = {n: b for n, b in error.nearest.bits().items() if n in every[0]}
    assert found in every
    assert float(far(found)) == pytest.approx(float(best), rel=1e-6, abs=1e-9)
    assert [budget.limit for budget in error.nearest.budgets] == list(limits.values())
    reached = uses(costs, found, table)
    no_farther = [
        objective
        for objective, bits in policies
        for use in [uses(costs, bits, table)]
        if all(within(n, use[n], v) or within(n, use[n], reached[n]) for n, v in limits.items())
    ]
    assert error.nearest.objective == pytest.approx(min(no_farther), rel=1e-12)


def test_one_budget_that_cannot_be_kept_is_said_in_words():
    with pytest.raises(InfeasibleError) as caught:
        search(*example(), bitops=1000, mean_weight_bits=3)
    error = caught.value
    assert error.conflict == ("bitops",)
    assert error.smallest == {"bitops": 1212}
    assert error.nearest.bits()["layer0"] == (2, 2)
    assert str(error) == (
        "no policy keeps bitops <= 1,000 BitOps; the smallest bitops that can be kept with all else"
        " is 1,212 BitOps; the nearest policy uses bitops 1,212 BitOps (21.200% above the limit),"
        " mean_weight_bits 2 bits (kept)"
    )


def test_what_is_far_beyond_a_limit_is_a_factor_and_no_long_percentage():
    with pytest.raises(InfeasibleError, match=r"nearest policy uses bitops 1,212 BitOps \(1,212 t"):
        search(*example(), bitops=1)


def test_several_conflicts_are_told_one_at_a_time():
    with pytest.raises(InfeasibleError) as caught:
        search(*example(), bitops=1000, size=1, compression=12, mean_weight_bits=2)
    assert caught.value.conflict == ("bitops",)
    assert caught.value.smallest == {"bitops": None}
    message = "no policy keeps bitops <= 1,000 BitOps; moving bitops alone does not help"
    assert message in str(caught.value)
    assert "compression 11.2 times smaller (6.667% below the limit)" in str(caught.value)


def test_a_fixed_part_above_the_size_is_impossible():
    with pytest.raises(
        InfeasibleError, match=r"size <= 4 bytes; the smallest size .* is 12\.5 bytes"
    ):
        search(*example(), size=4)


def test_budgets_against_restrictions_name_both():
    with pytest.raises(InfeasibleError) as caught:
        search(*example(), mean_weight_bits=2.5, min_bits={"*": (3, 2)}, tied="*")
    assert caught.value.conflict == ("mean_weight_bits", "min_bits['*']")
    message = "no policy keeps mean_weight_bits <= 2.5 bits and min_bits['*'] together"
    assert message in str(caught.value)
    assert caught.value.smallest == {"mean_weight_bits": 3}


def test_a_latency_that_more_bits_lower_is_no_trap():
    indicators, costs = example()
    entries = tuple(
        LatencyEntry(layer.name, bw, ba, 0.01 / bw) for layer in costs.layers
        for bw in (2, 3, 4) for ba in (2, 3, 4)
    )  # fmt: skip
    table = LatencyTable(entries)
    policy = search(indicators, costs, latency=0.0076, latency_table=table)
    assert {layer.weight_bits for layer in policy.layers} == {4}
    with pytest.raises(InfeasibleError) as caught:
        search(indicators, costs, latency=0.0076, latency_table=table, mean_weight_bits=3)
    assert set(caught.value.conflict) == {"latency", "mean_weight_bits"}
    assert caught.value.smallest["mean_weight_bits"] == 4


def test_a_large_question_without_a_policy_is_answered_in_time():
    bits = (2, 3, 4, 5, 6)
    generator = np.random.default_rng(0)
    layers, costs = [], []
    for i in range(300):
        values = dict(zip(bits, sorted(generator.random(5).tolist())[::-1], strict=True))
        layers.append(LayerIndicators(f"layer{i}", values, values))
        counts = generator.integers(10**6, 10**9, 3).tolist()
        costs.append(LayerCost(f"layer{i}", "linear", *counts))
    with pytest.raises(InfeasibleError) as caught:
        search(
            Indicators(bits, tuple(layers)),
            Costs(tuple(costs), ()),
            bitops=uniform(3, 3),
            mean_weight_bits=3,
            min_bits={"layer1*": 4, "layer2*": 3},
            time_limit=20,
        )
    error = caught.value
    assert set(error.conflict) <= {
        "bitops", "mean_weight_bits", "min_bits['layer1*']", "min_bits['layer2*']"
    }  # fmt: skip
    assert "mean_weight_bits" in error.conflict or "bitops" in error.conflict
