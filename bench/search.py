"""The search's integer program against other solvers, in turn, model building included.

    python -m bench.search [--only TEXT] [--rounds 5] [--seconds 60] [--indicators PICKLE]

All get the same tables of values and costs, one thread each. Their answers are counted exactly and
compared with ours before anything is timed; none may be better than what ours is proven to be.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.util
import itertools
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limpq_ext.graph.profile import profile
from limpq_ext.ilp.columns import by_group
from limpq_ext.ilp.program import Program, _Task
from limpq_ext.ilp.relaxation import around
from limpq_ext.ilp.rows import Row, total
from limpq_ext.nn.named import create_shapes
from limpq_ext.values.costs import FLOAT_BITS, Costs
from limpq_ext.values.indicators import Indicators, LayerIndicators

from .report import OURS, Result, contention, markdown, show_seconds
from .timing import Contender, OtherProcesses, Turns, compare_samples

CBC = "PuLP/CBC"
BITS = (2, 3, 4, 5, 6)
SECONDS = 60.0
"""Time limit of one solve."""
CURVE_SECONDS = 600.0
"""A curve is not continued after so much time."""
ONCE_SECONDS = 10.0
"""Who takes longer runs once, and not in every round."""
Values = list[list[float]]
Problem = tuple[Values, list[Row]]


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


# --- problems -----------------------------------------------------------------------------------


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
    return _network(profiled("resnet50"), usable, forbidden, 3 * 4, Fraction(122, 10))


def random_network(name: str, uniform: int, compression: int) -> Problem:
    """Random indicators that fall with the bits, for a network of torchvision."""
    generator = np.random.default_rng(0)
    costs, layers = profiled(name), []
    for layer in costs.layers:
        weight, activation = np.exp(generator.normal(-3, 1, (2, 1))) * generator.random((2, 5))
        both = (dict(zip(BITS, sorted(v, reverse=True), strict=True)) for v in (weight, activation))
        layers.append(LayerIndicators(layer.name, *both))
    return _network(costs, Indicators(BITS, tuple(layers)), set(), uniform, Fraction(compression))


def profiled(name: str) -> Costs:
    """The costs of a network of torchvision at 224x224."""
    return profile(create_shapes(name), torch.zeros(1, 3, 224, 224, device="meta"))


def _network(
    costs: Costs,
    indicators: Indicators,
    forbidden: set[tuple[str, str, int]],
    uniform: int,
    compression: Fraction,
) -> Problem:
    """A network at 224x224 under BitOps, those of a uniform product of bits, and compression."""
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
    network = partial(partial, random_network)
    found = [
        SearchCase("ResNet-18, random indicators", network("resnet18", 9, 10), 0.02),
        SearchCase("MobileNetV2, random indicators", network("mobilenet_v2", 9, 6), math.inf),
        SearchCase("ViT-B/16, random indicators", network("vit_b_16", 9, 10), math.inf),
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


def limits_of(case: SearchCase, rows: Sequence[Row]) -> list[int]:
    """The limits of the first row, one after the other."""
    if not case.points:
        return [rows[0].limit]
    largest = sum(map(max, rows[0].costs))
    return [int(n) for n in np.linspace(1.05 * rows[0].smallest, 0.9 * largest, case.points)]


# --- solvers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a solver says.

    Attributes:
        chosen: The choice in each group, None if nothing was found.
        proof: That it is the best: "integers" or "floats", which says what was computed with, or
            "gap" if a gap was all that was asked for. Empty: not proven, time was up.
        bound: No answer has a smaller sum of values, where the solver's bound is used.
    """

    chosen: tuple[int, ...] | None
    proof: str
    bound: float = -math.inf


PROOFS = {"optimal": "integers", "tolerance": "floats", "gap": "gap", "time": ""}
"""What limpq_ext's own answers are proven in, by what stopped it."""

Solve = Callable[[Values, list[Row], float, float], Answer]
"""Values, rows, gap and seconds: the choices with the smallest sum within the limits."""


def cbc(values: Values, rows: list[Row], gap: float, seconds: float) -> Answer:
    """PuLP's CBC. It stops looking for what is better by less than 1e-5."""
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
    for row in rows:
        problem += pulp.lpDot(_millionths(row).tolist(), flat) <= 10**6
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=gap, threads=1, timeLimit=seconds))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Answer(None, "")
    proven = problem.sol_status == pulp.LpSolutionOptimal
    found = np.array([variable.value() for variable in flat])
    return Answer(_largest(values, found), _proof("floats", gap) if proven else "")


