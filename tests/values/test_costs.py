from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest

from limpq_ext.values.costs import Costs, LayerCost, LiveTensor
from limpq_ext.values.policy import Policy
from limpq_ext.values.reading import FileFormatError

COSTS = Costs(
    layers=(LayerCost("a", "conv2d", 1000, 10, 7), LayerCost("b", "linear", 10**18 + 1, 3, 5)),
    fixed=(LayerCost("first", "conv2d", 5, 2, 1), LayerCost("last", "linear", 6, 4, 1)),
    meta={"input": [1, 3, 8, 8]},
)
BITS = {"a": (2, 3), "b": (4, 5)}


def test_save_and_load_give_the_same_costs(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    assert Costs.load(path) == COSTS
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("limpq-costs", 1)


def test_bitops_are_macs_times_both_bits_of_the_searchable_layers_exactly():
    assert COSTS.bitops(BITS) == 1000 * 6 + (10**18 + 1) * 20


def test_size_counts_the_fixed_layers_at_8_bits():
    assert COSTS.size_bits(BITS) == 10 * 2 + 3 * 4 + (2 + 4) * 8


def test_size_takes_the_bits_of_a_fixed_layer_where_they_are_given():
    assert COSTS.size_bits({**BITS, "last": (2, 2)}) == 10 * 2 + 3 * 4 + 2 * 8 + 4 * 2


def test_compression_is_the_ratio_to_32_bits():
    assert COSTS.compression(BITS) == Fraction(32 * 19, 80)


def test_activation_memory_is_the_most_that_is_held_at_one_moment(tmp_path):
    tensors = (
        LiveTensor(50, "first", 0, 0),
        LiveTensor(10, "a", 0, 2),
        LiveTensor(20, "b", 1, 2),
        LiveTensor(3, None, 2, 3),
    )
    costs = Costs(COSTS.layers, COSTS.fixed, shared_inputs=(("a", "first"),), tensors=tensors)
    assert costs.activation_memory_bits(BITS) == 50 * 8 + 10 * 3
    assert costs.activation_memory_bits({**BITS, "first": (2, 2)}) == 10 * 3 + 20 * 5 + 3 * 32
    costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json") == costs


def test_without_tensors_there_is_no_activation_memory():
    with pytest.raises(ValueError, match="no tensors"):
        COSTS.activation_memory_bits(BITS)


@pytest.mark.parametrize(
    ("shared", "tensor", "problem"),
    [
        ((("a",),), None, "two or more layers"),
        ((("a", "a"),), None, "two or more layers"),
        ((("a", "c"),), None, "no layer 'c'"),
        ((), LiveTensor(1, "c", 0, 0), "no layer 'c'"),
        ((), LiveTensor(1, "a", 2, 1), "moments are wrong"),
        ((), LiveTensor(-1, "a", 0, 1), "elements"),
    ],
)
def test_wrong_shared_inputs_and_tensors_are_named(shared, tensor, problem):
    tensors = () if tensor is None else (tensor,)
    with pytest.raises(ValueError, match=problem):
        Costs(COSTS.layers, COSTS.fixed, shared_inputs=shared, tensors=tensors)


def test_wrong_added_inputs_are_named(tmp_path):
    costs = dataclasses.replace(COSTS, added_inputs=[["a", "b"]])
    assert costs.added_inputs == (("a", "b"),)
    costs.save(tmp_path / "costs.json")
    assert Costs.load(tmp_path / "costs.json") == costs
    with pytest.raises(ValueError, match=r"added input \['a', 'c'\]: there is no layer 'c'"):
        dataclasses.replace(COSTS, added_inputs=(("a", "c"),))


def test_mean_bits_count_every_searchable_layer_the_same():
    assert COSTS.mean_bits(BITS) == (3, 4)
    assert COSTS.mean_bits({"a": (2, 2), "b": (3, 3), "first": (8, 8)})[0] == Fraction(5, 2)


def test_a_policy_can_be_counted():
    policy = Policy.uniform(COSTS, 3, 4)
    assert COSTS.bitops(policy.bits()) == (10**18 + 1001) * 12
    assert COSTS.size_bits(policy.bits()) == 13 * 3 + 6 * 8


def test_an_assignment_has_to_fit_the_layers():
    with pytest.raises(ValueError, match="layer 'b' has no bits in the assignment"):
        COSTS.bitops({"a": (2, 2)})
    with pytest.raises(ValueError, match="layer 'c' of the assignment is not in the costs"):
        COSTS.size_bits({**BITS, "c": (2, 2)})


def layer(**fields):
    return LayerCost(**{"name": "a", "kind": "conv2d", "macs": 1, "weights": 1} | fields)


@pytest.mark.parametrize(
    ("layers", "fixed", "message"),
    [
        ((), (), "no searchable layers"),
        ((layer(activations=1),) * 2, (), "layer 'a' stands twice"),
        ((layer(activations=1),), (layer(activations=1),), "layer 'a' stands twice"),
        ((layer(activations=-1),), (), "layer 'a': activations is -1"),
        ((layer(activations=1, macs=-5),), (), "layer 'a': macs is -5"),
    ],
)
def test_costs_that_cannot_be_are_refused(layers, fixed, message):
    with pytest.raises(ValueError, match=message):
        Costs(layers, fixed)


@pytest.mark.parametrize("count", [1.5, 2.0, "3", True])
def test_counts_have_to_be_integers(count):
    with pytest.raises(TypeError, match="layer 'a': activations must be an int"):
        Costs((layer(activations=count),), ())


@pytest.mark.parametrize("bits", [1, 17])
def test_fixed_bits_outside_2_to_16_are_refused(bits):
    with pytest.raises(ValueError, match=r"fixed layers: .* outside 2 to 16"):
        Costs(COSTS.layers, COSTS.fixed, fixed_bits=bits)


def test_without_weights_nothing_is_compressed():
    costs = Costs((layer(weights=0, activations=1),), ())
    assert costs.compression({"a": (4, 4)}) == 1


@pytest.mark.parametrize("what", ["macs", "weights", "activations"])
def test_a_count_that_no_network_has_is_refused(what):
    with pytest.raises(ValueError, match=f"layer 'a': {what} is an integer of 1329 bits"):
        Costs((layer(**{"activations": 1, what: 10**400}),), ())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([LiveTensor(1, "a", 0, 10**12)], "last is 1000000000000, expected below 100000"),
        ([LiveTensor(1, "a", 0, 99_999)] * 101, "held at 10100000 moments"),
        ([LiveTensor(10**30, "a", 0, 0)], "elements or moments are wrong"),
    ],
)
def test_tensors_that_would_take_all_memory_are_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        Costs((layer(activations=1),), (), tensors=tuple(tensors))
    path = tmp_path / "costs.json"
    Costs((layer(activations=1),), (), tensors=(LiveTensor(1, "a", 0, 0),)).save(path)
    document = json.loads(path.read_text())
    document["tensors"] = [dataclasses.asdict(tensor) for tensor in tensors]
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=rf"costs\.json: .*{message}"):
        Costs.load(path)


