"""Stratified splits: every class in proportion, the same for the same labels and seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def stratified_split(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split samples in two, at random within each class.

    Of a class of n samples, ``fraction * n`` rounded up or down go into the part, so that all parts
    together are as near to ``fraction`` of all samples as that allows. Where a class has two
    samples or more, both sides get one at least; a single sample stays in the rest.

    Args:
        labels: Class of every sample, from 0.
        fraction: Of the part, 0 to 1 (1 not included).
        seed: Of the draw.

    Returns:
        The indices of the rest and of the part, both ascending.

    Raises:
        ValueError: ``fraction`` is out of range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction of a split is {fraction}, expected 0 to 1 (not included)")
    everything = np.arange(len(labels))
    if fraction == 0:
        return everything, everything[:0]
    sizes = np.bincount(labels)
    exact = fraction * sizes
    counts = np.floor(exact).astype(np.int64)
    # The classes with the largest remainders get what the whole part still lacks.
    missing = round(fraction * len(labels)) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[: max(missing, 0)]] += 1
    counts = np.clip(counts, np.minimum(1, sizes // 2), np.maximum(sizes - 1, 0))
    chosen = np.zeros(len(labels), dtype=bool)
    random = np.random.default_rng(seed)
    for members, count in zip(_by_class(labels, len(sizes)), counts, strict=True):
        chosen[random.permutation(members)[:count]] = True
    return everything[~chosen], everything[chosen]


def stratified_part(labels: Indices, fraction: float, seed: int) -> Indices:
    """The indices of a part of the samples, at least one of each class.

    Args:
        labels: Class of every sample, from 0.
        fraction: Above 0, up to 1.
        seed: Of the draw.

    Raises:
        ValueError: ``fraction`` is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of the data is {fraction}, expected above 0, up to 1")
    return stratified_split(labels, 1 - fraction, seed)[0]


def _by_class(labels: Indices, classes: int) -> list[Indices]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.searchsorted(labels[order], np.arange(1, classes)))
