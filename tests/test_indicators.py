from __future__ import annotations

import collections
import itertools
import json
import math
import pickle
import re

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from limpq_ext.files import FileFormatError
from limpq_ext.indicators import Indicators, LayerIndicators, NonMonotone

FALLING = {2: 0.4, 3: 0.2, 4: 0.1}


def indicators(weight=FALLING, activation=FALLING, bits=(2, 3, 4)):
    first = LayerIndicators("first", FALLING, FALLING)
    return Indicators(bits, (first, LayerIndicators("layer3.0.conv2", weight, activation)))


def test_save_and_load_give_the_same_indicators(tmp_path):
    path = tmp_path / "indicators.json"
    saved = Indicators(
        (3, 2), (LayerIndicators("a", {3: 0.1, 2: 1 / 3}, {2: 1e-9, 3: 5.0}),), {"epochs": 3}
    )
    saved.save(path)
    assert Indicators.load(path) == saved


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "indicators.json"
    Indicators((2, 3), (LayerIndicators("a", {2: 0.4, 3: 0.2}, {2: 0.5, 3: 0.3}),)).save(path)
    assert json.loads(path.read_text()) == {
        "format": "limpq-indicators",
        "version": 1,
        "bits": [2, 3],
        "layers": [
            {"name": "a", "weight": {"2": 0.4, "3": 0.2}, "activation": {"2": 0.5, "3": 0.3}}
        ],
        "meta": {},
    }


def test_bits_are_sorted_and_numbers_are_plain():
    layer = LayerIndicators("a", {np.int64(4): np.float32(0.5), 2: 1}, {4: 0.5, 2: 1})
    value = Indicators([np.int64(4), 2], [layer])
    assert value.bits == (2, 4)
    assert list(value.layers[0].weight) == [2, 4]
    assert type(value.layers[0].weight[4]) is float


WRONG = [
    ({**FALLING, 4: math.nan}, "layer 'layer3.0.conv2': weight indicator at 4 bits is nan"),
    ({**FALLING, 2: math.inf}, "layer 'layer3.0.conv2': weight indicator at 2 bits is inf"),
    ({**FALLING, 3: 0.0}, "layer 'layer3.0.conv2': weight indicator at 3 bits is 0.0"),
    ({**FALLING, 3: -1.0}, "layer 'layer3.0.conv2': weight indicator at 3 bits is -1.0"),
    ({2: 0.4, 4: 0.1}, "layer 'layer3.0.conv2': weight indicator at 3 bits is missing"),
    (
        {**FALLING, 5: 0.1},
        "layer 'layer3.0.conv2': weight indicator at 5 bits: the candidates are [2, 3, 4]",
    ),
]


@pytest.mark.parametrize(("weight", "message"), WRONG)
def test_a_wrong_indicator_names_layer_and_bits(weight, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        indicators(weight=weight)
    with pytest.raises(ValueError, match=re.escape(message.replace("weight", "activation"))):
        indicators(activation=weight)


@pytest.mark.parametrize(("weight", "message"), WRONG)
def test_a_wrong_indicator_in_a_file_names_the_file_too(tmp_path, weight, message):
    path = tmp_path / "indicators.json"
    indicators().save(path)
    document = json.loads(path.read_text())
    document["layers"][1]["weight"] = {str(b): value for b, value in weight.items()}
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        Indicators.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("bits", [(1, 2), (2, 17), (0,), (-4,)])
def test_bits_outside_2_to_16_are_refused(bits):
    values = dict.fromkeys(bits, 0.1)
    with pytest.raises(ValueError, match="bits is outside 2 to 16"):
        Indicators(bits, (LayerIndicators("a", values, values),))


@pytest.mark.parametrize(
    ("bits", "layers", "message"),
    [
        ((), (LayerIndicators("a", {}, {}),), "no candidate bits"),
        ((2, 2), (LayerIndicators("a", {2: 1.0}, {2: 1.0}),), "a bit-width stands twice"),
        ((2,), (), "there are no layers"),
        ((2,), (LayerIndicators("a", {2: 1.0}, {2: 1.0}),) * 2, "layer 'a' stands twice"),
    ],
)
def test_indicators_that_cannot_be_are_refused(bits, layers, message):
    with pytest.raises(ValueError, match=message):
        Indicators(bits, layers)


@pytest.mark.parametrize("bits", ["4", 4.0, True])
def test_bits_have_to_be_integers(bits):
    with pytest.raises(TypeError, match="bits must be an integer"):
        Indicators((bits,), (LayerIndicators("a", {4: 1.0}, {4: 1.0}),))


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


ODD = {2: 0.1, 3: 0.4, 4: 0.3}


def test_forbid_takes_out_the_lower_of_a_pair_and_changes_no_value():
    value = indicators(weight=ODD)
    after, records = value.monotone("forbid")
    assert after == value
    assert records == (NonMonotone("layer3.0.conv2", "weight", 2, "forbidden", 0.1, None),)


def test_forbid_looks_at_learned_values_only_and_keeps_the_highest():
    rising = {2: 0.1, 3: 0.2, 4: 0.3}
    _, records = indicators(activation=rising).monotone("forbid")
    assert [(r.kind, r.bits) for r in records] == [("activation", 2), ("activation", 3)]


def test_isotonic_pools_what_rises_and_reports_every_change():
    after, records = indicators(weight=ODD).monotone("isotonic")
    pooled = after.layers[1].weight
    assert pooled == pytest.approx({2: 0.8 / 3, 3: 0.8 / 3, 4: 0.8 / 3})
    assert [(r.bits, r.action, r.old, r.new) for r in records] == [
        (b, "changed", ODD[b], pooled[b]) for b in ODD
    ]


def test_keep_changes_nothing_and_reports_it_all_the_same():
    value = indicators(weight=ODD)
    after, records = value.monotone("keep")
    assert after == value
    assert records == (NonMonotone("layer3.0.conv2", "weight", 2, "kept", 0.1, 0.1),)


@pytest.mark.parametrize("rule", ["forbid", "isotonic", "keep"])
def test_indicators_in_order_need_nothing(rule):
    assert indicators().monotone(rule) == (indicators(), ())


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'drop': not one of forbid, isotonic, keep"):
        indicators().monotone("drop")


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=15))
def test_isotonic_never_rises_and_is_the_least_squares_answer(values):
    bits = tuple(range(2, 2 + len(values)))
    layer = LayerIndicators("a", dict(zip(bits, values, strict=True)), dict.fromkeys(bits, 1.0))
    after, _ = Indicators(bits, (layer,)).monotone("isotonic")
    fitted = list(after.layers[0].weight.values())
    assert all(a >= b for a, b in itertools.pairwise(fitted))
    # min-max formula of isotonic regression (Barlow et al. 1972)
    for i in range(len(values)):
        expected = max(
            min(math.fsum(values[a : b + 1]) / (b + 1 - a) for a in range(i + 1))
            for b in range(i, len(values))
        )
        assert fitted[i] == pytest.approx(expected, rel=1e-9)
