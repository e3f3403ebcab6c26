from __future__ import annotations

import dataclasses
import itertools
import math
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import (
    BUDGETS,
    LIMITS,
    allowed,
    best_policy,
    latency_tables,
    problems,
    restrictions,
    uses,
    within,
)

from limpq_ext.allocation.budgets import UniformLevel, of_8bit, uniform
from limpq_ext.allocation.problem import make_problem
from limpq_ext.allocation.search import search
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.policy import Policy

PUBLISHED = Path(__file__).parents[3] / "shared/data/limpq_resnet50_indicators.pkl"


def resnet50_costs() -> Costs:
    """The costs of ResNet-50 at 224x224 as LIMPQ's script counts them.

    It divides height and width without rounding and rounds their product down: a 1x1 convolution
    of stride 2 on 56x56 counts floor(28.5 * 28.5) = 812 outputs.
    """
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    layers = {}

    def count(name):
        def hook(conv, inputs):
            outputs = Fraction(1)
            for axis in (0, 1):
                room = inputs[0].shape[2 + axis] + 2 * conv.padding[axis] - conv.kernel_size[axis]
                outputs *= Fraction(room, conv.stride[axis]) + 1
            macs = math.floor(outputs) * conv.in_channels * conv.out_channels
            macs = macs * conv.kernel_size[0] * conv.kernel_size[1] // conv.groups
            weights, activations = conv.weight.numel(), inputs[0].numel()
            layers[name] = LayerCost(name, "conv2d", macs, weights, activations)

        return hook

    with torch.device("meta"):
        model = torchvision.models.resnet50(weights=None).eval()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(count(name))
        model(torch.empty(1, 3, 224, 224))
    first = layers.pop("conv1")
    last = LayerCost("fc", "linear", 2048 * 1000, 2048 * 1000, 2048)
    return Costs(tuple(layers.values()), (first, last))


@pytest.mark.skipif(not PUBLISHED.exists(), reason="LIMPQ's published indicators are not here")
def test_the_published_indicators_of_resnet50_give_the_known_optimum():
    indicators, costs = Indicators.from_limpq(PUBLISHED), resnet50_costs()
    assert costs.all_weights == 25502912
    policy = search(indicators, costs, bitops=uniform(3, 4), compression=12.2, alpha=2.0)
    assert policy.objective == pytest.approx(4.617439227, abs=1e-9)
    assert policy.gap == 0
    assert policy.bound == pytest.approx(policy.objective, rel=1e-9)
    assert policy.bits()["conv1"] == (8, 8)
    assert costs.bitops(policy.bits()) <= costs.bitops(Policy.uniform(costs, 3, 4).bits())
    assert costs.compression(policy.bits()) >= Fraction("12.2")
    assert [(b.name, b.kept) for b in policy.budgets] == [("bitops", True), ("compression", True)]
    records = policy.meta["non_monotone_records"]
    assert [(r["layer"], r["kind"], r["bits"], r["action"]) for r in records] == [
        ("layer4.0.downsample.0", "weight", 5, "forbidden"),
        ("layer4.2.conv3", "weight", 5, "forbidden"),
    ]


# ------------------------------------------------------------------ against every possible policy


def check_against_brute_force(
    indicators, costs, limits, alpha=1.0, table=None, *, ties=True, **question
):
    best = best_policy(indicators, costs, question, limits, alpha, table)
    given = {**question, **limits, "alpha": alpha}
    if "latency" in limits:
        given["latency_table"] = table
    if best is None:
        with pytest.raises(ValueError):  # a contradiction, or no policy
            search(indicators, costs, **given)
        return
    objective, bitops, size, _ = best
    policy = search(indicators, costs, **given)
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}
    used = uses(costs, bits, table)
    assert policy.objective == pytest.approx(objective, rel=1e-12)
    assert policy.gap == 0
    assert policy.meta["stopped_by"] == "optimal"
    assert allowed(costs, bits, {**question, **limits})
    assert {budget.name: budget.limit for budget in policy.budgets} == limits
    for budget in policy.budgets:
        assert budget.kept
        assert within(budget.name, used[budget.name], limits[budget.name])
        assert budget.used == pytest.approx(float(used[budget.name]), rel=1e-15)
    # of equally good policies the one with fewer BitOps, then the smaller one
    assert not ties or (used["bitops"], used["size"]) == (bitops, size)


