"""`--target` of the search and of the curve, and `search.target` of recipes."""

import json

import pytest

from limpq_ext.app.recipe import make_recipe
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy

ASKED = ("--indicators", "indicators.json", "--costs", "costs.json", "--size", "75%")


@pytest.fixture(autouse=True)
def files(limpq):
    values = {name: {2: 1.0, 4: 0.5, 8: 0.25} for name in ("a", "b", "c")}
    Indicators.from_table(values, values).save("indicators.json")
    layers = tuple(LayerCost(name, "linear", 10, 10, 10) for name in values)
    Costs(layers, (LayerCost("head", "linear", 7, 5, 3),)).save("costs.json")


def test_a_target_is_searched_for(limpq, tmp_path):
    code, _, error = limpq("search", *ASKED, "--target", "onnxruntime")
    assert code == 0, error
    bits = Policy.load(tmp_path / "policy.json").bits()
    assert {bits[name] for name in ("a", "b", "c")} == {(4, 8), (8, 8)}


def test_the_curve_keeps_a_target_of_ones_own(limpq, tmp_path):
    (tmp_path / "mine.yaml").write_text("description: mine\npairs: [[2, 4], [8, 4]]\n")
    code, _, error = limpq(
        "pareto", "--indicators", "indicators.json", "--costs", "costs.json", "--points", "3",
        "--target", "mine.yaml",
    )  # fmt: skip
    assert code == 0, error
    curve = json.loads((tmp_path / "curve.json").read_text())
    found = {
        (layer["weight_bits"], layer["activation_bits"])
        for point in curve["points"]
        for layer in point["policy"]["layers"]
    }
    assert found == {(2, 4), (8, 4)}


def test_a_wrong_target_is_one_line(limpq, tmp_path):
    (tmp_path / "mine.yaml").write_text("description: mine\nkernels: [[2, 4]]\n")
    for given, told in (
        ("tvm", "target 'tvm' does not exist: expected a file, or one of finn, onnxruntime"),
        ("mine.yaml", "mine.yaml: kernels: unknown key"),
    ):
        code, _, error = limpq("search", *ASKED, "--target", given)
        assert (code, error.count("\n")) == (2, 1)
        assert told in error
        assert not (tmp_path / "policy.json").exists()


def test_recipes_have_a_target(tmp_path):
    recipe = make_recipe({"search": {"target": "finn", "bitops": None}}, source="mine")
    target = recipe.search.question()["target"]
    assert (target.name, target.tie_shared_inputs) == ("finn", True)
    assert make_recipe({}, source="mine").search.question()["target"] is None
