"""The network of a run as a file that engines run: written by `limpq run` and `limpq export`."""

import importlib.util
import json

import numpy as np
import pytest
import torch
import yaml

import limpq_ext as lq
from limpq_ext.app import exporting
from limpq_ext.app.recipe import load_recipe
from limpq_ext.app.session import Session
from limpq_ext.data.loading import make_loader
from limpq_ext.values.costs import Costs
from limpq_ext.values.policy import Policy

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")

SMALL = {
    "model": {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}},
    "bits": [2, 4],
    "device": "cpu",
    "float_training": {"epochs": 2, "lr": 0.1, "batch_size": 64},
    "finetune": {"epochs": 1, "lr": 0.02, "batch_size": 64},
    "check": {"random": 3},
}


def run(limpq, folder, *more):
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    return limpq("run", recipe, "--out", folder / "out", *more)


@pytest.fixture
def finished(limpq, tmp_path):
    """The folder of a run, and what it said."""
    code, said, error = run(limpq, tmp_path)
    assert code == 0, error
    return tmp_path / "out", said


def numbers_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["network"]: line for line in lines if line["stage"] == "evaluate"}


def test_a_run_ends_with_a_file_that_does_as_well(finished, limpq, tmp_path):
    folder, said = finished
    model = onnx.load(folder / "policy.onnx")
    stored = {own.key: own.value for own in model.metadata_props}
    policy = Policy.load(folder / "policy.json")
    assert json.loads(stored["limpq_ext.bits"]) == {
        name: list(bits) for name, bits in policy.bits().items()
    }
    found = numbers_of(folder)
    assert list(found) == ["float", "policy", "policy.onnx", "uniform"]
    # Some values lie between two codes, and half of the test images are right by little.
    assert found["policy.onnx"]["accuracy"] == pytest.approx(found["policy"]["accuracy"], abs=0.03)
    assert "onnxruntime" in said
    assert " layers in integers, " in said
    size = (folder / "policy.onnx").stat().st_size
    row = next(line for line in said.splitlines() if "policy.onnx" in line and "│" in line)
    assert f" {size / 1e3:.1f} " in row
    code, said, _ = run(limpq, tmp_path)
    assert code == 0
    for stage in ("pack", "export"):
        assert f"{stage}: nothing it depends on has changed, reused" in said


def test_a_run_keeps_the_network_as_one_packed_file(finished, tmp_path):
    folder, said = finished
    costs, policy = Costs.load(folder / "costs.json"), Policy.load(folder / "policy.json")
    session = Session(load_recipe(tmp_path / "small.yaml"))
    restored = lq.load(folder / "policy.safetensors", session.create_model()).eval()
    network = session.network(folder / "finetuned.safetensors", policy).eval()
    x = next(iter(make_loader(session.data.test, batch_size=64, train=False)))[0]
    with torch.no_grad():
        assert torch.equal(restored(x), network(x))
    size = (folder / "policy.safetensors").stat().st_size
    assert size < (folder / "float.safetensors").stat().st_size
    assert size > costs.size_bits(policy.bits()) / 8
    row = next(line for line in said.splitlines() if "│ policy " in line)
    assert f" {size / 1e3:.1f} " in row


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt2", "a.qonnx"])
def test_other_formats_are_told_by_the_name_and_verified(name, finished, limpq, tmp_path):
    if name.endswith(".qonnx"):
        pytest.importorskip("qonnx", reason="the extra qonnx is not installed")
    folder, _ = finished
    given = ("--weights", folder / "finetuned.safetensors", "--policy", folder / "policy.json")
    command = ("export", tmp_path / "small.yaml", *given, "--out", tmp_path / name)
    code, said, error = limpq(*command, "--images", "32")
    assert code == 0, error
    assert "32 images" in said
    assert "100.00" in said
    code, _, error = limpq(*command)
    assert "exists" in error
    code, _, error = limpq(*command[:-1], tmp_path / "a.bin")
    assert (code, error.count("\n")) == (2, 1)
    assert "tells no format, expected one of onnx, safetensors, qonnx, pt2, aoti" in error


