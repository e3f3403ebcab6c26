"""One joint step against as many float steps, and against the original's way, in turn.

    python -m bench.joint_step [--model resnet18 --batch 32 --size 64] [--rounds 3] [--device cpu]

Columns: seconds of a step (n + 1 branches, or n + 1 float steps), the ratio to float, and the peak
memory of a step above what the process held before it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.models import create_model

from .cases import BITS
from .peers import EagerJointTrainer
from .report import FLOAT_STEPS, OURS, Result, step_table
from .timing import Contender, Turns, compare_samples

SHAPES = {
    "resnet18 32x3x64x64": ("resnet18", 32, 64),
    "resnet18 64x3x32x32": ("resnet18", 64, 32),
}
"""What bench.record runs: model, batch, image size."""


def measure_steps(
    model_name: str, batch: int, size: int, *, device: str, rounds: int = 3
) -> Result:
    """Times the three ways of taking a step and measures their memory.

    Raises:
        AssertionError: The first losses of the joint step and of the original's way differ.
    """
    name = f"{model_name} {batch}x3x{size}x{size}"
    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(10, (batch,), device=device)
    model = create_model(model_name, num_classes=10).to(device).train()
    prepared = lq.prepare(model, BITS, example_input=x[:2])
    branches = len(BITS) + 1

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    trainer = lq.JointTrainer(prepared, optimizer(prepared.parameters()), F.cross_entropy)
    original = EagerJointTrainer(model, prepared, trainer.bits, optimizer)
    float_model = copy.deepcopy(model)
    float_optimizer = optimizer(float_model.parameters())

    def float_steps(_: object) -> None:
        for _branch in range(branches):
            float_optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(float_model(x), target).backward()
            float_optimizer.step()

    first = trainer.step(x, target)
    expected = original.step(x, target, first.draw)
    for branch, loss in first.losses.items():
        assert torch.allclose(loss, expected[branch], rtol=0.02), (
            f"branch {branch}: loss {float(loss)}, the original's way gives"
            f" {float(expected[branch])}"
        )
    # The first contender is what the others are compared with.
    steps: dict[str, Callable[[object], object]] = {
        OURS: lambda _: trainer.step(x, target),
        FLOAT_STEPS: float_steps,
        "eager": lambda _: original.step(x, target, trainer.draw(trainer.steps)),
    }
    memory = {step: _peak_memory(run, device) for step, run in steps.items()}
    turns = Turns({step: Contender(run) for step, run in steps.items()}, device, calibrate=False)
    for _ in range(rounds):
        turns.round()
    return Result.of(name, 0, compare_samples(turns.seconds), {}, memory=memory)


def _peak_memory(run: Callable[[object], object], device: str) -> int:
    """The most bytes that a step takes above what was held before it; 0 where it is not known."""
    run(None)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
        before = _status_bytes("VmRSS")
        run(None)
        return _status_bytes("VmHWM") - before
    except (AttributeError, OSError):
        return 0


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a torchvision ResNet; with --batch and --size: one shape")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.joint_step: there is no CUDA device here", file=sys.stderr)
        return 1
    shapes = SHAPES.values()
    if (options.model, options.batch, options.size) != (None, None, None):
        shapes = [(options.model or "resnet18", options.batch or 32, options.size or 64)]
    results = [
        measure_steps(*shape, device=options.device, rounds=options.rounds) for shape in shapes
    ]
    print(step_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
