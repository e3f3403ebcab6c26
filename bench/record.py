"""Runs the benchmarks and writes bench/results/<machine kind>.json and .md.

python -m bench.record [--device cuda] [--quick] [--out FOLDER] [--only TEXT] [--no-joint-step]
                       [--within SECONDS]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from . import joint_step, report, search, timing
from .cases import Case, all_cases
from .timing import Turns, compare_samples

SECONDS_PER_CASE = {False: 4.0, True: 1.0}
"""Time for the rounds of a case, by whether the run is a quick one."""


def measure(case: Case, device: str, *, quick: bool) -> report.Result:
    """Build a case, which checks it, and time its contenders in turn."""
    work = case.build()
    turns = Turns(work.contenders, device)
    for _ in range(turns.rounds_within(SECONDS_PER_CASE[quick])):
        turns.round()
    return report.Result.of(case.name, work.bytes, compare_samples(turns.seconds), case.targets)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--out", type=Path, help="folder; default: results")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--no-joint-step", action="store_true", help="kernels only")
    parser.add_argument(
        "--within", type=float, default=math.inf, help="seconds after which no kernel case begins"
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.record: there is no CUDA device here", file=sys.stderr)
        return 1
    run = report.describe_run(options.device, quick=options.quick, keeps_freed_memory=False)
    others = timing.OtherProcesses()
    results = []
    # The steps come first: their peak memory is measured with the C library's own settings.
    shapes = () if options.no_joint_step or options.quick else joint_step.SHAPES[options.device]
    for shape in shapes:
        if options.only in shape.name:
            print(shape.name, file=sys.stderr)
            results.append(joint_step.measure_steps(shape, device=options.device))
    searches = search.cases() if options.device == "cpu" and not options.quick else []
    peers = search.installed({search.CBC: search.PEERS[search.CBC]}) if searches else {}
    for case in searches:
        if options.only in case.name:
            print(case.name, file=sys.stderr)
            result, _ = search.measure_search(case, peers, seconds=search.ONCE_SECONDS)
            results.append(result)
    if options.device == "cpu":
        run["keeps_freed_memory"] = timing.keep_freed_memory()
    left_out = []
    for case in all_cases(options.device, quick=options.quick):
        if options.only not in case.name:
            continue
        if time.monotonic() - start > options.within:
            left_out.append(case.name)
            continue
        print(case.name, file=sys.stderr)
        results.append(measure(case, options.device, quick=options.quick))
    if left_out:
        run["left_out"] = left_out
        print(f"no time was left for: {', '.join(left_out)}", file=sys.stderr)
    if not results:
        print(f"bench.record: no case has '{options.only}' in its name", file=sys.stderr)
        return 1
    run["other_processes"] = others.share()
    print(report.page(run, results))
    folder = options.out
    if folder is None and (options.quick or options.only or options.no_joint_step or left_out):
        print("not written: only a part of the benchmarks ran (see --out)", file=sys.stderr)
        return 0
    folder = folder or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / f"{run['kind']}.json", run, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