def highs(values: Values, rows: list[Row], gap: float, seconds: float) -> Answer:
    """HiGHS: one mixed-integer program, its own presolve and branching."""
    import highspy

    starts = np.cumsum([0, *map(len, values)])
    count, groups = int(starts[-1]), len(values)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = count, groups + len(rows)
    model.col_cost_ = np.concatenate(values)
    model.col_lower_, model.col_upper_ = np.zeros(count), np.ones(count)
    model.integrality_ = [highspy.HighsVarType.kInteger] * count
    model.row_lower_ = np.concatenate((np.ones(groups), np.full(len(rows), -math.inf)))
    model.row_upper_ = np.concatenate((np.ones(groups), np.full(len(rows), 1e6)))
    matrix = model.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    matrix.num_col_, matrix.num_row_ = model.num_col_, model.num_row_
    matrix.start_ = np.concatenate((starts, count * np.arange(2, 2 + len(rows))))
    matrix.index_ = np.tile(np.arange(count, dtype=np.int32), 1 + len(rows))
    matrix.value_ = np.concatenate((np.ones(count), *map(_millionths, rows)))
    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,
        "time_limit": seconds,
        "mip_rel_gap": gap,
        "mip_abs_gap": 0.0,
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(model)
    solver.run()
    feasible = int(highspy.SolutionStatus.kSolutionStatusFeasible)
    if solver.getInfo().primal_solution_status != feasible:
        return Answer(None, "")
    proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    found = np.array(solver.getSolution().col_value)
    return Answer(_largest(values, found), _proof("floats", gap) if proven else "")


def cp_sat(values: Values, rows: list[Row], gap: float, seconds: float) -> Answer:
    """OR-tools' CP-SAT, which computes with integers of 64 bits: values become such integers."""
    cp_model = load_cp_sat()
    model = cp_model.CpModel()
    taken = [[model.new_bool_var("") for _ in group] for group in values]
    flat = list(itertools.chain.from_iterable(taken))
    for group in taken:
        model.add_exactly_one(group)
    for row in rows:
        costs = list(itertools.chain.from_iterable(row.costs))
        model.add(cp_model.LinearExpr.weighted_sum(flat, costs) <= row.limit)
    whole, loss = whole_values(values)
    objective = list(itertools.chain.from_iterable(whole))
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, objective))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.relative_gap_limit = gap
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return Answer(None, "")
    found = np.array([solver.boolean_value(variable) for variable in flat])
    kind = f"integers, to {loss:.0e}" if loss else "integers"
    return Answer(_largest(values, found), _proof(kind, gap) if status == cp_model.OPTIMAL else "")


@functools.cache
def load_cp_sat() -> Any:
    """OR-tools' module of CP-SAT, in a process that has highspy too.

    Each brings a libhighs.so.1, of different versions, and whoever is loaded second would get the
    first one's. So highspy is first, and OR-tools' own is put where OR-tools looks first.
    """
    import highspy  # noqa: F401
    import ortools

    for library in Path(ortools.__path__[0]).glob(".libs/libhighs.so*"):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    return importlib.import_module("ortools.sat.python.cp_model")


def whole_values(values: Values) -> tuple[list[list[int]], float]:
    """Values in whole numbers whose sums stay below 2^53, and what that may lose.

    Where the decimals have a common unit that is coarse enough, nothing is lost. Otherwise every
    value is rounded to the nearest unit, and the best sum of the rounded values may be above the
    best sum by a unit for each group.
    """
    exact = [[_exact(value) for value in group] for group in values]
    largest = sum(max(map(abs, group)) for group in exact) or 1
    scale = math.lcm(*(value.denominator for group in exact for value in group))
    finest = int(2**53 / largest)
    loss = 0.0
    if scale > finest:
        scale, loss = finest, len(values) / finest
    return [[round(value * scale) for value in group] for group in exact], loss


def presolved(solve: Solve) -> Solve:
    """Another solver for what our presolve leaves: the same bounds, without our sweeps."""

    def run(values: Values, rows: list[Row], gap: float, seconds: float) -> Answer:
        start = time.perf_counter()
        left = choices_left(Program(values, rows), rows, gap)
        some = [Row(_some(row.costs, left), row.limit) for row in rows]
        rest = max(0.0, seconds - (time.perf_counter() - start))
        answer = solve(_some(values, left), some, gap, rest)
        if answer.chosen is None:
            return answer
        chosen = tuple(kept[i] for kept, i in zip(left, answer.chosen, strict=True))
        return replace(answer, chosen=chosen)

    return run


