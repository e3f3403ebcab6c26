from __future__ import annotations

import csv
import itertools
import json
import math

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import BUDGETS, best_policy, every_policy, latency_tables, problems, uses
from test_search import PUBLISHED, resnet50_costs

from limpq_ext.allocation.budgets import of_8bit, uniform
from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.pareto import Curve, pareto
from limpq_ext.allocation.search import search
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.reading import FileFormatError


def example(count=6, bits=(2, 3, 4)):
    generator = np.random.default_rng(1)
    layers, costs = [], []
    for i in range(count):
        weight, activation = (
            dict(zip(bits, sorted(generator.random(len(bits)).tolist())[::-1], strict=True))
            for _ in range(2)
        )
        layers.append(LayerIndicators(f"layer{i}", weight, activation))
        macs, weights, inputs = generator.integers(100, 1000, 3).tolist()
        costs.append(LayerCost(f"layer{i}", "linear", macs, weights, inputs))
    return Indicators(bits, tuple(layers)), Costs(
        tuple(costs), (LayerCost("first", "conv2d", 7, 5, 3),)
    )


@pytest.mark.parametrize("over", BUDGETS)
@settings(max_examples=15, deadline=None)
@given(problem=problems(smallest_count=2, most=(3, 2)), data=st.data())
def test_every_point_is_the_brute_force_optimum_within_its_limit(over, problem, data):
    indicators, costs = problem
    table = data.draw(latency_tables(costs, indicators.bits)) if over == "latency" else None
    layers = [layer.name for layer in costs.layers]
    question = data.draw(st.sampled_from([{}, {"tied": [layers[:2]]}]))
    curve = pareto(indicators, costs, over=over, points=7, latency_table=table, **question)
    assert 1 <= len(curve.points) <= 7
    for point in curve.points:
        best = best_policy(indicators, costs, question, {over: point.limit}, 1.0, table)
        assert point.policy.objective == pytest.approx(best[0], rel=1e-12)
        assert point.policy.gap == 0
        assert [(b.limit, b.used, b.kept) for b in point.policy.budgets] == [
            (point.limit, point.used, True)
        ]
    # from the strictest limit that can be kept to where it no longer matters
    every = [
        (objective, uses(costs, bits, table)[over])
        for objective, bits in every_policy(indicators, costs, {**question, over: 1}, 1.0)
    ]
    strictest = (max if over == "compression" else min)(use for _, use in every)
    assert curve.points[0].limit == pytest.approx(float(strictest), rel=1e-15)
    best = min(objective for objective, _ in every)
    assert curve.points[-1].policy.objective == pytest.approx(best, rel=1e-12)


def test_other_budgets_are_kept_at_every_point_and_points_are_searches():
    indicators, costs = example()
    curve = pareto(indicators, costs, points=9, compression=9.5, alpha=2.0)
    assert len(curve.points) == 9
    for point in curve.points:
        alone = search(indicators, costs, bitops=point.limit, compression=9.5, alpha=2.0)
        assert point.policy.layers == alone.layers
        assert point.policy.objective == alone.objective
        assert [b.name for b in point.policy.budgets] == ["bitops", "compression"]
        assert all(b.kept for b in point.policy.budgets)
    objectives = [point.policy.objective for point in curve.points]
    assert objectives == sorted(objectives, reverse=True)
    limits = [point.limit for point in curve.points]
    steps = [b - a for a, b in itertools.pairwise(limits)]
    assert max(steps) - min(steps) <= 1


def test_the_compression_runs_from_the_largest_ratio_down():
    curve = pareto(*example(), over="compression", points=5)
    ratios = [point.limit for point in curve.points]
    assert ratios == sorted(ratios, reverse=True)
    assert all(point.used >= point.limit for point in curve.points)


def test_start_and_stop_may_be_numbers_levels_and_shares():
    indicators, costs = example()
    everything = sum(layer.macs for layer in costs.layers)
    curve = pareto(indicators, costs, points=3, start=uniform(3, 3), stop=of_8bit(0.25))
    assert [point.limit for point in curve.points] == [
        9 * everything, (9 + 16) * everything // 2, 16 * everything
    ]  # fmt: skip
    few = pareto(indicators, costs, points=50, start=9 * everything, stop=9 * everything + 3)
    assert [point.limit - 9 * everything for point in few.points] == [0, 1, 2, 3]


def test_the_knee_is_the_point_farthest_below_the_chord():
    bits = (2, 3, 4, 5, 6)
    values = {b: 2.0 ** -(b * b) for b in bits}  # nearly all is gained at 3 bits
    layer = LayerIndicators("a", values, values)
    costs = Costs((LayerCost("a", "linear", 1, 1, 1),), ())
    curve = pareto(Indicators(bits, (layer,)), costs, over="mean_weight_bits", points=5)
    assert [point.limit for point in curve.points] == [2, 3, 4, 5, 6]
    assert curve.knee == 1
    flat = Indicators(bits, (LayerIndicators("a", dict.fromkeys(bits, 1.0), values),))
    assert pareto(flat, costs, over="mean_weight_bits", points=5).knee is None