@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data(), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_one_budget_gives_the_brute_force_optimum(budget, problem, data, alpha):
    table = data.draw(latency_tables(problem[1], problem[0].bits)) if budget == "latency" else None
    limits = {budget: data.draw(LIMITS[budget])}
    check_against_brute_force(*problem, limits, alpha, table)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data(), alpha=st.sampled_from([0.5, 1.0, 2.0]))
def test_many_budgets_together_give_the_brute_force_optimum(problem, data, alpha):
    names = data.draw(st.sets(st.sampled_from(BUDGETS), min_size=2))
    limits = {name: data.draw(LIMITS[name]) for name in BUDGETS if name in names}
    table = data.draw(latency_tables(problem[1], problem[0].bits)) if "latency" in names else None
    check_against_brute_force(*problem, limits, alpha, table)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), data=st.data(), alpha=st.sampled_from([0.0, 1.0]))
def test_restrictions_and_budgets_give_the_brute_force_optimum(problem, data, alpha):
    question = data.draw(restrictions(*problem))
    names = data.draw(st.sets(st.sampled_from(BUDGETS), max_size=2)) - {"latency"}
    limits = {name: data.draw(LIMITS[name]) for name in BUDGETS if name in names}
    check_against_brute_force(*problem, limits, alpha, **question)


@settings(max_examples=60, deadline=None)
@given(problem=problems(largest=2**52), data=st.data())
def test_a_limit_is_kept_to_the_last_bitop_where_floats_cannot_see_it(problem, data):
    indicators, costs = problem
    values = st.sampled_from(indicators.bits)
    policy = {layer.name: (data.draw(values), data.draw(values)) for layer in costs.layers}
    limit = costs.bitops(policy) + data.draw(st.sampled_from([-1, 0, 1]))
    if limit > 0:
        # floats cannot see which of two equally good policies has the fewer BitOps either
        check_against_brute_force(indicators, costs, {"bitops": limit}, ties=False)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_without_a_budget_every_layer_gets_its_best_bits(problem):
    check_against_brute_force(*problem, {})


# ------------------------------------------------------------------------------------- by example


def example(count=3, bits=(2, 3, 4)):
    values = {b: 1 / b for b in bits}
    layers = tuple(LayerIndicators(f"layer{i}", values, values) for i in range(count))
    costs = tuple(LayerCost(f"layer{i}", "linear", 100 + i, 10, 5) for i in range(count))
    fixed = (LayerCost("first", "conv2d", 7, 5, 3),)
    return Indicators(bits, layers), Costs(costs, fixed)


def test_a_uniform_level_is_what_the_uniform_policy_uses():
    indicators, costs = example()
    policy = search(
        indicators,
        costs,
        bitops=uniform(3, 4),
        size=UniformLevel(3, 4),
        compression=uniform(4, 2),
        mean_weight_bits=uniform(3, 4),
        bits_per_activation=uniform(3, 4),
    )
    assert [(b.name, b.limit) for b in policy.budgets] == [
        ("bitops", 303 * 12),
        ("size", 16.25),
        ("compression", 7.0),
        ("mean_weight_bits", 3),
        ("bits_per_activation", 4),
    ]
    assert all(budget.kept for budget in policy.budgets)


