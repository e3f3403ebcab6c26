"""The folder of a run: what is reused, what is refused, and that nothing of others is lost."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("typer")

import torch
import yaml

from limpq_ext import Costs, Indicators, Policy, ScoreCheck
from limpq_ext.allocation.budgets import in_words
from limpq_ext.app import locks as exclusive
from limpq_ext.app import scoring
from limpq_ext.app.locks import only_one
from limpq_ext.scores import methods
from limpq_ext.scores.methods import METHODS

SMALL = {
    "model": {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}},
    "bits": [2, 4],
    "device": "cpu",
    "float_training": {"epochs": 1, "lr": 0.1, "batch_size": 256},
    "joint": {"epochs": 1, "lr": 0.01, "batch_size": 256},
    "scores": {"method": "learned"},
    "export": {"onnx": False},
    "finetune": {"epochs": 1, "lr": 0.02, "batch_size": 256},
}
STAGES = ("float", "indicators", "profile", "search", "check", "finetune", "pack", "baseline")
NET = """
from torch import nn

def build(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=1, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes),
    )
"""


def write_recipe(path, **changes):
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def reused(said):
    return set(re.findall("^([a-z]+): nothing it depends on has changed", said, re.MULTILINE))


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A recipe and the folder of its run, which no test changes."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "small.yaml")
    command = [sys.executable, "-m", "limpq_ext", "run", recipe, "--out", folder / "out"]
    subprocess.run([str(word) for word in command], capture_output=True, check=True)
    return recipe, folder / "out"


@pytest.fixture
def copied(finished, tmp_path):
    """The recipe and a copy of the folder."""
    recipe, out = finished
    return recipe, Path(shutil.copytree(out, tmp_path / "copied"))


@pytest.fixture
def own_network(tmp_path, monkeypatch):
    """Writes net.py as an editor would between two commands."""
    monkeypatch.setattr("sys.path", list(sys.path))

    def write(text):
        (tmp_path / "net.py").write_text(text)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        sys.modules.pop("net", None)

    yield write
    sys.modules.pop("net", None)


def test_an_edited_network_runs_again_and_its_old_weights_are_refused(limpq, own_network, tmp_path):
    recipe = write_recipe(tmp_path / "own.yaml", model={"name": "net:build"})
    command = ("run", recipe, "--out", "out", "--allow-code")
    own_network(NET)
    code, _, error = limpq(*command)
    assert code == 0, error
    old = shutil.copy("out/float.safetensors", "old.safetensors")
    macs = [layer.macs for layer in Costs.load("out/costs.json").layers]
    own_network("# the same\n" + NET)
    code, said, error = limpq(*command)
    assert code == 0, error
    assert reused(said) == set(STAGES) - {"check"}  # two layers leave too few policies
    own_network(NET.replace("stride=1", "stride=2"))
    code, said, error = limpq(*command)
    assert code == 0, error
    assert reused(said) == set()
    assert [layer.macs for layer in Costs.load("out/costs.json").layers] < macs
    code, _, error = limpq("evaluate", recipe, "--allow-code", "--weights", old)
    assert code == 2
    assert "old.safetensors: the weights were trained in another network" in error


def test_weights_are_evaluated_with_their_own_policy_alone(finished, limpq):
    recipe, out = finished
    command = ("evaluate", recipe, "--weights", out / "finetuned.safetensors", "--policy")
    assert limpq(*command, out / "policy.json")[0] == 0
    searched, uniform = (Policy.load(out / f"{name}.json") for name in ("policy", "uniform"))
    assert searched.bits() != uniform.bits()
    code, said, error = limpq(*command, out / "uniform.json")
    assert code == 2
    assert "finetuned.safetensors: the weights were trained at other bits: layer '" in error
    assert "accuracy" not in said


def test_a_network_whose_forward_depends_on_values_can_be_evaluated(limpq, own_network):
    own_network(
        NET
        + """

class Odd(nn.Linear):
    def forward(self, x):
        x = x.flatten(1)
        return super().forward(x if x.sum() > 0 else -x)

def odd(num_classes):
    return Odd(64, num_classes)
