import math

import pytest
import torch

from limpq_ext.kernels.ops import lsq_fake_quantize, thresholds
from limpq_ext.nn.quantizers import (
    ActivationQuantizer,
    LsqQuantizer,
    WeightQuantizer,
    weight_start_scale,
)
from limpq_ext.nn.start_values import Distribution, Histogram, Values, start_scales


@pytest.mark.parametrize(
    ("bits", "signed", "symmetric", "expected"),
    [
        (2, False, False, (0, 3)),
        (8, False, False, (0, 255)),
        (2, True, False, (-2, 1)),
        (16, True, False, (-32768, 32767)),
        (2, True, True, (-1, 1)),
        (8, True, True, (-127, 127)),
    ],
)
def test_thresholds(bits, signed, symmetric, expected):
    assert thresholds(bits, signed=signed, symmetric=symmetric) == expected


@pytest.mark.parametrize("bits", [1, 17, 0, -3])
def test_bits_outside_2_to_16_are_an_error(bits):
    with pytest.raises(ValueError, match=f"{bits} bits is outside 2 to 16"):
        ActivationQuantizer([4, bits])


def test_candidates_must_be_there_and_differ():
    with pytest.raises(ValueError, match="bits is empty"):
        ActivationQuantizer([])
    with pytest.raises(ValueError, match="no bit-width twice"):
        ActivationQuantizer([4, 4])
    with pytest.raises(TypeError, match="must be an integer"):
        ActivationQuantizer([4.5])


@pytest.mark.usefixtures("device")
def test_weight_start_values_are_those_of_the_paper():
    weight = torch.randn(8, 4, 3, 3) + 0.3
    quantizer = WeightQuantizer(weight, (2, 5), scale_start="lsq")
    mean, std = weight.mean(), weight.std()
    for bits, value in quantizer.values().items():
        wanted = max(abs(mean - 3 * std), abs(mean + 3 * std)) / 2 ** (bits - 1)
        assert value == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.usefixtures("device")
def test_weight_start_values_per_channel():
    weight = torch.randn(8, 4, 3, 3)
    quantizer = WeightQuantizer(weight, (2, 5), per_channel=True, scale_start="lsq")
    assert quantizer.scale.shape == (2, 8)
    each = torch.stack([weight_start_scale(channel, 5) for channel in weight])
    torch.testing.assert_close(quantizer.scale[1], each)


@pytest.mark.usefixtures("device")
def test_the_start_value_of_a_single_weight_is_finite():
    assert weight_start_scale(torch.tensor([[0.5]]), 2) == pytest.approx(0.25)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("signed", [True, False])
def test_activation_start_values_come_from_the_first_training_batch(signed):
    x = torch.randn(64, 10)
    x = x if signed else x.abs()
    quantizer = ActivationQuantizer((3, 6), scale_start="lsq").train()
    quantizer.select(6)
    y = quantizer(x)
    quant_max = 31 if signed else 63
    scale = 2 * x.abs().mean() / math.sqrt(quant_max)
    assert quantizer.signed is signed
    assert float(quantizer.scale[1]) == pytest.approx(float(scale), rel=1e-6)
    assert quantizer.initialized.tolist() == [False, True]
    quant_min = -32 if signed else 0
    assert torch.equal(y, lsq_fake_quantize(x, quantizer.scale[1], quant_min, quant_max))
    quantizer(10 * x)
    assert float(quantizer.scale[1]) == pytest.approx(float(scale), rel=1e-6)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("rule", ["mse", "max", "percentile"])
def test_weights_begin_by_the_rule(rule, per_channel):
    weight = torch.randn(8, 4, 3, 3)
    quantizer = WeightQuantizer(weight, (2, 5), per_channel=per_channel, scale_start=rule)
    found = Values(weight, 0 if per_channel else None)
    for scale, (low, high) in zip(quantizer.scale, ((-2, 1), (-16, 15)), strict=True):
        wanted = start_scales(found, rule, low, high).float()
        torch.testing.assert_close(scale.detach().reshape(-1), wanted)
    assert quantizer.initialized.all()


