"""The benchmark of pairwise terms: what it adds, and that its ways agree."""

from __future__ import annotations

import pytest

from bench.quadratic import CASES, QuadraticCase, measure, random_interactions
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators

NAMES = ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2")


def network():
    values = {2: 0.4, 3: 0.2, 4: 0.1}
    layers = tuple(LayerIndicators(name, values, values) for name in NAMES)
    costs = tuple(LayerCost(name, "conv2d", 100 + i, 10, 10) for i, name in enumerate(NAMES))
    return Indicators((2, 3, 4), layers), Costs(costs, ())


def test_random_interactions_are_of_layers_of_one_block_and_the_same_for_one_seed():
    indicators, _ = network()
    found = random_interactions(indicators, ("weight",), 0)
    assert [pair.layers for pair in found.pairs] == [NAMES[:2], NAMES[2:]]
    assert found == random_interactions(indicators, ("weight",), 0)
    assert found != random_interactions(indicators, ("weight",), 1)
    assert len(random_interactions(indicators, ("weight", "activation"), 0).pairs) == 8
    assert random_interactions(indicators, (), 0) is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_solved_in_its_ways(case):
    rows = measure(*network(), case, seeds=2, seconds=60)
    assert [row[1] for row in rows] == list(case.ways)
    assert all(row[0] == case.name for row in rows)
    assert all("time" not in row[4] for row in rows)


def test_a_way_below_the_others_proof_is_an_error(monkeypatch):
    indicators, costs = network()
    solve = measure.__globals__["solve"]
    case = QuadraticCase("one", ("weight",), ways=("as it is", "HiGHS alone"))

    def wrong(*given):
        policy, seconds = solve(*given)
        if given[4] == "HiGHS alone":
            object.__setattr__(policy, "objective", policy.objective / 2)
        return policy, seconds

    monkeypatch.setattr("bench.quadratic.solve", wrong)
    with pytest.raises(AssertionError, match="HiGHS alone"):
        measure(indicators, costs, case, seeds=1, seconds=60)
