"""Splits and parts of a data set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limpq_ext.data.splits import stratified_part, stratified_split

labels_of = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(np.array)
fractions = st.floats(0, 0.99)


@given(labels_of, fractions, st.integers(0, 3))
def test_every_sample_is_on_one_side(labels, fraction, seed):
    rest, part = stratified_split(labels, fraction, seed)
    assert np.array_equal(np.sort(np.concatenate([rest, part])), np.arange(len(labels)))


@given(labels_of, fractions, st.integers(0, 3))
def test_every_class_is_split_in_proportion(labels, fraction, seed):
    _, part = stratified_split(labels, fraction, seed)
    for name, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert abs((labels[part] == name).sum() - fraction * count) < 1 + 1e-9


@given(labels_of, st.floats(0.01, 0.99), st.integers(0, 3))
def test_no_class_of_two_samples_or_more_is_missing_on_a_side(labels, fraction, seed):
    rest, part = stratified_split(labels, fraction, seed)
    for name, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert name in labels[rest]
        assert count == 1 or name in labels[part]


@given(labels_of, st.floats(0.01, 1), st.integers(0, 3))
def test_a_part_has_every_class_and_is_the_same_every_time(labels, fraction, seed):
    part = stratified_part(labels, fraction, seed)
    assert set(labels[part]) == set(labels)
    assert np.array_equal(part, stratified_part(labels, fraction, seed))


def test_the_whole_part_has_the_size_that_was_asked_for():
    labels = np.arange(1000) % 34
    assert len(stratified_part(labels, 0.1, 0)) == 100
    assert len(stratified_part(labels, 1.0, 0)) == 1000
    assert not np.array_equal(stratified_part(labels, 0.5, 0), stratified_part(labels, 0.5, 1))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_named(fraction):
    with pytest.raises(ValueError, match=f"the fraction of a split is {fraction}, expected 0 to 1"):
        stratified_split(np.zeros(4, dtype=int), fraction, 0)
    with pytest.raises(ValueError, match="the fraction of the data is 0, expected above 0"):
        stratified_part(np.zeros(4, dtype=int), 0, 0)
