from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import every_policy, problems, restrictions, uses, within

import limpq_ext as lq
from limpq_ext.allocation.search import search, uniform
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.interactions import Interactions

BITS = (2, 4)
KINDS = ("weight", "activation")
ENGINES = {"blocks": 2048, "a group for each product": 0}


@st.composite
def interactions_of(draw, indicators):
    """Interactions of some tensors of a network, of either sign."""
    names = [layer.name for layer in indicators.layers]
    tensors = list(itertools.product(names, KINDS))
    pairs = draw(
        st.lists(
            st.sampled_from(list(itertools.combinations(tensors, 2))),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    value = st.integers(-32, 32).map(lambda n: n / 64)
    widths = list(itertools.product(indicators.bits, repeat=2))
    return Interactions.from_table({pair: {b: draw(value) for b in widths} for pair in pairs})


def added(indicators, interactions, smoothness, bits):
    """What pairs of layers add to the objective, from the definition."""
    side = {name: dict(zip(KINDS, own, strict=True)) for name, own in bits.items()}
    whole = 0.0
    for pair in interactions.pairs if interactions else ():
        (one, kind), (two, other) = pair.tensors
        whole += pair.values.get(side[one][kind], {}).get(side[two][other], 0.0)
    for one, two in itertools.pairwise(layer.name for layer in indicators.layers):
        whole += smoothness * sum(abs(a - b) for a, b in zip(bits[one], bits[two], strict=True))
    return whole


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40, deadline=None)
@given(problem=problems(smallest_count=2), data=st.data())
def test_the_policy_is_the_best_of_all(engine, problem, data):
    indicators, costs = problem
    question = data.draw(restrictions(indicators, costs))
    interactions = data.draw(st.one_of(st.none(), interactions_of(indicators)))
    smoothness = data.draw(st.sampled_from([0.0, 0.01, 0.25]))
    alpha = data.draw(st.sampled_from([1.0, 2.0]))
    asked = {**question, "interactions": interactions, "smoothness": smoothness, "alpha": alpha}
    every = list(every_policy(indicators, costs, question, alpha))
    if not every:
        with pytest.raises(ValueError):  # restrictions contradict each other
            search(indicators, costs, **asked)
        return
    near = uses(costs, data.draw(st.sampled_from(every))[1])
    limits = {
        name: float(near[name] + data.draw(st.integers(1, 20))) for name in ("bitops", "size")
    }
    kept = []
    for objective, bits in every:
        used = uses(costs, bits)
        if all(within(name, used[name], limit) for name, limit in limits.items()):
            whole = objective + added(indicators, interactions, smoothness, bits)
            kept.append((whole, bits))
    least = min(objective for objective, _ in kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("limpq_ext.ilp.quadratic.MOST_TUPLES", ENGINES[engine])
        policy = search(indicators, costs, **limits, **asked)
    own = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}
    assert policy.objective == pytest.approx(least, rel=1e-9, abs=1e-9)
    assert policy.objective == pytest.approx(dict_of(kept, own), rel=1e-12, abs=1e-12)
    assert policy.bound <= policy.objective
    assert policy.meta["stopped_by"] == "optimal"
    assert policy.gap == 0
    parts = policy.meta["objective_parts"]
    assert math.fsum(parts.values()) == pytest.approx(policy.objective, abs=1e-12)
    assert all(budget.kept for budget in policy.budgets)


def dict_of(kept, bits):
    return next(objective for objective, own in kept if own == bits)


# ----------------------------------------------------------------------------------- one network


def network(count=4, bits=BITS):
    names = [f"block{i // 2}.layer{i}" for i in range(count)]
    values = {b: 1 / b**2 for b in bits}
    layers = tuple(LayerIndicators(name, values, values) for name in names)
    costs = tuple(LayerCost(name, "linear", 10 + i, 5, 4) for i, name in enumerate(names))
    return Indicators(bits, layers), Costs(costs, (LayerCost("first", "conv2d", 7, 3, 3),))


def of_weights(first, second, values):
    table = dict(zip(itertools.product(BITS, repeat=2), values, strict=True))
    return Interactions.from_table(
        {((f"block{first // 2}.layer{first}", "weight"), (second, "weight")): table}
        if isinstance(second, str)
        else {
            (
                (f"block{first // 2}.layer{first}", "weight"),
                (f"block{second // 2}.layer{second}", "weight"),
            ): table
        },
        meta={"score": "by hand"},
    )


def test_zero_interactions_give_the_same_policy_as_none():
    indicators, costs = network(6)
    plain = search(indicators, costs, bitops=uniform(3, 3))
    nothing = of_weights(0, 1, [0.0] * 4)
    with_them = search(indicators, costs, bitops=uniform(3, 3), interactions=nothing, smoothness=0)
    for field in dataclasses.fields(plain):
        if field.name != "meta":
            assert getattr(with_them, field.name) == getattr(plain, field.name)
    assert plain.meta["interactions"] is None
    assert plain.meta["smoothness"] == 0.0
    assert list(plain.meta["objective_parts"]) == ["indicators"]


def test_meta_says_what_was_added(tmp_path):
    indicators, costs = network()
    policy = search(
        indicators,
        costs,
        bitops=uniform(3, 3),
        interactions=of_weights(0, 1, [0.5, 0.25, 0.25, 0.125]),
        smoothness=0.01,
    )
    assert policy.meta["interactions"] == {"pairs": 1, "score": "by hand"}
    assert policy.meta["smoothness"] == 0.01
    assert set(policy.meta["objective_parts"]) == {"indicators", "interactions", "smoothness"}
    policy.save(tmp_path / "policy.json")
    assert lq.Policy.load(tmp_path / "policy.json") == policy


def test_a_large_penalty_on_steps_gives_equal_bits():
    indicators, costs = network(6, (2, 3, 4))
    rough = search(indicators, costs, bitops=uniform(3, 4))
    smooth = search(indicators, costs, bitops=uniform(3, 4), smoothness=10)
    assert len({bits for name, bits in rough.bits().items() if name != "first"}) > 1
    assert len({bits for name, bits in smooth.bits().items() if name != "first"}) == 1
    assert smooth.meta["objective_parts"]["smoothness"] == 0


def test_a_negative_objective_has_a_gap_of_zero():
    indicators, costs = network()
    policy = search(indicators, costs, size=1000, interactions=of_weights(0, 1, [0, 0, 0, -5.0]))
    assert policy.objective < 0
    assert policy.gap == 0
    assert policy.bound == policy.objective


def test_bits_that_are_no_candidates_add_nothing_to_interactions_and_steps_to_smoothness():
    indicators, costs = network()
    policy = search(
        indicators,
        costs,
        size=1000,
        fixed={"block0.layer0": (8, 8)},
        interactions=of_weights(0, 1, [9.0] * 4),
        smoothness=0.001,
    )
    assert policy.meta["objective_parts"]["interactions"] == 0
    assert policy.meta["objective_parts"]["smoothness"] == pytest.approx(0.001 * (4 + 4))


def test_a_curve_has_the_optimum_at_every_limit():
    indicators, costs = network()
    given = {"interactions": of_weights(0, 1, [0.5, -0.1, 0.0, 0.2]), "smoothness": 0.02}
    curve = lq.pareto(indicators, costs, over="bitops", points=5, **given)
    for point in curve.points:
        policy = search(indicators, costs, bitops=point.limit, **given)
        assert point.policy.objective == pytest.approx(policy.objective, rel=1e-12)
    for own in curve.uniform:
        pair = (own.weight_bits, own.activation_bits)
        bits = {layer.name: pair for layer in costs.layers}
        alone = 4 * sum(1 / b**2 for b in pair)
        whole = alone + added(indicators, given["interactions"], 0.02, bits)
        assert own.objective == pytest.approx(whole)
    assert "above the curve" in curve.text()


def test_an_explanation_has_the_optima_and_says_that_prices_may_not_hold():
    indicators, costs = network()
    given = {"bitops": uniform(3, 3), "smoothness": 0.02}
    found = lq.explain(indicators, costs, "block0.layer1", **given)
    for choice in found.choices:
        pair = (choice.weight_bits, choice.activation_bits)
        held = search(indicators, costs, fixed={"block0.layer1": pair}, **given)
        assert choice.objective == pytest.approx(held.objective, rel=1e-12)
    assert "shadow prices may leave out what pairs of layers add" in found.text()
    plain = lq.explain(indicators, costs, "block0.layer1", bitops=uniform(3, 3))
    assert "shadow prices may" not in plain.text()


def test_no_policy_is_explained_as_without_pairs():
    indicators, costs = network()
    limits = {"bitops": 10, "size": 10}
    with pytest.raises(lq.InfeasibleError) as plain:
        search(indicators, costs, **limits)
    with pytest.raises(lq.InfeasibleError) as caught:
        search(indicators, costs, **limits, smoothness=0.1)
    assert caught.value.conflict == plain.value.conflict
    assert caught.value.smallest == plain.value.smallest


def test_a_gap_and_a_time_limit_are_taken():
    indicators, costs = network(6, (2, 3, 4))
    given = {"bitops": uniform(3, 3), "smoothness": 0.01}
    best = search(indicators, costs, **given)
    near = search(indicators, costs, **given, gap=0.5, time_limit=100)
    assert near.meta["stopped_by"] in ("gap", "optimal")
    assert near.bound <= best.objective <= near.objective <= best.objective / (1 - 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smoothness": -1}, "smoothness"),
        ({"smoothness": math.nan}, "smoothness"),
        (
            {"interactions": of_weights(0, "other", [0.1] * 4)},
            "interactions: layer 'other' has no indicators",
        ),
        (
            {"interactions": of_weights(0, "first", [0.1] * 4)},
            "interactions: layer 'first' is fixed by the costs",
        ),
        (
            {"interactions": of_weights(0, 1, [0.1] * 4), "normalise": True},
            "interactions are in the units of the indicators: they do not go with normalise",
        ),
    ],
)
def test_what_cannot_be_added_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        search(*network(), bitops=uniform(3, 3), **given)


def test_interactions_without_one_of_the_candidates_are_refused():
    indicators, costs = network(bits=(2, 3, 4))
    with pytest.raises(ValueError, match=r"indicators have 3 bits, the interactions \[2, 4\]"):
        search(indicators, costs, interactions=of_weights(0, 1, [0.1] * 4))


def test_interactions_of_another_type_are_refused():
    with pytest.raises(TypeError, match="interactions must be Interactions, got dict"):
        search(*network(), interactions={})
