"""Rank correlation against scipy, and its interval."""

import numpy as np
import pytest

from limpq_ext.scores.ranks import interval, rank_correlation


def slow(x, y):
    """Spearman's, from ranks that are counted one by one."""
    both = []
    for values in (x, y):
        ranks = [
            sum(other < value for other in values)
            + (sum(other == value for other in values) + 1) / 2
            for value in values
        ]
        both.append(np.array(ranks) - np.mean(ranks))
    a, b = both
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_it_is_that_of_the_ranks(levels):
    x, y = np.random.default_rng(0).integers(levels, size=(2, 12))
    assert rank_correlation(x, y) == pytest.approx(slow(x, y), rel=1e-12)


def test_the_interval_has_the_percentiles_of_resampled_correlations():
    x, y = np.random.default_rng(0).integers(6, size=(2, 9))
    counts = np.random.default_rng(1).multinomial(9, np.full(9, 1 / 9), size=2000)
    with np.errstate(invalid="ignore"):
        found = [slow(np.repeat(x, own), np.repeat(y, own)) for own in counts]
    expected = np.nanpercentile(found, [2.5, 97.5])
    assert interval(x, y, np.random.default_rng(1)) == pytest.approx(tuple(expected), rel=1e-9)


@pytest.mark.parametrize("levels", [3, 1000])
def test_it_is_spearmans(levels):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    x = generator.integers(levels, size=30)
    y = x + generator.integers(levels, size=30)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_it_is_1_for_what_rises_together_and_none_for_what_does_not_move():
    assert rank_correlation([1, 2, 4], [0.1, 0.2, 0.9]) == 1
    assert rank_correlation([1, 2, 4], [5, 3, 0]) == -1
    assert rank_correlation([1, 2, 4], [5, 5, 5]) is None
    assert interval([1, 2, 4], [5, 5, 5], np.random.default_rng(0)) is None


def test_the_interval_covers_95_of_100_samples_of_a_known_correlation():
    # Of two normal variables with correlation r Spearman's is 6 / pi * asin(r / 2).
    expected = 6 / np.pi * np.arcsin(0.6 / 2)
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        x, noise = generator.normal(size=(2, 40))
        low, high = interval(x, 0.6 * x + 0.8 * noise, generator)
        covered += low <= expected <= high
    assert 34 <= covered <= 40


def test_the_interval_is_that_of_its_seed():
    x, y = np.random.default_rng(0).normal(size=(2, 10))
    first, again, other = (interval(x, y, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first == again != other
