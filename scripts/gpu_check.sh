#!/usr/bin/env bash
# Everything that needs a GPU, in one command and in less than eight minutes:
#
#   scripts/gpu_check.sh OUT
#
# Builds the extension in place for the GPUs that it finds, runs the CUDA tests, a short selection
# of them under compute-sanitizer, and benchmarks. OUT then has summary.txt (a line per step),
# versions.txt, a log per step, and the benchmarks as JSON and as tables (.md). A step that fails
# does not keep the next ones from running; the exit status tells of it.
#
# Needs torch with CUDA, numpy, pytest and an nvcc of torch's CUDA version. Installs nothing.
#   PYTHON             the interpreter, default python3
#   GPU_CHECK_SECONDS  the time for all steps, default 460
set -uo pipefail

say() { echo "gpu_check.sh: $*" >&2; }

if [ $# -ne 1 ] || [ -z "$1" ]; then
  say "expected one argument, the folder for the results"
  exit 2
fi
python=${PYTHON:-python3}
total=${GPU_CHECK_SECONDS:-460}
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

if ! nvidia-smi -L >/dev/null 2>&1; then
  say "there is no NVIDIA GPU here: nvidia-smi finds none"
  exit 1
fi
architectures=$("$python" -c '
import torch
found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
print(";".join(f"{major}.{minor}" for major, minor in sorted(found)))
') || architectures=""
if [ -z "$architectures" ]; then
  say "the torch of $python finds no GPU here, although nvidia-smi does"
  exit 1
fi

mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd) || exit 1
if [ -e "$out/versions.txt" ] || [ -e "$out/summary.txt" ]; then
  say "$1 holds the results of a former check: name another folder"
  exit 1
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

{
  date -u '+date: %Y-%m-%d %H:%M:%S UTC'
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed 's/^/GPU, driver: /'
  echo "architectures: $architectures"
  "$python" -c 'import sys, torch; print("python:", sys.version.split()[0]); print("torch:", torch.__version__)'
  echo "nvcc: $(nvcc --version 2>/dev/null | grep release || echo not found)"
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
} >"$out/versions.txt" 2>&1

failures=0

# step NAME SECONDS COMMAND...: runs it within so many seconds, and within those of the whole check.
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((total - SECONDS)) status result
  shift 2
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -le 0 ]; then
    result="failed: no time was left"
    failures=$((failures + 1))
  else
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
      0) result=passed ;;
      124 | 137) result="failed: stopped after $limit s" ;;
      *) result="failed: exit status $status, see $name.log" ;;
    esac
    if [ $status -ne 0 ]; then failures=$((failures + 1)); fi
  fi
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - began)) "$result" | tee -a "$out/summary.txt"
}

# egg_info: without an installation this is where the package's version is read from.
step build 240 env LIMPQ_CUDA=1 TORCH_CUDA_ARCH_LIST="$architectures" \
  "$python" setup.py egg_info build_ext --inplace
step import 60 "$python" -c '
import sys
from limpq_ext.kernels.ops import build_info
sys.exit(None if "cuda version" in build_info() else "the build has no CUDA kernels")
'
step tests 180 "$python" -m pytest -m "cuda and not slow" --durations=10 -p no:cacheprovider tests
for tool in memcheck racecheck initcheck; do
  # Without torch's cache every tensor is an allocation, beyond whose ends the tools see.
  step $tool 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
    "$python" -m pytest -m sanitizer -p no:cacheprovider tests/kernels/test_cuda.py
done
step bench 120 "$python" -m bench.record --device cuda --quick --out "$out"
# The large vectors, in each direction and dtype, as far as the time goes.
left=$((total - SECONDS))
if [ $left -gt 45 ]; then
  step vectors $left "$python" -m bench.record --device cuda --no-joint-step --only vector \
    --within $((left - 40)) --out "$out/vectors"
else
  printf '%-10s %4d s  %s\n' vectors 0 "left out: no time was left" | tee -a "$out/summary.txt"
fi

if [ $failures -gt 0 ]; then
  echo "$failures failed" | tee -a "$out/summary.txt"
  exit 1
fi
echo "all passed" | tee -a "$out/summary.txt"