def test_a_wrong_field_in_a_file_is_named(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    path.write_text(path.read_text().replace('"macs": 1000', '"macs": 1000.5'))
    with pytest.raises(FileFormatError, match=r"costs\.json: layers\[0\]\.macs: .*integer"):
        Costs.load(path)


def test_another_documents_file_is_refused(tmp_path):
    path = tmp_path / "policy.json"
    Policy.uniform(COSTS, 3, 4).save(path)
    with pytest.raises(FileFormatError, match=r'format: is "limpq-policy"; .* "limpq-costs"'):
        Costs.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    with pytest.raises(TypeError, match="not written"):
        Costs(COSTS.layers, COSTS.fixed, {"model": object()}).save(path)
    assert Costs.load(path) == COSTS


# ---------------------------------------------------------------------------- the whole network


def test_costs_of_the_former_version_are_read_without_what_they_do_not_say(tmp_path):
    path = tmp_path / "costs.json"
    COSTS.save(path)
    document = json.loads(path.read_text())
    for name in ("parameters", "float_parameters"):
        del document[name]
    path.write_text(json.dumps(document))
    costs = Costs.load(path)
    assert costs.sizes(BITS)["total_size"] is None
    with pytest.raises(ValueError, match="which parameters stay in float: profile the network"):
        costs.total_size_bits(BITS)


def test_the_whole_network_has_what_stays_in_float_too():
    costs = dataclasses.replace(COSTS, parameters=119, float_parameters=100)
    size = 10 * 2 + 3 * 4 + (2 + 4) * 8
    assert costs.total_size_bits(BITS) == size + 32 * 100
    assert costs.sizes(BITS) == {
        "size": size / 8,
        "compression": 32 * 19 / size,
        "total_size": size / 8 + 400,
        "total_compression": 32 * 119 / (size + 3200),
    }


@pytest.mark.parametrize("name", ["parameters", "float_parameters"])
def test_a_count_of_parameters_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is -1"):
        dataclasses.replace(COSTS, **{name: -1})
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        dataclasses.replace(COSTS, **{name: 1.5})


def test_a_tensor_that_is_held_for_ever_takes_no_memory_to_count():
    tensors = (LiveTensor(3, "a", 0, 99_999), LiveTensor(5, "b", 90_000, 99_999))
    costs = dataclasses.replace(COSTS, tensors=tensors)
    assert costs.activation_memory_bits(BITS) == 3 * 3 + 5 * 5
