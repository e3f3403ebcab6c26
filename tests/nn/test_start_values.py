"""Step sizes of least squared error, and the other rules, against their plain definitions."""

import math

import pytest
import torch

from limpq_ext.kernels.ops import thresholds
from limpq_ext.nn.start_values import Distribution, Histogram, Values

RANGES = [
    thresholds(bits, signed=signed, symmetric=symmetric)
    for bits in (2, 3, 4, 6, 8)
    for signed, symmetric in ((False, False), (True, False), (True, True))
]


OF_VALUES = pytest.mark.parametrize("of", [Distribution.of, Values])


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
@OF_VALUES
def test_no_step_size_of_a_fine_grid_has_a_much_smaller_error(
    of, kind, count, quant_min, quant_max
):
    x = samples(kind, count, seed=count)
    found = of(x).least_error(quant_min, quant_max)
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


@pytest.mark.parametrize("count", [1, 9, 120, 5000])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_values_as_they_are_find_what_their_distribution_finds(count, bits):
    weight = torch.randn(4, count, generator=torch.Generator().manual_seed(bits))
    levels = thresholds(bits, signed=True)
    found = Values(weight, channel_axis=0).least_error(*levels)
    expected = Distribution.of(weight, channel_axis=0).least_error(*levels)
    for row, scale, other in zip(weight.double(), found, expected, strict=True):
        errors = [plain_error(row, float(each), *levels) for each in (scale, other)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02, abs=1e-9)


@OF_VALUES
def test_the_ends_and_the_mean_magnitude_are_those_of_the_values(of):
    x = samples("outliers", 4 * 70).reshape(4, 70)
    found = of(x.T, 1)
    assert torch.equal(torch.stack(found.ends), torch.stack([x.amin(1), x.amax(1)]))
    torch.testing.assert_close(found.mean_magnitude, x.abs().mean(1), rtol=1e-12, atol=0)


@OF_VALUES
@pytest.mark.parametrize("count", [50, 80])
def test_channels_are_sought_each_for_itself(of, count):
    weight = torch.stack([samples("normal", count), samples("outliers", count)])
    together = of(weight.T, channel_axis=1).least_error(-4, 3)
    alone = [float(of(row).least_error(-4, 3)) for row in weight]
    assert together.tolist() == pytest.approx(alone, rel=1e-12)


@OF_VALUES
def test_values_of_zero_have_no_step_size(of):
    weight = torch.zeros(3, 5)
    weight[1] = 1.5
    found = of(weight, channel_axis=0).least_error(-2, 1).tolist()
    assert found[::2] == [0, 0]
    assert plain_error(torch.full((1,), 1.5), found[1], -2, 1) < 1e-10


@OF_VALUES
def test_the_largest_value_is_just_not_clipped(of):
    x = torch.tensor([-3.0, 1.0, 2.0])
    found = of(x)
    assert found.no_clipping(-8, 7).tolist() == [3 / 8]
    assert found.no_clipping(0, 15).tolist() == [2 / 15]


@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 15), (-8, 7)])
@OF_VALUES
def test_the_percentile_leaves_out_its_share(of, quant_min, quant_max):
    x = samples("normal", 100_000) if quant_min else samples("relu", 100_000)
    scale = float(of(x).percentile(0.99, quant_min, quant_max))
    outside = (x > scale * quant_max) | (x < scale * quant_min)
    assert 0.004 < float(outside.double().mean()) < 0.0101


@pytest.mark.parametrize("bits", [10, 12, 16])
@OF_VALUES
def test_many_levels_are_close_to_what_the_levels_give(of, bits):
    x = samples("outliers", 2000)
    quant_min, quant_max = thresholds(bits, signed=True)
    error = plain_error(x, float(of(x).least_error(quant_min, quant_max)), quant_min, quant_max)
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
