from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from limpq_ext.values.interactions import Interactions, PairInteraction
from limpq_ext.values.reading import FileFormatError

VALUES = {2: {2: 0.5, 3: -0.25}, 3: {2: 0.125, 3: 0.0}}
PAIR = PairInteraction(("a", "b"), ("weight", "activation"), VALUES)
WHAT = "interaction of weight of 'a' and activation of 'b'"


def test_save_and_load_give_the_same_interactions(tmp_path):
    path = tmp_path / "interactions.json"
    saved = Interactions((3, 2), (PAIR,), {"score": "interactions"})
    saved.save(path)
    assert Interactions.load(path) == saved


def test_the_file_is_as_documented(tmp_path):
    path = tmp_path / "interactions.json"
    Interactions((2, 3), (PAIR,)).save(path)
    assert json.loads(path.read_text()) == {
        "format": "limpq-interactions",
        "version": 1,
        "bits": [2, 3],
        "pairs": [
            {
                "layers": ["a", "b"],
                "kinds": ["weight", "activation"],
                "values": {"2": {"2": 0.5, "3": -0.25}, "3": {"2": 0.125, "3": 0.0}},
            }
        ],
        "meta": {},
    }


def test_bits_are_sorted_and_numbers_are_plain():
    pair = PairInteraction(["a", "b"], ["weight", "weight"], {np.int64(4): {4: np.float32(0.5)}})
    found = Interactions([np.int64(4)], [pair]).pairs[0]
    assert found.layers == ("a", "b")
    assert type(found.values[4][4]) is float
    backwards = {bits: dict(reversed(row.items())) for bits, row in reversed(VALUES.items())}
    sorted_pair = PairInteraction(("a", "b"), ("weight", "weight"), backwards)
    assert [list(row) for row in sorted_pair.values.values()] == [[2, 3], [2, 3]]


def test_a_table_makes_the_same():
    table = {
        (("a", "weight"), ("b", "activation")): {
            (first, second): value for first, row in VALUES.items() for second, value in row.items()
        }
    }
    assert Interactions.from_table(table, meta={"by": "hand"}) == Interactions(
        (2, 3), (PAIR,), {"by": "hand"}
    )


WRONG_VALUES = [
    ({**VALUES, 2: {2: math.nan, 3: 0.0}}, f"{WHAT} at 2 and 2 bits is nan"),
    ({**VALUES, 3: {2: 0.0, 3: -math.inf}}, f"{WHAT} at 3 and 3 bits is -inf"),
    ({2: VALUES[2]}, f"{WHAT}: 3 bits are missing"),
    ({**VALUES, 4: VALUES[2]}, f"{WHAT}: 4 bits: the candidates are [2, 3]"),
    ({**VALUES, 2: {3: 0.0}}, f"{WHAT}, the first at 2 bits: 2 bits are missing"),
    (
        {**VALUES, 2: {2: 0.0, 3: 0.0, 5: 0.0}},
        f"{WHAT}, the first at 2 bits: 5 bits: the candidates are [2, 3]",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES)
def test_a_wrong_value_names_the_pair_and_the_bits(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Interactions((2, 3), (PairInteraction(PAIR.layers, PAIR.kinds, values),))


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES)
def test_a_wrong_value_in_a_file_names_the_file_too(tmp_path, values, message):
    path = tmp_path / "interactions.json"
    Interactions((2, 3), (PAIR,)).save(path)
    document = json.loads(path.read_text())
    document["pairs"][0]["values"] = values
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=re.escape(message)) as caught:
        Interactions.load(path)
    assert str(caught.value).startswith(f"{path}: ")


OTHER_WAY = PairInteraction(("b", "a"), ("activation", "weight"), VALUES)


@pytest.mark.parametrize(
    ("bits", "pairs", "message"),
    [
        ((), (PAIR,), "interactions: there are no candidate bits"),
        ((2, 2, 3), (PAIR,), r"interactions: a bit-width stands twice in \[2, 2, 3\]"),
        ((1, 2), (PAIR,), "interactions: 1 bits is outside 2 to 16"),
        ((2, 3), (), "interactions: there are no pairs"),
        (
            (2, 3),
            (PAIR, OTHER_WAY),
            "interaction of activation of 'b' and weight of 'a' stands twice",
        ),
        (
            (2, 3),
            (PairInteraction(("a", "a"), ("weight", "weight"), VALUES),),
            "interaction of weight of 'a' and weight of 'a': a tensor has none with itself",
        ),
        (
            (2, 3),
            (PairInteraction(("a", "b"), ("weight", "bias"), VALUES),),
            "interactions: kind 'bias' is not one of weight, activation",
        ),
    ],
)
def test_interactions_that_cannot_be_are_refused(bits, pairs, message):
    with pytest.raises(ValueError, match=message):
        Interactions(bits, pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("pairs"), "pairs: is missing"),
        (lambda d: d.update(pairs=[{"layers": ["a", "b"]}]), r"pairs\[0\].kinds: is missing"),
        (lambda d: d["pairs"][0].update(layers=["a"]), r"pairs\[0\].layers"),
        (lambda d: d["pairs"][0].update(kinds=["weight", "bias"]), r"pairs\[0\].kinds\[1\]"),
        (lambda d: d["pairs"][0].update(values={"2": {"x": 1.0}}), r"pairs\[0\].values"),
        (lambda d: d.update(version=2), "version: is 2"),
        (lambda d: d.update(other=1), "other: unknown key"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_field(tmp_path, change, message):
    path = tmp_path / "interactions.json"
    Interactions((2, 3), (PAIR,)).save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=message):
        Interactions.load(path)
