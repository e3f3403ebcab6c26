"""`limpq measure`: a table of this machine that `limpq search` takes."""

import json

import pytest
import yaml

from limpq_ext.values.indicators import Indicators
from limpq_ext.values.latency import LatencyTable

MODEL = ("--model", "cifar_resnet", "--input-size", "3", "16", "16")
QUICK = ("--engine", "torch", "--rounds", "1")


def test_the_table_is_measured_told_and_searched_with(limpq, tmp_path):
    code, said, error = limpq("measure", *MODEL, *QUICK, "--bits", "3", "--bits", "8")
    assert code == 0, error
    table = LatencyTable.load(tmp_path / "latency.json")
    assert {tuple(pair) for _, *pair in table.seconds} == {(3, 3), (3, 8), (8, 3), (8, 8)}
    assert table.meta["engine"] == "torch"
    for told in (
        *table.meta["notes"],
        f"median error of the prediction: {table.meta['median_error']:.1%}",
        "fake-quantized network in PyTorch",
        "threads: 1, batch: 1",
    ):
        assert " ".join(told.split()) in " ".join(said.split())
    for own in table.meta["predictions"]:
        assert f" {1e3 * own['measured']:.3f} " in said
    code, _, error = limpq("profile", *MODEL)
    assert code == 0, error
    layers = json.loads((tmp_path / "costs.json").read_text())["layers"]
    values = {layer["name"]: {3: 1.0, 8: 0.5} for layer in layers}
    Indicators.from_table(values, values).save("indicators.json")
    code, said, error = limpq(
        "search", "--indicators", "indicators.json", "--costs", "costs.json",
        "--latency", "10", "--latency-table", "latency.json",
    )  # fmt: skip
    assert code == 0, error
    assert "latency" in said


def test_a_recipe_gives_network_and_bits(limpq, tmp_path):
    small = {"model": {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}}, "bits": [4]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    code, _, error = limpq("measure", "small.yaml", *QUICK, "--batch", "2", "--out", "mine.json")
    assert code == 0, error
    table = LatencyTable.load(tmp_path / "mine.json")
    assert {tuple(pair) for _, *pair in table.seconds} == {(4, 4), (8, 8)}
    assert table.meta["batch"] == 2


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((*MODEL, "--engine", "tvm"), "engine is 'tvm', expected one of onnxruntime, openvino"),
        ((*MODEL, *QUICK, "--bits", "9"), "bits: 9 is measured by no engine, expected 2 to 8"),
        (("--model", "cifar_resnet"), "--input-size is missing"),
        ((*MODEL, "digits"), "both say which network"),
        ((*MODEL, *QUICK, "--threads", "0"), "threads is 0, expected 1 or more"),
        ((*MODEL, "--out", "none/a.json"), "the folder 'none' does not exist"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(given, told, limpq, tmp_path):
    code, _, error = limpq("measure", *given)
    assert (code, error.count("\n")) == (2, 1)
    assert told in error
    assert not list(tmp_path.iterdir())


def test_a_table_is_not_replaced_unasked(limpq, tmp_path):
    (tmp_path / "latency.json").write_text("mine")
    code, _, error = limpq("measure", *MODEL, *QUICK)
    assert (code, error.count("\n")) == (2, 1)
    assert "'latency.json' exists; --force replaces it" in error
    assert (tmp_path / "latency.json").read_text() == "mine"
    code, _, error = limpq("measure", *MODEL, *QUICK, "--bits", "8", "--force")
    assert code == 0, error
    LatencyTable.load(tmp_path / "latency.json")