def choices_left(program: Program, rows: Sequence[Row], gap: float) -> list[list[int]]:
    """The choices that no other one dominates and that an answer as good as the best known can use.

    That is what `Program.solve` begins with: the best prices of the Lagrangian relaxation, an
    answer rounded from them, and its reduced costs.
    """
    task = _Task(program, [row.limit for row in rows], gap, math.inf)
    _, prices = program._cuts.maximise(task._room, math.inf)
    task._prices = around(prices, program._cuts.most_costs)
    task._round()
    groups = by_group(np.unique(task._left().source), program._starts)
    return [(own - first).tolist() for own, first in zip(groups, program._starts, strict=False)]


def _some(table: Sequence[Sequence[float]], left: Sequence[Sequence[int]]) -> list[list]:
    return [[own[i] for i in kept] for own, kept in zip(table, left, strict=True)]


def _millionths(row: Row) -> np.ndarray:
    """All costs in millionths of the limit: larger numbers cost CBC the optimum."""
    return np.concatenate([np.array(group, dtype=float) for group in row.costs]) / row.limit * 1e6


def _largest(values: Values, found: np.ndarray) -> tuple[int, ...]:
    """The choice in each group, of a number for each of all choices."""
    ends = np.cumsum([*map(len, values)])[:-1]
    return tuple(int(np.argmax(group)) for group in np.split(found, ends))


def _proof(kind: str, gap: float) -> str:
    return "gap" if gap else kind


def _exact(value: float) -> Fraction:
    """A float as the decimal that it is written as, which is how limpq_ext reads it."""
    return Fraction(Decimal(repr(value)))


@dataclass(frozen=True)
class Peer:
    """Another solver, and the module that has to be installed for it."""

    module: str
    solve: Solve


PEERS = {
    CBC: Peer("pulp", cbc),
    "HiGHS": Peer("highspy", highs),
    "CP-SAT": Peer("ortools", cp_sat),
    "HiGHS, our presolve": Peer("highspy", presolved(highs)),
    "CP-SAT, our presolve": Peer("ortools", presolved(cp_sat)),
}


def installed(peers: Mapping[str, Peer] = PEERS) -> dict[str, Peer]:
    """The peers that can run here; a line for each of the others."""
    found = {}
    for name, peer in peers.items():
        if importlib.util.find_spec(peer.module):
            found[name] = peer
        else:
            print(f"{name} is left out: {peer.module} is not installed", file=sys.stderr)
    return found


