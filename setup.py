"""Builds the extension: CPU kernels always, CUDA kernels where torch and an nvcc allow it.

Environment variables:
  LIMPQ_CUDA            0 builds without CUDA, 1 insists on it; unset: with CUDA where torch is a
                        CUDA build and an nvcc of the same major version is found, GPU or not.
  TORCH_CUDA_ARCH_LIST  architectures, as for any torch extension; unset: those of the torch build.
  MAX_JOBS              how many files are compiled at once.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None

# Contraction to FMA would change the bits of the result. Ignoring floating-point traps changes no
# value, and without it GCC vectorises no loop that has a comparison in it. The C++ standard is left
# to torch, whose headers say what they need.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-fmad=false"]

# Only what torch 2.11 has of the stable ABI is used, so the binaries load in every later torch; and
# nothing of Python is, so they serve every Python.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
OLDEST_PYTHON = "cp310"


class BuildWithoutTorch(build_ext):
    """Fails with the one sentence that helps."""

    def run(self) -> None:
        """Say what is missing."""
        sys.exit(
            "limpq_ext: torch is not installed where this build runs; install it first"
            " (pip install 'torch>=2.11') and build with `pip install --no-build-isolation .`"
        )


def find_toolkit() -> Path | None:
    """The folder of the CUDA toolkit, from what nvcc says of itself.

    An nvcc on PATH may be a script that starts another one, so its folder proves nothing.
    """
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(folder) / "bin" / "nvcc") for folder in folders if folder]
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for nvcc in candidates:
        if not nvcc or not Path(nvcc).exists():
            continue
        told = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.*)$", told.stdout + told.stderr, re.MULTILINE)
        if top:
            return Path(top.group(1)).resolve()
    return None


def toolkit_version(toolkit: Path) -> str:
    """The version of a toolkit's nvcc, such as "13.0"."""
    nvcc = [str(toolkit / "bin" / "nvcc"), "--version"]
    told = subprocess.run(nvcc, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", told)
    return release.group(1) if release else ""


def choose_cuda() -> tuple[Path, str] | None:
    """The toolkit to build CUDA with and its version, or None for a CPU build."""
    wish = os.environ.get("LIMPQ_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"limpq_ext: LIMPQ_CUDA is '{wish}', expected 0 or 1")
    if wish == "0":
        return None
    missing = None
    toolkit = find_toolkit()
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is a build without CUDA"
    elif toolkit is None:
        missing = f"no nvcc was found (torch needs CUDA {torch.version.cuda})"
    elif toolkit_version(toolkit).split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = (
            f"nvcc is of CUDA {toolkit_version(toolkit)}, torch was built with {torch.version.cuda}"
        )
    if missing is None:
        return toolkit, toolkit_version(toolkit)
    if wish == "1":
        sys.exit(f"limpq_ext: LIMPQ_CUDA=1, but {missing}")
    print(f"limpq_ext: building without CUDA: {missing}")
    return None


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, or the torch build's own list with PTX of the newest."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    names = re.findall(r"sm_(\d+)(\d)", torch._C._cuda_getArchFlags() or "")
    return ";".join(f"{major}.{minor}" for major, minor in names) + "+PTX"


def headers() -> list[str]:
    """All headers, as dependencies: without them an edit of a header would not rebuild."""
    return [
        str(path.relative_to(ROOT))
        for pattern in ("*.h", "*.inl", "*.cuh")
        for path in sorted((ROOT / "csrc").rglob(pattern))
    ]


def sources(*patterns: str) -> list[str]:
    """The source files that match, relative to the project."""
    return [
        str(path.relative_to(ROOT)) for pattern in patterns for path in sorted(ROOT.glob(pattern))
    ]


def cpu_library() -> Extension:
    """limpq_ext.kernels._cpu: the operators' schemas and their CPU kernels."""
    definitions = [
        f'-DLIMPQ_BUILD_FLAGS="{" ".join(CXX_FLAGS)}"',
        f'-DLIMPQ_TORCH_VERSION="{torch.__version__}"',
    ]
    return cpp_extension.CppExtension(
        "limpq_ext.kernels._cpu",
        sources("csrc/operators.cpp", "csrc/cpu/*.cpp"),
        depends=headers(),
        extra_compile_args={"cxx": [*CXX_FLAGS, *STABLE_ABI, *definitions]},
        py_limited_api=True,
    )


def cuda_library(toolkit: Path, version: str) -> Extension:
    """limpq_ext.kernels._cuda: the operators' CUDA kernels."""
    architectures = cuda_architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    cpp_extension.CUDA_HOME = str(toolkit)
    definitions = [
        "-DUSE_CUDA",
        f'-DLIMPQ_CUDA_VERSION="{version}"',
        f'-DLIMPQ_CUDA_ARCHITECTURES="{architectures}"',
    ]
    return cpp_extension.CUDAExtension(
        "limpq_ext.kernels._cuda",
        sources("csrc/operators_cuda.cpp", "csrc/cuda/*.cu"),
        depends=headers(),
        extra_compile_args={"cxx": [*CXX_FLAGS, *STABLE_ABI, *definitions], "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


def libraries() -> list[Extension]:
    """What is built: the CPU library always, the CUDA library where it can be."""
    if torch is None:
        return []
    cuda = choose_cuda()
    return [cpu_library()] + ([] if cuda is None else [cuda_library(*cuda)])


setup(
    ext_modules=libraries(),
    cmdclass={"build_ext": BuildWithoutTorch if torch is None else cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}},
)