@pytest.mark.usefixtures("device")
def test_the_least_squared_error_is_less_than_where_lsq_begins():
    weight = torch.randn(16, 8, 3, 3)
    for bits in (2, 3, 4, 8):
        errors = [
            (WeightQuantizer(weight, (bits,), scale_start=rule)(weight) - weight).square().sum()
            for rule in ("mse", "lsq", "max", "percentile")
        ]
        assert errors[0] == min(errors)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rule", ["mse", "max", "percentile"])
def test_activations_begin_by_the_rule_on_the_first_batch_of_each_bit_width(signed, rule):
    x = torch.randn(64, 100) if signed else torch.rand(64, 100)
    quantizer = ActivationQuantizer((3, 6), scale_start=rule).train()
    for place, (bits, batch) in enumerate(((3, x), (6, 2 * x))):
        quantizer.select(bits)
        quantizer(batch)
        levels = thresholds(bits, signed=signed)
        wanted = float(start_scales(Distribution.of(batch), rule, *levels))
        assert float(quantizer.scale[place]) == pytest.approx(wanted, rel=2e-2)
    assert quantizer.signed is signed


@pytest.mark.usefixtures("device")
def test_what_is_observed_passes_unquantized_and_starts_all_bit_widths():
    torch.manual_seed(0)
    quantizer = ActivationQuantizer((2, 4, 8), scale_start="mse").eval()
    histogram = Histogram()
    quantizer.observe = histogram.add
    batches = [torch.rand(50), 3 * torch.rand(50)]
    assert all(quantizer(x) is x for x in batches)
    quantizer.observe = None
    quantizer.start_from(histogram)
    assert quantizer.initialized.all()
    assert quantizer.signed is False
    found = Distribution.of(torch.cat(batches))
    for bits, value in quantizer.values().items():
        wanted = float(found.least_error(0, 2**bits - 1))
        assert value == pytest.approx(wanted, rel=2e-2)


def test_a_rule_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="scale_start is 'best', expected one of mse, lsq, max, p"):
        ActivationQuantizer((3,), scale_start="best")


def test_evaluation_before_training_is_an_error_that_names_the_layer():
    quantizer = ActivationQuantizer((3, 6), name="layer 'conv2': input quantizer").eval()
    with pytest.raises(RuntimeError, match=r"layer 'conv2': input quantizer has no start value"):
        quantizer(torch.ones(3))


@pytest.mark.usefixtures("device")
def test_state_survives_saving_and_loading():
    trained = ActivationQuantizer((3, 6)).train()
    trained(torch.rand(10))
    loaded = ActivationQuantizer((3, 6)).eval()
    loaded.load_state_dict(trained.state_dict())
    assert loaded.signed is False
    x = torch.randn(100)
    assert torch.equal(loaded(x), trained.eval()(x))
    loaded.select(6)
    with pytest.raises(RuntimeError, match="no start value at 6 bits"):
        loaded(x)


def test_an_unknown_bit_width_cannot_be_selected():
    with pytest.raises(ValueError, match=r"5 bits is not a candidate, those are \(3, 6\)"):
        ActivationQuantizer((3, 6)).select(5)


@pytest.mark.usefixtures("device")
def test_only_the_selected_scale_gets_a_gradient():
    quantizer = WeightQuantizer(torch.randn(50), (2, 3, 4))
    quantizer.select(3)
    quantizer(torch.randn(50)).sum().backward()
    assert [bool(g) for g in quantizer.scale.grad] == [False, True, False]


@pytest.mark.usefixtures("device")
def test_the_cap_bounds_the_scale_and_stops_its_gradient():
    quantizer = LsqQuantizer((4,), signed=True, scale_max=1.0)
    quantizer.set_scale(0, torch.tensor(1.0))
    torch.nn.init.constant_(quantizer.scale, 2.0)
    x = torch.randn(50)
    y = quantizer(x)
    assert torch.equal(y, lsq_fake_quantize(x, torch.tensor(1.0), -8, 7))
    y.sum().backward()
    assert quantizer.scale.grad.item() == 0
    assert quantizer.values() == {4: 1.0}