def test_a_share_of_8_bits_is_that_share_of_the_uniform_8_bit_policy():
    indicators, costs = example()
    policy = search(
        indicators, costs, bitops=of_8bit(0.1), size=of_8bit(Decimal("0.5")), mean_weight_bits=3
    )
    assert [(b.name, b.limit) for b in policy.budgets] == [
        ("bitops", 303 * 64 // 10),
        ("size", 17.5),
        ("mean_weight_bits", 3),
    ]
    with pytest.raises(ValueError, match="compression is a ratio and takes no share of 8 bits"):
        search(indicators, costs, compression=of_8bit(0.5))


def test_normalised_indicators_are_searched_where_they_are_asked_for():
    indicators, costs = example()
    odd = tuple(
        dataclasses.replace(layer, weight={b: 50 * v for b, v in layer.weight.items()})
        for layer in indicators.layers
    )
    indicators = dataclasses.replace(indicators, layers=odd)
    policy = search(indicators, costs, bitops=uniform(3, 3), normalise=True)
    expected = search(indicators.normalised(), costs, bitops=uniform(3, 3))
    assert (policy.layers, policy.objective) == (expected.layers, expected.objective)
    assert policy.meta["normalised"]
    assert policy.objective != search(indicators, costs, bitops=uniform(3, 3)).objective


def test_up_to_200_layers_are_solved_to_a_gap_of_zero_and_more_to_a_millionth():
    assert make_problem(*example(200)).gap == 0
    assert make_problem(*example(201)).gap == 1e-6
    assert make_problem(*example(201), gap=0).gap == 0


@pytest.mark.parametrize("gap", [None, 0.05])
def test_the_result_says_what_ended_the_search(gap):
    indicators, costs = example(count=30)
    policy = search(indicators, costs, bitops=uniform(3, 3), gap=gap)
    assert policy.meta["stopped_by"] == "optimal" or (gap and policy.meta["stopped_by"] == "gap")
    assert policy.gap <= (gap or 0)


def test_equal_policies_are_told_apart_by_bitops_and_then_by_size():
    flat = {2: 0.5, 3: 0.5}
    layers = tuple(LayerIndicators(name, flat, flat) for name in "abc")
    costs = Costs(
        (
            LayerCost("a", "linear", 10, 10, 5),
            LayerCost("b", "linear", 0, 10, 5),
            LayerCost("c", "linear", 0, 0, 5),
        ),
        (),
    )
    assert search(Indicators((2, 3), layers), costs).bits()["a"] == (2, 2)
    assert search(Indicators((2, 3), layers), costs).bits()["b"][0] == 2


def test_a_search_with_nothing_to_choose_is_answered():
    value = {4: 0.5}
    indicators = Indicators((4,), (LayerIndicators("a", value, value),))
    costs = Costs((LayerCost("a", "linear", 2, 3, 4),), ())
    policy = search(indicators, costs, bitops=32, size=1.5, alpha=0)
    assert policy.bits() == {"a": (4, 4)}
    assert (policy.objective, policy.gap) == (0.5, 0)


def test_the_check_in_whole_units_is_reported():
    indicators, costs = example()
    policy = search(indicators, costs, compression=8.5)
    (check,) = policy.meta["check"]
    assert check["limit"] == math.floor(32 * 35 / Fraction("8.5"))
    assert check["used"] == costs.size_bits(policy.bits())
    assert policy.meta["solver"].startswith("HiGHS ")
    assert policy.meta["seconds"] > 0


def test_a_decimal_limit_means_that_decimal():
    indicators, costs = example(count=5)  # in binary, 2.2 is above 11/5 and 2.6 above 13/5
    for limit in (2.2, 2.6, Decimal("2.2"), Fraction(13, 5), np.float64(2.6), np.float32(2.2)):
        policy = search(indicators, costs, mean_weight_bits=limit)
        assert policy.budgets[0].used == float(str(float(limit))[:3])


def test_a_policy_found_can_be_saved(tmp_path):
    indicators, costs = example()
    policy = search(indicators, costs, size=20, non_monotone="isotonic")
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy


def test_the_layers_come_in_the_order_of_the_costs():
    indicators, costs = example()
    turned = Indicators(indicators.bits, indicators.layers[::-1])
    policy = search(turned, costs)
    assert [layer.name for layer in policy.layers] == ["layer0", "layer1", "layer2"]
    assert policy.fixed == Policy.uniform(costs, 2, 2).fixed


@pytest.mark.parametrize(("rule", "bits"), [("forbid", (3, 3)), ("keep", (2, 2))])
def test_a_forbidden_bit_width_is_not_chosen_however_good(rule, bits):
    odd = {2: 0.1, 3: 0.4}
    indicators = Indicators((2, 3), (LayerIndicators("a", odd, odd),))
    costs = Costs((LayerCost("a", "linear", 1, 1, 1),), ())
    policy = search(indicators, costs, non_monotone=rule)
    assert policy.bits() == {"a": bits}
    assert len(policy.meta["non_monotone_records"]) == 2


def test_a_gap_that_is_allowed_is_kept_and_stated():
    indicators, costs = example(count=30)
    policy = search(indicators, costs, bitops=uniform(3, 3), gap=0.05)
    assert policy.bound <= policy.objective
    assert policy.gap <= 0.05


def hard_problem():
    generator = np.random.default_rng(0)
    names = [f"layer{i}" for i in range(400)]
    bits = (2, 3, 4, 5, 6, 7, 8)

    def values():
        return {b: float(v) for b, v in zip(bits, sorted(generator.random(7))[::-1], strict=True)}

    counts = generator.integers(10**6, 10**9, (400, 2)).tolist()
    costs = [LayerCost(n, "linear", m, w, 1) for n, (m, w) in zip(names, counts, strict=True)]
    layers = tuple(LayerIndicators(name, values(), values()) for name in names)
    return Indicators(bits, layers), Costs(tuple(costs), ())


def test_a_time_limit_that_is_too_short_says_so():
    with pytest.raises(TimeoutError, match="no policy was found within the time limit"):
        search(*hard_problem(), bitops=uniform(3, 4), size=uniform(3, 4), time_limit=1e-6)


def test_a_time_limit_is_kept_and_the_gap_that_is_left_is_stated():
    indicators, costs = hard_problem()
    start = time.perf_counter()
    try:
        policy = search(
            indicators,
            costs,
            bitops=uniform(4, 4),
            size=uniform(4, 4),
            mean_weight_bits=4,
            mean_activation_bits=4,
            time_limit=1.0,
        )
    except TimeoutError:
        pytest.skip("this machine found no policy in time")
    assert time.perf_counter() - start < 30
    assert all(budget.kept for budget in policy.budgets)
    assert policy.gap == pytest.approx(1 - policy.bound / policy.objective, abs=2e-9)


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, Decimal("-3")])
def test_a_budget_that_is_not_positive_and_finite_is_refused(budget, value):
    with pytest.raises(ValueError, match=f"{budget} must be positive and finite, got"):
        search(*example(), **{budget: value})


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("value", [b"3", True, [1], 1j])
def test_a_budget_that_is_no_number_is_refused(budget, value):
    with pytest.raises(TypeError, match=f"{budget} must be a number"):
        search(*example(), **{budget: value})


