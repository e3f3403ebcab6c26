from __future__ import annotations

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

from limpq_ext.costs import Costs, LayerCost
from limpq_ext.indicators import Indicators, LayerIndicators
from limpq_ext.policy import Policy
from limpq_ext.search import InfeasibleError, UniformLevel, search, uniform

PUBLISHED = Path(__file__).parents[2] / "shared/data/limpq_resnet50_indicators.pkl"
BUDGETS = ("bitops", "size", "compression", "mean_weight_bits", "mean_activation_bits")


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


@st.composite
def problems(draw, largest=12):
    bits = tuple(sorted(draw(st.sets(st.integers(2, 8), min_size=2, max_size=3))))
    count = draw(st.integers(2, 4 if len(bits) == 2 else 3))
    names = [f"layer{i}" for i in range(count)]
    value = st.integers(1, 50).map(lambda n: n / 64)

    def values():
        return {b: draw(value) for b in bits}

    def cost(name):
        small = st.integers(0, largest)
        return LayerCost(name, "linear", draw(small), draw(small), draw(small))

    layers = tuple(LayerIndicators(name, values(), values()) for name in names)
    # one weight at least, so that there is something to compress
    fixed = (LayerCost("first", "conv2d", 7, draw(st.integers(1, largest)), 3),)
    return Indicators(bits, layers), Costs(tuple(map(cost, names)), fixed)


def brute_force(indicators, costs, alpha, keeps):
    """The smallest objective of all policies that keep the budgets, None if there is none."""
    _, records = indicators.monotone("forbid")
    forbidden = {(r.layer, r.kind, r.bits) for r in records}
    columns = [
        [
            (bw, ba, layer.activation[ba] + alpha * layer.weight[bw])
            for bw, ba in itertools.product(indicators.bits, repeat=2)
            if (layer.name, "weight", bw) not in forbidden
            and (layer.name, "activation", ba) not in forbidden
        ]
        for layer in indicators.layers
    ]
    best = None
    for chosen in itertools.product(*columns):
        objective = math.fsum(value for _, _, value in chosen)
        if best is not None and objective >= best:
            continue
        names = (layer.name for layer in costs.layers)
        bits = {name: (bw, ba) for name, (bw, ba, _) in zip(names, chosen, strict=True)}
        if keeps(bits):
            best = objective
    return best


def keeps(costs, limits):
    """Whether an assignment keeps the limits, written down once more and in fractions."""
    exact = {name: Fraction(str(limit)) for name, limit in limits.items()}

    def check(bits):
        used = {
            "bitops": costs.bitops(bits),
            "size": Fraction(costs.size_bits(bits), 8),
            "compression": -costs.compression(bits),
            "mean_weight_bits": costs.mean_bits(bits)[0],
            "mean_activation_bits": costs.mean_bits(bits)[1],
        }
        return all(used[n] <= (-v if n == "compression" else v) for n, v in exact.items())

    return check


def check_against_brute_force(indicators, costs, limits, alpha):
    check = keeps(costs, limits)
    best = brute_force(indicators, costs, alpha, check)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            search(indicators, costs, alpha=alpha, **limits)
        # the smallest values are the right ones: they can be asked for, all at once
        assert set(caught.value.conflict) <= set(limits)
        reachable = {**limits, **caught.value.smallest}
        assert search(indicators, costs, alpha=alpha, **reachable).gap == 0
    else:
        policy = search(indicators, costs, alpha=alpha, **limits)
        assert policy.objective == pytest.approx(best, rel=1e-12)
        assert policy.gap == 0
        assert check(policy.bits())
        assert all(budget.kept for budget in policy.budgets)
        assert {b.name: b.limit for b in policy.budgets} == limits


LIMITS = {
    "bitops": st.integers(1, 900),
    "size": st.integers(1, 320).map(lambda n: n / 8),
    "compression": st.integers(30, 160).map(lambda n: n / 10),
    "mean_weight_bits": st.integers(20, 80).map(lambda n: n / 10),
    "mean_activation_bits": st.integers(20, 80).map(lambda n: n / 10),
}


