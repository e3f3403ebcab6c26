"""The command line, as a user runs it: results on disk, one-line errors, exit codes."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("typer")

import torch
import yaml
from pictures import write_classes
from torch import nn

from limpq_ext import (
    Costs,
    Curve,
    Indicators,
    JointTrainer,
    LatencyEntry,
    LatencyTable,
    Policy,
    ScoreCheck,
    apply_policy,
    save,
)
from limpq_ext.allocation.budgets import BUDGETS
from limpq_ext.scores.methods import methods_text
from limpq_ext.values.costs import LayerCost, LiveTensor
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.policy import LayerBits

ROOT = Path(__file__).resolve().parents[2]
LIMPQ_INDICATORS = ROOT.parent / "shared" / "data" / "limpq_resnet50_indicators.pkl"
SMALL = {
    "model": {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}},
    "bits": [2, 3, 4],
    "float_training": {"epochs": 2, "lr": 0.1},
    "joint": {"epochs": 1, "lr": 0.01},
    "scores": {"method": "learned"},
    "export": {"onnx": False},
    "finetune": {"epochs": 1, "lr": 0.02},
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    command = [
        sys.executable,
        "-m",
        "limpq_ext",
        "run",
        str(recipe),
        "--out",
        str(folder / "out"),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return recipe, folder / "out", told.stdout


def test_a_run_leaves_all_files_and_a_table(finished_run):
    _, out, said = finished_run
    for name in (
        "recipe.yaml",
        "float.safetensors",
        "indicators.json",
        "costs.json",
        "policy.json",
        "check.json",
        "finetuned.safetensors",
        "metrics.jsonl",
    ):
        assert (out / name).stat().st_size > 0
        assert name in said
    titles = ("accuracy (%)", "BitOps (G)", "weights (KB)", "compression", "all (KB)",
              "KL before tuning")  # fmt: skip
    for word in (*titles, "Seconds"):
        assert word in said
    assert "\x1b" not in said
    policy, costs = Policy.load(out / "policy.json"), Costs.load(out / "costs.json")
    indicators = Indicators.load(out / "indicators.json")
    names = [layer.name for layer in costs.layers]
    assert [layer.name for layer in policy.layers] == names
    assert sorted(layer.name for layer in indicators.layers) == sorted(names)
    assert costs.bitops(policy.bits()) <= costs.bitops(dict.fromkeys(names, (3, 3)))
    assert {(layer.weight_bits, layer.activation_bits) for layer in policy.fixed} == {(8, 8)}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["network"] for line in lines[-3:]] == ["float", "policy", "uniform"]
    assert all(0 <= line["accuracy"] <= 1 for line in lines[-3:])
    resolved = yaml.safe_load((out / "recipe.yaml").read_text())
    assert resolved["joint"]["batch_size"] == 64


def test_a_second_run_reuses_what_did_not_change(finished_run, limpq, tmp_path):
    _, out, _ = finished_run
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump({**SMALL, "finetune": {"epochs": 1, "lr": 0.01}}))
    weights = (out / "float.safetensors").read_bytes()
    tuned = (out / "finetuned.safetensors").read_bytes()
    code, said, _ = limpq("run", changed, "--out", out)
    assert code == 0
    for stage in ("float", "indicators", "profile", "search", "check"):
        assert f"{stage}: nothing it depends on has changed, reused" in said
    assert "finetune: nothing" not in said
    assert (out / "float.safetensors").read_bytes() == weights
    assert (out / "finetuned.safetensors").read_bytes() != tuned
    code, said, _ = limpq("run", changed, "--out", out, "--fresh")
    assert code == 0
    assert "reused" not in said
    assert (out / "float.safetensors").read_bytes() == weights


def test_a_run_searches_again_when_the_latency_table_changes(finished_run, limpq, tmp_path):
    _, out, _ = finished_run
    costs, copy = Costs.load(out / "costs.json"), tmp_path / "out"
    shutil.copytree(out, copy)

    def measure(seconds):
        """A table in which every bit of the weights costs the same."""
        entries = tuple(
            LatencyEntry(layer.name, bw, ba, seconds * bw)
            for layer in costs.layers
            for bw in (2, 3, 4)
            for ba in (2, 3, 4)
        )
        LatencyTable(entries).save(tmp_path / "latency.json")

    measure(0.001)
    limit = 0.003 * len(costs.layers)
    search = {"bitops": None, "latency": limit, "latency_table": "latency.json",
              "pairs": {"*": ["w2a4", [4, 4]]}}  # fmt: skip
    (tmp_path / "timed.yaml").write_text(yaml.safe_dump({**SMALL, "search": search}))
    for said_again, bits in ((False, 3), (True, 3), (False, 2)):
        if bits == 2:
            measure(0.0015)
        code, said, error = limpq("run", "timed.yaml", "--out", copy)
        assert code == 0, error
        assert ("search: nothing it depends on has changed" in said) == said_again
        policy = Policy.load(copy / "policy.json")
        assert policy.mean_bits()[0] <= bits
        assert {layer.activation_bits for layer in policy.layers} == {4}
        assert [(b.name, b.kept) for b in policy.budgets] == [("latency", True)]


def test_a_run_does_not_overwrite_what_it_did_not_write(finished_run, limpq, tmp_path):
    recipe, out, _ = finished_run
    code, _, error = limpq("run", recipe, "--out", out.parent / "foreign")
    assert code == 0, error
    edited = out.parent / "foreign" / "policy.json"
    edited.write_text(edited.read_text() + "\n")
    code, _, error = limpq("run", recipe, "--out", edited.parent, "--fresh")
    assert code == 2
    assert "policy.json was changed since a run wrote it" in error
    assert edited.read_text().endswith("\n\n")
    (tmp_path / "float.safetensors").write_text("mine")
    code, _, error = limpq("run", recipe, "--out", tmp_path)
    assert code == 2
    assert "float.safetensors is not of a run" in error
    assert (tmp_path / "float.safetensors").read_text() == "mine"


def test_each_stage_alone_gives_what_the_run_gave(finished_run, limpq, tmp_path):
    recipe, out, _ = finished_run
    again = out.parent / "alone"
    assert limpq("run", recipe, "--out", again)[0] == 0
    code, said, error = limpq("profile", "--recipe", recipe, "--out", "costs.json")
    assert code == 0, error
    assert Costs.load("costs.json") == Costs.load(again / "costs.json")
    weights = again / "float.safetensors"
    code, said, error = limpq("indicators", recipe, "--weights", weights, "--out", "i.json")
    assert code == 0, error
    assert Indicators.load("i.json") == Indicators.load(again / "indicators.json")
    code, said, error = limpq(
        "search", "--indicators", "i.json", "--costs", "costs.json", "--weight-bits-level", 3,
        "--activation-bits-level", 3, "--out", "policy.json",
    )  # fmt: skip
    assert code == 0, error
    assert Policy.load("policy.json").layers == Policy.load(again / "policy.json").layers
    code, said, error = limpq(
        "finetune",
        recipe,
        "--policy",
        "policy.json",
        "--weights",
        weights,
        "--out",
        "f.safetensors",
    )
    assert code == 0, error
    assert (tmp_path / "f.safetensors").read_bytes() == (
        again / "finetuned.safetensors"
    ).read_bytes()
    for arguments in (
        ["--policy", "policy.json", "--weights", "f.safetensors"],
        ["--weights", weights],
    ):
        code, said, error = limpq("evaluate", recipe, *arguments)
        assert code == 0, error
        assert "450 samples" in said


def test_a_first_look_takes_a_few_batches_and_no_training(finished_run, limpq, tmp_path):
    recipe, out, _ = finished_run
    weights, costs = out / "float.safetensors", out / "costs.json"
    look = ("--weights", weights, "--calibrate", 2)
    code, said, error = limpq("indicators", recipe, *look, "--out", "i.json")
    assert code == 0, error
    assert Indicators.load("i.json").meta == {"calibrated_batches": 2}
    budget = ("--weight-bits-level", 3, "--activation-bits-level", 3)
    code, said, error = limpq("search", "--indicators", "i.json", "--costs", costs, *budget)
    assert code == 0, error
    code, said, error = limpq(
        "evaluate", recipe, *look, "--policy", "policy.json",
        "--float-weights", weights, "--out", "evaluation.json",
    )  # fmt: skip
    assert code == 0, error
    assert "the same class as the float network" in said
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    assert numbers["samples"] == 450
    assert len(numbers["class_accuracy"]) == 10
    assert sum(map(sum, numbers["against_float"]["counts"])) == 450
    assert numbers["top5"] >= numbers["accuracy"] > 0.1
    code, _, error = limpq("evaluate", recipe, *look)
    assert (code, "--calibrate needs --policy" in error) == (2, True)


def test_fine_tuning_starts_from_the_joint_model_with_a_teacher_where_the_recipe_says(
    finished_run, limpq, tmp_path
):
    recipe, _, _ = finished_run
    options = (
        "--set", "finetune.init=joint", "--set", "finetune.distill_weight=0.5",
        "--set", "finetune.ema_decay=0.5", "--set", "finetune.reestimate_batches=2",
        "--set", "finetune.autocast=bfloat16", "--set", "joint.epochs=2",
    )  # fmt: skip
    out = tmp_path / "out"
    code, _, error = limpq("run", recipe, "--out", out, *options)
    assert code == 0, error
    weights = ("--weights", out / "float.safetensors")
    code, _, error = limpq(
        "indicators", recipe, *options, *weights,
        "--out", "i.json", "--joint-weights", "j.safetensors",
    )  # fmt: skip
    assert code == 0, error
    assert Path("j.safetensors").read_bytes() == (out / "joint.safetensors").read_bytes()
    tune = ("finetune", recipe, *options, *weights, "--policy", out / "policy.json")
    code, _, error = limpq(*tune, "--joint-weights", "j.safetensors", "--out", "f")
    assert code == 0, error
    assert Path("f").read_bytes() == (out / "finetuned.safetensors").read_bytes()
    code, _, error = limpq(*tune, "--out", "g")
    assert (code, "--joint-weights is missing" in error) == (2, True)
    code, _, error = limpq("run", recipe, *options, "--set", "baseline.weight_bits=7")
    assert code == 2
    assert "the baseline's W7A3 is not among the bits" in error


def test_a_run_takes_float_weights_from_a_file_and_quantizes_as_the_recipe_says(
    finished_run, limpq, tmp_path
):
    recipe, out, _ = finished_run
    code, said, error = limpq(
        "run", recipe, "--out", "given",
        "--set", f"model.weights={out / 'float.safetensors'}",
        "--set", "quantization.per_channel_weights=true",
        "--set", "quantization.fixed=[conv1, 'layer1.*', fc]",
        "--set", "quantization.exclude=[layer2.0.downsample]",
    )  # fmt: skip
    assert code == 0, error
    assert "the float network has the weights" in said
    given = tmp_path / "given"
    same = (given / "float.safetensors").read_bytes() == (out / "float.safetensors").read_bytes()
    assert same
    policy = Policy.load(given / "policy.json")
    names = [layer.name for layer in policy.layers]
    assert names == ["layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2",
                     "layer3.0.downsample.0"]  # fmt: skip
    assert [layer.name for layer in policy.fixed][-1] == "fc"
    tuned = pytest.importorskip("safetensors.torch").load_file(given / "finetuned.safetensors")
    assert tuned["layer2.0.conv1.weight_quantizer.scale"].shape == (1, 8)
    assert "layer2.0.downsample.0.weight_quantizer.scale" not in tuned
    code, _, error = limpq("run", recipe, "--out", "other", "--set", "model.weights=none.pt")
    assert code == 2
    assert "none.pt" in error
    code, _, error = limpq("run", recipe, "--out", "other", "--set", "model.weights=DEFAULT")
    assert code == 2
    assert "there are no published weights of 'cifar_resnet'" in error


def test_a_stage_alone_goes_on_from_the_checkpoint_beside_its_output(
    finished_run, limpq, tmp_path, monkeypatch
):
    recipe, out, _ = finished_run
    weights = out.parent / "checkpointed.safetensors"
    weights.write_bytes((out / "float.safetensors").read_bytes())
    command = ("indicators", recipe, "--weights", weights, "--checkpoint-steps", 4, "--out")
    assert limpq(*command, "whole.json")[0] == 0
    original = JointTrainer.step
    steps = []

    def step(self, *batch):
        steps.append(self.steps)
        if len(steps) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *batch)

    monkeypatch.setattr(JointTrainer, "step", step)
    code, _, error = limpq(*command, "i.json")
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 10 of 18; the same command goes on from i.json" in error
    code, said, error = limpq(*command, "i.json")
    assert code == 0, error
    assert "going on after step 10 of 18 from i.json.checkpoint" in said
    assert steps == list(range(18))
    assert Indicators.load("i.json") == Indicators.load("whole.json")
    assert not Path("i.json.checkpoint").exists()
    Path("i.json.checkpoint").write_text("something else")
    code, _, error = limpq(*command, "i.json", "--force")
    assert code == 2
    assert "i.json.checkpoint: not a readable checkpoint" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.usefixtures("heeding_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_where_nothing_is_trained_ends_with_one_sentence(
    finished_run, limpq, tmp_path, monkeypatch, number, request
):
    recipe, _, _ = finished_run
    if number == signal.SIGINT:  # which a shell lets its background jobs ignore
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(
        "limpq_ext.app.session.load_data", lambda *_, **__: os.kill(os.getpid(), number)
    )
    code, _, error = limpq("run", recipe, "--out", tmp_path / "out")
    assert code == 128 + number
    assert error.strip() == f"limpq: stopped by {signal.Signals(number).name}"


def test_tensorboard_events_lie_beside_the_metrics(finished_run, limpq, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    recipe, _, _ = finished_run
    code, _, error = limpq("run", recipe, "--out", tmp_path / "out", "--tensorboard")
    assert code == 0, error
    for stage in ("float", "indicators", "finetune", "baseline", "evaluate"):
        assert list((tmp_path / "out" / "tensorboard" / stage).glob("events.out.tfevents.*"))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    epoch = next(line for line in map(json.loads, lines) if line["stage"] == "indicators")
    assert set(epoch["branches"]) == {"2", "3", "4", "random"}
    assert epoch["guarded_scales"] == 0
    indicators = Indicators.load(tmp_path / "out" / "indicators.json")
    assert set(epoch["indicators"]) == {layer.name for layer in indicators.layers}


@pytest.mark.skipif(not LIMPQ_INDICATORS.exists(), reason="LIMPQ's ResNet-50 indicators are absent")
def test_the_readme_example_of_a_search(limpq):
    code, _, error = limpq("indicators", "--from", LIMPQ_INDICATORS, "--out", "resnet50.json")
    assert code == 0, error
    code, said, error = limpq(
        "search", "--indicators", "resnet50.json", "--model", "resnet50", "--input-size", 3, 224,
        224, "--weight-bits-level", 3, "--activation-bits-level", 4, "--compression", 12.2,
        "--alpha", 2, "--out", "policy.json",
    )  # fmt: skip
    assert code == 0, error
    policy = Policy.load("policy.json")
    assert len(policy.layers) == 52
    # Recorded from here: with exact MACs the published script's 4.617439227 is out of reach.
    assert policy.objective == pytest.approx(4.630866213, abs=1e-9)
    assert policy.gap == 0
    assert all(budget.kept for budget in policy.budgets)
    assert "gap 0.0e+00 (stopped by: optimal)" in said
    assert re.search(r"checked in integers: bitops [\d,]+ <= [\d,]+ BitOps: kept", said)


def search_files():
    """A network of two layers, its indicators, a latency table and restrictions."""
    values = {"2": 0.4, "4": 0.2, "8": 0.1}
    layers = [{"name": name, "weight": values, "activation": values} for name in "ab"]
    indicators = {"format": "limpq-indicators", "version": 1, "bits": [2, 4, 8], "layers": layers,
                  "meta": {}}  # fmt: skip
    Path("indicators.json").write_text(json.dumps(indicators))
    costs = tuple(LayerCost(name, "linear", 10, 10, 10) for name in "ab")
    tensors = (LiveTensor(16, "a", 0, 1), LiveTensor(8, "b", 1, 1))
    Costs(costs, (), shared_inputs=(("a", "b"),), tensors=tensors).save("costs.json")
    lines = [f"{n},{w},{a},{w * a}e-3" for n in "ab" for w in (2, 4, 8) for a in (2, 4, 8)]
    header = "layer,weight_bits,activation_bits,seconds"
    Path("latency.csv").write_text("\n".join([header, *lines]))
    Path("restrictions.yaml").write_text(
        "pairs: {'*': [[4, 8], w8a8]}\nmin_bits: {b: 8}\ntied: []\nfixed: {a: w4a8}\n"
    )
    values = dict.fromkeys(itertools.product((2, 4, 8), repeat=2), 0.0) | {(4, 4): 5.0, (2, 4): 1.0}
    weights = (("a", "weight"), ("b", "weight"))
    Interactions.from_table({weights: values}).save("interactions.json")


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (("--bitops", "w4a2"), [(2, 4), (2, 4)]),  # as good, as many BitOps, smaller
        (("--bitops", "320"), [(4, 4), (4, 4)]),
        (("--size", "50%"), [(4, 8), (4, 8)]),
        (("--budget", "size=50%"), [(4, 8), (4, 8)]),
        (("--budget", "mean_weight_bits=4", "--budget", "activation_memory=8"), [(4, 2), (4, 2)]),
        (("--mean-weight-bits", 4, "--budget", "activation_memory=8"), [(4, 2), (4, 2)]),
        (("--compression", "w2a2"), [(2, 8), (2, 8)]),
        (("--bits-per-weight", 2, "--bits-per-activation", "w8a4"), [(2, 4), (2, 4)]),
        (("--activation-memory", 8, "--mean-weight-bits", 4), [(4, 2), (4, 2)]),
        (("--latency", "0.032", "--latency-table", "latency.csv"), [(4, 4), (4, 4)]),
        (("--restrictions", "restrictions.yaml"), [(4, 8), (8, 8)]),
        (("--activation-bits", 16, "--mean-weight-bits", 4), [(4, 16), (4, 16)]),
        (("--weight-bits", 3, "--tie-shared-inputs"), [(3, 8), (3, 8)]),
        (("--size", "50%", "--interactions", "interactions.json"), [(4, 8), (2, 8)]),
        (("--mean-weight-bits", 6, "--smoothness", 1), [(4, 8), (4, 8)]),
    ],
)
def test_a_search_takes_budgets_and_restrictions(limpq, options, bits):
    search_files()
    code, said, error = limpq(*SEARCH, "indicators.json", *options)
    assert code == 0, error
    found = Policy.load("policy.json")
    assert [(layer.weight_bits, layer.activation_bits) for layer in found.layers] == bits
    assert said.count("checked in integers: ") == len(found.budgets)


def test_a_search_says_why_a_layer_got_its_bits(limpq):
    search_files()
    code, said, error = limpq(*SEARCH, "indicators.json", "--bitops", "w4a4", "--explain", "a")
    assert code == 0, error
    assert "a: W4A4 in the optimum 0.800000000" in said
    assert said.count("<- chosen") == 1
    assert "shadow price" in said
    assert Policy.load("policy.json").bits()["a"] == (4, 4)


def test_a_curve_is_written_as_json_and_csv(limpq):
    search_files()
    code, said, error = limpq(
        "pareto", "--indicators", "indicators.json", "--costs", "costs.json", "--points", 10,
        "--over", "size", "--stop", "w8a8", "--budget", "bitops=75%", "--restrictions",
        "restrictions.yaml",
    )  # fmt: skip
    assert code == 0, error
    curve = Curve.load("curve.json")
    assert (curve.over, len(curve.points)) == ("size", 10)
    assert curve.points[0].policy.budgets[0].name == "bitops"
    table = Path("curve.csv").read_text().splitlines()
    assert len(table) == 1 + 10 + len(curve.uniform)
    assert table[0].startswith("policy,size_limit,size,objective,gap,knee")
    assert "W4A8" in said
    assert said.splitlines()[-1] == "curve: curve.json, curve.csv"
    code, _, error = limpq("pareto", "--indicators", "indicators.json", "--costs", "costs.json")
    assert code == 2
    assert "--out: 'curve.json' exists" in error


def test_a_run_says_what_the_policy_is_worth_before_fine_tuning(finished_run):
    _, out, said = finished_run
    check, policy = ScoreCheck.load(out / "check.json"), Policy.load(out / "policy.json")
    own = check.optimum("learned")
    assert [(layer.weight_bits, layer.activation_bits) for layer in policy.layers] == list(
        zip(own.weight_bits, own.activation_bits, strict=True)
    )
    for line in check.text().splitlines():
        assert f"check: {line}" in said
    for warning in check.warnings():
        assert f"warning: before fine-tuning {warning}" in said
    assert check.uniform is not None
    for name, loss in (("policy", own.loss), ("uniform", check.uniform.loss)):
        assert re.search(rf"{name} +│ +{loss:.4f} │", said)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["kl"] for line in lines if line["stage"] == "check"] == [
        policy.loss for policy in check.policies
    ]


def test_scores_are_measured_searched_and_checked(finished_run, limpq):
    recipe, out, _ = finished_run
    weights = ("--weights", out / "float.safetensors")
    for name in ("layerwise", "fisher"):
        command = ("scores", recipe, *weights, "--method", name, "--batches", 1)
        code, said, error = limpq(*command, "--out", f"{name}.json")
        assert code == 0, error
        assert f"{name}.json: {name} of 8 layers at [2, 3, 4] bits" in said
        meta = Indicators.load(f"{name}.json").meta
        assert (meta["score"], meta["batches"]) == (name, 1)
        code, _, error = limpq(
            "search", "--indicators", f"{name}.json", "--costs", out / "costs.json",
            "--bitops", "w3a3", "--out", f"{name}-policy.json",
        )  # fmt: skip
        assert code == 0, error
    files = ("--scores", "layerwise.json", "--scores", "fisher.json")
    few = ("--random", 3, "--neighbours", 0, "--batches", 1)
    code, said, error = limpq(
        "check-scores", recipe, *weights, *files, *few, "--bitops", "w3a3", "--plot", "check.png"
    )
    assert code == 0, error
    check = ScoreCheck.load("check.json")
    assert [score.name for score in check.scores] == ["layerwise", "fisher"]
    assert check.text() in said
    assert all(f"warning: {warning}" in said for warning in check.warnings())
    assert Path("check.png").read_bytes().startswith(b"\x89PNG")
    code, _, error = limpq(
        "check-scores", recipe, *weights, *files, *few, "--costs", out / "costs.json", "--force"
    )
    assert code == 0, error
    again = ScoreCheck.load("check.json")
    assert again.policies == check.policies  # the recipe's budget is the same
    assert again.meta["budgets"].keys() == {"bitops"}


def test_the_scores_are_listed(limpq):
    code, said, _ = limpq("scores", "--list")
    assert code == 0
    assert said.strip() == methods_text()


def test_the_shipped_recipes_are_listed(limpq):
    code, said, _ = limpq("recipes")
    assert code == 0
    assert "resnet50-imagenet" in said
    assert "LIMPQ's ResNet-50 on ImageNet" in said


def test_a_folder_of_images_goes_through_every_stage(limpq, tmp_path):
    pytest.importorskip("torchvision")
    for part, count in (("train", 12), ("val", 4)):
        write_classes(tmp_path / "images" / part, {"n01": count, "n02": count}, suffix=".JPEG")
    (tmp_path / "images" / "train" / "n01" / "3.JPEG").write_bytes(b"")
    command = ["run", "--recipe", "resnet18-imagenet", "--data", tmp_path / "images"]
    for setting in (
        "data.on_corrupt=skip", "data.image_size=32", "data.val_fraction=0.25", "data.workers=1",
        "model={name: cifar_resnet, options: {blocks: 1, width: 4}}", "bits=[2, 4]",
        "float_training.epochs=1", "finetune.epochs=1", "float_training.batch_size=4",
        "joint.batch_size=4", "finetune.batch_size=4",
    ):  # fmt: skip
        command += ["--set", setting]
    code, said, error = limpq(*command, "--epochs", 1, "--data-fraction", 0.5)
    assert code == 0, error
    assert "data: images left out: 1, the first: train/n01/3.JPEG: is not an image" in said
    out = tmp_path / "runs" / "resnet18-imagenet"
    record = json.loads((out / "data.json").read_text())
    assert record["splits"] == {"train": 17, "val": 6, "test": 8}
    assert list(record["skipped"]) == ["train/n01/3.JPEG"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = {line["stage"]: line["step"] for line in lines if "step" in line}
    assert steps == {"float": 4, "indicators": 2, "finetune": 4, "baseline": 4}
    weights = ("--weights", out / "finetuned.safetensors", "--policy", out / "policy.json")
    code, said, error = limpq("evaluate", out / "recipe.yaml", *weights, "--split", "val")
    assert code == 0, error
    assert "6 samples" in said
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    code, said, error = limpq(
        "run", out / "recipe.yaml", "--out", out, "--data", moved, "--set", "data.workers=0",
        "--data-fraction", 0.25,
    )  # fmt: skip
    assert code == 0, error
    assert "float: nothing it depends on has changed, reused" in said
    assert "indicators: nothing" not in said
    (moved / "train" / "n02" / "0.JPEG").unlink()
    code, said, error = limpq("run", out / "recipe.yaml", "--out", out, "--data", moved)
    assert code == 0, error
    assert "float: nothing" not in said


def test_info_tells_how_it_was_built(limpq):
    code, said, _ = limpq("info")
    assert code == 0
    for word in ("limpq_ext", "torch", "build flags", "CPU capability", "CUDA architectures"):
        assert word in said


def test_info_tells_the_memory_of_a_models_weight_bank(limpq):
    code, said, _ = limpq("info", "--model", "resnet18")
    assert code == 0
    assert re.search(r"searchable layers +19, 11,157,504 weights", said)
    assert re.search(r"weight bank +223\.2 MB in float32 for 5 bit-widths", said)


def packed(folder):
    """A small quantized network in packed safetensors."""
    torch.manual_seed(0)
    layers = (LayerBits("0", 3, 4), LayerBits("1", 4, 16))
    policy = Policy(layers, (LayerBits("2", 8, 8),), 1.0, 1.0, 0.0)
    network = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8, bias=False))
    model = apply_policy(network, policy)
    model(torch.randn(4, 32))
    save(model, folder / "network.safetensors", policy=policy, name="mlp")
    return folder / "network.safetensors"


def test_info_tells_what_a_packed_file_holds(limpq, tmp_path):
    path = packed(tmp_path)
    code, said, error = limpq("info", path)
    assert code == 0, error
    rows = dict(re.split(" {2,}", line, maxsplit=1) for line in said.splitlines() if line)
    assert rows["format"] == "limpq-packed, version 1"
    assert rows["architecture"] == "Sequential, the model 'mlp'"
    assert rows["quantized layers"] == "3, 6,656 weights"
    assert rows["mean bits"] == "weights 5.00, activations 9.33 (by layer)"
    assert rows["policy"] == "searched, gap 0.0e+00"
    size = (32 * 64 * 3 + 64 * 64 * 4 + 64 * 8 * 8) // 8
    assert rows["quantized weights"] == (
        f"{size / 1e6:.3f} MB, {4 * 6656 / size:.2f} times smaller than in float32"
    )
    assert rows["in float"] == "0.001 MB"
    assert rows["file"].startswith(f"{path.stat().st_size / 1e6:.3f} MB, ")
    assert rows["1"].split() == ["4", "16", "4,096", "2,048"]


def test_info_refuses_what_is_no_packed_file(limpq, tmp_path):
    path = packed(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    code, _, error = limpq("info", path)
    assert code == 2
    assert re.fullmatch(rf"limpq: {path}: not a safetensors file: its tensors end at .*\n", error)
    code, _, error = limpq("info", path, "--model", "resnet18")
    assert (code, error) == (2, "limpq: FILE and --model are told about one at a time\n")


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "recipes",
        "indicators",
        "scores",
        "check-scores",
        "profile",
        "search",
        "pareto",
        "finetune",
        "evaluate",
        "info",
    ],
)
def test_help_of_every_command(limpq, command):
    code, said, _ = limpq(command, "--help")
    assert code == 0
    assert "Usage: limpq" in said or "Usage:" in said
    assert "--help" in said


@pytest.mark.parametrize("command", ["search", "pareto", "check-scores"])
def test_every_budget_of_the_table_is_an_option(limpq, command):
    _, said, _ = limpq(command, "--help")
    for name in BUDGETS:
        assert f"  --{name.replace('_', '-')} " in said


def small_files():
    costs = {
        "format": "limpq-costs",
        "version": 1,
        "layers": [{"name": "a", "kind": "conv2d", "macs": 10, "weights": 5, "activations": 7}],
        "fixed": [],
        "meta": {},
        "fixed_bits": 8,
    }
    indicators = {
        "format": "limpq-indicators",
        "version": 1,
        "bits": [2, 4],
        "layers": [{"name": "a", "weight": {"2": 0.2, "4": 0.1}, "activation": {"2": 2, "4": 1}}],
        "meta": {},
    }
    Path("costs.json").write_text(json.dumps(costs))
    Path("indicators.json").write_text(json.dumps(indicators))
    Path("truncated.json").write_text(json.dumps(indicators)[:40])
    Path("version.json").write_text(json.dumps({**indicators, "version": 9}))
    Path("field.json").write_text(json.dumps({**indicators, "bits": "two"}))
    indicators["layers"][0]["weight"]["2"] = float("nan")
    Path("nan.json").write_text(json.dumps(indicators))
    indicators["layers"][0] = {**indicators["layers"][0], "name": "b", "weight": {"2": 2, "4": 1}}
    Path("names.json").write_text(json.dumps(indicators))
    Path("key.yaml").write_text("learning_rate: 3\n")
    Path("model.yaml").write_text("model: {name: resnet19}\n")
    Path("data.yaml").write_text("data: {name: imagenet22k}\n")
    Path("out.json").write_text("kept")
    Path("holes.csv").write_text("layer,weight_bits,activation_bits,seconds\na,2,2,0.1\n")
    Path("pairs.yaml").write_text("pairs: {'*': [w4]}\n")


SEARCH = ("search", "--costs", "costs.json", "--out", "policy.json", "--indicators")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SEARCH, "none.json"), "none.json"),
        ((*SEARCH, "truncated.json"), "truncated.json: "),
        ((*SEARCH, "version.json"), "version.json: version: is 9"),
        ((*SEARCH, "field.json"), "field.json: bits: "),
        ((*SEARCH, "nan.json"), "layer 'a': weight indicator at 2 bits is nan"),
        ((*SEARCH, "names.json"), "'b'"),
        ((*SEARCH, "indicators.json", "--bitops", -5), "bitops"),
        ((*SEARCH, "indicators.json", "--size", 0), "size"),
        ((*SEARCH, "indicators.json", "--bitops", 1), "bitops"),
        ((*SEARCH, "indicators.json", "--weight-bits-level", 3), "--activation-bits-level go toge"),
        ((*SEARCH, "indicators.json", "--alpha", "nan"), "alpha"),
        ((*SEARCH, "indicators.json", "--non-monotone", "drop"), "drop"),
        (
            (*SEARCH, "indicators.json", "--weight-bits-level", 1, "--activation-bits-level", 3),
            "1 bits is outside 2 to 16",
        ),
        (("search", "--indicators", "indicators.json"), "give --costs, --recipe or --model"),
        (("search", "--indicators", "indicators.json", "--model", "resnet18"), "--input-size"),
        ((*SEARCH, "indicators.json", "--size", "3 apples"), "size: '3 apples' is not a number, a"),
        ((*SEARCH, "indicators.json", "--compression", "25%"), "takes no share of 8 bits"),
        ((*SEARCH, "indicators.json", "--activation-memory", "25%"), "profile the network again"),
        ((*SEARCH, "indicators.json", "--budget", "size"), "--budget size: expected NAME=VALUE"),
        ((*SEARCH, "indicators.json", "--budget", "speed=3"), "there is no budget 'speed': it is"),
        ((*SEARCH, "indicators.json", "--budget", "size=big"), "size: 'big' is not a number, a"),
        (
            (*SEARCH, "indicators.json", "--budget", "size=9", "--budget", "size=8"),
            "--budget size=8: size is 9 already: give one",
        ),
        (
            (*SEARCH, "indicators.json", "--size", 9, "--budget", "size=8"),
            "--budget size=8: size is 9 already: give one",
        ),
        (
            (
                *SEARCH,
                "indicators.json",
                "--weight-bits-level",
                3,
                "--activation-bits-level",
                4,
                "--budget",
                "bitops=8",
            ),
            "--budget bitops=8: bitops is w3a4 already: give one",
        ),
        (
            (
                "pareto",
                "--indicators",
                "indicators.json",
                "--costs",
                "costs.json",
                "--budget",
                "bitops=8",
            ),
            "bitops is the budget that moves",
        ),
        ((*SEARCH, "indicators.json", "--latency", "1"), "latency_table is missing"),
        ((*SEARCH, "indicators.json", "--latency-table", "none.csv"), "none.csv"),
        (
            (*SEARCH, "indicators.json", "--latency", "1", "--latency-table", "holes.csv"),
            "latency table: 3 entries are missing: 'a' at W2A4, ",
        ),
        ((*SEARCH, "indicators.json", "--restrictions", "key.yaml"), "learning_rate: unknown key"),
        ((*SEARCH, "indicators.json", "--restrictions", "none.yaml"), "'none.yaml' does not exist"),
        ((*SEARCH, "indicators.json", "--restrictions", "pairs.yaml"), "pairs.yaml: pairs.*[0]: "),
        ((*SEARCH, "indicators.json", "--weight-bits", 1), "weight_bits: 1 bits is outside"),
        ((*SEARCH, "indicators.json", "--interactions", "none.json"), "none.json"),
        ((*SEARCH, "indicators.json", "--smoothness", -1), "smoothness must be finite and not neg"),
        ((*SEARCH, "indicators.json", "--explain", "z"), "no searchable layer 'z'"),
        (
            ("pareto", "--indicators", "indicators.json", "--costs", "costs.json", "--over", "x"),
            "there is no budget 'x'",
        ),
        (
            (
                "pareto",
                "--indicators",
                "indicators.json",
                "--costs",
                "costs.json",
                "--csv",
                "out.json",
            ),
            "--csv: 'out.json' exists; --force",
        ),
        ((*SEARCH, "indicators.json", "--out", "out.json"), "'out.json' exists; --force"),
        (
            ("profile", "--out", "new.json", "--model", "resnet19", "--input-size", 3, 8, 8),
            "unknown model 'resnet19'",
        ),
        (
            ("profile", "--out", "new.json", "--model", "vit_b_16", "--input-size", 3, 32, 32),
            "cannot follow VisionTransformer.forward",
        ),
        (
            ("profile", "--out", "new.json", "--model", "resnet18", "--input-size", 3, 0, 8),
            "--input-size is (3, 0, 8)",
        ),
        (("run", "none.yaml"), "recipe 'none.yaml' does not exist"),
        (("run", "key.yaml"), "key.yaml: learning_rate: unknown key"),
        (("run", "model.yaml"), "unknown model 'resnet19'"),
        (("run", "data.yaml"), "unknown data set 'imagenet22k'"),
        (("indicators", "--out", "i.json"), "--weights is missing"),
        (
            ("scores", "--weights", "w.pt", "--out", "i.json", "--set", "scores.method=learned"),
            "--method is missing: one of `limpq scores --list`",
        ),
        (("scores", "--method", "fisher", "--out", "i.json"), "--weights is missing"),
        (
            ("scores", "--method", "magic", "--out", "i.json"),
            "scores.method: there is no score 'magic'",
        ),
        (("scores", "--method", "fisher", "--out", "out.json"), "'out.json' exists"),
        (("check-scores", "--weights", "w.pt", "--scores", "nan.json"), "nan.json: "),
        (
            (
                "check-scores",
                "--weights",
                "w.pt",
                "--scores",
                "indicators.json",
                "--scores",
                "indicators.json",
            ),
            "two files of --scores have one name",
        ),
        (("run", "--set", "finetune.epoch=3"), "command line: finetune.epoch: unknown key"),
        (("run", "--data", "none", "--set", "data.name=imagenet"), "'none' is not a folder"),
        (("run", "--recipe", "resnet18-imagenet"), "data.root is missing: imagenet is read"),
        (("run", "digits", "--recipe", "glyphs"), "two recipes, 'digits' and --recipe glyphs"),
        (("run", "--set", "model.options.num_classes=7"), "num_classes is 7, but the data set"),
        (("run", "--data-fraction", 0), "command line: data.fraction: "),
        (("evaluate", "--weights", "w.pt", "--split", "train"), "--split is 'train'"),
        (("evaluate", "--weights", "none.safetensors"), "'none.safetensors' do not exist"),
        (("finetune", "--policy", "costs.json", "--weights", "w.pt"), "costs.json: format: is"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(limpq, arguments, message):
    small_files()
    before = {path: path.read_bytes() for path in Path().iterdir()}
    code, _, error = limpq(*arguments)
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_an_unknown_option_is_a_usage_error(limpq):
    code, _, error = limpq("search", "--limit", 3)
    assert code == 2
    assert "--limit" in error


def test_an_error_is_one_line_and_debug_shows_where_it_is_from(limpq):
    small_files()
    for command, shown in (
        ((*SEARCH, "none.json"), False),
        (("--debug", *SEARCH, "none.json"), True),
        ((*SEARCH, "none.json", "--debug"), True),
    ):
        code, _, error = limpq(*command)
        assert code == 2
        assert ("Traceback" in error) == shown
        assert error.splitlines()[-1].startswith("limpq: ")
        assert shown or len(error.splitlines()) == 1


def test_an_error_that_nobody_expected_is_one_line_too(limpq, monkeypatch):
    def fail(*arguments):
        raise KeyError("layer")

    monkeypatch.setattr("limpq_ext.app.recipe.shipped_recipes", fail)
    code, _, error = limpq("recipes")
    assert code == 2
    assert error == "limpq: unexpected KeyError: 'layer' (--debug shows where)\n"
    code, _, error = limpq("recipes", "--debug")
    assert code == 2
    assert "Traceback" in error


def test_a_curve_has_a_number_of_points_that_can_be_found(limpq):
    search_files()
    code, _, error = limpq(
        "pareto", "--indicators", "indicators.json", "--costs", "costs.json",
        "--points", 1_000_000_000,
    )  # fmt: skip
    assert code == 2
    assert "--points is 1,000,000,000, at most 100,000 are found" in error


def test_weights_that_are_not_finite_are_not_evaluated(finished_run, limpq):
    safetensors = pytest.importorskip("safetensors.torch")
    recipe, out, _ = finished_run
    weights = safetensors.load_file(out / "float.safetensors")
    for name, value, message in (
        ("fc.weight", float("nan"), "'fc.weight' has values that are NaN or infinite"),
        ("fc.weight", 3e38, "the loss on the test images is "),
    ):
        bad = {**weights, name: weights[name] * 0 + value, "fc.bias": weights["fc.bias"] * 0 + 3e38}
        safetensors.save_file(bad, "bad.safetensors")
        code, said, error = limpq("evaluate", recipe, "--weights", "bad.safetensors")
        assert code == 2
        assert message in error
        assert "accuracy" not in said


def test_names_from_files_do_not_command_the_terminal(limpq):
    name = "a\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e"
    values = {"2": 0.4, "4": 0.2}
    layers = [{"name": name, "weight": values, "activation": values}]
    indicators = {"format": "limpq-indicators", "version": 1, "bits": [2, 4], "layers": layers,
                  "meta": {}}  # fmt: skip
    Path("indicators.json").write_text(json.dumps(indicators))
    Costs((LayerCost(name, "linear", 10, 10, 10),), ()).save("costs.json")
    code, said, error = limpq(*SEARCH, "indicators.json")
    assert code == 0, error
    assert "a\\x1b]0;title\\x07\\x1b[2J\\r\\x9b31m\\u202e" in said
    Path("costs.json").write_text(Path("costs.json").read_text().replace('"a', '"b'))
    code, _, error = limpq(*SEARCH, "indicators.json", "--force")
    assert code == 2
    for text in (said, error):
        assert all(character.isprintable() or character == "\n" for character in text)
