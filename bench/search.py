"""The search's integer program against PuLP with CBC, in turn, model building included.

    python -m bench.search [--only TEXT] [--rounds 5] [--indicators PICKLE]

Both get the same tables of values and costs. The sums of values are compared first, and the rows
are counted in integers. Cases that are too large for CBC are timed alone, against a time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from limpq_ext.app.models import create_shapes
from limpq_ext.graph.profile import profile
from limpq_ext.ilp.program import Program, minimise
from limpq_ext.ilp.rows import Row
from limpq_ext.values.costs import FLOAT_BITS, Costs
from limpq_ext.values.indicators import Indicators, LayerIndicators

from .report import OURS, Result, contention, markdown, show_seconds
from .timing import Contender, OtherProcesses, Turns, compare_samples

CBC = "PuLP/CBC"
BITS = (2, 3, 4, 5, 6)
Problem = tuple[list[list[float]], list[Row]]


@dataclass(frozen=True)
class SearchCase:
    """A problem, or a curve of them.

    Attributes:
        name: What is solved.
        build: Makes its values and rows.
        gap: The gap to prove.
        seconds: The time that is wanted at most.
        targets: The least ratios of a contender's time to limpq_ext's that are wanted.
        points: Limits of the first row to solve for, between its smallest and its largest use; 0:
            its own limit only.
    """

    name: str
    build: Callable[[], Problem]
    seconds: float
    gap: float = 0.0
    targets: dict[str, float] = field(default_factory=dict)
    points: int = 0


def layers_of_bits(seed: int, layers: int, rows: int) -> Problem:
    """Random layers whose indicators fall with the bits, under BitOps, size and activations."""
    generator = np.random.default_rng(seed)
    bits = np.array(list(itertools.product(BITS, repeat=2)))
    shape = (2, layers, len(BITS))
    learned = np.exp(generator.normal(-3, 1, (2, layers, 1))) * generator.random(shape) / BITS
    weight, activation = np.sort(learned, axis=2)[:, :, ::-1]
    values = weight[:, bits[:, 0] - BITS[0]] + activation[:, bits[:, 1] - BITS[0]]
    spread = ((17, 1.0), (12, 1.5), (11, 1.0))[:rows]
    sizes = [np.exp(generator.normal(*each, (layers, 1))).astype(int) for each in spread]
    costs = [size * way for size, way in zip(sizes, (bits.prod(axis=1), *bits.T), strict=False)]
    return values.tolist(), [_limited(cost, 0.3 + 0.05 * k) for k, cost in enumerate(costs)]


def independent_choices(seed: int, layers: int, rows: int) -> Problem:
    """Random values and costs without any order."""
    generator = np.random.default_rng(seed)
    shape = (layers, len(BITS) ** 2)
    values = generator.random(shape)
    costs = [generator.integers(0, 10**6, shape) for _ in range(rows)]
    return values.tolist(), [_limited(cost, 0.31 + 0.02 * rows) for cost in costs]


def _limited(costs: np.ndarray, share: float) -> Row:
    """The row whose limit is so far from its smallest to its largest use."""
    smallest, largest = int(costs.min(axis=1).sum()), int(costs.max(axis=1).sum())
    return Row(costs.tolist(), smallest + int(share * (largest - smallest)))


def resnet50(indicators: Path) -> Problem:
    """LIMPQ's published indicators under the BitOps of W3A4 and a compression of 12.2."""
    usable, records = Indicators.from_limpq(indicators).monotone("forbid")
    forbidden = {(r.layer, r.kind, r.bits) for r in records if r.action == "forbidden"}
    return _network("resnet50", usable, forbidden, 3 * 4, Fraction(122, 10))


def resnet18() -> Problem:
    """Random indicators that fall with the bits, under the BitOps of W3A3 and compression 10."""
    generator = np.random.default_rng(0)
    layers = []
    for layer in _profiled("resnet18").layers:
        weight, activation = np.exp(generator.normal(-3, 1, (2, 1))) * generator.random((2, 5))
        both = (dict(zip(BITS, sorted(v, reverse=True), strict=True)) for v in (weight, activation))
        layers.append(LayerIndicators(layer.name, *both))
    return _network("resnet18", Indicators(BITS, tuple(layers)), set(), 3 * 3, Fraction(10))


def _profiled(name: str) -> Costs:
    return profile(create_shapes(name), torch.zeros(1, 3, 224, 224, device="meta"))


def _network(
    name: str,
    indicators: Indicators,
    forbidden: set[tuple[str, str, int]],
    uniform: int,
    compression: Fraction,
) -> Problem:
    """A network of torchvision at 224x224 under BitOps and compression, alpha 2."""
    costs = _profiled(name)
    by_name = {layer.name: layer for layer in indicators.layers}
    values, operations, sizes = [], [], []
    for cost in costs.layers:
        layer = by_name[cost.name]
        pairs = [
            (w, a)
            for w, a in itertools.product(indicators.bits, repeat=2)
            if (cost.name, "weight", w) not in forbidden
            and (cost.name, "activation", a) not in forbidden
        ]
        values.append([layer.activation[a] + 2.0 * layer.weight[w] for w, a in pairs])
        operations.append([cost.macs * w * a for w, a in pairs])
        sizes.append([cost.weights * w for w, _ in pairs])
    fixed = costs.fixed_bits * sum(layer.weights for layer in costs.fixed)
    room = math.floor(FLOAT_BITS * costs.all_weights / compression) - fixed
    limit = sum(cost.macs for cost in costs.layers) * uniform
    return values, [Row(operations, limit), Row(sizes, room)]


