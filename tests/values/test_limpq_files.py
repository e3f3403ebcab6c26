"""The files of LIMPQ's own code."""

from __future__ import annotations

import collections
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest

from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.policy import LayerBits, Policy
from limpq_ext.values.reading import FileFormatError

FALLING = {2: 0.4, 3: 0.2, 4: 0.1}


def limpq(**changes):
    values = {"4": 0.1, "3": 0.2, "2": 0.4}
    content = {
        "weight": {"module.a": dict(values), "module.b": dict(values)},
        "act": {"module.a": dict(values), "module.b": dict(values)},
        "layer_name": ["module.b", "module.a"],
    }
    return {**content, **changes}


def written(path, content):
    path.write_bytes(pickle.dumps(content))
    return path


def test_limpq_pickles_are_read_in_their_order_without_the_prefix(tmp_path):
    value = Indicators.from_limpq(written(tmp_path / "i.pkl", limpq()))
    assert [layer.name for layer in value.layers] == ["b", "a"]
    assert value.bits == (2, 3, 4)
    assert value.layers[0] == LayerIndicators("b", FALLING, FALLING)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (limpq(layer_name=collections.OrderedDict()), r"collections\.OrderedDict"),
        (limpq(act={"module.a": {"2": np.float64(1)}}), "numpy"),
        (print, r"builtins\.print|__builtin__\.print"),
    ],
)
def test_a_pickle_that_asks_for_any_global_is_refused_by_its_name(tmp_path, content, named):
    with pytest.raises(FileFormatError, match=f"i.pkl: .* it asks for .*({named})"):
        Indicators.from_limpq(written(tmp_path / "i.pkl", content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1], "does not hold a dict of exactly weight, act, layer_name"),
        ({"weight": {}, "act": {}}, "does not hold a dict of exactly"),
        (limpq(weight=[]), "weight: is no dict"),
        (limpq(layer_name=["module.a"]), "weight: layer 'module.b' is not in layer_name"),
        (limpq(layer_name=["module.a", "module.b", "c"]), "weight: layer 'c' has no dict"),
        (limpq(layer_name=["module.a", "module.b", 3]), "layer_name: 3 is no string"),
        (limpq(weight={"module.a": {"x": 1.0}}), "weight: layer 'module.b' has no dict"),
        (
            limpq(weight={"module.a": {}, "module.b": {"2.0": 1.0}}),
            "weight: layer 'module.b': '2.0' is no bit-width",
        ),
        (
            limpq(weight={"module.a": {}, "module.b": {"2": "1"}}),
            "weight: layer 'module.b': indicator at 2 bits is no number",
        ),
        (
            limpq(weight={"module.a": {}, "module.b": {"2": 10**400}}),
            "too large",
        ),
        (
            limpq(act={"module.a": {"2": math.nan}, "module.b": {"2": 1.0}}),
            "layer 'b': activation indicator at 3 bits is missing",
        ),
        (limpq(layer_name=["module.a", "module.b", "module.a"]), "layer 'a' stands twice"),
        (limpq(weight={}, act={}, layer_name=[]), "no candidate bits"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, reason):
    with pytest.raises(FileFormatError, match=f"i.pkl: {reason}|i.pkl: .*{reason}"):
        Indicators.from_limpq(written(tmp_path / "i.pkl", content))


def test_every_cut_of_a_pickle_is_refused(tmp_path):
    path = tmp_path / "i.pkl"
    data = pickle.dumps(limpq())
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=r"i\.pkl: not read as a pickle"):
            Indicators.from_limpq(path)


def test_a_missing_pickle_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot read the LIMPQ indicators file"):
        Indicators.from_limpq(tmp_path / "none.pkl")


# ------------------------------------------------------------------------------------- checkpoints


def state_dict(torch, **changes):
    """Three layers as LIMPQ's training saves them; the first is excepted and has no step sizes."""
    state = {"module.conv1.weight": torch.zeros(2, 3)}
    for name in ("module.layer1.0.conv1", "module.layer1.0.conv2"):
        state[f"{name}.weight"] = torch.zeros(2, 2)
        state[f"{name}.quan_w_fn.s"] = torch.tensor([0.125, 0.25, 0.5])
        state[f"{name}.quan_w_fn.init_state"] = torch.ones(3)
        state[f"{name}.quan_a_fn.s"] = torch.tensor([0.5, 1.0, 2.0])
    state.update(changes)
    return {name: value for name, value in state.items() if value is not None}


def saved(torch, path, state, **beside):
    torch.save({"epoch": 3, "arch": "resnet18", "extras": {}, "state_dict": state, **beside}, path)
    return path


