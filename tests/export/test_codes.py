"""A layer in integers is the layer that computes."""

import pytest
import torch
from networks import Depthwise, NoNorm, Upsampling

from limpq_ext import Policy, apply_policy, prepare, quantized_layers
from limpq_ext.export.codes import check_widths, layer_codes
from limpq_ext.nn.layers import quantizable_base
from limpq_ext.values.policy import LayerBits


def quantized(model, bits=(3, 4), dtype=torch.float32, **options):
    """The model with all its layers at these bits, run once."""
    torch.manual_seed(0)
    names = [name for name, module in model.named_modules() if quantizable_base(module)]
    policy = Policy(tuple(LayerBits(name, *bits) for name in names))
    model = apply_policy(model.to(dtype), policy, **options).train()
    model(torch.randn(4, 3, 8, 8, dtype=dtype))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("make", [Depthwise, Upsampling])
def test_codes_times_scale_are_the_weights_that_a_layer_computes_with(make, per_channel, dtype):
    model = quantized(make(), dtype=dtype, per_channel_weights=per_channel)
    codes = layer_codes(model)
    assert list(codes) == list(quantized_layers(model))
    for name, layer in quantized_layers(model).items():
        found = codes[name]
        assert found.weights.dtype == torch.int8
        assert found.weights.min() >= -4
        assert found.weights.max() <= 3
        assert torch.equal(found.dequantized().to(dtype), layer.quantized_weight())
        computing = torch.float64 if dtype == torch.float64 else torch.float32
        assert found.weight_range.scale.dtype == found.input_range.scale.dtype == computing


def test_ranges_are_those_of_the_quantizers():
    model = quantized(NoNorm(), (5, 6), symmetric_weights=True, per_channel_weights=True)
    codes = layer_codes(model)
    weight, inputs = codes["hidden"].weight_range, codes["hidden"].input_range
    assert (weight.bits, weight.quant_min, weight.quant_max) == (5, -15, 15)
    assert (weight.axis, weight.scale.shape, weight.signed) == (0, (12,), True)
    assert (inputs.bits, inputs.quant_min, inputs.quant_max) == (6, 0, 63)
    assert (inputs.axis, inputs.scale.shape, inputs.signed) == (None, (), False)
    first = codes["features.a"].input_range
    assert (first.quant_min, first.quant_max, first.signed) == (-32, 31, True)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scale_lies_along_its_axis(axis):
    model = quantized(Upsampling(), per_channel_weights=True)
    codes = layer_codes(model)["up1" if axis else "first"]
    shape = [1, 1, 1, 1]
    shape[axis] = len(codes.weight_range.scale)
    assert codes.weight_range.along(codes.weights).shape == tuple(shape)


def test_wide_weights_have_wide_codes():
    codes = layer_codes(quantized(NoNorm(), (9, 9)))
    assert {layer.weights.dtype for layer in codes.values()} == {torch.int16}
    with pytest.raises(ValueError, match=r"at most 8 bits, but W9A9 is .* 'features\.a'"):
        check_widths(codes, 8, "ONNX")
    check_widths(codes, 9, "ONNX")


def test_a_scale_beyond_its_guards_is_the_guard():
    model = quantized(NoNorm(), scale_max=0.25)
    with torch.no_grad():
        model.hidden.weight_quantizer.scale.fill_(-1.0)
        model.hidden.input_quantizer.scale.fill_(7.0)
    codes = layer_codes(model)["hidden"]
    assert codes.weight_range.scale == torch.tensor(1e-5)
    assert codes.input_range.scale == 0.25


def test_what_has_no_codes_is_named():
    with pytest.raises(ValueError, match="NoNorm has no quantized layers: give it a policy first"):
        layer_codes(NoNorm())
    model = prepare(NoNorm(), (2, 4), example_input=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"layer 'features\.b': input quantizer has no step size"):
        layer_codes(model)
    model = quantized(NoNorm())
    with torch.no_grad():
        model.hidden.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'hidden' has weights that are NaN or infinite"):
        layer_codes(model)
    with torch.no_grad():
        model.hidden.weight_quantizer.scale.fill_(torch.nan)
    with pytest.raises(ValueError, match="'hidden': weight quantizer has step sizes that are NaN"):
        layer_codes(model)