def cases(indicators: Path | None = None) -> list[SearchCase]:
    """All cases; those of ResNet-50 where its published indicators are given."""
    bits, independent = layers_of_bits, independent_choices
    partial = functools.partial
    found = [
        SearchCase("ResNet-18, random indicators", resnet18, 0.02),
        SearchCase("100 ordered, 2 rows", partial(bits, 0, 100, 2), 0.3),
        SearchCase("100 ordered, 2 rows, another", partial(bits, 1, 100, 2), 0.3),
        SearchCase("100 shuffled, 2 rows", partial(independent, 0, 100, 2), 0.3),
        SearchCase("500 ordered, 3 rows, gap 1e-5", partial(bits, 0, 500, 3), 1.0, 1e-5),
        SearchCase("500 shuffled, 3 rows, gap 1e-5", partial(independent, 0, 500, 3), 1.0, 1e-5),
        SearchCase("500 ordered, 3 rows, gap 0", partial(bits, 0, 500, 3), math.inf),
        SearchCase("5000 ordered, 3 rows, gap 1e-5", partial(bits, 0, 5000, 3), 10.0, 1e-5),
        SearchCase("5000 shuffled, 3 rows, gap 1e-5", partial(independent, 0, 5000, 3), 10, 1e-5),
    ]  # fmt: skip
    if indicators is not None:
        golden = partial(resnet50, indicators)
        found[:0] = [
            SearchCase("ResNet-50", golden, math.inf, targets={CBC: 3.0}),
            SearchCase("ResNet-50, 100 points", golden, 3.0, points=100),
        ]
    return found


def cbc(values: list[list[float]], rows: list[Row]) -> list[int]:
    """The choices of PuLP's CBC, proven with a gap of zero."""
    import pulp

    problem = pulp.LpProblem(sense=pulp.LpMinimize)
    taken = [
        [pulp.LpVariable(f"x_{g}_{i}", cat="Binary") for i in range(len(group))]
        for g, group in enumerate(values)
    ]
    flat = list(itertools.chain.from_iterable(taken))
    problem += pulp.lpDot(itertools.chain.from_iterable(values), flat)
    for group in taken:
        problem += pulp.lpSum(group) == 1
    for row in rows:  # in units of a millionth of the limit: larger numbers cost it the optimum
        unit = row.limit / 10**6
        costs = [cost / unit for cost in itertools.chain.from_iterable(row.costs)]
        problem += pulp.lpDot(costs, flat) <= row.limit / unit
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, threads=1))
    return [max(range(len(group)), key=lambda i: group[i].value()) for group in taken]


def measure_search(case: SearchCase, rounds: int = 5) -> Result:
    """Solve a case with everybody, compare the answers, and time them in turn.

    Raises:
        AssertionError: An answer breaks a row, is not proven, or differs from CBC's.
    """
    values, rows = case.build()
    tiebreaks = [row.costs for row in rows]

    def ours(_: object) -> tuple[int, ...]:
        if not case.points:
            solution = minimise(values, rows, gap=case.gap, deadline=math.inf, tiebreaks=tiebreaks)
            assert solution.stopped_by in (("optimal",) if case.gap == 0 else ("optimal", "gap"))
            return solution.chosen
        program, chosen = Program(values, rows, tiebreaks=tiebreaks), None
        first, *others = rows
        largest = sum(map(max, first.costs))
        for limit in np.linspace(1.05 * first.smallest, 0.9 * largest, case.points):
            limits = [int(limit), *(row.limit for row in others)]
            solution = program.solve(limits, gap=case.gap, deadline=math.inf, start=chosen)
            assert solution.stopped_by == "optimal"
            chosen = solution.chosen
        assert chosen is not None
        return chosen

    contenders = {OURS: Contender(ours)}
    # CBC cannot be asked for a curve, and takes minutes for hundreds of layers
    if not case.points and len(values) <= 100:
        contenders[CBC] = Contender(lambda _: cbc(values, rows))
        both = [
            math.fsum(group[i] for group, i in zip(values, contender.run(None), strict=True))
            for contender in contenders.values()
        ]
        # it stops looking for what is better by less than 1e-5
        assert both[0] <= both[1] + 1e-9 <= both[0] + 1.1e-5, both
        assert all(row.use(ours(None)) <= row.limit for row in rows)
    turns = Turns(contenders, "cpu", calibrate=False)
    for _ in range(rounds if len(values) <= 500 else min(rounds, 2)):
        turns.round()
    return Result.of(case.name, 0, compare_samples(turns.seconds), case.targets)


def search_table(results: list[Result], wanted: dict[str, float]) -> str:
    """The results as a Markdown table."""
    rows = [("case", "time", "wanted", f"x {CBC}", "target")]
    for result in results:
        seconds, most = result.medians[OURS], wanted.get(result.name, math.inf)
        ratio = f"{result.ratios[CBC]:.2f}" if CBC in result.ratios else ""
        met = seconds <= most and not result.missed()
        limits = [show_seconds(most)] * (most < math.inf)
        limits += [f"{least:g} x {peer}" for peer, least in result.targets.items()]
        verdict = ("met" if met else "missed") if limits else ""
        rows.append((result.name, show_seconds(seconds), ", ".join(limits), ratio, verdict))
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--indicators", type=Path, help="LIMPQ's published pickle of ResNet-50")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # PuLP's, a line per variable
    others, start = OtherProcesses(), time.monotonic()
    chosen = [case for case in cases(options.indicators) if options.only in case.name]
    results = []
    for case in chosen:
        print(case.name, file=sys.stderr)
        results.append(measure_search(case, options.rounds))
    print(search_table(results, {case.name: case.seconds for case in chosen}))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    warning = contention(others.share())
    if warning:
        print(f"Careful: {warning}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
