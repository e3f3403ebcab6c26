"""The C++ tests: configured, built and run by CMake, without torch."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    answer = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if answer.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{answer.stdout}", pytrace=False)
    return answer.stdout


def build(folder: Path, *options: str, prefix: Sequence[str] = ()) -> None:
    """Builds the C++ tests. CUDA compiles in test_cuda_sass.py, not here."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    options += ("-G", "Ninja") if shutil.which("ninja") else ()
    said = run("cmake", "-S", str(ROOT), "-B", str(folder), "-DLIMPQ_CUDA=OFF", *options)
    if "GoogleTest not found" in said:
        pytest.skip("GoogleTest is not installed (Debian: libgtest-dev)")
    jobs = os.environ.get("MAX_JOBS", "2")
    run(*prefix, "cmake", "--build", str(folder), "--parallel", jobs)


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory) -> Path:
    """Where the C++ tests lie, built with the address sanitizer."""
    folder = tmp_path_factory.mktemp("cpp")
    build(folder)
    return folder


def test_cpp_tests_pass(build_folder):
    run("ctest", "--test-dir", str(build_folder), "-LE", "slow", "-j2", "--output-on-failure")


@pytest.mark.slow
def test_slow_cpp_tests_pass(build_folder):
    run("ctest", "--test-dir", str(build_folder), "-L", "slow", "-j2", "--output-on-failure")


@pytest.mark.slow
def test_cpp_tests_pass_under_the_thread_sanitizer(tmp_path):
    # Where addresses are randomised widely, older thread sanitizers do not start. The build runs
    # the tests too, to list them.
    fixed_addresses = ("setarch", "-R")
    if not runs(*fixed_addresses, "true"):
        fixed_addresses = ()
    build(tmp_path, "-DLIMPQ_SANITIZER=thread", prefix=fixed_addresses)
    # The tests of the division have one thread and are built without a sanitizer.
    selection = ("-LE", "slow", "-E", "Division", "-j2", "--output-on-failure")
    run(*fixed_addresses, "ctest", "--test-dir", str(tmp_path), *selection)


def runs(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