def test_weights_of_many_bits_leave_files_out(limpq, tmp_path):
    code, said, error = run(
        limpq, tmp_path, "--set", "bits=[9, 10]", "--set", "search.bitops=w10a10"
    )
    assert code == 0, error
    assert "pack: left out: " in said
    assert "export: left out: ONNX holds at most 8 bits" in said
    assert list(numbers_of(tmp_path / "out")) == ["float", "policy", "uniform"]


def test_the_command_writes_the_same_file(finished, limpq, tmp_path):
    folder, _ = finished
    given = ("--weights", folder / "finetuned.safetensors", "--policy", folder / "policy.json")
    command = ("export", tmp_path / "small.yaml", *given, "--out", tmp_path / "mine.onnx")
    code, said, error = limpq(*command, "--images", "64")
    assert code == 0, error
    assert (tmp_path / "mine.onnx").read_bytes() == (folder / "policy.onnx").read_bytes()
    for word in ("MB", "of float32", "64 images", "unoptimized", "ms in float32"):
        assert word in said
    code, _, error = limpq(*command)
    assert (code, error.count("\n")) == (2, 1)
    assert "mine.onnx' exists; --force replaces it" in error
    code, said, _ = limpq(*command, "--force", "--no-verify", "--no-shift")
    assert code == 0
    assert "engine" not in said
    code, said, _ = limpq(*command, "--force", "--residual-bits", "8", "--images", "32")
    assert code == 0
    assert "this is not the network that was trained" in said
    code, _, error = limpq(*command, "--force", "--residual-bits", "4")
    assert error == "limpq: residual_bits is 4, expected 8 or None\n"
    code, _, error = limpq(*command, "--force", "--engine", "tvm")
    assert "engine is 'tvm', expected one of onnxruntime, openvino" in error
    other = tmp_path / "other.json"
    Policy.uniform(["conv1"], 4, 4).save(other)
    code, _, error = limpq(
        "export", tmp_path / "small.yaml", *given[:2], "--policy", other, "--out", tmp_path / "b"
    )
    assert (code, error.count("\n")) == (2, 1)
    assert not (tmp_path / "b").exists()


def test_without_the_extra_a_run_has_no_file(limpq, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "limpq_ext.app.recipe.find_spec", lambda name: None if name == "onnx" else found(name)
    )
    code, said, error = run(limpq, tmp_path)
    assert code == 0, error
    assert "onnx" not in said
    assert not (tmp_path / "out" / "policy.onnx").exists()


def test_what_does_not_compute_the_same_ends_no_run_unasked(limpq, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise ValueError("onnxruntime 1 does not compute what it should")

    monkeypatch.setattr("limpq_ext.app.run.export_network", refused)
    code, said, error = run(limpq, tmp_path)
    assert code == 0, error
    assert "export: left out: onnxruntime 1 does not compute what it should" in said
    assert "policy.onnx" not in numbers_of(tmp_path / "out")
    code, _, error = run(limpq, tmp_path, "--set", "export.onnx=true")
    assert code == 2
    assert error == "limpq: onnxruntime 1 does not compute what it should\n"
    assert not (tmp_path / "out" / "policy.onnx").exists()


def test_the_accuracy_is_of_all_test_images(monkeypatch, tmp_path):
    from limpq_ext.app.recipe import Recipe

    class Constant:
        inputs = ("x",)

        def __init__(self, *_, **__):
            pass

        def run(self, feeds):
            return {"y": np.tile(np.arange(10) == 3, (len(feeds["x"]), 1))}

    monkeypatch.setattr(exporting, "OnnxRuntime", Constant)
    (tmp_path / "a").touch()
    session = Session(Recipe())
    steps = []
    accuracy = exporting.accuracy_of_file(
        session, tmp_path / "a", on_step=lambda *step: steps.append(step)
    )
    targets = [target for _, target in session.data.test]
    assert accuracy == targets.count(3) / len(targets)
    assert steps[-1][0] == steps[-1][1] == len(steps)
