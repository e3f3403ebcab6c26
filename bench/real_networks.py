"""Scores and policies on networks that are not alike in all layers: what a policy is worth.

    scripts/real_networks_setup.sh FOLDER
    python -m bench.real_networks --folder FOLDER --plan
    python -m bench.real_networks --folder FOLDER --within 3000
    python -m bench.real_networks --folder FOLDER --record bench/results/real_networks.json

EfficientNet-Lite0 and Lite1 with their published weights on photographs, a ResNet-20 and a small
vision transformer on drawn glyphs. A policy is compared with the float network on images of which
none was seen before: the share of equal classes, and the divergence of the outputs. Every result is
a line of FOLDER/results.jsonl as soon as it is there, and is not computed again; nor is what a
recorded file has, after

    python -m bench.real_networks --folder FOLDER --resume bench/results/real_networks.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from limpq_ext.values.files import open_atomically
from limpq_ext.values.indicators import Indicators, LayerIndicators

from .networks import (
    GLYPH_SIZE,
    GLYPH_TEST,
    GLYPH_TRAIN,
    HELD,
    NETWORKS,
    PHOTO_SIZE,
    PHOTO_TEST,
    PHOTO_TRAIN,
)
from .real_networks_report import NotThereYet, Results, page
from .real_networks_study import (
    BITS,
    CALIBRATION_IMAGES,
    CHOICE_IMAGES,
    JOINT_STEPS,
    LEARNED,
    LOSS_AWARE_IMAGES,
    RANDOM_DRAWS,
    SCORES,
    TUNED_STEPS,
    Study,
    Task,
    all_tasks,
    scores_file,
)
from .report import commit, describe_run


def missing(tasks: Sequence[Task], results: Results, only: str) -> list[Task]:
    """The tasks whose name has a text and that have no result."""
    return [task for task in tasks if only in str(task) and not results.has(task.key)]


def plan(tasks: Sequence[Task], results: Results) -> str:
    """What is left to do, and how long it takes a core by what was done."""
    lines = []
    total = 0.0
    for network_name in dict.fromkeys(task.network for task in tasks):
        for what in dict.fromkeys(task.what for task in tasks):
            own = [task for task in tasks if (task.network, task.what) == (network_name, what)]
            if not own:
                continue
            seconds = results.seconds(network_name, what)
            told = "not measured yet"
            if seconds is not None:
                total += seconds * len(own)
                told = f"{seconds:.0f} s each, {seconds * len(own) / 3600:.1f} h"
            lines.append(f"{network_name}: {what}: {len(own)} left, {told}")
    return "\n".join([*lines, f"{total / 3600:.1f} h of what was measured"])


def run(tasks: Sequence[Task], folder: Path, results: Results, within: float) -> None:
    """Compute results, one after the other; none begins later than `within` seconds."""
    start = time.monotonic()
    make = functools.cache(lambda name: Study(name, folder, results))
    for task in tasks:
        if time.monotonic() - start > within:
            print("no time is left for more", flush=True)
            return
        began = time.process_time()
        try:
            result = make(task.network).run(task)
        except NotThereYet as error:
            print(f"{task}: left out: {error}", flush=True)
            continue
        result |= {"cpu_seconds": time.process_time() - began, "commit": commit()}
        results.add(task.key, result)
        shown = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
        print(f"{task}: {json.dumps(shown)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the setup script")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", default="", help="only results whose name has this text")
    parser.add_argument("--within", type=float, default=math.inf, help="begins none after, seconds")
    parser.add_argument("--random", type=int, default=RANDOM_DRAWS, help="policies at each budget")
    parser.add_argument("--plan", action="store_true", help="say what is left to do, and end")
    parser.add_argument("--resume", type=Path, help="take what a recorded file has, and end")
    parser.add_argument("--record", type=Path, help="write the results and their page, and end")
    options = parser.parse_args(arguments)
    results = Results(options.folder / "results.jsonl")
    if options.resume is not None:
        resume(options.resume, options.folder, results)
        return 0
    if options.record is not None:
        record(options.record, options.folder, results)
        return 0
    tasks = missing(all_tasks(options.network, options.random), results, options.only)
    if options.plan:
        print(plan(tasks, results))
        return 0
    run(tasks, options.folder, results, options.within)
    return 0


def kept_scores(folder: Path, results: Results) -> dict[str, dict[str, Indicators]]:
    """The scores that were computed: network -> score -> indicators."""
    found = {}
    for name in results.networks():
        files = [(score, scores_file(folder, name, score)) for score in (*SCORES, *LEARNED)]
        found[name] = {score: Indicators.load(file) for score, file in files if file.exists()}
    return found


def record(path: Path, folder: Path, results: Results) -> None:
    """Write the results with how they were measured, and the page that is made of them."""
    described = describe_run(
        "cpu",
        bits=BITS,
        calibration_images=CALIBRATION_IMAGES,
        loss_aware_images=LOSS_AWARE_IMAGES,
        choice_images=CHOICE_IMAGES,
        refining_images=HELD - CHOICE_IMAGES,
        joint_steps=JOINT_STEPS,
        tuned_steps=TUNED_STEPS,
        photographs={"train": PHOTO_TRAIN, "test": PHOTO_TEST, "size": PHOTO_SIZE},
        glyphs={"train": GLYPH_TRAIN, "test": GLYPH_TEST, "size": GLYPH_SIZE},
    )
    scores = kept_scores(folder, results)
    tables = {
        name: {score: _table(indicators) for score, indicators in own.items()}
        for name, own in scores.items()
    }
    with open_atomically(path) as file:
        file.write(_json_text(described, results.lines(), tables).encode())
    with open_atomically(path.with_suffix(".md")) as file:
        file.write(page(described, results, scores).encode())


def _json_text(described: object, lines: Sequence[object], scores: object) -> str:
    """A file of JSON with each result on a line of its own, which a comparison can show."""
    run, tables = json.dumps(described, indent=1), json.dumps(scores)
    each = ",\n".join(json.dumps(line, allow_nan=False) for line in lines)
    return f'{{"run": {run},\n"results": [\n{each}\n],\n"scores": {tables}}}\n'


def resume(path: Path, folder: Path, results: Results) -> None:
    """Take the results and scores of a recorded file that a folder does not have."""
    recorded = json.loads(path.read_text())
    for line in recorded["results"]:
        if not results.has(key := tuple(line["key"])):
            results.add(key, line["result"])
    for name, own in recorded["scores"].items():
        for score, layers in own.items():
            kept = scores_file(folder, name, score)
            if not kept.exists():
                made = [
                    LayerIndicators(layer, *(dict(zip(BITS, kind, strict=True)) for kind in kinds))
                    for layer, kinds in layers.items()
                ]
                Indicators(BITS, tuple(made), {"score": score}).save(kept)


def _table(indicators: Indicators) -> dict[str, list[list[float]]]:
    """Of each layer the scores of weights and of activations, to five digits."""
    return {
        layer.name: [
            [float(f"{value:.5g}") for value in kind.values()]
            for kind in (layer.weight, layer.activation)
        ]
        for layer in indicators.layers
    }


if __name__ == "__main__":
    sys.exit(main())
