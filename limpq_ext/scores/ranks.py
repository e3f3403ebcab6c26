"""Rank correlation, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

RESAMPLES: Final = 2000
"""Resamples of the bootstrap."""


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation of pairs; None where all x or all y are equal."""
    found = _correlations(x, y, np.ones((1, len(x)), dtype=int))
    return float(found[0]) if len(found) else None


def interval(
    x: Sequence[float], y: Sequence[float], generator: np.random.Generator
) -> tuple[float, float] | None:
    """The interval of 95 % of a rank correlation: percentiles of the bootstrap over the pairs.

    Args:
        x: One side of the pairs.
        y: The other side.
        generator: Draws the resamples; those in which all x or all y are equal do not count.

    Returns:
        Its ends; None where no resample has a correlation.
    """
    counts = generator.multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES)
    found = _correlations(x, y, counts)
    if not len(found):
        return None
    low, high = np.percentile(found, [2.5, 97.5]).tolist()
    return low, high


def _correlations(x: Sequence[float], y: Sequence[float], counts: np.ndarray) -> np.ndarray:
    """The rank correlations of samples in which pair i stands ``counts[sample, i]`` times.

    Samples in which all x or all y are equal have none and are left out.
    """
    middle = (len(x) + 1) / 2  # the mean of the ranks
    first, second = (_ranks(values, counts) - middle for values in (x, y))
    products = [(counts * a * b).sum(axis=1) for a in (first, second) for b in (first, second)]
    size = np.sqrt(products[0] * products[3])
    some = size > 0
    return np.clip(products[1][some] / size[some], -1, 1)


def _ranks(values: Sequence[float], counts: np.ndarray) -> np.ndarray:
    """The rank of each value in each sample from 1; equal ones share the mean of theirs."""
    _, place = np.unique(np.asarray(values), return_inverse=True)
    levels = counts @ np.eye(place.max() + 1)[place]
    return (levels.cumsum(axis=1) - (levels - 1) / 2)[:, place]