@pytest.mark.parametrize(
    ("text", "meant"), [("w3a4", uniform(3, 4)), ("45%", of_8bit(0.45)), ("600", 600)]
)
def test_a_budget_may_be_a_string_as_on_the_command_line(text, meant):
    asked, same = (search(*example(), size=limit) for limit in (text, meant))
    assert asked.layers == same.layers
    assert asked.budgets == same.budgets


def test_a_string_that_is_no_budget_is_refused():
    with pytest.raises(ValueError, match="size: 'three' is not a number, a level"):
        search(*example(), size="three")


def test_a_time_limit_counts_what_is_prepared_too(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    with pytest.raises(TimeoutError, match="no policy was found within the time limit"):
        search(*example(count=30), bitops=uniform(3, 3), size=uniform(3, 3), time_limit=2)


def test_a_penalty_that_forbids_does_not_hide_the_other_scores():
    layers = (
        LayerIndicators("a", {2: 1e16, 4: 1.0}, {2: 0.0, 4: 0.0}),
        LayerIndicators("b", {2: 1.0, 4: 0.0}, {2: 0.0, 4: 0.0}),
    )
    costs = Costs(tuple(LayerCost(name, "linear", 1, 1, 1) for name in "ab"), ())
    policy = search(Indicators((2, 4), layers), costs, non_monotone="keep")
    assert (policy.objective, policy.bound, policy.gap) == (1.0, 1.0, 0.0)
    assert policy.meta["stopped_by"] == "optimal"


@pytest.mark.parametrize("scale", [1e-320, 1e-300])
def test_scores_that_hardly_differ_from_zero_are_searched(scale):
    layer = LayerIndicators("a", {2: 2 * scale, 4: scale}, {2: 2 * scale, 4: scale})
    costs = Costs((LayerCost("a", "linear", 1, 1, 1),), ())
    assert search(Indicators((2, 4), (layer,)), costs).bits() == {"a": (4, 4)}


@pytest.mark.parametrize(("weight", "activation"), [(1, 4), (4, 17)])
def test_a_uniform_level_outside_2_to_16_bits_is_refused(weight, activation):
    with pytest.raises(ValueError, match=r"uniform level, .* outside 2 to 16"):
        uniform(weight, activation)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_alpha_and_gap_have_to_be_finite_and_not_negative(value):
    for option in ("alpha", "gap"):
        with pytest.raises(ValueError, match=f"{option} must be finite and not negative"):
            search(*example(), **{option: value})


def test_an_alpha_that_overflows_is_refused():
    layer = LayerIndicators("layer0", {2: 2e10, 3: 1e10}, {2: 2.0, 3: 1.0})
    with pytest.raises(ValueError, match=r"alpha 1e\+300 is too large"):
        search(Indicators((2, 3), (layer,)), example(count=1)[1], alpha=1e300)


@pytest.mark.parametrize("value", [1e-320, Decimal("1e-999999"), 10**301])
def test_a_number_out_of_all_range_is_refused(value):
    with pytest.raises(ValueError, match="size must be between 1e-300 and 1e300"):
        search(*example(), size=value)


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_a_time_limit_has_to_be_positive(value):
    with pytest.raises(ValueError, match="time_limit must be positive and finite"):
        search(*example(), time_limit=value)


def test_layers_that_do_not_match_are_named():
    indicators, costs = example(count=6)
    fewer = Costs(costs.layers[:1], costs.fixed)
    with pytest.raises(
        ValueError,
        match=r"5 layers have indicators and no searchable cost: 'layer1', 'layer2', 'layer3'",
    ):
        search(indicators, fewer)
    with pytest.raises(ValueError, match="4 layers have a cost and no indicators: 'layer2'"):
        search(Indicators(indicators.bits, indicators.layers[:2]), costs)


def test_no_weights_cannot_be_compressed():
    indicators, _ = example(count=1)
    with pytest.raises(ValueError, match="compression: the costs hold no weights"):
        search(indicators, Costs((LayerCost("layer0", "linear", 1, 0, 1),), ()), compression=2)


@st.composite
def questions(draw, names, bits):
    """Questions that may be wrong in any way."""
    odd = st.sampled_from([0, -1, math.nan, math.inf, -math.inf, "3", True, 10**400, 1e-310, [3]])
    number = st.one_of(st.floats(0.5, 1000), st.integers(1, 2000), odd)
    level = st.one_of(
        number,
        st.tuples(st.sampled_from(bits), st.sampled_from(bits)).map(lambda b: uniform(*b)),
        st.sampled_from([0.001, 0.3, 1, 5]).map(of_8bit),
    )
    limits = draw(st.dictionaries(st.sampled_from(BUDGETS[:-1]), level, max_size=3))
    pattern = st.sampled_from([*names, "*", "block0", "nothing", "first"])
    bit = st.sampled_from([*bits, *bits, 1, 9, 17, 2.5])
    pair = st.tuples(bit, bit)
    rules = st.fixed_dictionaries(
        {},
        optional={
            "pairs": st.dictionaries(pattern, st.lists(pair, max_size=3), max_size=2),
            "fixed": st.dictionaries(pattern, pair, max_size=2),
            "min_bits": st.dictionaries(pattern, st.one_of(bit, pair), max_size=2),
            "tied": st.lists(st.lists(pattern, max_size=3), max_size=2),
            "tie_shared_inputs": st.booleans(),
            "weight_bits": bit,
            "gap": st.sampled_from([0, 0.01, -1, math.nan]),
            "time_limit": st.sampled_from([60, 0, math.inf]),
        },
    )
    return limits, draw(rules)


@settings(max_examples=200, deadline=None)
@given(problem=problems(), data=st.data())
def test_any_question_gets_a_clear_error_or_a_proven_answer(problem, data):
    indicators, costs = problem
    limits, rules = data.draw(questions([layer.name for layer in costs.layers], indicators.bits))
    try:
        policy = search(indicators, costs, **limits, **rules)
    except (ValueError, TypeError):  # anything else fails here
        return
    given = {budget.name: budget.limit for budget in policy.budgets}
    question = {name: rule for name, rule in rules.items() if name not in ("gap", "time_limit")}
    best = best_policy(indicators, costs, question, given, 1.0)
    assert policy.objective == pytest.approx(best[0], rel=1e-12 + rules.get("gap", 0))
    assert policy.bound <= best[0] * (1 + 1e-12)
