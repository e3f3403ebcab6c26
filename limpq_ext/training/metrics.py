"""Numbers of a running training: added up on the device, read now and then, written to files.

``metrics.jsonl`` holds one JSON object per line, each with its "stage" and "step". A stage that
starts drops the lines that it wrote before, one that goes on from a checkpoint those after the
checkpoint's step, so that no line stands twice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.distributed import add_up, is_main
from limpq_ext.values.files import open_atomically
from limpq_ext.values.reading import parse_json, read_bytes, shown

METRICS_BYTES = 2**30
"""The most bytes of ``metrics.jsonl``."""

Record = dict[str, Any]
"""Numbers by name, some of them nested; "step" says when."""


class Meter:
    """Sums on the device, read as means only when somebody asks.

    Args:
        device: Where the sums are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, name: str, value: Tensor | float) -> None:
        """Add to a sum; nothing waits for the device."""
        if name not in self._sums:
            self._sums[name] = torch.zeros((), dtype=torch.float64, device=self._device)
        self._sums[name] += value

    def add_branch(self, branch: str, output: Any, target: Any) -> None:
        """Count what one branch of a step got right, where its outputs are class scores."""
        scores = isinstance(output, Tensor) and output.dim() == 2
        classes = (
            isinstance(target, Tensor) and target.dim() == 1 and not target.is_floating_point()
        )
        if scores and classes:
            self.add(f"correct {branch}", (output.argmax(dim=1) == target).sum())
            self.add(f"samples {branch}", len(target))

    def read(self) -> dict[str, float]:
        """The sums over all processes by name; this waits for the device."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        return dict(
            zip(names, add_up(torch.stack([self._sums[n] for n in names])).tolist(), strict=True)
        )

    def reset(self) -> None:
        """Start from 0."""
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """The sums of this process."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take sums back.

        Raises:
            ValueError: They are no sums.
        """
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != () or value.dtype != torch.float64:
                raise ValueError(f"meter: {shown(name)} is no sum")
            kind, _, branch = name.partition(" ")
            if kind == "correct" and f"samples {branch}" not in state:
                raise ValueError(f"meter: 'samples {branch}' is missing")
        self._sums = {name: value.to(self._device) for name, value in state.items()}


class RecordFile(Protocol):
    """Where records go."""

    def start(self, stage: str, *, after_step: int = 0) -> None:
        """Forget what the stage wrote after this step."""

    def write(self, stage: str, record: Mapping[str, Any]) -> None:
        """Write a record of the stage."""


@dataclass(frozen=True)
class Journal:
    """What a training writes its records to; only process 0 writes.

    Attributes:
        stage: Name of the training.
        files: Where its records go.
        say: Prints a line.
    """

    stage: str
    files: Sequence[RecordFile] = ()
    say: Callable[[str], None] = print

    def start(self, after_step: int = 0) -> None:
        """Begin, or go on after a step."""
        for file in self.files if is_main() else ():
            file.start(self.stage, after_step=after_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record."""
        for file in self.files if is_main() else ():
            file.write(self.stage, record)

    def report(self, line: str) -> None:
        """Say something."""
        if is_main():
            self.say(line)


class MetricsFile:
    """Writes records to ``metrics.jsonl``.

    Args:
        path: The file; made where it is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def start(self, stage: str, *, after_step: int = 0) -> None:
        """Drop the stage's lines after a step, and a last line that a killed run left cut short."""
        if not self.path.exists():
            return
        lines = read_bytes(self.path, "metrics", METRICS_BYTES).splitlines(keepends=True)
        kept = [
            line
            for line in lines
            if line.endswith(b"\n") and not _is_after(line, stage, after_step)
        ]
        if kept != lines:
            with open_atomically(self.path) as file:
                file.write(b"".join(kept))

    def write(self, stage: str, record: Mapping[str, Any]) -> None:
        """Append one line."""
        line = json.dumps({"stage": stage, **record}) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


class TensorBoard:
    """Writes the numbers of records as TensorBoard events.

    Args:
        folder: Gets the event files, in a folder per stage.

    Raises:
        ImportError: tensorboard is not installed; the message is the command that installs it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "writing TensorBoard events needs tensorboard: pip install 'limpq_ext[tensorboard]'"
            ) from error
        self._make = SummaryWriter
        self.folder = Path(folder)
        self._writers: dict[str, Any] = {}

    def start(self, stage: str, *, after_step: int = 0) -> None:
        """Begin a stage, or go on with it; events after the step are purged by TensorBoard."""
        self.close()
        folder = self.folder / stage
        if after_step == 0 and folder.is_dir():
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writers[stage] = self._make(
            str(folder), purge_step=after_step + 1 if after_step else None
        )

    def write(self, stage: str, record: Mapping[str, Any]) -> None:
        """Write every number of a record at its step."""
        if stage not in self._writers:
            self.start(stage)
        writer = self._writers[stage]
        for tag, value in _numbers(record):
            if tag != "step":
                writer.add_scalar(tag, value, record.get("step", 0))
        writer.flush()

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def memory(device: torch.device) -> dict[str, int]:
    """Resident memory of this process and the peak of CUDA memory since the last call, in bytes."""
    values = {"rss_bytes": resident_bytes()}
    if device.type == "cuda":
        values["cuda_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return values


def resident_bytes() -> int:
    """Resident memory of this process; where the system does not tell it, the peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def guarded_scales(model: nn.Module) -> list[str]:
    """The step sizes that are at or below their guard ``scale_min``; this waits for the device.

    Returns:
        One entry each, as in "layer 'fc': weight quantizer at 2 bits".
    """
    quantizers = [module for module in model.modules() if isinstance(module, LsqQuantizer)]
    if not quantizers:
        return []
    at_guard = torch.cat(
        [(q.scale.detach() <= q.scale_min).reshape(len(q.bits), -1).any(dim=1) for q in quantizers]
    ).tolist()
    places = [(q, bits) for q in quantizers for bits in q.bits]
    return [
        f"{q.name or 'quantizer'} at {bits} bits"
        for (q, bits), found in zip(places, at_guard, strict=True)
        if found
    ]


def _is_after(line: bytes, stage: str, step: int) -> bool:
    try:
        record = parse_json(line.decode())
    except (ValueError, RecursionError):
        return False  # somebody else's, which is kept
    if not isinstance(record, dict) or record.get("stage") != stage:
        return False
    written = record.get("step", 0)
    return step == 0 or (isinstance(written, int | float) and written > step)


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