def test_a_limpq_checkpoint_gives_the_step_sizes_in_its_order(tmp_path):
    torch = pytest.importorskip("torch")
    path = saved(torch, tmp_path / "r18_checkpoint.pth.tar", state_dict(torch))
    value = Indicators.from_limpq_checkpoint(path, bits=(4, 3, 2))
    assert value.bits == (2, 3, 4)
    assert [layer.name for layer in value.layers] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert value.layers[1].weight == {2: 0.5, 3: 0.25, 4: 0.125}
    assert value.layers[1].activation == {2: 2.0, 3: 1.0, 4: 0.5}


def test_a_limpq_checkpoint_that_is_none_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    name = "module.layer1.0.conv2.quan_a_fn.s"
    for state, bits, message in (
        (state_dict(torch, **{name: None}), (4, 3, 2), f"{name} is missing"),
        (state_dict(torch), (5, 4, 3, 2), r"quan_w_fn.s has shape \(3,\), not one for each"),
        (state_dict(torch, **{name: torch.tensor([1, math.nan, 1])}), (4, 3, 2), "3 bits is nan"),
        ({"conv1.weight": torch.zeros(1)}, (4, 3, 2), "no quan_w_fn.s"),
        (None, (4, 3, 2), "holds no state_dict"),
    ):
        path = saved(torch, tmp_path / "c.pth.tar", state)
        with pytest.raises(FileFormatError, match=f"c.pth.tar: .*{message}"):
            Indicators.from_limpq_checkpoint(path, bits=bits)
    path = saved(torch, tmp_path / "c.pth.tar", state_dict(torch), extra=Fraction(1, 3))
    with pytest.raises(FileFormatError, match=r"c\.pth\.tar: not a readable checkpoint"):
        Indicators.from_limpq_checkpoint(path, bits=(4, 3, 2))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FileFormatError, match=r"c\.pth\.tar: not a readable checkpoint"):
        Indicators.from_limpq_checkpoint(path, bits=(4, 3, 2))
    with pytest.raises(FileNotFoundError, match="cannot read the LIMPQ checkpoint file"):
        Indicators.from_limpq_checkpoint(tmp_path / "none.pth.tar")


# ---------------------------------------------------------------------------------- lists of bits

CONFIGURATION = """
name: resnet18_w3a3
weight_bits: [6, 3]
act_bits:    [5, 4]
quan:
  act: {mode: lsq, bit: 2}
"""


def test_the_lists_of_a_limpq_configuration_become_a_policy(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "finetune.yaml"
    path.write_text(CONFIGURATION)
    policy = Policy.from_limpq(path, ["layer1.0.conv1", "layer1.0.conv2"])
    assert policy.layers == (LayerBits("layer1.0.conv1", 6, 5), LayerBits("layer1.0.conv2", 3, 4))
    assert policy.fixed == ()


def test_a_policy_written_for_limpq_is_read_back_in_either_order(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "bits.yaml"
    layers = (LayerBits("a", 2, 5), LayerBits("b", 3, 6))
    policy = Policy(layers, (LayerBits("conv1", 8, 8),))
    policy.save_limpq(path)
    assert path.read_text() == "weight_bits: [2, 3]\nact_bits: [5, 6]\n"
    policy.save_limpq(path, ["b", "a"])
    assert Policy.from_limpq(path, ["b", "a"]).layers == layers[::-1]


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["a", "a"], ["a", "b", "b"]])
def test_other_layers_than_the_policys_are_refused(tmp_path, names):
    policy = Policy((LayerBits("a", 2, 5), LayerBits("b", 3, 6)))
    with pytest.raises(ValueError, match="not once in both"):
        policy.save_limpq(tmp_path / "bits.yaml", names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("act_bits: [4, 4]", "weight_bits: is no list of integers"),
        ("weight_bits: [4, 4]\nact_bits: 4", "act_bits: is no list of integers"),
        ("weight_bits: [4, 4]\nact_bits: [4, x]", "act_bits: is no list of integers"),
        ("weight_bits: [4, 4]\nact_bits: [4, true]", "act_bits: is no list of integers"),
        ("weight_bits: [4, 4, 4]\nact_bits: [4, 4]", "weight_bits: has 3 entries for 2 layers"),
        ("weight_bits: [4, 1]\nact_bits: [4, 4]", "layer 'b': weight_bits: 1 bits is outside"),
        ("- 4", "weight_bits: is no list"),
        ("a: [", "not a YAML file"),
    ],
)
def test_a_configuration_without_good_lists_is_refused(tmp_path, text, message):
    pytest.importorskip("yaml")
    path = tmp_path / "finetune.yaml"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=f"finetune.yaml: .*{re.escape(message)}"):
        Policy.from_limpq(path, ["a", "b"])
