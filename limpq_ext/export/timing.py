"""How long engines take, in turn: what else the machine does comes to all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from limpq_ext.export.engines import Engine, Feeds


def seconds_in_turn(
    engines: Sequence[Engine], feeds: Feeds, *, seconds: float = 2.0, least: int = 5
) -> list[float]:
    """The median time of a forward of each engine, run one after the other again and again.

    Args:
        engines: With their files loaded.
        feeds: The inputs by name, the same for all.
        seconds: How long to measure in all.
        least: Rounds that are measured in any case.

    Returns:
        Seconds, in the order of the engines.
    """
    for engine in engines:
        engine.run(feeds)
    found: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + seconds
    while len(found[0]) < least or time.perf_counter() < end:
        for engine, own in zip(engines, found, strict=True):
            begin = time.perf_counter()
            engine.run(feeds)
            own.append(time.perf_counter() - begin)
    return [statistics.median(own) for own in found]
