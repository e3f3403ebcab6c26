from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from limpq_ext.ilp.program import Program, _Task, minimise, nearest
from limpq_ext.ilp.rows import Link, NoSolutionError, Row

ENGINES = {
    "sweeps": {},
    "narrow sweeps, then HiGHS": {"ilp.program.WIDTHS": (1, 2), "ilp.program.LAST_WIDTH": 1},
    "links left to HiGHS": {"ilp.columns.MOST_TUPLES": 0},
}
"""Constants of modules under which the same answers have to come out."""


def total(values, chosen):
    return math.fsum(group[i] for group, i in zip(values, chosen, strict=True))


def solve(values, rows):
    return minimise(values, rows, gap=0.0, deadline=math.inf)


def knapsack(values, row):
    """The smallest sum of values with one limit, by dynamic programming over the used cost."""
    best = np.full(row.limit + 1, np.inf)
    best[0] = 0.0
    for group, costs in zip(values, row.costs, strict=True):
        after = np.full_like(best, np.inf)
        for value, cost in zip(group, costs, strict=True):
            if cost <= row.limit:
                np.minimum(after[cost:], best[: len(best) - cost] + value, out=after[cost:])
        best = after
    return best.min()


@pytest.mark.parametrize("tightness", [0.0, 0.02, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_forty_groups_give_the_optimum_of_dynamic_programming(seed, tightness):
    generator = np.random.default_rng(seed)
    values = generator.random((40, 25)).tolist()
    costs = generator.integers(0, 200, (40, 25)).tolist()
    smallest = Row(costs, 0).smallest
    row = Row(costs, smallest + int(tightness * 2000))
    solution = solve(values, [row])
    assert row.use(solution.chosen) <= row.limit
    assert total(values, solution.chosen) == pytest.approx(knapsack(values, row), rel=1e-9)
    assert solution.bound == pytest.approx(total(values, solution.chosen), rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), largest=st.sampled_from([3, 10**3, 10**9, 2**53, 10**25]))
def test_costs_of_any_size_and_order_give_the_brute_force_optimum(data, largest):
    groups = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(1, 3)) for _ in range(groups)]
    cost, value = st.integers(0, largest), st.integers(1, 1000).map(lambda n: n / 1000)
    values = [[data.draw(value) for _ in range(n)] for n in shape]
    rows = []
    feasible = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    for _ in range(data.draw(st.integers(1, 3))):
        costs = [[data.draw(cost) for _ in range(n)] for n in shape]
        slack = data.draw(st.sampled_from([0, 0, 1, largest // 3]))
        rows.append(Row(costs, Row(costs, 0).use(feasible) + slack))
    kept = (
        chosen
        for chosen in itertools.product(*map(range, shape))
        if all(row.use(chosen) <= row.limit for row in rows)
    )
    best = min(total(values, chosen) for chosen in kept)
    solution = solve(values, rows)
    assert all(row.use(solution.chosen) <= row.limit for row in rows)
    assert total(values, solution.chosen) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(("room", "most"), [(-1, 2), (0, 3)])
def test_one_unit_in_a_quadrillion_too_much_is_not_taken_and_the_last_one_is(room, most):
    costs = [[0, 10**15 + i] for i in range(6)]  # 1 unit is a thousandth of HiGHS's tolerance
    row = Row(costs, sum(cost for _, cost in costs[:3]) + room)
    solution = solve([[1.0, 0.5]] * 6, [row])
    assert sum(solution.chosen) == most
    assert row.use(solution.chosen) <= row.limit


def test_the_only_answer_is_found_where_it_is_far_from_the_relaxed_one():
    costs = [[*range(0, 40, 2), 1]] * 2  # an odd sum needs the one odd cost, which is dear
    values = [[0.1 + 0.001 * i for i in range(20)] + [100.0]] * 2
    at_most, at_least = Row(costs, 11), Row([[40 - cost for cost in group] for group in costs], 69)
    solution = solve(values, [at_most, at_least])
    assert at_most.use(solution.chosen) == 11
    assert total(values, solution.chosen) == pytest.approx(100.105, rel=1e-9)


def test_a_row_that_every_choice_costs_the_same_is_no_row():
    assert solve([[0.5, 0.25]], [Row([[7, 7]], 7)]).chosen == (1,)


# ------------------------------------------------------------------------------ links, tiebreaks


def score(values, tiebreaks, chosen):
    """What has to be smallest: the exact sum of the decimals, then the tiebreaks."""
    value = sum(Fraction(str(group[i])) for group, i in zip(values, chosen, strict=True))
    return value, *(Row(table, 0).use(chosen) for table in tiebreaks)


def all_kept(rows, links, chosen):
    return all(row.use(chosen) <= row.limit for row in rows) and all(
        len({labels[chosen[g]] for g, labels in link.labels.items()}) == 1 for link in links
    )


@st.composite
def programs(draw, largest_costs=(1, 5, 1000, 10**9, 2**53, 10**25)):
    """Values, rows, links and tiebreaks that are often tied and often cannot be kept."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    largest = draw(st.sampled_from(largest_costs))

    def table(cost):
        return [[draw(cost) for _ in range(n)] for n in shape]

    digits = draw(st.sampled_from([0, 1, 3, 1000]))
    values = table(st.integers(0, digits).map(lambda n: n / 1000))
    some = draw(st.permutations(range(len(shape))))
    links = []
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        groups = draw(st.sets(st.sampled_from(some), min_size=1))
        label = st.integers(0, draw(st.integers(0, 2)))
        links.append(Link({g: [draw(label) for _ in range(shape[g])] for g in sorted(groups)}))
    rows = []
    meant = [draw(st.integers(0, n - 1)) for n in shape]
    for _ in range(draw(st.integers(0, 3))):
        costs = table(st.integers(0, largest))
        slack = draw(st.sampled_from([0, 1, -1, largest // 3, -largest // 3]))
        rows.append(Row(costs, max(0, Row(costs, 0).use(meant) + slack)))
    ties = st.integers(0, draw(st.sampled_from([1, 5, largest])))
    return values, rows, links, [table(ties) for _ in range(draw(st.integers(0, 2)))]


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_links_and_tiebreaks_give_the_brute_force_answer_or_a_proof_that_there_is_none(
    engine, data
):
    # in an objective HiGHS does not see what is a billionth of it
    sizes = (1, 5, 1000, 10**6) if ENGINES[engine] else (1, 5, 1000, 10**9, 2**53, 10**25)
    values, rows, links, tiebreaks = data.draw(programs(sizes))
    every = itertools.product(*(range(len(group)) for group in values))
    scores = [score(values, tiebreaks, c) for c in every if all_kept(rows, links, c)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENGINES[engine].items():
            patch.setattr(f"limpq_ext.{name}", value)
        try:
            solution = minimise(
                values, rows, gap=0.0, deadline=math.inf, links=links, tiebreaks=tiebreaks
            )
        except NoSolutionError:
            assert not scores
            return
    assert all_kept(rows, links, solution.chosen)
    assert score(values, tiebreaks, solution.chosen) == min(scores)
    assert solution.stopped_by in (("optimal", "tolerance") if ENGINES[engine] else ("optimal",))
    least = min(scores)[0]
    if solution.stopped_by == "optimal":
        assert solution.bound == pytest.approx(float(least), rel=1e-9, abs=1e-300)
    assert Fraction(solution.bound) <= least
    assert solution.bound == pytest.approx(float(least), abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_groups_does_not_matter(seed):
    generator = np.random.default_rng(seed)
    shape = (24, 9)
    values = (generator.integers(0, 4, shape) / 10).tolist()  # many sums are equal
    costs = generator.integers(0, 20, shape).tolist()
    tiebreak = (1 << generator.permutation(shape[0] * 2)[: shape[0], None]) * np.arange(9)
    labels = generator.integers(0, 3, shape).tolist()
    row = Row(costs, Row(costs, 0).smallest + 60)
    order = generator.permutation(shape[0]).tolist()

    def answer(which):
        place = {group: i for i, group in enumerate(which)}
        return minimise(
            [values[g] for g in which],
            [Row([costs[g] for g in which], row.limit)],
            gap=0.0,
            deadline=math.inf,
            links=[Link({place[g]: labels[g] for g in (3, 8, 20)})],
            tiebreaks=[[tiebreak[g].tolist() for g in which]],
        ).chosen

    turned = answer(order)
    assert dict(zip(order, turned, strict=True)) == dict(enumerate(answer(range(shape[0]))))


def test_groups_that_are_all_alike_are_no_trouble():
    bits = [(w, a) for w in range(2, 7) for a in range(2, 7)]
    values = [[1 / w + 1 / a for w, a in bits]] * 80
    operations, size = Row([[w * a for w, a in bits]] * 80, 80 * 13), [[w for w, _ in bits]] * 80
    solution = minimise(values, [operations], gap=0.0, deadline=math.inf, tiebreaks=[size])
    assert solution.stopped_by == "optimal"
    assert total(values, solution.chosen) == pytest.approx(knapsack(values, operations), rel=1e-12)


def test_decimals_that_add_up_to_the_same_are_equal():
    values = [[0.1, 0.3], [0.2, 0.0]]  # in floats 0.1 + 0.2 is above 0.3
    both = Link({0: [0, 1], 1: [0, 1]})
    for tiebreak, chosen in (([[0, 1], [0, 0]], (0, 0)), ([[1, 0], [0, 0]], (1, 1))):
        solution = minimise(
            values, [], gap=0.0, deadline=math.inf, tiebreaks=[tiebreak], links=[both]
        )
        assert solution.chosen == chosen


@settings(max_examples=100, deadline=None)
@given(
    program=programs((1, 5, 1000, 10**6)),
    weights=st.lists(st.fractions(0.01, 100), min_size=3, max_size=3),
)
def test_the_nearest_choice_exceeds_the_limits_least(program, weights):
    values, rows, links, _ = program
    assume(rows)
    weights = weights[: len(rows)]

    def excess(chosen):
        over = (max(0, row.use(chosen) - row.limit) for row in rows)
        return sum(weight * units for weight, units in zip(weights, over, strict=True))

    every = itertools.product(*(range(len(group)) for group in values))
    kept = [excess(chosen) for chosen in every if all_kept([], links, chosen)]
    if not kept:
        with pytest.raises(NoSolutionError):
            nearest(rows, weights, links=links, deadline=math.inf)
        return
    chosen = nearest(rows, weights, links=links, deadline=math.inf)
    assert all_kept([], links, chosen)
    largest = max(w * row.use(chosen) for w, row in zip(weights, rows, strict=True))
    assert float(excess(chosen)) == pytest.approx(float(min(kept)), abs=1e-8 * float(largest))


# ------------------------------------------------------------------------- against another solver


def random_problem(seed):
    """A problem of 2 to 60 layers with up to four rows, some of it as bits make it."""
    generator = np.random.default_rng(seed)
    layers, count = int(generator.integers(2, 61)), int(generator.integers(1, 5))
    if seed % 2:
        bits = np.array([(w, a) for w in range(2, 7) for a in range(2, 7)])
        learned = np.sort(generator.random((2, layers, 5)), axis=2)[:, :, ::-1]
        learned *= np.exp(generator.normal(-3, 1, (2, layers, 1)))
        values = learned[0][:, bits[:, 0] - 2] + learned[1][:, bits[:, 1] - 2]
        scale = np.exp(generator.normal(8, 1, (4, layers, 1))).astype(int)
        ways = (bits.prod(axis=1), bits[:, 0], bits[:, 1], np.maximum(*bits.T))
        tables = [scale[k] * way for k, way in enumerate(ways[:count])]
    else:
        shape = (layers, int(generator.integers(2, 13)))
        values = generator.random(shape)
        tables = [generator.integers(0, 10**4, shape) for _ in range(count)]
    meant = generator.integers(0, values.shape[1], layers)
    everywhere = np.arange(layers)
    rows = [
        Row(t.tolist(), int(t[everywhere, meant].sum() * generator.uniform(1, 1.1))) for t in tables
    ]
    return values.tolist(), rows


def coin_or(values, rows):
    """The answer of PuLP's CBC."""
    pulp = pytest.importorskip("pulp")
    problem = pulp.LpProblem(sense=pulp.LpMinimize)
    taken = [
        [pulp.LpVariable(f"x_{g}_{i}", cat="Binary") for i in range(len(group))]
        for g, group in enumerate(values)
    ]
    flat = list(itertools.chain.from_iterable(taken))
    # CBC looks for answers that are better by 1e-5 at least, whatever the objective's size
    problem += pulp.lpDot([1e6 * v for v in itertools.chain.from_iterable(values)], flat)
    for group in taken:
        problem += pulp.lpSum(group) == 1
    for row in rows:
        problem += pulp.lpDot(itertools.chain.from_iterable(row.costs), flat) <= row.limit
    tight = ["primalT 1e-9", "integerT 1e-9", "ratio 0", "allow 0"]
    problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, threads=1, options=tight))
    assert pulp.LpStatus[problem.status] == "Optimal"
    return [max(range(len(group)), key=lambda i: group[i].value()) for group in taken]


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[] if s < 12 else pytest.mark.slow) for s in range(300)]
)
def test_the_objective_is_the_one_of_cbc(seed):
    values, rows = random_problem(seed)
    theirs = coin_or(values, rows)
    # with costs of up to six digits CBC's tolerance cannot hide a unit
    assert all_kept(rows, [], theirs)
    solution = minimise(
        values, rows, gap=0.0, deadline=math.inf, tiebreaks=[row.costs for row in rows]
    )
    assert all_kept(rows, [], solution.chosen)
    assert total(values, solution.chosen) == pytest.approx(total(values, theirs), rel=1e-9)
    assert solution.stopped_by in ("optimal", "tolerance")  # four tight rows may be left to HiGHS