@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data(), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_one_budget_gives_the_brute_force_optimum(budget, problem, data, alpha):
    limits = {budget: data.draw(LIMITS[budget])}
    check_against_brute_force(*problem, limits, alpha)


@settings(max_examples=150, deadline=None)
@given(problem=problems(), data=st.data(), alpha=st.sampled_from([0.5, 1.0, 2.0]))
def test_all_budgets_together_give_the_brute_force_optimum(problem, data, alpha):
    limits = {name: data.draw(limit) for name, limit in LIMITS.items()}
    check_against_brute_force(*problem, limits, alpha)


@settings(max_examples=100, deadline=None)
@given(problem=problems(largest=2**52), data=st.data())
def test_a_limit_is_kept_to_the_last_bitop_where_floats_cannot_see_it(problem, data):
    indicators, costs = problem
    values = st.sampled_from(indicators.bits)
    policy = {layer.name: (data.draw(values), data.draw(values)) for layer in costs.layers}
    limit = costs.bitops(policy) + data.draw(st.sampled_from([-1, 0, 1]))
    if limit > 0:
        check_against_brute_force(indicators, costs, {"bitops": limit}, 1.0)


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_without_a_budget_every_layer_gets_its_best_bits(problem):
    check_against_brute_force(*problem, {}, 1.0)


# ------------------------------------------------------------------------------------- by example


def example(count=3, bits=(2, 3, 4)):
    values = {b: 1 / b for b in bits}
    layers = tuple(LayerIndicators(f"layer{i}", values, values) for i in range(count))
    costs = tuple(LayerCost(f"layer{i}", "linear", 100 + i, 10, 5) for i in range(count))
    fixed = (LayerCost("first", "conv2d", 7, 5, 3),)
    return Indicators(bits, layers), Costs(costs, fixed)


def test_a_uniform_level_is_what_the_uniform_policy_uses():
    indicators, costs = example()
    policy = search(indicators, costs, bitops=uniform(3, 4), size=UniformLevel(3, 4))
    assert [(b.name, b.limit) for b in policy.budgets] == [("bitops", 303 * 12), ("size", 16.25)]


def test_the_check_in_whole_units_is_reported():
    indicators, costs = example()
    policy = search(indicators, costs, compression=8.5)
    (check,) = policy.meta["check"]
    assert check["limit"] == math.floor(32 * 35 / Fraction("8.5")) - 40
    assert check["used"] == costs.size_bits(policy.bits()) - 40
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
@pytest.mark.parametrize("value", ["3", True, [1], 1j])
def test_a_budget_that_is_no_number_is_refused(budget, value):
    with pytest.raises(TypeError, match=f"{budget} must be a number"):
        search(*example(), **{budget: value})


@pytest.mark.parametrize("budget", ["compression", "mean_weight_bits", "mean_activation_bits"])
def test_a_uniform_level_is_for_bitops_and_size_only(budget):
    with pytest.raises(TypeError, match=f"{budget} must be a number, got UniformLevel"):
        search(*example(), **{budget: uniform(3, 4)})


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
    layer = LayerIndicators("layer0", {2: 200.0, 3: 100.0}, {2: 2.0, 3: 1.0})
    with pytest.raises(ValueError, match=r"alpha 1e\+308 is too large"):
        search(Indicators((2, 3), (layer,)), example(count=1)[1], alpha=1e308)


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


def test_impossible_budgets_are_named_with_what_is_possible():
    indicators, costs = example()
    with pytest.raises(InfeasibleError) as caught:
        search(indicators, costs, bitops=1000, size=1, compression=12, mean_weight_bits=2)
    assert caught.value.conflict == ("bitops", "size", "compression")
    assert caught.value.smallest["bitops"] == 303 * 4
    assert caught.value.smallest["size"] == 100 / 8
    assert caught.value.smallest["compression"] == pytest.approx(32 * 35 / 100)
    message = str(caught.value)
    assert "bitops <= 1000 (the smallest that can be kept is 1212)" in message
    assert "compression >= 12 (the largest that can be kept is 11.2)" in message


def test_a_fixed_part_above_the_size_is_impossible():
    with pytest.raises(InfeasibleError, match="size <= 4 "):
        search(*example(), size=4)