# --- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What a contender gave, against limpq_ext's answers.

    Attributes:
        seconds: Of one call, the median where it was timed in turn.
        ratio: Its time over limpq_ext's.
        proof: What its answers are proven in, or how many it has if they are not.
        above: How far its sums of values are above ours at most, or what is wrong with them.
    """

    seconds: float
    ratio: float
    proof: str
    above: str


def measure_search(
    case: SearchCase,
    peers: Mapping[str, Peer],
    *,
    rounds: int = 5,
    seconds: float = SECONDS,
) -> tuple[Result, dict[str, Judged]]:
    """Solve a case with everybody, compare the answers, and time them in turn.

    Args:
        case: The case.
        peers: Whom to compare with.
        rounds: Rounds in turn; two at most for thousands of layers.
        seconds: Time limit of a peer's solve. Who does not finish, or takes long, runs once.

    Returns:
        The samples of those who were timed in turn; what everybody gave.

    Raises:
        AssertionError: Our answer breaks a row or is not proven, or another one that keeps the rows
            is better than our bound.
    """
    values, rows = case.build()
    points = [[replace(rows[0], limit=limit), *rows[1:]] for limit in limits_of(case, rows)]
    exact = [[_exact(value) for value in group] for group in values]

    def ours(_: object) -> list[Answer]:
        program, answers, chosen = Program(values, rows, tiebreaks=ties), [], None
        for point in points:
            limits = [row.limit for row in point]
            solution = program.solve(limits, gap=case.gap, deadline=math.inf, start=chosen)
            chosen = solution.chosen
            answers.append(Answer(chosen, PROOFS[solution.stopped_by], solution.bound))
        return answers

    def theirs(peer: Peer, _: object) -> list[Answer]:
        begin, answers = time.perf_counter(), []
        for point in points:
            answers.append(peer.solve(values, point, case.gap, seconds))
            if not answers[-1].proof or time.perf_counter() - begin > CURVE_SECONDS:
                break
        return answers

    ties = [row.costs for row in rows]
    contenders = {OURS: Contender(ours)}
    contenders |= {name: Contender(functools.partial(theirs, p)) for name, p in peers.items()}
    answers, took = {}, {}
    for name, contender in contenders.items():
        begin = time.perf_counter()
        answers[name] = contender.run(None)
        took[name] = time.perf_counter() - begin
    assert all(answer.proof for answer in answers[OURS])
    above = {name: _above(exact, points, given, answers[OURS]) for name, given in answers.items()}
    assert above[OURS] == "0", above[OURS]
    finished = {
        name for name, given in answers.items() if len(given) == len(points) and given[-1].proof
    }
    in_turn = {
        name: contender
        for name, contender in contenders.items()
        if name == OURS or (name in finished and took[name] <= ONCE_SECONDS)
    }
    turns = Turns(in_turn, "cpu", calibrate=False)
    for _ in range(rounds if len(values) <= 500 else min(rounds, 2)):
        turns.round()
    result = Result.of(case.name, 0, compare_samples(turns.seconds), case.targets)
    once = {name: took[name] / result.medians[OURS] for name in contenders} | {OURS: 1.0}
    judged = {
        name: Judged(
            result.medians.get(name, took[name]),
            result.ratios.get(name, once[name]),
            _proofs(given) if name in finished else f"not finished: {len(given)} of {len(points)}",
            above[name],
        )
        for name, given in answers.items()
    }
    return result, judged


def _proofs(given: Sequence[Answer]) -> str:
    """What the answers of a curve are proven in; how many where they differ."""
    counts = Counter(answer.proof for answer in given)
    if len(counts) == 1:
        return given[0].proof
    return ", ".join(f"{count} {proof}" for proof, count in counts.most_common())


def _above(
    exact: list[list[Fraction]],
    points: Sequence[list[Row]],
    given: Sequence[Answer],
    best: Sequence[Answer],
) -> str:
    """How far the sums of values of some answers are above ours at most, counted exactly."""
    differences = []
    for rows, answer, ours in zip(points, given, best, strict=False):
        if answer.chosen is None:
            return "nothing found"
        if any(row.use(answer.chosen) > row.limit for row in rows):
            return "breaks a limit"
        assert ours.chosen is not None
        theirs, own = (total(exact, chosen) for chosen in (answer.chosen, ours.chosen))
        assert theirs >= (own if ours.proof == "integers" else Fraction(ours.bound)), "not the best"
        differences.append(theirs - own)
    worst = max(differences)
    return f"{float(worst):.1e}" if worst else "0"


def search_table(
    measured: Sequence[tuple[Result, Mapping[str, Judged]]], wanted: Mapping[str, float]
) -> str:
    """What everybody gave in every case, as a Markdown table."""
    rows = [("case", "solver", "time", f"x {OURS}", "proof in", "above ours", "wanted")]
    for result, judged in measured:
        most = wanted.get(result.name, math.inf)
        limits = [show_seconds(most)] * (most < math.inf)
        limits += [f"{least:g} x {peer}" for peer, least in result.targets.items()]
        met = result.medians[OURS] <= most and not result.missed()
        verdict = f"{', '.join(limits)}: {'met' if met else 'missed'}" if limits else ""
        for name, own in judged.items():
            shown = (show_seconds(own.seconds), f"{own.ratio:.2f}", own.proof, own.above)
            rows.append((result.name, name, *shown, verdict if name == OURS else ""))
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only cases whose name has this text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of one solve")
    parser.add_argument("--indicators", type=Path, help="LIMPQ's published pickle of ResNet-50")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # PuLP's, a line per variable
    others, start = OtherProcesses(), time.monotonic()
    chosen = [case for case in cases(options.indicators) if options.only in case.name]
    peers, measured = installed(), []
    for case in chosen:
        print(case.name, file=sys.stderr)
        measured.append(measure_search(case, peers, rounds=options.rounds, seconds=options.seconds))
    print(search_table(measured, {case.name: case.seconds for case in chosen}))
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    warning = contention(others.share())
    if warning:
        print(f"Careful: {warning}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
