"""scripts/gpu_check.sh with stand-ins for the commands it calls: no GPU is needed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu_check.sh"
STEPS = ("build", "import", "tests", "memcheck", "racecheck", "initcheck", "bench", "vectors")

# Each stand-in writes its arguments to $CALLS and fails where they have the text $FAILS.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$0 $*" in *"${FAILS:-nothing fails}"*) echo "said by the step"; exit 3 ;; esac
"""
PYTHON = (
    STAND_IN
    + """case "$*" in
  *get_device_capability*) echo "${ARCHITECTURES-9.0}" ;;
  *bench.record*) for out; do :; done; mkdir -p "$out"; touch "$out/gpu.json" "$out/gpu.md" ;;
  *"-m pytest"*) sleep "${TESTS_TAKE:-0}" ;;
esac
"""
)
SANITIZER = STAND_IN + 'while [ "$1" != python3 ]; do shift; done\nexec "$@"\n'
NVIDIA_SMI = STAND_IN + 'case "$*" in *query*) echo "Some GPU, 580.1" ;; esac\n'

pytestmark = pytest.mark.skipif(
    not all(shutil.which(command) for command in ("bash", "timeout")),
    reason="bash and timeout (coreutils) are needed",
)


@pytest.fixture
def check(tmp_path):
    """Runs the script; gives its exit status, what it said and the calls it made."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "python3": PYTHON,
        "nvidia-smi": NVIDIA_SMI,
        "compute-sanitizer": SANITIZER,
        "nvcc": "#!/bin/sh\necho 'Cuda compilation tools, release 13.0'\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(out="out", **environment):
        calls.write_text("")
        given = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        given |= {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls)}
        told = subprocess.run(
            [SCRIPT, *([out] if out else [])],
            env=given | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return told, calls.read_text()

    return run


def results(summary):
    """What the summary says of each step."""
    lines = [line.split(maxsplit=3) for line in summary.splitlines() if " s  " in line]
    return {name: result for name, _, _, result in lines}


def test_every_step_runs_and_leaves_its_files(check, tmp_path):
    told, calls = check()
    assert told.returncode == 0, told.stdout + told.stderr
    out = tmp_path / "out"
    assert (out / "summary.txt").read_text() == told.stdout
    assert results(told.stdout) == dict.fromkeys(STEPS, "passed")
    assert told.stdout.endswith("all passed\n")
    assert {f"{step}.log" for step in STEPS} <= {path.name for path in out.iterdir()}
    assert {"gpu.json", "gpu.md", "vectors"} <= {path.name for path in out.iterdir()}
    assert "setup.py egg_info build_ext --inplace" in calls
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"compute-sanitizer --tool {tool} --error-exitcode 9" in calls
    assert calls.count("-m sanitizer") == 6  # by compute-sanitizer, and then by Python


def test_versions_are_recorded(check, tmp_path):
    check()
    versions = (tmp_path / "out" / "versions.txt").read_text()
    assert "GPU, driver: Some GPU, 580.1" in versions
    assert "architectures: 9.0" in versions
    assert "release 13.0" in versions
    assert "commit: " in versions


@pytest.mark.parametrize(
    ("fails", "step"),
    [
        ("setup.py", "build"),
        ("cuda and not slow", "tests"),
        ("compute-sanitizer --tool racecheck", "racecheck"),
        ("--quick", "bench"),
    ],
)
def test_a_failure_is_recorded_and_the_next_steps_run(check, tmp_path, fails, step):
    told, _ = check(FAILS=fails)
    assert told.returncode == 1
    expected = dict.fromkeys(STEPS, "passed")
    expected[step] = f"failed: exit status 3, see {step}.log"
    assert results(told.stdout) == expected
    assert told.stdout.endswith("1 failed\n")
    assert "said by the step" in (tmp_path / "out" / f"{step}.log").read_text()


def test_a_step_that_takes_too_long_is_stopped_and_the_time_is_not_exceeded(check):
    told, _ = check(TESTS_TAKE="30", GPU_CHECK_SECONDS="2")
    assert told.returncode == 1
    found = results(told.stdout)
    assert found["build"] == "passed"
    assert found["tests"].startswith("failed: stopped after")
    assert found["bench"] == "failed: no time was left"
    assert found["vectors"] == "left out: no time was left"


def test_a_folder_of_a_former_check_is_refused(check, tmp_path):
    check()
    before = (tmp_path / "out" / "summary.txt").read_text()
    told, calls = check()
    assert told.returncode == 1
    assert told.stderr == (
        "gpu_check.sh: out holds the results of a former check: name another folder\n"
    )
    assert "setup.py" not in calls
    assert (tmp_path / "out" / "summary.txt").read_text() == before


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FAILS": "nvidia-smi"}, "there is no NVIDIA GPU here: nvidia-smi finds none"),
        ({"ARCHITECTURES": ""}, "the torch of python3 finds no GPU here"),
        ({"FAILS": "capability"}, "the torch of python3 finds no GPU here"),
    ],
)
def test_without_a_gpu_nothing_is_built(check, tmp_path, environment, message):
    told, calls = check(**environment)
    assert told.returncode == 1
    assert message in told.stderr
    assert len(told.stderr.splitlines()) == 1
    assert "setup.py" not in calls
    assert not (tmp_path / "out").exists()


def test_the_folder_has_to_be_named(check):
    told, calls = check(out=None)
    assert told.returncode == 2
    assert "expected one argument" in told.stderr
    assert calls == ""
