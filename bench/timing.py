"""The one way in which everything here is measured: contenders take turns, round by round.

A round times every contender once, so that whatever slows the machine down for a while slows all of
them down, and a ratio is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# A sample is at least this long: far above the clock's resolution and the cost of two events.
MIN_SAMPLE_SECONDS = 1e-3
MAX_CALLS_PER_SAMPLE = 2000


@dataclass(frozen=True)
class Contender:
    """One of those that take turns.

    Attributes:
        run: What is timed; it gets what ``prepare`` gave. What it returns is dropped in the time.
        prepare: Makes one call's input from the number of the call; not timed.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda call: call


class Turns:
    """Contenders that are timed in turn.

    Args:
        contenders: By name; the first is the one that the others are compared with.
        device: "cpu", timed with the performance counter, or "cuda", timed with events.
        calibrate: Warm up, and repeat short calls within a sample. False: a sample is one call, for
            contenders that take seconds and are warm.

    Attributes:
        seconds: For every contender the time of one call, a sample per round.
    """

    def __init__(
        self, contenders: Mapping[str, Contender], device: str, *, calibrate: bool = True
    ) -> None:
        self.contenders = dict(contenders)
        self.device = device
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self._calls = dict.fromkeys(self.contenders, 1)
        self._round_seconds = 0.0
        if not calibrate:
            return
        for contender in self.contenders.values():  # the first call may compile
            self._sample(contender, 1)
            self._sample(contender, 1)
        for name, contender in self.contenders.items():
            once = min(self._sample(contender, 1) for _ in range(2))
            wanted = MIN_SAMPLE_SECONDS / max(once, 1e-9)
            self._calls[name] = min(max(1, round(wanted)), MAX_CALLS_PER_SAMPLE)
        self.round()
        for samples in self.seconds.values():
            samples.clear()

    def round(self) -> None:
        """Time every contender once; each round starts with another one."""
        start = time.perf_counter()
        names = list(self.contenders)
        first = len(self.seconds[names[0]]) % len(names)
        for name in names[first:] + names[:first]:
            calls = self._calls[name]
            self.seconds[name].append(self._sample(self.contenders[name], calls))
        self._round_seconds = time.perf_counter() - start

    def rounds_within(self, seconds: float, at_least: int = 5, at_most: int = 100) -> int:
        """How many rounds, preparations included, fit into a time."""
        return min(max(at_least, int(seconds / max(self._round_seconds, 1e-6))), at_most)

    def _sample(self, contender: Contender, calls: int) -> float:
        """Seconds per call, of so many calls in a row."""
        run = contender.run
        inputs = [contender.prepare(call) for call in range(calls)]
        gc.collect(0)
        gc.disable()
        try:
            if self.device == "cuda":
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                for value in inputs:
                    run(value)
                end.record()
                end.synchronize()
                return begin.elapsed_time(end) / 1e3 / calls
            start = time.perf_counter()
            for value in inputs:
                run(value)
            return (time.perf_counter() - start) / calls
        finally:
            gc.enable()


@dataclass(frozen=True)
class Comparison:
    """What the samples of :class:`Turns` say.

    Attributes:
        rounds: How many samples of each contender.
        medians: Seconds of one call, by contender.
        ratios: A contender's time over the first one's, the median of the rounds: above 1 the first
            one is faster.
        quartiles: The lower and upper quartile of the same ratios over the rounds.
    """

    rounds: int
    medians: dict[str, float]
    ratios: dict[str, float]
    quartiles: dict[str, tuple[float, float]]


def compare_samples(seconds: Mapping[str, list[float]]) -> Comparison:
    """Medians, and ratios of samples of the same round.

    Args:
        seconds: Samples by contender, all of the same number, in the order of the rounds; the first
            contender is the one that the others are compared with.
    """
    ours, *others = seconds
    ratios, quartiles = {}, {}
    for name in others:
        pairs = sorted(t / u for t, u in zip(seconds[name], seconds[ours], strict=True))
        ratios[name] = statistics.median(pairs)
        lower, _, upper = (
            statistics.quantiles(pairs, n=4, method="inclusive") if len(pairs) > 1 else pairs * 3
        )
        quartiles[name] = (lower, upper)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    return Comparison(len(seconds[ours]), medians, ratios, quartiles)


class OtherProcesses:
    """How much of the machine's CPU time other processes take from now on.

    Two threads that wait for each other wait a whole time slice wherever a third process has the
    core of one of them. Then a sample counts time slices, and no median helps.
    """

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Their part of all CPU time since the start, 0 to 1; None where Linux does not tell."""
        now = self._read()
        if self._start is None or now is None:
            return None
        busy, total = (after - before for after, before in zip(now, self._start, strict=True))
        return min(max(0.0, busy / total), 1.0) if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float] | None:
        """Seconds that others were busy, and seconds in all, summed over the CPUs."""
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user
        seconds = [int(field) / ticks for field in line.split()[1:9]]
        own = os.times()
        idle = seconds[3] + seconds[4]
        mine = own.user + own.system + own.children_user + own.children_system
        return sum(seconds) - idle - mine, sum(seconds)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of giving it back to the system.

    Otherwise every tensor of some 30 MB and more is new pages from the system, whose zeroing takes
    longer than most kernels do. It is the same for all contenders, and those with most temporary
    tensors gain most. Training programs get the same from a caching allocator.

    Returns:
        Whether the C library could be told; only glibc can.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))
