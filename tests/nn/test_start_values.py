"""Step sizes of least squared error, and the other rules, against their plain definitions."""

import math

import pytest
import torch

from limpq_ext.kernels.ops import thresholds
from limpq_ext.nn import start_values
from limpq_ext.nn.start_values import Distribution, Histogram

RANGES = [
    thresholds(bits, signed=signed, symmetric=symmetric)
    for bits in (2, 3, 4, 6, 8)
    for signed, symmetric in ((False, False), (True, False), (True, True))
]


def plain_error(x, scale, quant_min, quant_max):
    quantized = (x / scale).clamp(quant_min, quant_max).round() * scale
    return float((x - quantized).square().sum())


def samples(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    if kind == "relu":
        return x.relu()
    if kind == "outliers":
        return x.sign() * x.abs() ** 4
    return x * 0.01 + 0.003


@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_the_error_of_a_step_size_is_that_of_the_definition(kind, quant_min, quant_max):
    x = samples(kind, 3001)
    scales = torch.tensor([[1e-3, 0.02, 0.11, 0.5, 3.0]], dtype=torch.float64)
    errors = Distribution.of(x).squared_error(scales, quant_min, quant_max)
    for scale, error in zip(scales[0].tolist(), errors[0].tolist(), strict=True):
        assert error == pytest.approx(plain_error(x, scale, quant_min, quant_max), rel=1e-9)


@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
@pytest.mark.parametrize("count", [1, 9, 300, 5000])
def test_no_step_size_of_a_fine_grid_has_a_much_smaller_error(kind, count, quant_min, quant_max):
    x = samples(kind, count, seed=count)
    found = Distribution.of(x).least_error(quant_min, quant_max)
    if not bool((x if quant_min else x.relu()).any()):
        assert found == 0
        return
    error = plain_error(x, float(found), quant_min, quant_max)
    most = float(x.abs().max())
    grid = torch.logspace(
        math.log10(most / quant_max / 100), math.log10(2 * most / quant_max), 3000
    )
    best = min(plain_error(x, float(scale), quant_min, quant_max) for scale in grid)
    # At 8 bits some 100 values lie on the levels by chance, more or less well.
    assert error <= best * (1.2 if quant_max > 100 else 1.03) + 1e-6 * float(x.square().sum())


@pytest.mark.parametrize("count", [1, 9, 120])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_values_that_are_rounded_find_what_levels_find(monkeypatch, count, bits):
    weight = torch.randn(4, count, generator=torch.Generator().manual_seed(bits))
    quant_min, quant_max = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded = Distribution.of(weight, channel_axis=0).least_error(quant_min, quant_max)
    monkeypatch.setattr(start_values, "_VALUES_OF_A_LOOKUP", 0)
    looked_up = Distribution.of(weight, channel_axis=0).least_error(quant_min, quant_max)
    torch.testing.assert_close(rounded, looked_up, rtol=1e-12, atol=0)


def test_channels_are_sought_each_for_itself():
    weight = torch.stack([samples("normal", 50), samples("outliers", 50)])
    together = Distribution.of(weight.T, channel_axis=1).least_error(-4, 3)
    alone = [float(Distribution.of(row).least_error(-4, 3)) for row in weight]
    assert together.tolist() == alone


def test_values_of_zero_have_no_step_size():
    assert Distribution.of(torch.zeros(3, 5), channel_axis=0).least_error(-2, 1).tolist() == [0] * 3


def test_the_largest_value_is_just_not_clipped():
    x = torch.tensor([-3.0, 1.0, 2.0])
    found = Distribution.of(x)
    assert found.no_clipping(-8, 7).tolist() == [3 / 8]
    assert found.no_clipping(0, 15).tolist() == [2 / 15]


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 15), (-8, 7)])
def test_the_percentile_leaves_out_its_share(quant_min, quant_max):
    x = samples("normal", 100_000) if quant_min else samples("relu", 100_000)
    scale = float(Distribution.of(x).percentile(0.99, quant_min, quant_max))
    outside = (x > scale * quant_max) | (x < scale * quant_min)
    assert 0.004 < float(outside.double().mean()) < 0.0101


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_many_levels_are_close_to_what_the_levels_give(bits):
    x = samples("outliers", 2000)
    quant_min, quant_max = thresholds(bits, signed=True)
    error = plain_error(
        x, float(Distribution.of(x).least_error(quant_min, quant_max)), quant_min, quant_max
    )
    grid = float(x.abs().max()) / quant_max * torch.linspace(0.2, 1, 200)
    assert error < 1.1 * min(plain_error(x, float(s), quant_min, quant_max) for s in grid)


