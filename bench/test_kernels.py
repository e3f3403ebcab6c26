"""The kernel benchmarks under pytest-benchmark: `python -m pytest bench --benchmark-only`.

Its clock here is the sum of what bench/timing.py measured of limpq_ext, so its statistics are of
the same samples as the ratios, and every one of its rounds is a round of all contenders.
"""

from __future__ import annotations

import pytest

from bench.cases import Case
from bench.record import SECONDS_PER_CASE
from bench.report import OURS, Result
from bench.timing import Turns, compare_samples


class _Clock:
    """Stands still but for the time of limpq_ext's own samples."""

    turns: Turns | None = None

    def __call__(self) -> float:
        return sum(self.turns.seconds[OURS]) if self.turns else 0.0


CLOCK = _Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_kernels(case: Case, device: str, benchmark, results: list[Result], pytestconfig) -> None:
    work = case.build()
    CLOCK.turns = turns = Turns(work.contenders, device)
    rounds = turns.rounds_within(SECONDS_PER_CASE[pytestconfig.getoption("quick")])
    benchmark.pedantic(turns.round, rounds=rounds)
    result = Result.of(case.name, work.bytes, compare_samples(turns.seconds), case.targets)
    benchmark.extra_info |= {"medians": result.medians, "ratios": result.ratios}
    results.append(result)
