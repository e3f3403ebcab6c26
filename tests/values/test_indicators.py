from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from limpq_ext.values.indicators import Indicators, LayerIndicators, NonMonotone
from limpq_ext.values.reading import FileFormatError

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


# ------------------------------------------------------------------------- scores from elsewhere


def test_a_table_of_scores_becomes_indicators():
    weight = {"a": {4: 0.0, 2: 3.5}, "b": {2: 1.0, 4: 0.25}}
    found = Indicators.from_table(weight, meta={"score": "Hessian trace"})
    assert found.bits == (2, 4)
    assert [layer.name for layer in found.layers] == ["a", "b"]
    assert found.layers[0].weight == {2: 3.5, 4: 0.0}
    assert found.layers[1].activation == {2: 0.0, 4: 0.0}
    assert found.meta == {"score": "Hessian trace"}
    other = Indicators.from_table(activation=weight)
    assert other.layers[0].activation == {2: 3.5, 4: 0.0}
    assert other.layers[0].weight == {2: 0.0, 4: 0.0}


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (None, None, "hold no layers"),
        ({"a": {2: 1.0}}, {"b": {2: 1.0}}, "is missing in one of the tables"),
        ({"a": {2: 1.0}, "b": {3: 1.0}}, None, "layer 'b': weight indicator at 2 bits is missing"),
        ({"a": {2: math.nan}}, None, "layer 'a': weight indicator at 2 bits is nan"),
        ({"a": {2: -0.5}}, None, "layer 'a': weight indicator at 2 bits is -0.5"),
    ],
)
def test_a_wrong_table_names_what_is_wrong(weight, activation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Indicators.from_table(weight, activation)


def test_normalised_indicators_have_a_mean_of_one_for_each_kind_and_the_same_ratios():
    first = LayerIndicators("a", {2: 4.0, 4: 2.0}, {2: 0.0, 4: 0.0})
    second = LayerIndicators("b", {2: 1.0, 4: 1.0}, {2: 0.0, 4: 0.0})
    found = Indicators((2, 4), (first, second), {"steps": 1}).normalised()
    assert found.layers[0].weight == {2: 2.0, 4: 1.0}
    assert found.layers[1].weight == {2: 0.5, 4: 0.5}
    assert found.layers[0].activation == {2: 0.0, 4: 0.0}
    assert found.meta == {"steps": 1}