def test_batches_of_growing_values_are_counted_as_one():
    batches = [samples("normal", 1000, seed) * 3.0**seed for seed in range(6)]
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    x = torch.cat(batches)
    assert histogram.counts.sum() == len(x)
    assert histogram.lowest == pytest.approx(float(x.min()))
    for quant_min, quant_max in ((-2, 1), (-8, 7), (-128, 127)):
        scale = float(histogram.distribution().least_error(quant_min, quant_max))
        exact = float(Distribution.of(x).least_error(quant_min, quant_max))
        error = plain_error(x, scale, quant_min, quant_max)
        assert error <= 1.02 * plain_error(x, exact, quant_min, quant_max)


def test_batches_in_any_order_give_the_same_counts():
    batches = [samples("outliers", 500, seed) for seed in range(4)]
    forwards, backwards = Histogram(), Histogram()
    for batch in batches:
        forwards.add(batch)
    for batch in reversed(batches):
        backwards.add(batch)
    assert forwards.bound == backwards.bound
    assert torch.equal(forwards.counts, backwards.counts)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="a NaN or an infinity"):
        Histogram().add(torch.tensor([1.0, bad]))


def test_zeros_alone_are_counted_and_have_no_step_size():
    histogram = Histogram()
    histogram.add(torch.zeros(10))
    histogram.add(torch.zeros(0))
    assert histogram.counts.sum() == 10
    assert histogram.distribution().least_error(0, 15) == 0
    histogram.add(torch.ones(10))
    assert histogram.distribution().least_error(0, 1) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_many_values_are_put_into_bins_that_give_the_same(monkeypatch, kind, quant_min, quant_max):
    x = torch.stack([samples(kind, 6001), 3 * samples(kind, 6001, seed=1)])
    plain = Distribution.of(x, 0)
    monkeypatch.setattr(start_values, "_MANY_VALUES", 6000)
    monkeypatch.setattr(start_values, "_AT_ONCE", 5000)
    binned = Distribution.of(x, 0)
    assert binned.values.shape == (2, start_values._FINE_BINS)
    levels = quant_min, quant_max
    assert torch.equal(binned.no_clipping(*levels), plain.no_clipping(*levels))
    torch.testing.assert_close(binned.mean_magnitude, plain.mean_magnitude, rtol=1e-4, atol=0)
    scales = binned.least_error(*levels)[:, None]
    errors = [found.squared_error(scales, *levels) for found in (binned, plain)]
    torch.testing.assert_close(*errors, rtol=1e-3, atol=0)
    least = plain.squared_error(plain.least_error(*levels)[:, None], *levels)
    torch.testing.assert_close(errors[1], least, rtol=1e-2, atol=0)


def test_many_values_that_are_all_the_same_begin_as_few_do(monkeypatch):
    monkeypatch.setattr(start_values, "_MANY_VALUES", 100)
    assert Distribution.of(torch.zeros(1000)).least_error(0, 7) == 0
    found = Distribution.of(torch.full((1000,), 1.5)).least_error(0, 7)
    assert plain_error(torch.full((1,), 1.5), float(found), 0, 7) < 1e-10
