"""What nvcc makes of the CUDA kernels: no spills, no local memory, 16-byte accesses."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
HOT_ARCHITECTURES = ("90", "120")

# Kernels that take one element at a time, for tensors that no 16-byte access fits: "V" is 1.
SCALAR_KERNELS = re.compile(r"(forward|backward|error_sums)_columns\w*Li1E")

# For each dtype: rows for one problem and for a list, with one bit-width and with several; columns
# for one problem (forward: with one bit-width and with several) and for a list. Error sums are of
# one problem.
HOT_KERNELS = {"forward": 4 * (4 + 3), "backward": 4 * (4 + 2), "error_sums": 4 * 2}


@dataclass(frozen=True)
class Build:
    """One .cu file compiled for one architecture."""

    cubin: Path
    report: str  # of ptxas -v


def find_nvcc() -> str | None:
    """The compiler itself: an nvcc on PATH may be a script that calls it."""
    on_path = shutil.which("nvcc")
    if on_path is None:
        return None
    answer = subprocess.run(
        [on_path, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", answer.stderr, re.MULTILINE)
    return str(Path(top[1]).resolve() / "bin" / "nvcc") if top else None


def find_cuobjdump() -> str | None:
    """From the toolkit or, where that has none, from the triton package."""
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        return on_path
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(beside) if beside.exists() else None


@pytest.fixture(scope="module")
def nvcc() -> str:
    compiler = find_nvcc()
    if compiler is None:
        pytest.skip("no nvcc on PATH")
    return compiler


@pytest.fixture(scope="module")
def compile_kernels(nvcc, tmp_path_factory):
    builds: dict[tuple[str, str], Build] = {}

    def compiled(source: str, architecture: str) -> Build:
        key = (source, architecture)
        if key not in builds:
            cubin = tmp_path_factory.mktemp("cubin") / f"{source}_sm_{architecture}.cubin"
            command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
            command += ["-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin)]
            command += [str(CUDA_SOURCES / f"{source}.cu")]
            answer = subprocess.run(command, capture_output=True, text=True, check=False)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            builds[key] = Build(cubin, answer.stderr)
        return builds[key]

    return compiled


def assert_no_local_memory(report: str) -> None:
    kernels = re.findall(
        r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    assert kernels, f"ptxas reported no kernel:\n{report}"
    with_local_memory = [kernel for kernel in kernels if set(kernel[1:]) != {"0"}]
    assert not with_local_memory, "kernel, stack frame, spill stores, spill loads (bytes)"


def disassemble(cubin: Path) -> dict[str, str]:
    """The SASS of each kernel, by mangled name."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump: neither in the CUDA toolkit nor beside triton")
    answer = subprocess.run(
        [cuobjdump, "--dump-sass", str(cubin)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    parts = re.split(r"^\s*Function : (\w+)$", answer.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("architecture", HOT_ARCHITECTURES)
@pytest.mark.parametrize("source", HOT_KERNELS)
def test_kernels_use_no_local_memory(compile_kernels, source, architecture):
    assert_no_local_memory(compile_kernels(source, architecture).report)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", HOT_KERNELS)
def test_kernels_compile_without_local_memory_for_every_architecture(
    compile_kernels, source, architecture
):
    assert_no_local_memory(compile_kernels(source, architecture).report)


@pytest.mark.parametrize("architecture", HOT_ARCHITECTURES)
@pytest.mark.parametrize("source", HOT_KERNELS)
def test_hot_kernels_read_and_write_16_bytes_at_a_time(compile_kernels, source, architecture):
    kernels = disassemble(compile_kernels(source, architecture).cubin)
    hot = {name: sass for name, sass in kernels.items() if not SCALAR_KERNELS.search(name)}
    assert len(hot) == HOT_KERNELS[source], sorted(kernels)
    for name, sass in hot.items():
        assert re.search(r"\bLDG\.E\.128\b", sass), f"{name} has no 16-byte load"
        if source != "error_sums":  # which writes nothing but sums
            assert re.search(r"\bSTG\.E\.128\b", sass), f"{name} has no 16-byte store"


@pytest.mark.parametrize("architecture", HOT_ARCHITECTURES)
@pytest.mark.parametrize("source", HOT_KERNELS)
def test_kernels_touch_no_local_memory_and_use_no_float_atomics(
    compile_kernels, source, architecture
):
    for name, sass in disassemble(compile_kernels(source, architecture).cubin).items():
        assert not re.search(r"\b(LDL|STL)\b", sass), f"{name} uses local memory"
        atomics = re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED)\.\S+", sass)
        floating = [atomic for atomic in atomics if re.search(r"\.F(16|32|64)", atomic)]
        assert not floating, f"{name} adds floats atomically, in an order that varies"
