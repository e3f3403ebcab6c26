"""Neighbours and random policies against all policies of small searches."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from search_cases import LIMITS, allowed, latency_tables, problems, restrictions, uses, within

from limpq_ext.allocation.neighbours import Neighbours, changed, largest_uniform
from limpq_ext.allocation.problem import make_problem
from limpq_ext.allocation.restrictions import ContradictionError
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators


def flat(costs, bits):
    """Indicators that do not matter."""
    table = {layer.name: dict.fromkeys(bits, 1.0) for layer in costs.layers}
    return Indicators.from_table(table, table)


def every(costs, bits, question, limits, table=None):
    """All policies within restrictions and budgets, as pairs."""
    names = [layer.name for layer in costs.layers]
    for pairs in itertools.product(itertools.product(bits, repeat=2), repeat=len(names)):
        named = dict(zip(names, pairs, strict=True))
        if allowed(costs, named, {**question, **limits}):
            used = uses(costs, named, table)
            if all(within(name, used[name], limit) for name, limit in limits.items()):
                yield pairs


def ties(costs, question, limits):
    """(place, side) -> everything that has the same bits."""
    places = {layer.name: place for place, layer in enumerate(costs.layers)}
    same = {(place, side): {(place, side)} for place in places.values() for side in (0, 1)}

    def join(group):
        whole = set().union(*(same[member] for member in group))
        for member in whole:
            same[member] = whole

    for group in question.get("tied", ()):
        for side in (0, 1):
            join([(places[name], side) for name in group])
    if question.get("tie_shared_inputs") or "activation_memory" in limits:
        for group in costs.shared_inputs:
            join([(places[name], 1) for name in group])
    return same


def is_neighbour(pairs, other, same, kept):
    """Whether one raise, an exchange within a layer or one swap makes the other policy."""
    moved = {
        (place, side): other[place][side] - pairs[place][side]
        for place in range(len(pairs))
        for side in (0, 1)
        if other[place][side] != pairs[place][side]
    }
    tensors = {frozenset(same[member]) for member in moved}
    up = {tensor for tensor in tensors if moved[next(iter(tensor & moved.keys()))] > 0}
    if not up:
        return False
    for place in range(len(pairs)):
        if tensors <= {frozenset(same[place, 0]), frozenset(same[place, 1])}:
            return True
    if len(up) != 1 or len(tensors) != 2:
        return False
    (more,), (less,) = up, tensors - up
    if {place for place, _ in more} & {place for place, _ in less}:
        return False
    alone = [list(pair) for pair in pairs]
    for place, side in more:
        alone[place][side] = other[place][side]
    return tuple(map(tuple, alone)) not in kept


SOME_LIMITS = st.dictionaries(
    st.sampled_from(sorted(set(LIMITS) - {"latency"})), st.none(), min_size=1, max_size=2
).flatmap(lambda names: st.fixed_dictionaries({name: LIMITS[name] for name in names}))


@settings(max_examples=30, deadline=None)
@given(problem=problems(smallest_count=2, most=(3, 2)), limits=SOME_LIMITS, data=st.data())
def test_neighbours_are_all_policies_one_raise_exchange_or_swap_away(problem, limits, data):
    indicators, costs = problem
    layers = [layer.name for layer in costs.layers]
    question = data.draw(st.sampled_from([{}, {"tied": [layers[:2]]}, {"tie_shared_inputs": True}]))
    kept = set(every(costs, indicators.bits, question, limits))
    assume(kept)
    pairs = data.draw(st.sampled_from(sorted(kept)))
    near = Neighbours(make_problem(flat(costs, indicators.bits), costs, **question, **limits))
    found = [changed(pairs, bits) for bits in near.within(pairs)]
    same = ties(costs, question, limits)
    assert len(set(found)) == len(found)
    assert set(found) == {
        other for other in kept if other != pairs and is_neighbour(pairs, other, same, kept)
    }


@settings(max_examples=30, deadline=None)
@given(problem=problems(smallest_count=2, most=(3, 2)), limits=SOME_LIMITS, data=st.data())
def test_whatever_is_asked_neighbours_and_draws_keep_it(problem, limits, data):
    indicators, costs = problem
    question = data.draw(restrictions(indicators, costs))
    table = None
    if data.draw(st.booleans()) and not question.keys() & {"fixed", "weight_bits"}:
        limits = {**limits, "latency": data.draw(LIMITS["latency"])}
        table = data.draw(latency_tables(costs, indicators.bits))
    assume("activation_bits" not in question or table is None)
    try:
        asked = make_problem(
            flat(costs, indicators.bits), costs, latency_table=table, **question, **limits
        )
        near = Neighbours(asked)
    except (ContradictionError, ValueError):
        assume(False)
    kept = [
        pairs
        for pairs in itertools.product(*asked.columns)
        if asked.allows(pairs) and asked.keeps(pairs)
    ]
    assume(kept)
    pairs = data.draw(st.sampled_from(kept))
    for bits in near.within(pairs):
        assert changed(pairs, bits) in kept
    drawn = near.random(pairs, np.random.default_rng(0))
    assert drawn == near.random(pairs, np.random.default_rng(0))
    assert drawn is None or drawn in kept
    if drawn is not None:
        measures = [(b.measure.use(drawn), b.limit) for b in asked.budgets]
        assert any(100 * used >= 99 * limit for used, limit in measures)


def example():
    counts = [(40, 13, 8), (25, 31, 4), (33, 17, 6)]
    layers = tuple(LayerCost(f"layer{i}", "linear", *count) for i, count in enumerate(counts))
    return Costs(layers, (LayerCost("first", "conv2d", 7, 5, 3),))


def test_draws_come_to_nearly_every_policy_at_the_budget():
    costs, bits, limits = example(), (2, 3, 4), {"bitops": 900}
    near = Neighbours(make_problem(flat(costs, bits), costs, **limits))
    start = ((2, 2),) * 3
    names = [layer.name for layer in costs.layers]
    at_budget = {
        pairs
        for pairs in every(costs, bits, {}, limits)
        if costs.bitops(dict(zip(names, pairs, strict=True))) >= 891
    }
    generator = np.random.default_rng(0)
    drawn = {near.random(start, generator) for _ in range(300)} - {None}
    assert len(at_budget) > 5
    assert drawn <= at_budget
    assert len(drawn) > 0.9 * len(at_budget)


def test_what_no_budget_counts_is_at_its_highest():
    costs, bits = example(), (2, 3, 4)
    near = Neighbours(make_problem(flat(costs, bits), costs, size=(3 * 61 + 40) / 8))
    for seed in range(5):
        drawn = near.random(((2, 2),) * 3, np.random.default_rng(seed))
        assert [activation for _, activation in drawn] == [4, 4, 4]


@pytest.mark.parametrize("limit", [190, 20_000])
def test_there_are_no_draws_where_no_policy_is_at_the_budget(limit):
    costs, bits = example(), (2, 3)
    near = Neighbours(make_problem(flat(costs, bits), costs, bitops=limit))
    assert near.random(((2, 2),) * 3, np.random.default_rng(0)) is None


def test_a_layer_that_may_only_change_as_a_whole_is_swapped_as_a_whole():
    costs, bits = example(), (4, 8)
    question = {"pairs": {"*": [(4, 4), (8, 8)]}}
    near = Neighbours(make_problem(flat(costs, bits), costs, bitops=40 * 64 + 58 * 16, **question))
    pairs = ((8, 8), (4, 4), (4, 4))
    assert [changed(pairs, bits) for bits in near.within(pairs)] == [
        ((4, 4), (8, 8), (4, 4)),
        ((4, 4), (4, 4), (8, 8)),
    ]


@settings(max_examples=25, deadline=None)
@given(problem=problems(smallest_count=2, most=(3, 2)), limits=SOME_LIMITS, data=st.data())
def test_the_largest_uniform_policies_are_those_that_no_other_one_has_more_bits_than(
    problem, limits, data
):
    indicators, costs = problem
    question = data.draw(st.sampled_from([{}, {"tie_shared_inputs": True}]))
    asked = make_problem(flat(costs, indicators.bits), costs, **question, **limits)
    kept = set(every(costs, indicators.bits, question, limits))
    uniform = {pairs[0] for pairs in kept if len(set(pairs)) == 1}
    larger = {(w, a) for w, a in uniform for v, b in uniform - {(w, a)} if v >= w and b >= a}
    found = largest_uniform(asked)
    assert sorted(found) == sorted((pair,) * len(costs.layers) for pair in uniform - larger)


def test_a_layer_with_one_choice_keeps_it_in_uniform_policies():
    costs = example()
    question = {"fixed": {"layer1": (8, 8)}, "bitops": 40 * 9 + 25 * 64 + 33 * 9}
    asked = make_problem(flat(costs, (2, 3, 4)), costs, **question)
    assert largest_uniform(asked) == [
        ((2, 4), (8, 8), (2, 4)),
        ((3, 3), (8, 8), (3, 3)),
        ((4, 2), (8, 8), (4, 2)),
    ]


def test_at_the_budget_is_from_the_share_up_to_the_limit():
    costs = example()
    near = Neighbours(make_problem(flat(costs, (2, 3)), costs, bitops=400))
    used = costs.bitops({f"layer{i}": (2, 2) for i in range(3)})
    assert used == 392
    assert not near.is_at_budget(((2, 2),) * 3)
    assert near.is_at_budget(((2, 2),) * 3, Fraction(98, 100))
    assert not near.is_at_budget(((3, 3),) * 3, Fraction(1, 2))
