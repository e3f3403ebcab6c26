from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from limpq_ext.ilp.program import Program
from limpq_ext.ilp.quadratic import Product, QuadraticProgram
from limpq_ext.ilp.rows import Link, NoSolutionError, Row

ENGINES = {
    "all combinations of a block": {},
    "a group for each product": {"quadratic.MOST_TUPLES": 0},
    "links left to HiGHS": {"quadratic.MOST_TUPLES": 0, "columns.MOST_TUPLES": 0},
}
"""Constants of modules under which the same answers have to come out."""


def use(monkeypatch, engine):
    for name, value in ENGINES[engine].items():
        monkeypatch.setattr(f"limpq_ext.ilp.{name}", value)


def exact_sum(values, products, chosen):
    """The objective from its definition."""
    whole = sum((Fraction(str(own[i])) for own, i in zip(values, chosen, strict=True)), Fraction(0))
    for product in products:
        (g, h), (ones, others) = product.groups, product.labels
        whole += product.values.get((ones[chosen[g]], others[chosen[h]]), 0)
    return whole


def best_of(values, rows, products, links=()):
    """All answers that keep everything, and their sums."""
    return {
        chosen: exact_sum(values, products, chosen)
        for chosen in itertools.product(*(range(len(own)) for own in values))
        if all(row.use(chosen) <= row.limit for row in rows)
        and all(link.kept(chosen) for link in links)
    }


@st.composite
def quadratic_problems(draw):
    count = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(count)]
    value = st.integers(1, 1000).map(lambda n: n / 1000)
    values = [[draw(value) for _ in range(n)] for n in shape]
    rows = []
    for _ in range(draw(st.integers(0, 2))):
        costs = [[draw(st.integers(0, 30)) for _ in range(n)] for n in shape]
        rows.append(Row(costs, Row(costs, 0).smallest + draw(st.integers(-1, 40))))
    groups, label = st.integers(0, count - 1), st.integers(0, 2)
    products = []
    for _ in range(draw(st.integers(1, 5))):
        g, h = draw(groups), draw(groups)
        labels = tuple([draw(label) for _ in range(shape[each])] for each in (g, h))
        term = st.integers(-500, 500).map(lambda n: Fraction(n, 1000))
        keys = st.tuples(label, label)
        products.append(Product((g, h), labels, draw(st.dictionaries(keys, term, max_size=9))))
    links = []
    if draw(st.integers(0, 2)) == 0:
        tied = draw(st.lists(groups, min_size=2, max_size=3, unique=True))
        links.append(Link({g: [draw(label) for _ in range(shape[g])] for g in tied}))
    return values, rows, products, links


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None)
@given(problem=quadratic_problems())
def test_products_give_the_brute_force_optimum(engine, problem):
    values, rows, products, links = problem
    sums = best_of(values, rows, products, links)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, engine)
        if not sums:
            with pytest.raises(NoSolutionError):
                QuadraticProgram(values, rows, products, links=links).solve(
                    gap=0.0, deadline=math.inf
                )
            return
        program = QuadraticProgram(values, rows, products, links=links)
        solution = program.solve(gap=0.0, deadline=math.inf)
    least = min(sums.values())
    assert solution.chosen in sums
    assert float(sums[solution.chosen]) == pytest.approx(float(least), rel=1e-9, abs=1e-9)
    assert program.objective(solution.chosen) == sums[solution.chosen]
    assert Fraction(solution.bound) <= least
    assert solution.bound == pytest.approx(float(least), rel=1e-7, abs=1e-7)
    if solution.stopped_by == "optimal":
        assert sums[solution.chosen] == least
    assert engine != "all combinations of a block" or solution.stopped_by == "optimal"


def test_an_objective_that_is_not_convex_is_solved_exactly():
    # x' Q x with an indefinite Q: equal choices are dear, and a wish for each group conflicts
    values = [[0.0, 0.1], [0.0, 0.1], [0.0, 0.1]]
    apart = {(0, 0): Fraction(1), (1, 1): Fraction(1)}
    products = [
        Product((g, h), ([0, 1], [0, 1]), apart) for g, h in itertools.combinations(range(3), 2)
    ]
    matrix = np.kron(np.ones((3, 3)) - np.eye(3), np.eye(2))
    assert np.linalg.eigvalsh(matrix).min() < 0
    solution = QuadraticProgram(values, [], products).solve(gap=0.0, deadline=math.inf)
    assert sum(solution.chosen) == 1
    assert solution.bound == pytest.approx(1.1)


@pytest.mark.parametrize("engine", ENGINES)
def test_products_that_add_nothing_leave_the_answer_with_its_ties(engine, monkeypatch):
    use(monkeypatch, engine)
    generator = np.random.default_rng(0)
    values = (generator.integers(0, 4, (12, 6)) / 10).tolist()  # many sums are equal
    costs = generator.integers(0, 20, (12, 6)).tolist()
    tie = (generator.integers(0, 1000, (12, 6))).tolist()
    labels = generator.integers(0, 3, (12, 6)).tolist()
    rows = [Row(costs, Row(costs, 0).smallest + 30)]
    nothing = dict.fromkeys(itertools.product(range(3), repeat=2), Fraction(0))
    products = [Product((g, g + 1), (labels[g], labels[g + 1]), nothing) for g in range(0, 12, 2)]
    plain = Program(values, rows, tiebreaks=[tie]).solve(gap=0.0, deadline=math.inf)
    program = QuadraticProgram(values, rows, products, tiebreaks=[tie])
    assert program.solve(gap=0.0, deadline=math.inf).chosen == plain.chosen


def test_limits_and_a_start_are_taken():
    values = [[0.3, 0.2, 0.1]] * 3
    rows = [Row([[0, 1, 2]] * 3, 6)]
    steps = {(a, b): Fraction(abs(a - b), 20) for a in range(3) for b in range(3)}
    products = [Product((g, g + 1), ([0, 1, 2], [0, 1, 2]), steps) for g in range(2)]
    program = QuadraticProgram(values, rows, products)
    assert program.solve(gap=0.0, deadline=math.inf).chosen == (2, 2, 2)
    tight = program.solve([3], gap=0.0, deadline=math.inf, start=(2, 1, 0))
    assert program.objective(tight.chosen) == Fraction(6, 10)  # 1, 1, 1 without a step
    assert tight.prices == (pytest.approx(0.1),)


def test_time_runs_out_with_the_answer_without_products(monkeypatch):
    use(monkeypatch, "links left to HiGHS")
    values = [[0.3, 0.2, 0.1]] * 3
    rows = [Row([[0, 1, 2]] * 3, 3)]
    steps = {(a, b): Fraction(abs(a - b), 20) for a in range(3) for b in range(3)}
    products = [Product((g, g + 1), ([0, 1, 2], [0, 1, 2]), steps) for g in range(2)]
    program = QuadraticProgram(values, rows, products)
    whole = program._without_products
    answer = whole.solve(gap=0.0, deadline=math.inf)
    monkeypatch.setattr(whole, "solve", lambda *_, **__: answer)
    late = program.solve(gap=0.0, deadline=-math.inf)
    assert late.stopped_by == "time"
    assert late.chosen == answer.chosen
    assert late.bound <= program.objective(late.chosen)


@pytest.mark.parametrize(
    "product",
    [
        Product((0, 2), ([0, 1], [0]), {}),
        Product((0, 1), ([0, 1], [0]), {}),
    ],
)
def test_products_of_other_groups_are_refused(product):
    with pytest.raises(ValueError, match="product 0 has other groups or choices than the values"):
        QuadraticProgram([[0.1, 0.2], [0.1, 0.2]], [], [product])
