"""Which of the measured times of a layer differ, and which are one value but for noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Pair = tuple[int, int]
"""Weight bits and activation bits."""

Times = Mapping[Pair, Sequence[float]]
"""Of one layer the seconds in each load of the networks, by pair, loads in one order."""

SCATTERS: Final = 3.0
"""The least difference that is no noise, in scatters of what is compared."""


@dataclass(frozen=True)
class Pooled:
    """The times of one layer.

    Attributes:
        groups: Pairs that have one value, from the fastest to the slowest group.
        seconds: The value of each pair.
        noise: The least difference, in seconds, that can count.
    """

    groups: tuple[tuple[Pair, ...], ...]
    seconds: dict[Pair, float]
    noise: float


def pool(layers: Mapping[str, Times], tick: float = 0.0) -> dict[str, Pooled]:
    """Give one value to the pairs of bits of a layer that differ by less than the noise.

    A pair takes what it does in its fastest load, since all else on a machine only adds to it; its
    scatter is what the second fastest load takes more. Two pairs differ by less than the noise
    where that is `SCATTERS` times the largest of their own scatters, the median scatter of the
    layer's pairs, and that of a typical layer in proportion to its time; or one tick of the
    engine's clock, if that is more. Pairs that do, also by way of others, are a group, and the
    median of their times is its value.

    Args:
        layers: Of each layer the times of the same pairs in the same number of loads.
        tick: What the engine's clock counts in, in seconds.

    Returns:
        The values by layer.
    """
    scatters = {
        name: {pair: _scatter(own) for pair, own in times.items()} for name, times in layers.items()
    }
    levels = {name: statistics.median(map(min, times.values())) for name, times in layers.items()}
    usual = {name: statistics.median(own.values()) for name, own in scatters.items()}
    shares = [usual[name] / levels[name] for name in layers if levels[name] > 0]
    typical = statistics.median(shares) if shares else 0.0
    return {
        name: _pooled(
            times,
            scatters[name],
            max(SCATTERS * max(usual[name], typical * levels[name]), tick),
        )
        for name, times in layers.items()
    }


def _scatter(times: Sequence[float]) -> float:
    """How far the second fastest load is from the fastest."""
    fastest = sorted(times)[:2]
    return fastest[-1] - fastest[0]


def _pooled(times: Times, scatters: Mapping[Pair, float], noise: float) -> Pooled:
    fastest = {pair: min(own) for pair, own in times.items()}
    groups: list[list[Pair]] = []
    for pair in sorted(fastest, key=lambda pair: (fastest[pair], pair)):
        own = [pair]
        while groups and any(
            fastest[pair] - fastest[other]
            <= max(noise, SCATTERS * scatters[pair], SCATTERS * scatters[other])
            for other in groups[-1]
        ):
            own = [*groups.pop(), *own]
        groups.append(own)
    seconds: dict[Pair, float] = {}
    for group in groups:
        value = statistics.median(fastest[pair] for pair in group)
        seconds |= dict.fromkeys(group, value)
    return Pooled(tuple(tuple(sorted(group)) for group in groups), seconds, noise)
