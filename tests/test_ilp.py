from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from limpq_ext.ilp import Row, minimise


def total(values, chosen):
    return math.fsum(group[i] for group, i in zip(values, chosen, strict=True))


def solve(values, rows):
    return minimise(values, rows, gap=0.0, deadline=math.inf)


def knapsack(values, row):
    """The smallest sum of values with one limit, by dynamic programming over the used cost."""
    best = np.full(row.limit + 1, np.inf)
    best[0] = 0.0
    for group, costs in zip(values, row.costs, strict=True):
        after = np.full_like(best, np.inf)
        for value, cost in zip(group, costs, strict=True):
            if cost <= row.limit:
                np.minimum(after[cost:], best[: len(best) - cost] + value, out=after[cost:])
        best = after
    return best.min()


@pytest.mark.parametrize("tightness", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_forty_groups_give_the_optimum_of_dynamic_programming(seed, tightness):
    generator = np.random.default_rng(seed)
    values = generator.random((40, 25)).tolist()
    costs = generator.integers(0, 200, (40, 25)).tolist()
    smallest = Row(costs, 0).smallest
    row = Row(costs, smallest + int(tightness * 2000))
    solution = solve(values, [row])
    assert row.use(solution.chosen) <= row.limit
    assert total(values, solution.chosen) == pytest.approx(knapsack(values, row), rel=1e-9)
    assert solution.bound == pytest.approx(total(values, solution.chosen), rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), largest=st.sampled_from([3, 10**3, 10**9, 2**53, 10**25]))
def test_costs_of_any_size_and_order_give_the_brute_force_optimum(data, largest):
    groups = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(1, 3)) for _ in range(groups)]
    cost, value = st.integers(0, largest), st.integers(1, 1000).map(lambda n: n / 1000)
    values = [[data.draw(value) for _ in range(n)] for n in shape]
    rows = []
    feasible = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    for _ in range(data.draw(st.integers(1, 3))):
        costs = [[data.draw(cost) for _ in range(n)] for n in shape]
        slack = data.draw(st.sampled_from([0, 0, 1, largest // 3]))
        rows.append(Row(costs, Row(costs, 0).use(feasible) + slack))
    kept = (
        chosen
        for chosen in itertools.product(*map(range, shape))
        if all(row.use(chosen) <= row.limit for row in rows)
    )
    best = min(total(values, chosen) for chosen in kept)
    solution = solve(values, rows)
    assert all(row.use(solution.chosen) <= row.limit for row in rows)
    assert total(values, solution.chosen) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("room", "most"), [(-1, 2), (0, 3)])
def test_one_unit_in_a_quadrillion_too_much_is_not_taken_and_the_last_one_is(room, most):
    costs = [[0, 10**15 + i] for i in range(6)]  # 1 unit is a thousandth of HiGHS's tolerance
    row = Row(costs, sum(cost for _, cost in costs[:3]) + room)
    solution = solve([[1.0, 0.5]] * 6, [row])
    assert sum(solution.chosen) == most
    assert row.use(solution.chosen) <= row.limit


def test_the_only_answer_is_found_where_it_is_far_from_the_relaxed_one():
    costs = [[*range(0, 40, 2), 1]] * 2  # an odd sum needs the one odd cost, which is dear
    values = [[0.1 + 0.001 * i for i in range(20)] + [100.0]] * 2
    at_most, at_least = Row(costs, 11), Row([[40 - cost for cost in group] for group in costs], 69)
    solution = solve(values, [at_most, at_least])
    assert at_most.use(solution.chosen) == 11
    assert total(values, solution.chosen) == pytest.approx(100.105, rel=1e-9)


def test_a_row_that_every_choice_costs_the_same_is_no_row():
    assert solve([[0.5, 0.25]], [Row([[7, 7]], 7)]).chosen == (1,)


def test_a_deadline_that_has_passed_says_so():
    generator = np.random.default_rng(0)
    row = Row(generator.integers(0, 200, (40, 25)).tolist(), 2000)
    with pytest.raises(TimeoutError, match="no policy was found within the time limit"):
        minimise(generator.random((40, 25)).tolist(), [row], gap=0.0, deadline=0.0)


def test_the_same_program_gives_the_same_answer():
    generator = np.random.default_rng(0)
    values = generator.random((30, 9)).tolist()
    row = Row(generator.integers(0, 10**6, (30, 9)).tolist(), 5 * 10**6)
    assert solve(values, [row]) == solve(values, [row])
