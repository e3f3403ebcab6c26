"""Which of the measured times of a layer differ, and which are one value but for noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Pair = tuple[int, int]
"""Weight bits and activation bits."""

Times = Mapping[Pair, Sequence[float]]
"""Of one layer the median seconds in each load of the networks, by pair, loads in one order."""

DEVIATIONS: Final = 3.0
"""The least difference that is no noise, in standard deviations of what one load gives."""


@dataclass(frozen=True)
class Pooled:
    """The times of one layer.

    Attributes:
        groups: Pairs that have one value, from the fastest to the slowest group.
        seconds: The value of each pair.
        noise: The least difference, in seconds, that counts.
    """

    groups: tuple[tuple[Pair, ...], ...]
    seconds: dict[Pair, float]
    noise: float


def pool(layers: Mapping[str, Times], tick: float = 0.0) -> dict[str, Pooled]:
    """Give one value to the pairs of bits of a layer that differ by less than the noise.

    A pair's time is the median over the loads. What the loads of a pair scatter, once what a load
    does to all pairs alike is taken off, has a standard deviation; `DEVIATIONS` of it are noise,
    and never less than those of a typical layer in proportion to its time, or than a tick of the
    engine's clock. In the order of their times, pairs are in one group as long as each is no
    farther from the one before; the group's value is the mean. So no two values of a layer differ
    by less than the noise.

    Args:
        layers: Of each layer the times of the same pairs in the same number of loads.
        tick: What the engine's clock counts in, in seconds.

    Returns:
        The values by layer.
    """
    deviations = {name: _deviation(times) for name, times in layers.items()}
    levels = {
        name: statistics.fmean(statistics.median(own) for own in times.values())
        for name, times in layers.items()
    }
    shares = [deviations[name] / levels[name] for name in layers if levels[name] > 0]
    typical = statistics.median(shares) if shares else 0.0
    return {
        name: _pooled(times, max(DEVIATIONS * max(deviations[name], typical * levels[name]), tick))
        for name, times in layers.items()
    }


def _deviation(times: Times) -> float:
    """The standard deviation of a load's times of a layer's pairs, without what all share."""
    pairs, loads = len(times), min(map(len, times.values()))
    if pairs < 2 or loads < 2:
        return 0.0
    of_pair = {pair: statistics.fmean(own) for pair, own in times.items()}
    of_load = [statistics.fmean(own[load] for own in times.values()) for load in range(loads)]
    mean = statistics.fmean(of_load)
    squares = [
        (own[load] - of_pair[pair] - of_load[load] + mean) ** 2
        for pair, own in times.items()
        for load in range(loads)
    ]
    return (sum(squares) / ((pairs - 1) * (loads - 1))) ** 0.5


def _pooled(times: Times, noise: float) -> Pooled:
    medians = {pair: statistics.median(own) for pair, own in times.items()}
    groups: list[list[Pair]] = []
    for pair in sorted(medians, key=lambda pair: (medians[pair], pair)):
        if groups and medians[pair] - medians[groups[-1][-1]] <= noise:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    seconds: dict[Pair, float] = {}
    for group in groups:
        value = statistics.fmean(medians[pair] for pair in group)
        seconds |= dict.fromkeys(group, value)
    return Pooled(tuple(tuple(sorted(group)) for group in groups), seconds, noise)
