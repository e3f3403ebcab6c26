from __future__ import annotations

import json
import math

import pytest

from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.policy import BudgetUse, ChangedLayer, LayerBits, Policy
from limpq_ext.values.reading import FileFormatError

POLICY = Policy(
    layers=(LayerBits("a", 2, 5), LayerBits("b", 3, 6)),
    fixed=(LayerBits("conv1", 8, 8),),
    objective=4.617,
    bound=4.617,
    gap=0.0,
    budgets=(BudgetUse("bitops", 2**60, 2**60 - 1), BudgetUse("compression", 12.2, 12.25)),
    meta={"alpha": 2.0},
)


def test_save_and_load_give_the_same_policy(tmp_path):
    path = tmp_path / "policy.json"
    POLICY.save(path)
    assert Policy.load(path) == POLICY
    assert type(Policy.load(path).budgets[0].used) is int


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "policy.json"
    POLICY.save(path)
    document = json.loads(path.read_text())
    assert document["format"] == "limpq-policy"
    assert document["version"] == 1
    assert document["layers"][0] == {"name": "a", "weight_bits": 2, "activation_bits": 5}
    assert document["fixed"] == [{"name": "conv1", "weight_bits": 8, "activation_bits": 8}]
    assert document["budgets"][1] == {"name": "compression", "limit": 12.2, "used": 12.25}


def test_a_policy_without_a_search_is_saved_and_loaded(tmp_path):
    path = tmp_path / "policy.json"
    policy = Policy.uniform(["a", "b"], 4, 4)
    policy.save(path)
    assert Policy.load(path) == policy
    assert policy.objective is policy.bound is policy.gap is None


def test_bits_and_mean_bits():
    assert POLICY.bits() == {"a": (2, 5), "b": (3, 6), "conv1": (8, 8)}
    assert POLICY.mean_bits() == (2.5, 5.5)


def test_uniform_takes_the_layers_of_costs():
    layer, first = LayerCost("a", "conv2d", 1, 1, 1), LayerCost("conv1", "conv2d", 1, 1, 1)
    costs = Costs((layer,), (first,))
    assert Policy.uniform(costs, 3, 4).bits() == {"a": (3, 4), "conv1": (8, 8)}
    assert Policy.uniform(costs, 3, 4, fixed=()).bits() == {"a": (3, 4)}
    assert Policy.uniform(["x"], 3, 4, fixed=["y"]).bits() == {"x": (3, 4), "y": (8, 8)}


def test_a_budget_knows_whether_it_is_kept():
    assert BudgetUse("bitops", 10, 10).kept
    assert not BudgetUse("bitops", 10, 11).kept
    assert BudgetUse("compression", 12.2, 12.2).kept
    assert not BudgetUse("compression", 12.2, 12.1).kept


@pytest.mark.parametrize("bits", [1, 0, -3, 17])
def test_bits_outside_2_to_16_are_refused(bits):
    with pytest.raises(ValueError, match=f"layer 'a': weight_bits: {bits} bits is outside 2 to 16"):
        LayerBits("a", bits, 4)
    with pytest.raises(ValueError, match="layer 'a': activation_bits"):
        LayerBits("a", 4, bits)


@pytest.mark.parametrize("bits", [4.0, "4", None, True])
def test_bits_have_to_be_integers(bits):
    with pytest.raises(TypeError, match="layer 'a': weight_bits: bits must be an integer"):
        LayerBits("a", bits, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, "there are no layers"),
        ({"layers": (LayerBits("a", 2, 2),) * 2}, "layer 'a' stands twice"),
        (
            {"layers": (LayerBits("a", 2, 2),), "fixed": (LayerBits("a", 8, 8),)},
            "layer 'a' stands twice",
        ),
        ({"layers": (LayerBits("a", 2, 2),), "objective": math.nan}, "objective is nan"),
        ({"layers": (LayerBits("a", 2, 2),), "bound": -math.inf}, "bound is -inf"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Policy(**fields)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"weight_bits": 2', '"weight_bits": 17', r"layers\[0\]: layer 'a': .* outside 2 to 16"),
        ('"weight_bits": 2', '"weight_bits": "2"', r"layers\[0\]\.weight_bits: "),
        ('"weight_bits": 2', '"weights": 2', r"layers\[0\]\.weight_bits: is missing"),
        ('"name": "b"', '"name": "a"', "layer 'a' stands twice"),
        ('"used": 12.25', '"used": "12"', r"budgets\[1\]\.used: .*, got \"12\""),
        ('"gap": 0.0', '"gap": NaN', "policy: gap is nan"),
        ('"used": 12.25', '"used": Infinity', "budget '.*': limit is .*, used is inf"),
        ('"meta": {', '"meta": {"a": [1, NaN], ', r"meta\.a\[1\]: is nan"),
        ('"version": 1', '"version": 2', "version: is 2; this limpq_ext reads version 1"),
    ],
)
def test_a_wrong_file_is_named_with_field_and_reason(tmp_path, old, new, message):
    path = tmp_path / "policy.json"
    POLICY.save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(FileFormatError, match=rf"policy\.json: {message}"):
        Policy.load(path)


def test_a_comparison_names_the_layers_that_differ_and_what_they_cost():
    layers = (LayerCost("a", "conv2d", 10, 4, 1), LayerCost("b", "conv2d", 20, 8, 1))
    costs = Costs(layers, (LayerCost("conv1", "conv2d", 1, 4, 1),))
    other = Policy((LayerBits("a", 2, 5), LayerBits("b", 6, 3)), POLICY.fixed)
    comparison = POLICY.compare(other, costs)
    assert comparison.layers == 3
    assert comparison.changed == (ChangedLayer("b", 3, 6, 6, 3),)
    assert comparison.mean_bits == (2.5, 5.5)
    assert comparison.other_mean_bits == (4.0, 4.0)
    assert comparison.ratios == {"bitops": 1.0, "size": (8 + 48 + 32) / (8 + 24 + 32)}
    assert str(comparison).splitlines() == [
        "b  W3A6 -> W6A3",
        "1 of 3 layers differ",
        "mean bits W2.50A5.50 -> W4.00A4.00",
        "bitops x 1.0000",
        "size x 1.3750",
    ]


def test_a_comparison_counts_what_stays_in_float_where_costs_say_it():
    layers = (LayerCost("a", "conv2d", 10, 4, 1), LayerCost("b", "conv2d", 20, 8, 1))
    fixed = (LayerCost("conv1", "conv2d", 1, 4, 1),)
    costs = Costs(layers, fixed, parameters=17, float_parameters=1)
    other = Policy((LayerBits("a", 2, 5), LayerBits("b", 6, 3)), POLICY.fixed)
    ratios = POLICY.compare(other, costs).ratios
    assert ratios["total_size"] == (8 + 48 + 32 + 32) / (8 + 24 + 32 + 32)


def test_a_policy_does_not_differ_from_itself():
    comparison = POLICY.compare(POLICY)
    assert comparison.changed == ()
    assert comparison.ratios == {}
    assert "0 of 3 layers differ" in str(comparison)


def test_policies_of_other_layers_are_not_compared():
    with pytest.raises(ValueError, match="layer 'c' is in one of the policies only"):
        POLICY.compare(Policy((*POLICY.layers, LayerBits("c", 2, 2)), POLICY.fixed))