def test_uniform_policies_stand_beside_the_curve_and_none_lies_below_it():
    indicators, costs = example()
    curve = pareto(indicators, costs, points=20, non_monotone="keep")
    assert len(curve.uniform) == 9
    for own in curve.uniform:
        assert own.allowed
        pair = (own.weight_bits, own.activation_bits)
        assert own.used == costs.bitops({layer.name: pair for layer in costs.layers})
        assert own.objective == pytest.approx(
            math.fsum(
                layer.weight[pair[0]] + layer.activation[pair[1]] for layer in indicators.layers
            )
        )
        assert own.objective >= search(indicators, costs, bitops=own.used).objective - 1e-12
        assert own.best is not None
        within = [p.policy.objective for p in curve.points if p.used <= own.used]
        assert own.best == min(within)


def test_uniform_policies_that_break_something_else_say_so():
    indicators, costs = example()
    curve = pareto(indicators, costs, points=3, mean_weight_bits=3, fixed={"layer0": (4, 4)})
    allowed = {(u.weight_bits, u.activation_bits) for u in curve.uniform if u.allowed}
    assert allowed == {(2, 2), (2, 3), (2, 4)}  # layer0 keeps its 4 bits
    given = pareto(indicators, costs, points=3, activation_bits=16)
    assert {u.activation_bits for u in given.uniform} == {16}
    assert all(u.allowed for u in given.uniform)


def test_a_curve_survives_being_saved(tmp_path):
    curve = pareto(*example(), points=4, size=of_8bit(0.6), pairs={"*": [(2, 2), (4, 4)]})
    curve.save(tmp_path / "curve.json")
    assert Curve.load(tmp_path / "curve.json") == curve
    document = json.loads((tmp_path / "curve.json").read_text())
    document["knee"] = 99
    (tmp_path / "curve.json").write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match="knee 99 is not one of 4 points"):
        Curve.load(tmp_path / "curve.json")


def test_the_table_has_a_line_for_every_point_and_uniform_policy(tmp_path):
    curve = pareto(*example(), points=5, size=of_8bit(0.6))
    curve.save_csv(tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    points, rest = lines[:5], lines[5:]
    assert [float(line["bitops_limit"]) for line in points] == [p.limit for p in curve.points]
    assert [float(line["bitops"]) for line in points] == [p.used for p in curve.points]
    assert [float(line["objective"]) for line in points] == [
        p.policy.objective for p in curve.points
    ]
    assert [int(line["knee"]) for line in points] == [int(i == curve.knee) for i in range(5)]
    assert [line["policy"] for line in rest[:3]] == ["W2A2", "W2A3", "W2A4"]
    assert [float(line["objective"]) for line in rest] == [u.objective for u in curve.uniform]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"over": "speed"}, ValueError, "there is no budget 'speed': it is one of bitops"),
        ({"bitops": 3}, ValueError, "bitops is the budget that moves: give start and stop"),
        ({"points": 1}, ValueError, "points must be 2 or more, got 1"),
        ({"points": 2.5}, TypeError, "points must be an integer, got 2.5"),
        (
            {"start": 1},
            ValueError,
            r"start: bitops 1 BitOps cannot be kept .*; the smallest that can is",
        ),
        (
            {"over": "compression", "start": 1000},
            ValueError,
            r"start: compression .* times smaller cannot be kept .*; the largest that can is",
        ),
        (
            {"start": 20000, "stop": 15000},
            ValueError,
            r"stop: bitops 15,000 BitOps is stricter than the start, 20,000 B",
        ),
        ({"start": -3}, ValueError, "bitops must be positive and finite, got -3"),
        ({"over": "latency"}, ValueError, "go together: latency_table is missing"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"speed": 3}, TypeError, "there is no budget or option 'speed'"),
    ],
)
def test_a_wrong_question_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        pareto(*example(), **given)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="LIMPQ's published indicators are not here")
def test_the_curve_of_resnet50_goes_through_the_known_optimum():
    indicators, costs = Indicators.from_limpq(PUBLISHED), resnet50_costs()
    level = uniform(3, 4)
    question = {"compression": 12.2, "alpha": 2.0}
    curve = pareto(indicators, costs, points=2, start=level, stop=of_8bit(0.25), **question)
    assert curve.points[0].policy.objective == pytest.approx(4.617439227, abs=1e-9)
    assert curve.points[1].policy.objective < 3.98
    assert len(curve.uniform) == 25
    reached = search(indicators, costs, bitops=curve.points[0].limit, **question)
    assert curve.points[0].policy.layers == reached.layers


def test_other_budgets_that_cannot_be_kept_are_explained():
    with pytest.raises(InfeasibleError) as caught:
        pareto(*example(), points=3, mean_weight_bits=2.5, min_bits={"*": 3})
    assert caught.value.conflict == ("mean_weight_bits", "min_bits['*']")


def test_one_layer_with_one_candidate_is_a_curve_of_one_point():
    values = {4: 0.5}
    indicators = Indicators((4,), (LayerIndicators("a", values, values),))
    costs = Costs((LayerCost("a", "linear", 2, 3, 4),), ())
    curve = pareto(indicators, costs)
    assert [(p.limit, p.policy.objective) for p in curve.points] == [(32, 1.0)]
    assert curve.knee is None
