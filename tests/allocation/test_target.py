"""Targets are data: shipped ones and files, and what they leave a search."""

import dataclasses
import itertools

import pytest
import yaml

from limpq_ext.allocation.search import InfeasibleError, search
from limpq_ext.allocation.target import Target, load_target, shipped_targets
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.reading import FileFormatError

NAMES = ("a", "b", "c")


def network(bits=(2, 4, 8), shared=(("a", "b"),)):
    values = {name: {b: (1 + place) / b for b in bits} for place, name in enumerate(NAMES)}
    costs = tuple(LayerCost(name, "linear", 10, 10, 10) for name in NAMES)
    fixed = (LayerCost("head", "linear", 7, 5, 3),)
    return Indicators.from_table(values, values), Costs(costs, fixed, shared_inputs=shared)


def bits_of(policy):
    return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}


def test_the_shipped_targets_are_documented():
    assert shipped_targets() == ["finn", "onnxruntime", "openvino", "tensorrt"]
    for name in shipped_targets():
        target = load_target(name)
        assert target.name == name
        assert len(target.description) > 50
        assert target.source.startswith("https://")
        assert all(2 <= side <= 8 for pair in target.pairs for side in pair)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_engines_with_8_bit_activations_leave_the_weights_to_search(name):
    policy = search(*network(), size="75%", target=load_target(name))
    found = bits_of(policy)
    assert set(found.values()) == {(4, 8), (8, 8)}
    assert f"target {name!r}" in policy.meta["restrictions"]


def test_a_target_ties_the_inputs_of_one_tensor():
    asked = {"weight_bits": 4, "bitops": 720, "min_bits": {"a": (2, 8)}}
    free = bits_of(search(*network(), **asked))
    assert free["a"][1] != free["b"][1]
    tied = bits_of(search(*network(), **asked, target=load_target("finn")))
    assert tied["a"][1] == tied["b"][1] == 8


def test_a_target_ties_what_is_added():
    indicators, costs = network(shared=())
    costs = dataclasses.replace(costs, added_inputs=(("a", "c"),))
    asked = {"weight_bits": 4, "bitops": 720, "min_bits": {"a": (2, 8)}}
    free = bits_of(search(indicators, costs, **asked))
    assert free["a"][1] != free["c"][1]
    tied = bits_of(search(indicators, costs, **asked, target=load_target("finn")))
    assert tied["a"][1] == tied["c"][1] == 8
    assert bits_of(search(indicators, costs, **asked, tie_added_inputs=True)) == tied
    with pytest.raises(TypeError, match="tie_added_inputs must be True or False, got 1"):
        search(indicators, costs, tie_added_inputs=1)


def test_a_target_holds_beside_other_restrictions():
    target = Target("mine", ((4, 8), (8, 8)))
    found = bits_of(search(*network(), target=target, pairs={"b": [(2, 2), (4, 8)]}))
    assert found == {"a": (8, 8), "b": (4, 8), "c": (8, 8)}


def test_a_target_without_the_candidates_is_named():
    with pytest.raises(ValueError, match="no bits left that target 'tensorrt' allow"):
        search(*network(bits=(2, 4)), target=load_target("tensorrt"))


def test_a_budget_that_a_target_cannot_keep_names_both():
    with pytest.raises(InfeasibleError, match="target 'tensorrt'") as error:
        search(*network(), size="60%", target=load_target("tensorrt"))
    assert "size" in str(error.value)


def test_a_name_is_no_target():
    with pytest.raises(TypeError, match="target must be a Target, of load_target, got 'finn'"):
        search(*network(), target="finn")


def test_pairs_may_be_written_as_bits_of_each_side(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("description: x\nweight_bits: [2, 4]\nactivation_bits: [4, 8]\n")
    assert load_target(file) == Target(
        "mine", tuple(itertools.product((2, 4), (4, 8))), description="x"
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pair": [[4, 8]]}, "pair: unknown key"),
        ({"pairs": [[4, 17]]}, "target 'mine': 17 bits is outside 2 to 16"),
        ({"pairs": [[1, 8]]}, "target 'mine': 1 bits is outside 2 to 16"),
        ({"pairs": [[4, "8"]]}, r"pairs\[0\]\[1\]: Input should be a valid integer"),
        ({"pairs": [[4, 8, 8]]}, r"pairs\[0\]"),
        ({"pairs": []}, "target 'mine': has no pairs of bits"),
        ({"pairs": [[4, 8], [4, 8]]}, r"target 'mine': the pair \[4, 8\] stands twice"),
        ({"weight_bits": [4]}, "expected pairs, or weight_bits and activation_bits"),
        ({"pairs": None}, "expected pairs, or weight_bits and activation_bits"),
        ({"description": None}, "description: "),
        ({"tie_shared_inputs": 1}, "tie_shared_inputs: Input should be a valid boolean"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changed, reason, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"description": "x", "pairs": [[4, 8]], **changed}))
    with pytest.raises(FileFormatError, match=rf"mine\.yaml: {reason}"):
        load_target(file)


@pytest.mark.parametrize(
    ("text", "reason"), [("[1]", "not the keys of a target"), ("a: [", "not YAML"), ("", "holds")]
)
def test_what_is_no_mapping_is_refused(text, reason, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(FileFormatError, match=reason):
        load_target(file)


def test_a_target_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(
        FileNotFoundError, match=r"target 'tvm' does not exist.* finn, onnxruntime, openvino"
    ):
        load_target("tvm")