"""
    )
    torch.save(torch.nn.Linear(64, 10).state_dict(), "odd.pt")
    code, said, error = limpq("evaluate", "--set", "model.name=net:odd", "--weights", "odd.pt")
    assert code == 0, error
    assert "450 samples" in said


FILES = ("recipe.yaml", "data.json", "metrics.jsonl", "scan.json", "float.checkpoint",
         "search.checkpoint", "policy.json", "stages.json")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["", "fresh"])
def test_files_of_others_in_a_new_folder_are_left_alone(finished, limpq, tmp_path, name, fresh):
    recipe, _ = finished
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text('{"mine": 1}\n')
    code, _, error = limpq("run", recipe, "--out", out, *fresh)
    assert code == 2
    assert f"{name} is not of a run" in error or f"{name}: format: is missing" in error
    assert content(out) == {Path(name): b'{"mine": 1}\n'}


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("stages.json", "scan.json")])
@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["", "fresh"])
def test_files_that_were_edited_or_added_are_left_alone(copied, limpq, name, fresh):
    recipe, out = copied
    with (out / name).open("a") as file:
        file.write('{"mine": 1}\n')
    before = content(out)
    code, _, error = limpq("run", recipe, "--out", out, *fresh)
    assert code == 2
    assert name in error
    after = content(out)
    after.pop(Path("stages.json"))
    before.pop(Path("stages.json"))
    assert after == before


def test_tensorboard_events_of_others_are_left_alone(copied, limpq):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    recipe, out = copied
    events = out / "tensorboard" / "float" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.write_text("mine")
    code, _, error = limpq("run", recipe, "--out", out, "--tensorboard", "--fresh")
    assert code == 2
    assert "tensorboard is not of a run" in error
    assert events.read_text() == "mine"


def test_a_recipe_with_comments_that_says_the_same_is_left_as_it_is(copied, limpq):
    _, out = copied
    path = out / "recipe.yaml"
    path.write_text("# why these settings\n" + path.read_text())
    before = path.read_bytes()
    code, said, error = limpq("run", path, "--out", out)
    assert code == 0, error
    assert reused(said) == set(STAGES)
    assert path.read_bytes() == before


def test_a_folder_that_is_no_run_yet_is_not_made_by_a_recipe_that_cannot_run(limpq, tmp_path):
    code, _, _ = limpq("run", "--set", "model.name=resnet19", "--out", "new/out")
    assert code == 2
    assert not (tmp_path / "new").exists()


def test_a_file_that_appears_while_a_stage_works_is_not_replaced(copied, limpq, monkeypatch):
    recipe, out = copied

    def search(*arguments, **question):
        (out / "policy.json").write_text("mine")
        return Policy.load(out / "uniform.json")

    monkeypatch.setattr("limpq_ext.app.run.search", search)
    code, _, error = limpq("run", recipe, "--out", out, "--set", "search.alpha=2.0")
    assert code == 2
    assert "policy.json was written by somebody else meanwhile" in error
    assert (out / "policy.json").read_text() == "mine"


def test_a_second_run_in_a_folder_is_refused_and_the_first_one_ends_well(
    finished, limpq, tmp_path, monkeypatch
):
    recipe, reference = finished
    monkeypatch.setattr(exclusive, "PATIENCE", 0.1)
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-m", "limpq_ext", "run", str(recipe), "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / ".limpq.lock").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    for fresh in ((), ("--fresh",)):
        code, _, error = limpq("run", recipe, "--out", out, *fresh)
        assert code == 2
        assert "is in use by another limpq process" in error
    _, told = first.communicate(timeout=300)
    assert first.returncode == 0, told
    for name in ("float.safetensors", "indicators.json", "finetuned.safetensors"):
        assert (out / name).read_bytes() == (reference / name).read_bytes()


@pytest.mark.parametrize("command", ["indicators", "finetune"])
def test_two_commands_do_not_share_an_output_and_its_checkpoint(
    finished, limpq, tmp_path, monkeypatch, command
):
    recipe, out = finished
    monkeypatch.setattr(exclusive, "PATIENCE", 0.1)
    policy = ("--policy", out / "policy.json") if command == "finetune" else ()
    arguments = (recipe, "--weights", out / "float.safetensors", *policy, "--out", "mine")
    with only_one(tmp_path / ".mine.lock", "it"):
        code, _, error = limpq(command, *arguments)
    assert code == 2
    assert "'mine' is in use by another limpq process" in error
    code, _, error = limpq(command, *arguments)
    assert code == 0, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_first_look_removes_no_checkpoint(finished, limpq):
    recipe, out = finished
    Path("i.json.checkpoint").write_text("mine")
    code, _, error = limpq(
        "indicators", recipe, "--weights", out / "float.safetensors", "--calibrate", 1,
        "--out", "i.json",
    )  # fmt: skip
    assert code == 0, error
    assert Path("i.json.checkpoint").read_text() == "mine"


def test_an_output_that_appears_while_a_command_works_is_not_replaced(
    finished, limpq, tmp_path, monkeypatch
):
    _, out = finished

    def find(*arguments, **options):
        Path("policy.json").write_text("theirs")
        return Policy.load(out / "policy.json")

    monkeypatch.setattr("limpq_ext.allocation.search.search", find)
    command = ("search", "--indicators", out / "indicators.json", "--costs", out / "costs.json")
    code, _, error = limpq(*command)
    assert code == 2
    assert "'policy.json' was written by somebody else meanwhile" in error
    assert "the result is in 'policy.1.json'" in error
    assert Path("policy.json").read_text() == "theirs"
    assert Policy.load("policy.1.json") == Policy.load(out / "policy.json")
    assert limpq(*command, "--force")[0] == 0
    assert Policy.load("policy.json") == Policy.load(out / "policy.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pareto", "--out", "f.csv", "--csv", "f.csv"), "--csv: 'f.csv' is --out already"),
        (("pareto", "--out", "f.csv"), "--csv: 'f.csv' is --out already"),
        (("pareto", "--out", "f", "--csv", "here/f"), "--csv: 'here/f' is --out already"),
        (
            ("indicators", "--out", "f", "--joint-weights", "./f"),
            "--joint-weights: 'f' is --out already",
        ),
        (
            ("indicators", "--out", "f", "--joint-weights", "f.checkpoint"),
            "--joint-weights: 'f.checkpoint' is the checkpoint of --out already",
        ),
    ],
)
def test_two_outputs_do_not_have_one_name(finished, limpq, arguments, message):
    _, out = finished
    Path("here").symlink_to(".")
    inputs = ("--indicators", out / "indicators.json", "--costs", out / "costs.json")
    inputs = inputs if arguments[0] == "pareto" else ("--weights", out / "float.safetensors")
    code, _, error = limpq(*arguments, *inputs, "--force")
    assert code == 2
    assert message in error
    assert [path.name for path in Path().iterdir()] == ["here"]


HOLES = "layer,weight_bits,activation_bits,seconds\nlayer1.0.conv1,2,2,0.1\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["search.pairs={'*': [[7, 7]]}"], "7 bits"),
        (["search.min_bits={nothing: 4}"], "'nothing' fits no"),
        (["search.latency=1"], "latency_table is missing"),
        (["search.latency=1", "search.latency_table=none.csv"], "none.csv"),
        (["search.interactions=none.json"], "none.json"),
        (["search.latency=1", "search.latency_table=holes.csv"], "entries are missing"),
        (["search.size=1"], "no policy keeps size"),
        (["search.bitops=1000"], "no policy keeps bitops"),
        (["search.compression=1000"], "no policy keeps compression"),
        (["search.size=w4a4", "search.compression=16"], "no policy keeps compression"),
        (["model.name=net:build", "model.options={}"], "(LSTM)"),
        (["quantization.exclude=[nothing]"], "no module 'nothing'"),
        (["quantization.fixed=['*']"], "no layer is left to search"),
        (["joint.cuda_graph=true"], "cuda_graph needs a model on a CUDA device"),
        (["model.weights=none.pt"], "none.pt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_before_anything_trains(
    finished, limpq, own_network, tmp_path, monkeypatch, settings, message
):
    recipe, _ = finished
    own_network(NET.replace("nn.Flatten()", "nn.Flatten(), nn.LSTM(4, 4), Only()") + ONLY)
    Path("holes.csv").write_text(HOLES)
    monkeypatch.setattr("limpq_ext.app.trainings.run_epochs", never)
    monkeypatch.setattr("limpq_ext.app.trainings.finetune", never)
    options = [word for setting in settings for word in ("--set", setting)]
    code, said, error = limpq("run", recipe, "--out", "out", *options)
    assert code == 2
    assert message in error
    assert "training" not in said
    assert not (tmp_path / "out").exists()


ONLY = """