@pytest.mark.usefixtures("device")
def test_an_empty_first_batch_is_an_error():
    with pytest.raises(ValueError, match="the first batch is empty"):
        ActivationQuantizer((4,)).train()(torch.ones(0, 3))


@pytest.mark.usefixtures("device")
def test_a_nan_in_the_first_batch_does_not_pass_as_a_scale():
    quantizer = ActivationQuantizer((4,), name="layer 'conv2': input quantizer").train()
    with pytest.raises(ValueError, match=r"layer 'conv2': input quantizer: the first batch"):
        quantizer(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("bound", ["scale_min", "scale_max"])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-50, math.nan])
def test_a_bound_of_the_scales_that_is_not_positive_in_float32_is_refused(bound, value):
    with pytest.raises(ValueError, match=f"layer 'a': {bound} is {value}.*expected a positive"):
        LsqQuantizer((4,), signed=True, name="layer 'a'", **{bound: value})


def test_a_lower_bound_above_the_upper_one_is_refused():
    with pytest.raises(ValueError, match=r"scale_min is 0\.5, above scale_max, 0\.1"):
        LsqQuantizer((4,), signed=True, scale_min=0.5, scale_max=0.1)
    with pytest.raises(ValueError, match="scale_min is inf"):
        LsqQuantizer((4,), signed=True, scale_min=math.inf)


@pytest.mark.usefixtures("device")
def test_a_first_batch_of_zeros_is_an_error_and_leaves_nothing_behind():
    quantizer = ActivationQuantizer((2, 4), name="layer 'conv2': input quantizer").train()
    with pytest.raises(ValueError, match=r"layer 'conv2': input quantizer: .* nothing but zeros"):
        quantizer(torch.zeros(3, 4))
    assert quantizer.signed is None
    assert not quantizer.initialized.any()
    quantizer(-torch.ones(3, 4))
    assert quantizer.signed is True


@pytest.mark.usefixtures("device")
def test_weights_of_zeros_start_at_the_first_weights_that_are_not():
    weight = torch.zeros(4, 5)
    quantizer = WeightQuantizer(weight, (2, 4), name="layer 'head': weight quantizer")
    assert not quantizer.initialized.any()
    with pytest.raises(ValueError, match=r"layer 'head': weight quantizer: all weights are 0"):
        quantizer(weight)
    weight.normal_()
    quantizer(weight)
    expected = WeightQuantizer(weight, (2, 4)).scale
    assert torch.equal(quantizer.scale, expected)
    assert quantizer.initialized.all()


def test_scales_that_were_loaded_need_no_weights_to_start_from():
    trained = WeightQuantizer(torch.ones(4, 5), (4,))
    loaded = WeightQuantizer(torch.zeros(4, 5), (4,))
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(torch.ones(4, 5)), trained(torch.ones(4, 5)))


@pytest.mark.usefixtures("device")
def test_a_channel_of_zeros_starts_at_the_mean_of_the_others():
    weight = torch.randn(4, 10)
    weight[1] = 0
    quantizer = WeightQuantizer(weight, (3,), per_channel=True)
    others = quantizer.scale[0, [0, 2, 3]]
    assert float(quantizer.scale[0, 1]) == pytest.approx(float(others.mean()))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_a_start_value_beyond_the_bounds_is_taken_to_them_and_still_learns(size):
    generator = torch.Generator().manual_seed(0)
    weight = size * torch.randn(50, generator=generator).to(torch.get_default_device())
    activation = ActivationQuantizer((4,), scale_max=1.0).train()
    for quantizer in (WeightQuantizer(weight, (4,), scale_max=1.0), activation):
        quantizer(weight).sum().backward()
        assert quantizer.scale_min < quantizer.scale.item() <= quantizer.scale_max
        assert float(quantizer.scale.grad) != 0
