from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from search_cases import LIMITS, best_policy, problems
from test_pareto import example

from limpq_ext.allocation.budgets import uniform
from limpq_ext.allocation.explain import explain
from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.search import search


@settings(max_examples=60, deadline=None)
@given(problem=problems(smallest_count=2, most=(3, 2)), data=st.data())
def test_every_choice_has_the_brute_force_optimum_with_the_layer_held_there(problem, data):
    indicators, costs = problem
    names = data.draw(st.sets(st.sampled_from(["bitops", "size", "activation_memory"])))
    limits = {name: data.draw(LIMITS[name]) for name in sorted(names)}
    layers = [layer.name for layer in costs.layers]
    question = data.draw(st.sampled_from([{}, {"tied": [layers[:2]]}]))
    best = best_policy(indicators, costs, question, limits, 1.0)
    assume(best is not None)
    layer = data.draw(st.sampled_from(layers))
    found = explain(indicators, costs, layer, percents=(-10, 50), **limits, **question)
    assert found.policy.objective == pytest.approx(best[0], rel=1e-12)
    assert found.chosen.objective == found.policy.objective
    assert found.chosen.change == 0
    assert found.chosen.moved == ()
    for choice in found.choices:
        held = {**question, "fixed": {layer: (choice.weight_bits, choice.activation_bits)}}
        forced = best_policy(indicators, costs, held, limits, 1.0)
        if forced is None:
            assert choice.objective is None
            assert choice.change is None
        else:
            assert choice.objective == pytest.approx(forced[0], rel=1e-12)
            assert choice.change == pytest.approx(forced[0] - best[0], abs=1e-12)
            assert choice.change >= -1e-12
    for move in found.moves:
        moved = best_policy(indicators, costs, question, {**limits, move.budget: move.limit}, 1.0)
        assert move.objective == (None if moved is None else pytest.approx(moved[0], rel=1e-12))


def test_changed_layers_are_those_that_a_new_search_changes():
    indicators, costs = example()
    question = {"bitops": uniform(3, 3), "size": uniform(3, 3)}
    found = explain(indicators, costs, "layer2", percents=(5,), **question)
    before = search(indicators, costs, **question)
    assert found.policy.layers == before.layers
    for move in found.moves:
        after = search(indicators, costs, **{**question, move.budget: move.limit})
        assert move.changed == tuple(
            one.name for one, two in zip(before.layers, after.layers, strict=True) if one != two
        )
    choice = found.choices[0]
    held = {"fixed": {"layer2": (choice.weight_bits, choice.activation_bits)}}
    forced = search(indicators, costs, **question, **held).bits()
    assert choice.moved == tuple(
        name for name, bits in before.bits().items() if forced[name] != bits and name != "layer2"
    )


def test_the_shadow_price_makes_the_lagrangian_bound_the_highest():
    indicators, costs = example()
    found = explain(indicators, costs, "layer0", bitops=uniform(3, 3), size=uniform(16, 16))
    tight, loose = found.prices
    assert (tight.budget, loose.budget) == ("bitops", "size")
    assert loose.per_unit == loose.per_percent == 0

    def bound(price):
        """By duality no policy within the limit has a lower objective, whatever the price."""
        best = 0.0
        for layer, cost in zip(indicators.layers, costs.layers, strict=True):
            best += min(
                layer.activation[ba] + layer.weight[bw] + price * cost.macs * bw * ba
                for bw in indicators.bits
                for ba in indicators.bits
            )
        return best - price * tight.limit

    assert tight.per_unit > 0
    assert tight.per_percent == pytest.approx(tight.per_unit * tight.limit / 100)
    assert bound(tight.per_unit) <= found.policy.objective
    for factor in (0.0, 0.5, 0.99, 1.01, 2.0):
        assert bound(tight.per_unit) >= bound(factor * tight.per_unit) - 1e-12
    first = costs.layers[0].macs
    for choice in found.choices:
        price = tight.per_unit * first * choice.weight_bits * choice.activation_bits
        assert choice.price == pytest.approx(price)


def test_the_text_says_what_was_chosen_and_what_would_change():
    indicators, costs = example()
    found = explain(indicators, costs, "layer1", bitops=uniform(3, 3), mean_weight_bits=2.1)
    text = found.text()
    own = found.chosen
    assert f"layer1: W{own.weight_bits}A{own.activation_bits} in the optimum" in text
    assert text.count("<- chosen") == 1
    assert "shadow price" in text
    assert "no policy keeps" in text  # 2.1 mean bits less 5% is below 2
    for percent in ("-10%", "+10%"):
        assert percent in text


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("first", "layer 'first' is fixed at 8 bits: nothing to explain"),
        ("layer99", "there is no searchable layer 'layer99'"),
    ],
)
def test_a_layer_that_is_not_searched_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        explain(*example(), layer)


@pytest.mark.parametrize("percent", [-100, float("nan"), float("inf"), -250])
def test_a_limit_cannot_move_to_nothing(percent):
    with pytest.raises(ValueError, match="percents: a limit cannot move by"):
        explain(*example(), "layer0", percents=(percent,), size=100000)


def test_a_question_without_a_policy_is_explained():
    with pytest.raises(InfeasibleError, match=r"no policy keeps mean_weight_bits <= 1\.5 bits"):
        explain(*example(), "layer0", mean_weight_bits=1.5)
