"""Importing, building and the list of what is public."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import limpq_ext

ROOT = Path(__file__).resolve().parent.parent


def python(code, *, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=folder,
    )


def test_the_import_needs_torch_and_numpy_alone():
    lazy = ["highspy", "pydantic", "matplotlib", "safetensors", "sklearn", "torchvision", "typer"]
    lazy += ["rich", "yaml", "pytest"]
    block = "".join(f"sys.modules['{name}'] = None\n" for name in lazy)
    told = python(f"import sys\n{block}import limpq_ext\nprint(len(limpq_ext.__all__))")
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) == len(limpq_ext.__all__)


def test_what_is_missing_is_said_with_the_extra_that_brings_it():
    code = (
        "import sys; sys.modules['highspy'] = None\n"
        "import limpq_ext as lq\n"
        "from limpq_ext.values.costs import LayerCost\n"
        "from limpq_ext.values.indicators import LayerIndicators\n"
        "i = lq.Indicators((2,), (LayerIndicators('a', {2: 1.0}, {2: 1.0}),))\n"
        "lq.search(i, lq.Costs((LayerCost('a', 'linear', 1, 1, 1),), ()))\n"
    )
    told = python(code)
    assert "highspy: pip install 'limpq_ext[search]'" in told.stderr


def test_an_older_torch_is_an_import_error_that_names_both(tmp_path):
    # What does not load at all stands for what an older torch lacks.
    package = tmp_path / "limpq_ext"
    shutil.copytree(ROOT / "limpq_ext", package, ignore=shutil.ignore_patterns("*.so"))
    (package / "_cpu.abi3.so").write_bytes(b"no library")
    told = python(
        "import torch; import limpq_ext.kernels.ops", PYTHONPATH=str(tmp_path), folder=tmp_path
    )
    assert told.returncode != 0
    last = told.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: limpq_ext needs torch 2.11 or newer")
    assert "this is torch 2." in last


@pytest.mark.parametrize("command", ["", "run", "indicators", "search", "pareto", "info"])
def test_help_needs_no_torch(command):
    arguments = ["limpq", *command.split(), "--help"]
    code = f"import sys; sys.modules['torch'] = None; sys.argv = {arguments}\n"
    told = python(code + "from limpq_ext.app.cli.main import main; main()")
    assert told.returncode == 0, told.stderr
    assert "Usage: limpq" in told.stdout


def test_a_public_name_stays_what_it_is_when_all_modules_are_loaded():
    loads = (
        "import importlib, pkgutil, limpq_ext\n"
        "for module in pkgutil.walk_packages(limpq_ext.__path__, 'limpq_ext.'):\n"
        "    if not module.name.endswith('__main__') and '._c' not in module.name:\n"
        "        importlib.import_module(module.name)\n"
    )
    names = [name for name in limpq_ext.__all__ if name != "scores"]  # a room that users name
    checks = "".join(f"assert callable(limpq_ext.{name})\n" for name in names)
    checks += "assert callable(limpq_ext.scores.fisher)\n"
    told = python(f"{loads}{checks}print(len(limpq_ext.__all__))")
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 40


def test_the_import_does_not_bring_dynamo():
    told = python("import limpq_ext.joint.trainer, sys; print('torch._dynamo' in sys.modules)")
    assert told.stdout.strip() == "False", told.stderr


def test_a_build_without_torch_ends_with_one_sentence(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', 'build_ext', '--build-lib', {str(tmp_path)!r}]\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    )
    told = python("__file__ = 'setup.py'\n" + code)
    assert told.returncode != 0
    last = told.stderr.strip().splitlines()[-1]
    assert "torch is not installed where this build runs" in last
    assert "--no-build-isolation" in last


def test_what_is_installed_carries_the_recipes(tmp_path):
    arguments = ["setup.py", "egg_info", "--egg-base", str(tmp_path)]
    arguments += ["build_py", "--build-lib", str(tmp_path / "lib")]
    told = python(
        f"__file__ = 'setup.py'\nimport sys\nsys.argv = {arguments}\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    )
    assert told.returncode == 0, told.stderr
    recipes = {path.name for path in (ROOT / "limpq_ext" / "app" / "recipes").glob("*.yaml")}
    assert {path.name for path in (tmp_path / "lib").rglob("recipes/*.yaml")} == recipes
    assert len(recipes) >= 7


@pytest.mark.parametrize(
    ("wish", "message"), [("2", "LIMPQ_CUDA is '2', expected 0 or 1"), ("1", "LIMPQ_CUDA=1, but")]
)
def test_cuda_that_cannot_be_built_is_an_error_that_says_what_is_missing(wish, message):
    code = (
        "__file__ = 'setup.py'\nimport sys, torch\ntorch.version.cuda = '1.0'\n"
        "sys.argv = ['setup.py', '--version']\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    )
    told = python(code, LIMPQ_CUDA=wish)
    assert told.returncode != 0
    assert message in told.stderr


def test_everything_public_is_there_and_documented():
    for name in limpq_ext.__all__:
        assert getattr(limpq_ext, name).__doc__, name
    assert callable(limpq_ext.search)
    assert callable(limpq_ext.prepare)
    assert callable(limpq_ext.finetune)
