"""Latency tables of ResNet-18 in two engines, and how well they predict mixed policies.

python -m bench.latency --record bench/results/latency.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

import limpq_ext as lq
from limpq_ext.values.files import open_atomically, write_json

from .report import describe_run, markdown

BITS: Final = (4, 8)
ENGINES: Final = ("onnxruntime", "openvino")


def measure(engine: str) -> lq.LatencyTable:
    """The table of ResNet-18 at 224 pixels, a batch of one, one thread."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    return lq.measure_latency(model, torch.randn(1, 3, 224, 224), bits=BITS, engine=engine)


def page(run: Mapping[str, Any], metas: Mapping[str, Mapping[str, Any]]) -> str:
    """What was predicted and measured, as Markdown."""
    rows = [("engine", "policy", "predicted ms", "measured ms", "error")]
    notes = []
    for engine, meta in metas.items():
        for number, own in enumerate(meta["predictions"], start=1):
            times = (f"{1e3 * own[key]:.2f}" for key in ("predicted", "measured"))
            rows.append((engine, f"mixed {number}", *times, f"{100 * own['error']:+.1f} %"))
        rows.append(
            (engine, "unattributed", f"{1e3 * meta['unattributed']['seconds']:.2f}", "", "")
        )
        notes += [f"- {engine} {meta['engine_version']}: {note}" for note in meta["notes"]]
    return f"""# Latency tables

`python -m bench.latency`; ResNet-18 with random weights, 224 pixels, a batch of one, one thread,
all pairs of {" and ".join(map(str, BITS))} bits. {run["cpu"]}, commit {(run["commit"] or "")[:12]},
{run["date"]}. What a table and the unattributed time predict of five
mixed policies, beside the median time measured:

{markdown(rows)}

{chr(10).join(notes)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="JSON file to write, and a page beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = describe_run("cpu", bits=BITS)
    metas = {engine: measure(engine).meta for engine in ENGINES}
    print(page(run, metas))
    if options.record is not None:
        write_json(options.record, {"run": run, "tables": metas})
        with open_atomically(options.record.with_suffix(".md")) as file:
            file.write(page(run, metas).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
