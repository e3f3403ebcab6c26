"""The C++ tests: configured, built and run by CMake, without torch."""

import os
import shutil
import subprocess
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


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory) -> Path:
    """Where the C++ tests lie, built. CUDA compiles in test_cuda_sass.py, not here."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    folder = tmp_path_factory.mktemp("cpp")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    said = run("cmake", "-S", str(ROOT), "-B", str(folder), *generator, "-DLIMPQ_CUDA=OFF")
    if "GoogleTest not found" in said:
        pytest.skip("GoogleTest is not installed (Debian: libgtest-dev)")
    run("cmake", "--build", str(folder), "--parallel", os.environ.get("MAX_JOBS", "2"))
    return folder


def test_cpp_tests_pass(build_folder):
    run("ctest", "--test-dir", str(build_folder), "-LE", "slow", "-j2", "--output-on-failure")


@pytest.mark.slow
def test_slow_cpp_tests_pass(build_folder):
    run("ctest", "--test-dir", str(build_folder), "-L", "slow", "-j2", "--output-on-failure")
