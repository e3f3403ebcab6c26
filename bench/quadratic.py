"""Searches with pairwise terms on ResNet-50: combinations of a block as one group, or HiGHS alone.

    python -m bench.quadratic --indicators PICKLE [--only TEXT] [--seeds 5] [--seconds 60]

LIMPQ's published indicators under the BitOps of W3A4 and a compression of 12.2, with random
interactions of the layers of a block, and penalties on steps. Both ways get one thread; their
processor time is taken, so that others on the machine matter little, and their sums are compared.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from limpq_ext.allocation.search import search, uniform
from limpq_ext.ilp import columns, quadratic
from limpq_ext.scores.pairs import block_of
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators, Kind
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.policy import Policy

from .report import markdown, show_seconds
from .search import SECONDS, profiled

ALPHA = 2.0
SHARE = 0.1
"""The size of random interactions, of the geometric mean of what the two tensors cost alone."""


@dataclass(frozen=True)
class QuadraticCase:
    """What is added to the indicators.

    Attributes:
        name: In words.
        kinds: Whose interactions within blocks; none: no interactions.
        smoothness: The penalty on steps, per bit.
        ways: How it is solved; where it makes no difference, in one way.
    """

    name: str
    kinds: tuple[Kind, ...] = ()
    smoothness: float = 0.0
    ways: tuple[str, ...] = ("as it is",)


CASES = (
    QuadraticCase("nothing"),
    QuadraticCase("weights within blocks", ("weight",), ways=("as it is", "HiGHS alone")),
    QuadraticCase("smoothness 0.001", (), 0.001),
    QuadraticCase("smoothness 0.01", (), 0.01),
    QuadraticCase("weights within blocks, smoothness 0.01", ("weight",), 0.01),
    QuadraticCase("weights and activations within blocks", ("weight", "activation")),
)

WAYS = {"as it is": None, "HiGHS alone": 0}
"""The most combinations that make a group of their own; None: as it is."""


def random_interactions(
    indicators: Indicators, kinds: Sequence[Kind], seed: int
) -> Interactions | None:
    """Interactions of all tensors of two layers of a block, normally distributed.

    Args:
        indicators: What they are measured by.
        kinds: Whose.
        seed: Of the random numbers.
    """
    generator = np.random.default_rng(seed)
    table = {}
    for one, two in itertools.combinations(indicators.layers, 2):
        if block_of(one.name) != block_of(two.name):
            continue
        for kind, other in itertools.product(kinds, repeat=2):
            first = {b: v * _weight(kind) for b, v in getattr(one, kind).items()}
            second = {b: v * _weight(other) for b, v in getattr(two, other).items()}
            table[(one.name, kind), (two.name, other)] = {
                (a, b): SHARE * math.sqrt(first[a] * second[b]) * float(generator.normal())
                for a, b in itertools.product(indicators.bits, repeat=2)
            }
    return Interactions.from_table(table) if table else None


def _weight(kind: Kind) -> float:
    return ALPHA if kind == "weight" else 1.0


def solve(
    indicators: Indicators, costs: Costs, case: QuadraticCase, seed: int, way: str, seconds: float
) -> tuple[Policy, float]:
    """The policy of one way, and its seconds of processor time, the model's building included."""
    interactions = random_interactions(indicators, case.kinds, seed)
    most = WAYS[way]
    with (
        patch.object(quadratic, "MOST_TUPLES", quadratic.MOST_TUPLES if most is None else most),
        patch.object(columns, "MOST_TUPLES", columns.MOST_TUPLES if most is None else most),
    ):
        begin = time.process_time()
        policy = search(
            indicators,
            costs,
            bitops=uniform(3, 4),
            compression=12.2,
            alpha=ALPHA,
            interactions=interactions,
            smoothness=case.smoothness,
            time_limit=seconds,
        )
        return policy, time.process_time() - begin


def measure(
    indicators: Indicators, costs: Costs, case: QuadraticCase, seeds: int, seconds: float
) -> list[tuple[str, ...]]:
    """A row of the table for each way.

    Raises:
        AssertionError: A way has a sum below what the other one proves.
    """
    given = range(seeds if case.kinds else 1)
    found = {
        way: [solve(indicators, costs, case, seed, way, seconds) for seed in given]
        for way in case.ways
    }
    bounds = [max(own[seed][0].bound for own in found.values()) for seed in given]
    rows = []
    for way, solved in found.items():
        for (policy, _), bound in zip(solved, bounds, strict=True):
            assert policy.objective >= bound - 1e-12, (way, policy.objective, bound)
        took = [seconds for _, seconds in solved]
        stops = [policy.meta["stopped_by"] for policy, _ in solved]
        counts = ", ".join(f"{stops.count(each)} {each}" for each in dict.fromkeys(stops))
        gap = max(policy.gap for policy, _ in solved)
        rows.append(
            (case.name, way, show_seconds(statistics.median(took)), show_seconds(max(took)),
             counts, f"{gap:.0e}")
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--indicators", type=Path, required=True, help="LIMPQ's published pickle")
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--seeds", type=int, default=5, help="random interactions for each case")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one search")
    options = parser.parse_args(arguments)
    indicators, costs = Indicators.from_limpq(options.indicators), profiled("resnet50")
    rows = [("added", "way", "median", "longest", "stopped by", "largest gap")]
    for case in CASES:
        if options.only in case.name:
            print(case.name, file=sys.stderr)
            rows += measure(indicators, costs, case, options.seeds, options.seconds)
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