# -------------------------------------------------------------------------- limits, gaps, deadlines


def test_a_program_gives_for_other_limits_what_a_new_one_gives():
    values, rows = random_problem(3)
    ties = [row.costs for row in rows]
    program, start = Program(values, rows, tiebreaks=ties), None
    for percent in (100, 98, 99, 105, 130):
        limits = [row.limit * percent // 100 for row in rows]
        fresh = [Row(row.costs, limit) for row, limit in zip(rows, limits, strict=True)]
        found = program.solve(limits, gap=0.0, deadline=math.inf, start=start)
        again = minimise(values, fresh, gap=0.0, deadline=math.inf, tiebreaks=ties)
        assert found.chosen == again.chosen
        start = found.chosen


def test_the_prices_maximise_the_relaxation():
    values, rows = random_problem(7)
    solution = solve(values, rows)
    costs = np.array([row.costs for row in rows], dtype=float)
    limits = np.array([row.limit for row in rows], dtype=float)

    def relaxed(prices):
        priced = np.array(values) + np.tensordot(prices, costs, 1)
        return priced.min(axis=1).sum() - prices @ limits

    prices = np.array(solution.prices)
    assert (prices >= 0).all()
    assert prices.max() > 0
    best = relaxed(prices)
    assert best <= total(values, solution.chosen)
    for k, factor in itertools.product(range(len(rows)), (0.99, 1.01)):
        other = prices.copy()
        other[k] = factor * prices[k] if prices[k] else 0.01 * values[0][0] / limits[k]
        assert relaxed(other) <= best + 1e-6 * abs(best)


def test_a_row_that_does_not_bind_has_no_price():
    generator = np.random.default_rng(0)
    costs = generator.integers(0, 200, (40, 25)).tolist()
    solution = solve(generator.random((40, 25)).tolist(), [Row(costs, 1000), Row(costs, 10**6)])
    assert solution.prices[0] > 0
    assert solution.prices[1] == 0


def test_a_gap_is_kept_and_named():
    generator = np.random.default_rng(1)
    values = generator.random((200, 25)).tolist()
    rows = [Row(generator.integers(0, 200, (200, 25)).tolist(), 9000) for _ in range(2)]
    solution = minimise(values, rows, gap=1e-3, deadline=math.inf)
    best = total(values, solve(values, rows).chosen)
    objective = total(values, solution.chosen)
    assert solution.stopped_by in ("gap", "optimal")
    assert solution.bound <= best <= objective
    assert objective - solution.bound <= 1e-3 * objective


def test_with_no_time_left_the_start_is_returned_if_it_keeps_the_limits():
    generator = np.random.default_rng(0)
    values = generator.random((40, 25)).tolist()
    row = Row(generator.integers(0, 200, (40, 25)).tolist(), 2000)
    cheapest = [min(range(25), key=group.__getitem__) for group in row.costs]
    solution = minimise(values, [row], gap=0.0, deadline=0.0, start=cheapest)
    assert solution.chosen == tuple(cheapest)
    assert solution.stopped_by == "time"
    assert solution.bound <= total(values, solve(values, [row]).chosen)
    with pytest.raises(TimeoutError, match="no policy was found within the time limit"):
        minimise(values, [Row(row.costs, 300)], gap=0.0, deadline=0.0, start=[0] * 40)


def test_a_deadline_gives_the_best_so_far_and_a_true_bound():
    generator = np.random.default_rng(2)  # a subset sum of twelve digits: out of reach
    costs = generator.integers(1, 10**12, (60, 5))
    values = (10**12 - costs).astype(float).tolist()
    row = Row(costs.tolist(), int(costs.mean() * 60))
    start = time.perf_counter()
    solution = minimise(values, [row], gap=0.0, deadline=start + 1.0)
    assert row.use(solution.chosen) <= row.limit
    assert solution.stopped_by in ("time", "optimal")
    assert 60 * 10**12 - row.limit <= solution.bound * (1 + 1e-9)
    assert solution.bound <= total(values, solution.chosen)


# ------------------------------------------------------------------------------------------ errors


def test_links_without_a_common_label_are_no_solution():
    with pytest.raises(NoSolutionError, match="links"):
        minimise(
            [[1.0, 2.0], [1.0, 2.0]],
            [],
            gap=0.0,
            deadline=math.inf,
            links=[Link({0: [1, 2], 1: [3, 4]})],
        )


def test_rows_that_only_together_cannot_be_kept_are_no_solution():
    costs = [[2, 0]] * 20
    rows = [Row(costs, 19), Row([[0, 2]] * 20, 19)]  # each leaves 9 groups, and there are 20
    with pytest.raises(NoSolutionError):
        solve(np.random.default_rng(0).random((20, 2)).tolist(), rows)


@pytest.mark.parametrize(
    ("values", "more", "message"),
    [
        ([], {}, "no group"),
        ([[1.0], []], {}, "group 1 has no choice"),
        ([[math.nan]], {}, "not finite"),
        ([[1e308, 0.0]] * 2, {}, "too large"),
        ([[1.0, 2.0]], {"rows": [Row([[1]], 1)]}, "row 0 has other groups or choices"),
        ([[1.0, 2.0]], {"tiebreaks": [[[1, 2], [1, 2]]]}, "tiebreak 0 has other groups"),
        ([[1.0, 2.0]], {"links": [Link({0: [1]})]}, "link 0 has other choices in group 0"),
        ([[1.0, 2.0]], {"links": [Link({3: [1]})]}, "link 0 has other choices in group 3"),
    ],
)
def test_what_does_not_fit_together_is_named(values, more, message):
    with pytest.raises(ValueError, match=message):
        Program(values, more.pop("rows", []), **more)


def test_a_deadline_that_has_passed_says_so():
    generator = np.random.default_rng(0)
    row = Row(generator.integers(0, 200, (40, 25)).tolist(), 2000)
    with pytest.raises(TimeoutError, match="no policy was found within the time limit"):
        minimise(generator.random((40, 25)).tolist(), [row], gap=0.0, deadline=0.0)


def test_the_same_program_gives_the_same_answer():
    generator = np.random.default_rng(0)
    values = generator.random((30, 9)).tolist()
    row = Row(generator.integers(0, 10**6, (30, 9)).tolist(), 5 * 10**6)
    assert solve(values, [row]) == solve(values, [row])


# -------------------------------------------------------------------------- values of any size


@st.composite
def wide_programs(draw):
    """Programs whose values span hundreds of powers of ten, some of them meant as forbidden."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    some = draw(st.lists(st.sampled_from([-320, -300, -17, -3, 0, 3, 16, 30, 300]), min_size=1))
    digits = st.sampled_from(["1", "1.7", "3", "9.87654321", "2.718281828459045"])
    power = st.sampled_from([0, *some[:3]])
    number = st.one_of(st.just(0.0), st.builds(lambda d, p: float(f"{d}e{p}"), digits, power))
    values = [[draw(number) for _ in range(n)] for n in shape]
    rows = []
    for _ in range(draw(st.integers(0, 2))):
        costs = [[draw(st.integers(0, 9)) for _ in range(n)] for n in shape]
        rows.append(Row(costs, draw(st.integers(0, 30))))
    return values, rows, [[[draw(st.integers(0, 3)) for _ in range(n)] for n in shape]]


@settings(max_examples=300, deadline=None)
@given(program=wide_programs())
def test_values_of_any_range_give_the_exact_optimum(program):
    values, rows, tiebreaks = program
    every = itertools.product(*(range(len(group)) for group in values))
    scores = [score(values, tiebreaks, c) for c in every if all_kept(rows, [], c)]
    if not scores:
        with pytest.raises(NoSolutionError):
            minimise(values, rows, gap=0.0, deadline=math.inf, tiebreaks=tiebreaks)
        return
    solution = minimise(values, rows, gap=0.0, deadline=math.inf, tiebreaks=tiebreaks)
    assert score(values, tiebreaks, solution.chosen) == min(scores)
    assert solution.stopped_by == "optimal"


@pytest.mark.parametrize("penalty", [1e10, 1e16, 3.7e30, 1e300])
def test_choices_that_a_huge_value_forbids_leave_the_others_as_exact_as_without_them(penalty):
    generator = np.random.default_rng(0)
    values = generator.random((60, 9)).tolist()
    row = Row(generator.integers(0, 200, (60, 9)).tolist(), 3000)
    plain = solve(values, [row])
    forbidden = [[*group, penalty] for group in values]
    cheap = Row([[*costs, 0] for costs in row.costs], row.limit)
    solution = solve(forbidden, [cheap])
    assert solution.chosen == plain.chosen
    assert solution.stopped_by == "optimal"
    assert solution.bound == plain.bound


def test_what_only_highs_proved_is_called_so_and_has_a_bound_below_it(monkeypatch):
    monkeypatch.setattr("limpq_ext.ilp.program.WIDTHS", (1,))
    monkeypatch.setattr("limpq_ext.ilp.program.LAST_WIDTH", 1)
    values, rows = random_problem(3)
    solution = solve(values, rows)
    objective = total(values, solution.chosen)
    assert solution.stopped_by == "tolerance"
    assert objective * (1 - 1e-5) < solution.bound < objective


@pytest.mark.parametrize("groups", [50, 250])
def test_rounding_exchanges_choices_in_programs_of_any_number_of_groups(groups):
    generator = np.random.default_rng(0)
    values = generator.random((groups, 4)).tolist()
    row = Row(generator.integers(0, 200, (groups, 4)).tolist(), 50 * groups)
    task = _Task(Program(values, [row]), [row.limit], 0.0, math.inf)
    floor, prices = task._program._cuts.maximise(task._room, math.inf)
    task._prices = prices[None]
    task._round()
    assert task.best is not None
    # a few exchanges away from the bound: less than a tenth of what one group spans
    assert (task.upper - floor) * float(task._program._unit) < 0.1


def test_rounding_moves_one_group_where_that_is_enough():
    row = Row([[0, 3], [0, 5]], 3)
    layout = Program([[1.0, 0.0], [1.0, 0.9]], [row])
    task = _Task(layout, [3], 0.0, math.inf)
    task._prices = np.zeros((1, 1))
    task._round()
    assert task.best == [1, 0]


def test_sweeps_hold_no_more_than_they_may_and_find_the_same(monkeypatch):
    values, rows = random_problem(3)
    plain = solve(values, rows)
    monkeypatch.setattr("limpq_ext.ilp.sweep.MOST_BYTES", 2**14)
    assert solve(values, rows).chosen == plain.chosen
