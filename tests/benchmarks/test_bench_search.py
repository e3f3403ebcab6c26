"""The comparison of solvers: all of them on tiny problems, and what is said about their answers."""

from __future__ import annotations

import itertools
import math
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is not installed

from bench import search
from bench.search import Answer, Peer, SearchCase
from limpq_ext.ilp.program import Program, Row
from limpq_ext.ilp.rows import Solution, total

pytest.importorskip("highspy")

NOTHING = Peer("highspy", lambda values, rows, gap, seconds: Answer(None, ""))
FIRST = Peer("highspy", lambda values, rows, gap, seconds: Answer((0,) * len(values), "floats"))


def tiny(seed=0, groups=6):
    """A problem that all answers can be written down of."""
    generator = np.random.default_rng(seed)
    values = generator.random((groups, 4)).round(3)
    costs = generator.integers(1, 100, (2, groups, 4))
    return values.tolist(), [search._limited(table, 0.35) for table in costs]


def two():
    """Two groups whose first choices are the best ones, and within the limit."""
    return [[1.0, 1.5], [2.0, 2.25]], [Row([[1, 0], [1, 0]], 2)]


def best_of(values, rows):
    """The smallest sum of values, from all answers."""
    exact = [[search._exact(value) for value in group] for group in values]
    answers = itertools.product(*(range(len(group)) for group in values))
    kept = (a for a in answers if all(row.use(a) <= row.limit for row in rows))
    return min(total(exact, answer) for answer in kept)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", search.PEERS)
def test_every_solver_finds_the_best_answer(name, seed):
    peer = search.PEERS[name]
    pytest.importorskip(peer.module)
    values, rows = tiny(seed)
    answer = peer.solve(values, rows, 0.0, 60.0)
    assert answer.proof == ("integers" if "CP-SAT" in name else "floats")
    assert all(row.use(answer.chosen) <= row.limit for row in rows)
    exact = [[search._exact(value) for value in group] for group in values]
    assert total(exact, answer.chosen) == best_of(values, rows)


@pytest.mark.parametrize("name", search.PEERS)
def test_no_solver_claims_more_than_the_gap_that_it_was_asked_for(name):
    peer = search.PEERS[name]
    pytest.importorskip(peer.module)
    assert peer.solve(*tiny(), 0.01, 60.0).proof == "gap"


@pytest.mark.parametrize("name", ["PuLP/CBC", "HiGHS", "CP-SAT"])
def test_a_problem_without_an_answer_has_none(name):
    peer = search.PEERS[name]
    pytest.importorskip(peer.module)
    values, (row, other) = tiny()
    assert peer.solve(values, [Row(row.costs, 1), other], 0.0, 60.0) == Answer(None, "")


def test_the_presolve_leaves_the_best_answer_and_little_else():
    values, rows = search.layers_of_bits(0, 40, 2)
    left = search.choices_left(Program(values, rows), rows, 0.0)
    best = Program(values, rows).solve(gap=0.0, deadline=math.inf).chosen
    assert all(choice in kept for choice, kept in zip(best, left, strict=True))
    assert sum(map(len, left)) < sum(map(len, values)) / 4


def test_short_decimals_lose_nothing_in_whole_numbers_and_long_ones_say_what():
    assert search.whole_values([[0.5, 0.25], [3.0, 0.125]]) == ([[4, 2], [24, 1]], 0.0)
    values = np.random.default_rng(0).random((20, 5)).tolist()
    whole, loss = search.whole_values(values)
    unit = Fraction(1, round(len(values) / loss))
    assert 0 < loss < 1e-12
    assert sum(map(max, whole)) <= 2**53 + len(values)
    for numbers, group in zip(whole, values, strict=True):
        for number, value in zip(numbers, group, strict=True):
            assert abs(number * unit - search._exact(value)) <= unit / 2


@pytest.mark.parametrize("points", [0, 3])
def test_everybody_is_judged_by_our_answers(points):
    case = SearchCase("tiny", tiny, 60.0, points=points)
    peers = {"HiGHS": search.PEERS["HiGHS"], "nothing": NOTHING, "first": FIRST}
    result, judged = search.measure_search(case, peers, rounds=2, seconds=60.0)
    assert list(result.medians) == ["limpq_ext", "HiGHS", "first"]
    assert {name: own.above for name, own in judged.items()} == {
        "limpq_ext": "0",
        "HiGHS": "0",
        "nothing": "nothing found",
        "first": "breaks a limit",
    }
    assert [own.proof for own in judged.values()] == [
        "integers",
        "floats",
        f"not finished: 1 of {points or 1}",
        "floats",
    ]
    table = search.search_table([(result, judged)], {"tiny": 60.0}).splitlines()
    assert len(table) == 2 + len(judged)
    assert "| 60 s: met" in table[2]


def test_an_answer_that_is_not_the_best_says_by_how_much():
    case = SearchCase("two", two, 1.0)
    second = Peer("highspy", lambda values, rows, gap, seconds: Answer((1, 1), "floats"))
    _, judged = search.measure_search(case, {"second": second}, rounds=1)
    assert judged["second"].above == "7.5e-01"


def test_an_answer_better_than_what_is_proven_is_an_error(monkeypatch):
    dearest = Solution((1, 1), 3.75, "wrong", "optimal", ())
    monkeypatch.setattr(Program, "solve", lambda self, limits, **how: dearest)
    case = SearchCase("two", two, 1.0)
    with pytest.raises(AssertionError, match="not the best"):
        search.measure_search(case, {"HiGHS": search.PEERS["HiGHS"]}, rounds=1)


def test_who_takes_long_runs_once(monkeypatch):
    monkeypatch.setattr(search, "ONCE_SECONDS", 0.0)
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return search.highs(*arguments)

    case = SearchCase("tiny", tiny, 60.0)
    result, judged = search.measure_search(case, {"slow": Peer("highspy", counting)}, rounds=3)
    assert len(calls) == 1
    assert list(result.medians) == ["limpq_ext"]
    assert judged["slow"].proof == "floats"


def test_a_solver_that_is_not_installed_is_left_out_with_a_line(capsys):
    peers = {"here": NOTHING, "gone": Peer("no_such_solver", NOTHING.solve)}
    assert search.installed(peers) == {"here": NOTHING}
    assert capsys.readouterr().err == "gone is left out: no_such_solver is not installed\n"


def test_the_cases_have_names_of_their_own_and_the_limits_of_a_curve_rise():
    found = search.cases(Path("some.pkl"))
    assert len({case.name for case in found}) == len(found)
    _, rows = tiny()
    limits = search.limits_of(SearchCase("curve", tiny, 1.0, points=5), rows)
    assert limits == sorted(set(limits))
    assert limits[0] >= rows[0].smallest


@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2", "ViT-B/16"])
def test_the_budgets_of_the_networks_can_be_kept_and_bind(name):
    (case,) = (case for case in search.cases() if name in case.name)
    values, rows = case.build()
    for row in rows:
        assert row.smallest < row.limit < sum(map(max, row.costs))
    assert Program(values, rows).solve(gap=0.0, deadline=math.inf).stopped_by == "optimal"


def test_the_proofs_of_a_curve_are_counted_where_they_differ():
    exact, near = Answer((0,), "integers"), Answer((0,), "floats")
    assert search._proofs([exact, exact]) == "integers"
    assert search._proofs([exact, near, exact]) == "2 integers, 1 floats"
