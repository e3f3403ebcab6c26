"""Results: what one case gave, the table that is printed, and the files under results/."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import limpq_ext
from limpq_ext.kernels.ops import build_info
from limpq_ext.values.files import open_atomically, write_json

from .timing import Comparison

FORMAT = "limpq-benchmark"
VERSION = 1
OURS = "limpq_ext"
FLOOR = "floor"
FLOAT_STEPS = "float steps"
QUIET = 0.03
"""The share of the CPU time that other processes may take in a run that is worth recording."""
COLUMNS = ("eager", "learnable", "compiled")


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        name: What is computed, on which shape and dtype.
        bytes: What has to be read and written at least; 0 where that says nothing.
        rounds: Samples of each contender.
        medians: Seconds, by contender.
        ratios: A contender's time over limpq_ext's, paired by round; of the floor, the share of the
            bandwidth of a copy that is reached.
        quartiles: Lower and upper quartile of the same ratios.
        targets: The least ratios that are wanted.
        memory: Peak memory in bytes, by contender, where it was measured.
    """

    name: str
    bytes: int
    rounds: int
    medians: dict[str, float]
    ratios: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    targets: dict[str, float]
    memory: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, moved: int, comparison: Comparison, targets: dict[str, float], **more: Any
    ) -> Result:
        """The result of a comparison."""
        known = {peer: target for peer, target in targets.items() if peer in comparison.ratios}
        return cls(name, moved, **dataclasses.asdict(comparison), targets=known, **more)

    def missed(self) -> list[str]:
        """The contenders whose target is not reached."""
        return [peer for peer, target in self.targets.items() if self.ratios[peer] < target]


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    head = ("case", "time", "GB/s", "% of floor", *(f"x {peer}" for peer in COLUMNS))
    rows = [(*head, "x others", "targets")]
    for result in results:
        seconds = result.medians[OURS]
        ratios = result.ratios
        others = [peer for peer in ratios if peer not in (*COLUMNS, FLOOR)]
        rows.append(
            (
                result.name,
                show_seconds(seconds),
                f"{result.bytes / seconds / 1e9:.1f}" if FLOOR in ratios else "",
                f"{100 * ratios[FLOOR]:.0f}" if FLOOR in ratios else "",
                *(f"{ratios[peer]:.2f}" if peer in ratios else "" for peer in COLUMNS),
                ", ".join(f"{ratios[peer]:.2f} {peer}" for peer in others),
                _targets(result),
            )
        )
    return markdown(rows)


def contention(share: float | None) -> str:
    """A warning where other processes disturbed a run by more than they may, else nothing."""
    if share is None or share <= QUIET:
        return ""
    return (
        f"other processes took {100 * share:.0f} % of the CPU time of this run:"
        " its numbers are of no use on a CPU, and not worth recording"
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them the head, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def show_seconds(seconds: float) -> str:
    """A time with a unit that fits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _targets(result: Result) -> str:
    if not result.targets:
        return ""
    missed = result.missed()
    if not missed:
        return "met"
    return "missed: " + ", ".join(
        f"{100 * result.targets[peer]:.0f} % of floor"
        if peer == FLOOR
        else f"{result.targets[peer]:.2f} {peer}"
        for peer in missed
    )


# --- files --------------------------------------------------------------------------------------


def describe_run(device: str, **settings: Any) -> dict[str, Any]:
    """On what, with what and when the results were measured."""
    flags = _cpu_field("flags").split()
    described = {
        "kind": machine_kind(device),
        "device": device,
        "cpu": _cpu_field("model name") or platform.processor(),
        "cpu_flags": sorted(f for f in flags if f.startswith(("avx", "f16c", "fma", "amx"))),
        "cpu_capability": build_info()["cpu capability"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "limpq_ext": limpq_ext.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": build_info()["compiler"],
            "cuda": build_info().get("cuda version", ""),
        },
    }
    return described | settings


def commit() -> str:
    """The commit of the working tree; "" where it has none."""
    return _git("rev-parse", "HEAD")


def machine_kind(device: str) -> str:
    """A name for machines of this kind that can be part of a file name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        model = _cpu_field("model name") or platform.processor() or platform.machine()
        model = re.sub(r"\((R|TM|tm)\)|@.*|\bCPU\b|\bProcessor\b", " ", model)
        name = f"{model} {torch.get_num_threads()} threads {build_info()['cpu capability']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def save(path: Path, run: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the results as JSON and, beside it, as a table made from that."""
    cases = [dataclasses.asdict(result) for result in results]
    write_json(path, {"format": FORMAT, "version": VERSION, "run": run, "cases": cases})
    with open_atomically(path.with_suffix(".md")) as file:
        file.write(page(*load(path)).encode())


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """The run and the results of a file that :func:`save` wrote.

    Raises:
        ValueError: It is another file.
    """
    document = json.loads(path.read_text())
    found = (document.get("format"), document.get("version")) if isinstance(document, dict) else ()
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: not a {FORMAT} file of version {VERSION}")
    fields = {"quartiles": lambda value: {k: tuple(v) for k, v in value.items()}}
    cases = [
        Result(**{k: fields.get(k, lambda v: v)(v) for k, v in case.items()})
        for case in document["cases"]
    ]
    return document["run"], cases


def page(run: dict[str, Any], results: Sequence[Result]) -> str:
    """A Markdown page of a run."""
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items() if value)
    hardware = run["gpu"] or f"{run['cpu']}, {run['threads']} threads, {run['cpu_capability']}"
    warning = contention(run.get("other_processes"))
    commit = (run["commit"] or "unknown")[:12] + (" with changes" if run["dirty"] else "")
    lines = [
        f"# {run['kind']}",
        "",
        f"{hardware}. {versions}. Commit {commit}, {run['date']}.",
        "",
        *([f"Careful: {warning}.", ""] if warning else []),
        table([result for result in results if not result.memory]),
        "",
    ]
    steps = [result for result in results if result.memory]
    if steps:
        lines += [step_table(steps), ""]
    return "\n".join(lines)


def step_table(results: Sequence[Result]) -> str:
    """Whole training steps: every contender's time, its ratio to float steps and its memory."""
    rows = [("case", "contender", "seconds", "x float", "x limpq_ext", "peak memory MB", "targets")]
    for result in results:
        for name, seconds in result.medians.items():
            rows.append(
                (
                    result.name,
                    name,
                    f"{seconds:.3f}",
                    f"{result.ratios.get(name, 1.0) / result.ratios[FLOAT_STEPS]:.2f}",
                    f"{result.ratios.get(name, 1.0):.2f}",
                    f"{result.memory[name] / 1e6:.0f}",
                    _targets(result) if name == OURS else "",
                )
            )
    return markdown(rows)


def _cpu_field(name: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        told = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
