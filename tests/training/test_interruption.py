"""Whole runs that are killed or stopped from outside and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

TESTS = Path(__file__).resolve().parents[1]
RECIPE = {
    "model": {"name": "cifar_resnet", "options": {"blocks": 1, "width": 4}},
    "bits": [2, 4],
    "device": "cpu",
    "float_training": {"epochs": 2, "lr": 0.1, "batch_size": 128},
    "joint": {"epochs": 2, "lr": 0.01, "batch_size": 128},
    "scores": {"method": "learned"},
    "export": {"onnx": False},
    "finetune": {"epochs": 1, "lr": 0.02, "batch_size": 128},
    "checkpoint_steps": 3,
    "log_steps": 4,
}
CLOCKED = ("images_per_second", "rss_bytes")
FILES = (
    "float.safetensors",
    "indicators.json",
    "costs.json",
    "finetuned.safetensors",
    "uniform.json",
    "uniform.safetensors",
)


def start(*command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **options,
    )


def finish(process):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


def torchrun(processes, *command, restarts=0):
    options = ("--nproc_per_node", processes, "--max-restarts", restarts, "--standalone")
    return start("-m", "torch.distributed.run", *options, *command)


def results(folder):
    """What a run left, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    policy = json.loads((folder / "policy.json").read_text())
    policy["meta"].pop("seconds")
    return {
        "metrics": [{k: v for k, v in line.items() if k not in CLOCKED} for line in lines],
        "policy": policy,
        **{name: (folder / name).read_bytes() for name in FILES},
    }


def assert_same(folder, reference):
    ours = results(folder)
    for name, value in reference.items():
        assert ours[name] == value, name
    left = [path.name for path in folder.iterdir() if path.name.endswith((".tmp", ".checkpoint"))]
    assert left == []


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture(scope="module")
def alone(recipe):
    """The results of a run that was left alone."""
    finish(start("-m", "limpq_ext", "run", recipe, "--out", recipe.parent / "alone"))
    return results(recipe.parent / "alone")


@pytest.fixture(scope="module")
def two_alone(recipe):
    """The same of a run of two processes."""
    finish(torchrun(2, "-m", "limpq_ext", "run", recipe, "--out", recipe.parent / "two_alone"))
    return results(recipe.parent / "two_alone")


@pytest.mark.parametrize(("kills", "seed"), [(4, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_ends_with_the_same_bits(recipe, alone, tmp_path, kills, seed):
    out = tmp_path / "out"
    said = finish(start(TESTS / "killed_run.py", recipe, out, "--kills", kills, "--seed", seed))
    # A moment that lies behind the end of the run kills nothing.
    assert said.count("killed\n") >= kills * 3 // 4
    assert_same(out, alone)


@pytest.mark.parametrize(("kills", "seed"), [(1, 0), pytest.param(20, 1, marks=pytest.mark.slow)])
def test_two_processes_one_of_which_was_killed_end_with_the_same_bits(
    recipe, two_alone, tmp_path, kills, seed
):
    out = tmp_path / "out"
    command = (TESTS / "killed_run.py", recipe, out, "--kills", kills, "--seed", seed)
    said = finish(torchrun(2, *command, restarts=kills))
    assert said.count("killed\n") == kills
    assert_same(out, two_alone)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_one_sentence_and_it_goes_on(alone, tmp_path, number):
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": {"workers": 1}}))
    command = ("-m", "limpq_ext", "run", recipe, "--out", out)
    process = start(*command, start_new_session=True)
    wait_for(out / "float.checkpoint", process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C, which the loading processes get too
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + number, said
    last = said.splitlines()[-1]
    assert last.startswith(f"limpq: stopped by {number.name} after step "), said
    assert "Traceback" not in said
    assert "going on after step" in finish(start(*command))
    assert_same(out, alone)


def test_sigterm_to_torchrun_writes_a_checkpoint_and_it_goes_on(recipe, two_alone, tmp_path):
    out = tmp_path / "out"
    command = (2, "-m", "limpq_ext", "run", recipe, "--out", out)
    process = torchrun(*command)
    wait_for(out / "indicators.checkpoint", process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert said.count("limpq: stopped by SIGTERM after step ") == 1, said
    assert "going on after step" in finish(torchrun(*command))
    assert_same(out, two_alone)


def test_a_checkpoint_of_another_recipe_is_refused(recipe, tmp_path):
    out = tmp_path / "out"
    process = start("-m", "limpq_ext", "run", recipe, "--out", out)
    wait_for(out / "float.checkpoint", process)
    process.kill()
    process.wait()
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**RECIPE, "seed": 5}))
    process = start("-m", "limpq_ext", "run", other, "--out", out)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    last = said.splitlines()[-1]
    assert "float.checkpoint: this checkpoint belongs to another recipe or other inputs" in last
    finish(start("-m", "limpq_ext", "run", other, "--out", out, "--fresh"))
    assert not (out / "float.checkpoint").exists()
