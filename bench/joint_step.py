"""One joint step against as many float steps, and against the original's way, in turn.

    python -m bench.joint_step [--model resnet18 --batch 32 --size 64] [--rounds 3] [--device cpu]

Columns: seconds of a step (n + 1 branches, or n + 1 float steps), the ratio to float, and the peak
memory of a step above what the process held before it.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import functools
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.nn.named import create_model

from .cases import BITS
from .peers import EagerJointTrainer, compiled_for_all_bits, eager
from .report import FLOAT_STEPS, OURS, Result, step_table
from .timing import Contender, Turns, compare_samples


@dataclass(frozen=True)
class Shape:
    """A network and its batch.

    Attributes:
        model: By the name of limpq_ext.nn.named.
        batch: Images.
        size: Height and width.
        autocast: Whether the steps run in bfloat16 autocast.
        targets: The least ratio (a contender's time over limpq_ext's) that is wanted.
    """

    model: str
    batch: int
    size: int
    autocast: bool = False
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As the table names it."""
        text = f"{self.model} {self.batch}x3x{self.size}x{self.size}"
        return f"{text} autocast" if self.autocast else text


# Least ratios: "at most 1.05 times float" is 1 / 1.05.
SHAPES = {
    "cpu": (
        Shape("resnet18", 32, 64, targets={FLOAT_STEPS: 1 / 1.05, "eager": 1.8}),
        Shape("resnet18", 64, 32, targets={FLOAT_STEPS: 1 / 1.10, "eager": 2.3}),
        Shape("mobilenet_v2", 32, 64, targets={FLOAT_STEPS: 1 / 1.05, "eager": 1.8}),
    ),
    "cuda": tuple(
        Shape(model, 64, 224, autocast, targets={FLOAT_STEPS: 1 / 1.05, "eager": 2.5})
        for model in ("resnet18", "resnet50")
        for autocast in (False, True)
    ),
}
"""What bench.record runs on each device."""


def measure_steps(
    shape: Shape, *, device: str, rounds: int = 3, compile_eager: bool = True
) -> Result:
    """Times the ways of taking a step and measures their memory.

    Args:
        shape: What is trained.
        device: "cpu" or "cuda".
        rounds: How often each contender takes its turn.
        compile_eager: Whether the original's way also runs with its quantizers compiled, which
            takes a minute or more to compile.

    Raises:
        AssertionError: The first losses of the joint step and of the original's way differ.
    """
    torch.manual_seed(0)
    x = torch.randn(shape.batch, 3, shape.size, shape.size, device=device)
    target = torch.randint(10, (shape.batch,), device=device)
    model = create_model(shape.model, num_classes=10).to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # every contender draws other numbers, and losses are compared
    prepared = lq.prepare(model, BITS, example_input=x[:2], scale_start="lsq")
    branches = len(BITS) + 1

    def optimizer(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    trainer = lq.JointTrainer(prepared, optimizer(prepared.parameters()), F.cross_entropy)
    float_model = copy.deepcopy(model)
    float_optimizer = optimizer(float_model.parameters())

    def float_steps(_: object) -> None:
        for _branch in range(branches):
            float_optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(float_model(x), target).backward()
            float_optimizer.step()

    autocast = functools.partial(
        torch.autocast, device, dtype=torch.bfloat16, enabled=shape.autocast
    )
    with autocast():
        first = trainer.step(x, target)
    chains = {"eager": eager}
    if compile_eager:
        chains["eager compiled"] = compiled_for_all_bits()
    originals = {
        name: EagerJointTrainer(model, prepared, trainer.bits, optimizer, chain=chain)
        for name, chain in chains.items()
    }
    for name, original in originals.items():
        with autocast():
            expected = original.step(x, target, first.draw)
        for branch, loss in first.losses.items():
            assert torch.allclose(loss, expected[branch], rtol=0.1 if shape.autocast else 0.02), (
                f"branch {branch}: loss {float(loss)}, {name} gives {float(expected[branch])}"
            )
    # The first contender is what the others are compared with.
    steps: dict[str, Callable[[object], object]] = {
        OURS: lambda _: trainer.step(x, target),
        FLOAT_STEPS: float_steps,
        **{
            name: lambda _, original=original: original.step(x, target, trainer.draw(trainer.steps))
            for name, original in originals.items()
        },
    }
    steps = {name: _within(autocast, run) for name, run in steps.items()}
    memory = {step: _peak_memory(run, device) for step, run in steps.items()}
    turns = Turns({step: Contender(run) for step, run in steps.items()}, device, calibrate=False)
    for _ in range(rounds):
        turns.round()
    return Result.of(shape.name, 0, compare_samples(turns.seconds), shape.targets, memory=memory)


def _within(
    context: Callable[[], AbstractContextManager[object]], run: Callable[[object], object]
) -> Callable[[object], object]:
    def inside(argument: object) -> object:
        with context():
            return run(argument)

    return inside


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
    parser.add_argument(
        "--model", help="a torchvision network of convolutions; with --batch and --size: one shape"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, help="height and width of the images")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.joint_step: there is no CUDA device here", file=sys.stderr)
        return 1
    shapes = SHAPES[options.device]
    if (options.model, options.batch, options.size) != (None, None, None):
        shape = Shape(
            options.model or "resnet18", options.batch or 32, options.size or 64, options.autocast
        )
        shapes = (shape,)
    results = [
        measure_steps(
            shape,
            device=options.device,
            rounds=options.rounds,
            compile_eager=not options.no_compile,
        )
        for shape in shapes
    ]
    print(step_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