class Only(nn.Module):
    def forward(self, x):
        return x[0]
"""


def never(*arguments, **options):
    raise AssertionError("something trains")


@pytest.mark.parametrize("module", ["highspy", "safetensors", "tensorboard"])
def test_a_missing_extra_is_said_before_anything_trains(
    finished, limpq, tmp_path, monkeypatch, module
):
    recipe, _ = finished
    hidden = {"tensorboard": "torch.utils.tensorboard"}.get(module, module)
    for name in (hidden, *[name for name in sys.modules if name.startswith(f"{hidden}.")]):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("limpq_ext.app.trainings.run_epochs", never)
    monkeypatch.setattr("limpq_ext.app.trainings.finetune", never)
    code, _, error = limpq("run", recipe, "--out", "out", "--tensorboard")
    assert code == 2
    assert module in error
    assert "pip install 'limpq_ext[" in error


def test_a_run_says_what_each_budget_allows_and_what_is_used(copied, limpq):
    recipe, out = copied
    code, said, error = limpq(
        "run", recipe, "--out", out, "--set", "search.size=w4a8", "--set", "search.compression=8"
    )
    assert code == 0, error
    policy = Policy.load(out / "policy.json")
    assert [budget.name for budget in policy.budgets] == ["size", "compression"]
    for budget in policy.budgets:
        limit = in_words(budget.name, budget.limit)
        assert f"search: {budget.name} limit {limit}, used " in said


def test_a_policy_of_scores_needs_no_joint_training_and_can_be_refined(copied, limpq):
    recipe, out = copied
    for name in ("indicators.json", "joint.safetensors"):
        (out / name).unlink()
    wanted = ("--set", "scores.method=fisher", "--set", "refine.steps=3")
    code, said, error = limpq("run", recipe, "--out", out, *wanted)
    assert code == 0, error
    assert not (out / "indicators.json").exists()
    assert Indicators.load(out / "scores.json").meta["score"] == "fisher"
    found, refined = (Policy.load(out / f"{name}.json") for name in ("policy", "refined"))
    told = refined.meta["refined"]
    assert len(told["record"]) <= 3
    assert told["after"] <= told["before"]
    assert f"KL {told['before']:.4g} -> {told['after']:.4g}, on other images " in said
    assert [budget.name for budget in refined.budgets] == [b.name for b in found.budgets]
    assert all(budget.kept for budget in refined.budgets)
    code, _, error = limpq(
        "evaluate", recipe, "--policy", out / "refined.json",
        "--weights", out / "finetuned.safetensors",
    )  # fmt: skip
    assert code == 0, error
    _, said, _ = limpq("run", recipe, "--out", out, *wanted)
    stages = {"float", "profile", "scores", "search", "check", "refine", "finetune", "pack"}
    stages |= {"baseline"}
    assert reused(said) == stages
    _, said, _ = limpq("run", recipe, "--out", out, *wanted, "--set", "scores.batches=2")
    assert "scores" not in reused(said)
    assert {"float", "profile", "baseline"} <= reused(said)


def test_auto_takes_the_score_whose_optimum_loses_least(copied, limpq, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("not for this network")

    refusing = replace(METHODS["fisher"], function=refuse)
    table = {"layerwise": METHODS["layerwise"], "fisher": METHODS["fisher"], "refused": refusing}
    monkeypatch.setattr(methods, "METHODS", table)
    monkeypatch.setattr(scoring, "METHODS", table)
    recipe, out = copied
    code, said, error = limpq("run", recipe, "--out", out, "--set", "scores.method=auto")
    assert code == 0, error
    assert "scores: refused is left out: not for this network" in said
    found = Indicators.load(out / "scores.json").meta
    losses = found["chosen_from"]
    assert set(losses) == {"layerwise", "fisher"}
    assert losses[found["score"]] == min(losses.values())
    code, _, error = limpq("run", recipe, "--out", out, "--set", "scores.method=auto",
                           "--set", "scores.candidates=[refused]")  # fmt: skip
    assert code == 2
    assert "scores: refused is left out: not for this network" in error


def test_the_check_is_made_again_where_it_changes_and_no_other_stage_is(copied, limpq):
    recipe, out = copied
    code, said, error = limpq("run", recipe, "--out", out, "--set", "check.random=3")
    assert code == 0, error
    assert reused(said) == set(STAGES) - {"check"}
    assert len(ScoreCheck.load(out / "check.json").random) == 3
    code, said, _ = limpq("run", recipe, "--out", out, "--set", "check.random=0")
    assert code == 0
    assert "check" not in reused(said)
    assert "KL before tuning" not in said


def test_a_run_goes_on_where_its_policy_cannot_be_compared(copied, limpq):
    recipe, out = copied
    code, said, error = limpq("run", recipe, "--out", out, "--set", "search.bitops=w2a2")
    assert code == 0, error
    assert "check: left out: random policies cannot spread under bitops" in said
    assert "KL before tuning" not in said
    code, said, error = limpq("run", recipe, "--out", out, "--set", "search.bitops=null")
    assert code == 0, error
    assert "search: no budget limits the policy" in said
    assert "check" not in reused(said)


def test_the_seed_of_the_data_belongs_to_what_it_chooses(finished, limpq):
    recipe, _ = finished
    command = ("run", recipe, "--out", "out", "--set", "data.val_fraction=0")
    part = ("--data-fraction", 0.5)
    assert limpq(*command, *part)[0] == 0
    _, said, _ = limpq(*command, *part, "--set", "data.seed=1")
    assert "float" in reused(said)
    assert "indicators" not in reused(said)
    assert limpq(*command)[0] == 0
    _, said, _ = limpq(*command, "--set", "data.seed=1")
    assert reused(said) == set(STAGES)


MARK = "from pathlib import Path\nPath('imported').touch()\n"


def test_a_recipe_runs_code_only_where_the_command_line_says_so(
    limpq, own_network, tmp_path, monkeypatch
):
    own_network(MARK + NET)
    recipe = write_recipe(tmp_path / "own.yaml", model={"name": "net:build"})
    for command in (
        ("run", recipe, "--out", "out"),
        ("profile", "--recipe", recipe, "--out", "c.json"),
        ("indicators", recipe, "--weights", "w.safetensors"),
        ("evaluate", recipe, "--weights", "w.safetensors"),
    ):
        code, _, error = limpq(*command)
        assert code == 2
        assert "its model 'net:build' imports a module, which runs code" in error
        assert "--allow-code" in error
        assert not Path("imported").exists()
    for number, allowed in enumerate(
        (
            ("profile", "--recipe", recipe, "--allow-code"),
            ("run", "--set", "model={name: net:build}", "--set", "search.size=1"),
            ("run", recipe, "--set", "model.name=net:build", "--set", "search.size=1"),
        )
    ):
        sys.modules.pop("net", None)
        monkeypatch.setattr("sys.path", [place for place in sys.path if place != str(tmp_path)])
        limpq(*allowed, "--out", f"out{number}")
        assert Path("imported").exists()
        Path("imported").unlink()


def test_a_recipe_does_not_load_from_a_hub_unasked(limpq, tmp_path):
    model = {"name": "torch.hub:load", "options": {"repo_or_dir": str(tmp_path), "source": "local"}}
    recipe = write_recipe(tmp_path / "hub.yaml", model=model)
    (tmp_path / "hubconf.py").write_text(MARK)
    code, _, error = limpq("run", recipe)
    assert code == 2
    assert "its model 'torch.hub:load' imports a module, which runs code" in error
    assert not Path("imported").exists()


def test_stages_json_that_is_none_is_named(copied, limpq):
    recipe, out = copied
    for text in ("[]", "null", "{", json.dumps({"format": "limpq-run", "version": 9})):
        (out / "stages.json").write_text(text)
        code, _, error = limpq("run", recipe, "--out", out)
        assert code == 2
        assert "stages.json: " in error
        assert (out / "stages.json").read_text() == text
