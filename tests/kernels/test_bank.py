"""The weight bank against the weight quantizers, one layer and one bit-width at a time."""

import copy
import math

import pytest
import torch
from test_ops import DTYPES, assert_same_bits
from torch import nn

from limpq_ext import WeightBank, lsq_fake_quantize
from limpq_ext.kernels import bank as bank_module
from limpq_ext.kernels.ops import bank_backward, bank_forward
from limpq_ext.nn.layers import quantize_layer

BITS = (6, 5, 4, 3, 2)
# Output channels, input channels and kernel of ResNet-18's convolutions but the first.
RESNET18 = (
    [(64, 64, 3)] * 4
    + [(128, 64, 3), (128, 128, 3), (128, 64, 1), (128, 128, 3), (128, 128, 3)]
    + [(256, 128, 3), (256, 256, 3), (256, 128, 1), (256, 256, 3), (256, 256, 3)]
    + [(512, 256, 3), (512, 512, 3), (512, 256, 1), (512, 512, 3), (512, 512, 3)]
)


def layers_of(modules, *, bits=BITS, **options):
    """Quantized layers by name."""
    return {
        name: quantize_layer(module, bits, bits, name=name, **options)
        for name, module in modules.items()
    }


def small_layers(dtype=torch.float32, layout=torch.contiguous_format, **options):
    torch.manual_seed(0)
    modules = {
        "conv": nn.Conv2d(3, 5, 3),
        "depthwise": nn.Conv2d(7, 7, 3, groups=7),
        "point": nn.Conv2d(1, 9, 1),
        "wide": nn.Linear(300, 130),
        "one": nn.Linear(1, 1),
        "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
        "transposed depthwise": nn.ConvTranspose2d(5, 5, 2, groups=5),
    }
    modules = {name: module.to(memory_format=layout) for name, module in modules.items()}
    layers = layers_of(modules, **options)
    return {name: layer.to(dtype) for name, layer in layers.items()}


def every(layers):
    return [(name, bits) for name, layer in layers.items() for bits in layer.weight_quantizer.bits]


def quantized_alone(layer, bits):
    """What the layer's own weight quantizer gives, with its autograd."""
    layer.weight_quantizer.select(bits)
    return layer.weight_quantizer(layer.weight)


def parameters(layers):
    return {
        (name, kind): parameter
        for name, layer in layers.items()
        for kind, parameter in (
            ("weight", layer.weight),
            ("scale", layer.weight_quantizer.scale),
        )
    }


def check_one_bit_width_at_a_time(layers):
    """Quantized weights and all gradients, equal bits, with one bit-width of each layer in use."""
    bank = WeightBank(layers)
    bank.quantize()
    for index in range(len(BITS)):
        grads = {}
        for name, layer in layers.items():
            bits = layer.weight_quantizer.bits[index]
            leaf, alone = bank.weight(name, bits), quantized_alone(layer, bits)
            assert_same_bits(leaf.detach(), alone.detach())
            assert leaf.stride() == layer.weight.stride()
            grad = torch.randn(leaf.shape).to(leaf)
            leaf.backward(grad)
            wanted = (layer.weight, layer.weight_quantizer.scale)
            grads[name, "weight"], grads[name, "scale"] = torch.autograd.grad(alone, wanted, grad)
        bank.backward()
        for key, parameter in parameters(layers).items():
            assert parameter.grad.dtype == parameter.dtype
            assert_same_bits(parameter.grad, grads[key])
            parameter.grad = None
    assert all(bank.weight(*key).grad is None for key in every(layers))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_bank_equals_the_quantizers(dtype, per_channel, layout):
    check_one_bit_width_at_a_time(small_layers(dtype, layout, per_channel_weights=per_channel))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("options", [{"symmetric_weights": True}, {"scale_max": 0.05}])
def test_the_bank_follows_the_options_of_the_quantizers(options):
    layers = small_layers(**options)
    with torch.no_grad():
        layers["conv"].weight_quantizer.scale[1:3] = torch.tensor([-1.0, 1e-7])
    check_one_bit_width_at_a_time(layers)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_resnet18_at_five_bit_widths(per_channel):
    torch.manual_seed(0)
    modules = {
        f"conv{i}": nn.Conv2d(fan_in, fan_out, size, bias=False)
        for i, (fan_out, fan_in, size) in enumerate(RESNET18)
    }
    layers = layers_of(modules, per_channel_weights=per_channel)
    bank = WeightBank(layers)
    assert bank.nbytes == 5 * 4 * sum(layer.weight.numel() for layer in layers.values())
    bank.quantize()
    for name, bits in every(layers):
        leaf = bank.weight(name, bits)
        assert torch.equal(leaf.detach(), quantized_alone(layers[name], bits).detach())
        leaf.grad = leaf.detach() - layers[name].weight.detach()
    grads = {key: bank.weight(*key).grad for key in every(layers)}
    bank.backward()
    for name, layer in layers.items():
        weight = torch.zeros_like(layer.weight)
        scale = torch.zeros_like(layer.weight_quantizer.scale)
        for index, bits in enumerate(BITS):
            dweight, dscale = torch.autograd.grad(
                quantized_alone(layer, bits),
                (layer.weight, layer.weight_quantizer.scale),
                grads[name, bits],
            )
            weight += dweight
            scale[index] = dscale[index]
        assert torch.equal(layer.weight.grad, weight)
        assert torch.equal(layer.weight_quantizer.scale.grad, scale)


@pytest.mark.usefixtures("device")
def test_half_precision_gradients_are_added_in_float32():
    layers = small_layers(torch.bfloat16)
    bank = WeightBank(layers)
    bank.quantize()
    layer = layers["wide"]
    total = torch.zeros(layer.weight.shape)
    for bits in BITS:
        leaf = bank.weight("wide", bits)
        leaf.backward(torch.randn_like(leaf))
        alone = quantized_alone(layer, bits)
        total += torch.autograd.grad(alone, layer.weight, leaf.grad)[0].float()
    bank.backward()
    assert torch.equal(layer.weight.grad, total.bfloat16())


@pytest.mark.usefixtures("device")
def test_gradients_are_added_to_those_that_are_there():
    layers = small_layers()
    first, second = copy.deepcopy(layers), copy.deepcopy(layers)
    for part in (first, second):
        bank = WeightBank(part)
        for _ in range(1 if part is first else 2):
            bank.quantize()
            bank.weight("conv", 4).sum().backward()
            bank.backward()
    for key in (("conv", "weight"), ("conv", "scale")):
        assert torch.equal(parameters(second)[key].grad, 2 * parameters(first)[key].grad)


@pytest.mark.usefixtures("device")
def test_a_leaf_used_in_several_passes_collects_their_gradients():
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    leaf = bank.weight("conv", 3)
    assert leaf.is_leaf
    assert leaf is bank.weight("conv", 3)
    for factor in (1.0, 2.0):
        (leaf * factor).sum().backward()
    assert torch.equal(leaf.grad, torch.full_like(leaf, 3.0))


@pytest.mark.usefixtures("device")
def test_layers_that_were_not_used_get_no_gradient():
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    bank.weight("conv", 4).sum().backward()
    bank.backward()
    for (name, _), parameter in parameters(layers).items():
        assert (parameter.grad is not None) == (name == "conv")
    unused = [index for index, bits in enumerate(BITS) if bits != 4]
    assert not layers["conv"].weight_quantizer.scale.grad[unused].any()


@pytest.mark.usefixtures("device")
def test_a_frozen_weight_gets_no_gradient():
    layers = small_layers()
    layers["conv"].weight.requires_grad_(False)
    bank = WeightBank(layers)
    bank.quantize()
    bank.weight("conv", 4).sum().backward()
    bank.backward()
    assert layers["conv"].weight.grad is None
    assert layers["conv"].weight_quantizer.scale.grad.any()


@pytest.mark.usefixtures("device")
def test_a_gradient_in_another_order_of_the_axes_is_understood():
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    leaf, layer = bank.weight("wide", 4), layers["wide"]
    grad = torch.randn(300, 130).T
    leaf.grad = grad
    expected = torch.autograd.grad(quantized_alone(layer, 4), layer.weight, grad)[0]
    bank.backward()
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.usefixtures("device")
def test_every_weight_starts_at_16_bytes():
    bank = WeightBank(small_layers(torch.float16))
    bank.quantize()
    for name in ("conv", "depthwise", "point", "wide", "one"):
        for bits in BITS:
            assert bank.weight(name, bits).data_ptr() % 16 == 0


def test_the_result_does_not_depend_on_the_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            layers = small_layers(per_channel_weights=True)
            bank = WeightBank(layers)
            bank.quantize()
            for key in every(layers):
                (bank.weight(*key) * 0.1).square().sum().backward()
            bank.backward()
            results.append([p.grad for p in parameters(layers).values()])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("device")
def test_the_buffer_is_used_again_and_follows_the_weights():
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    address = bank.weight("conv", 4).data_ptr()
    with torch.no_grad():
        layers["conv"].weight.mul_(0.5)
    bank.quantize()
    assert bank.weight("conv", 4).data_ptr() == address
    expected = quantized_alone(layers["conv"], 4)
    assert torch.equal(bank.weight("conv", 4).detach(), expected.detach())


def replace_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def replace_data(layer):
    layer.weight.data = layer.weight.detach() * 0.5


def replace_scale(layer):
    layer.weight_quantizer.scale.data = layer.weight_quantizer.scale.detach() * 2


def change_dtype(layer):
    layer.double()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "replace",
    [replace_parameter, replace_data, replace_scale, change_dtype],
    ids=lambda f: f.__name__,
)
def test_a_replaced_tensor_is_noticed(replace):
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    leaf = bank.weight("conv", 4)
    leaf.sum().backward()
    replace(layers["conv"])
    with pytest.raises(RuntimeError, match=r"replaced between quantize\(\) and backward\(\)"):
        bank.backward()
    with pytest.raises(RuntimeError, match=r"replaced before backward\(\) used its gradients"):
        bank.quantize()
    leaf.grad = None
    bank.quantize()
    expected = quantized_alone(layers["conv"], 4)
    assert torch.equal(bank.weight("conv", 4).detach(), expected.detach())
    assert bank.weight("conv", 4).dtype == expected.dtype


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("kind", ["weight", "scale"])
def test_a_tensor_changed_before_backward_is_an_error_that_names_the_layer(kind):
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    bank.weight("conv", 4).sum().backward()
    with torch.no_grad():
        parameters(layers)["conv", kind].mul_(2)
    with pytest.raises(RuntimeError, match="layer 'conv': the weight or its scales were modified"):
        bank.backward()


@pytest.mark.usefixtures("device")
def test_a_pass_that_outlives_its_weights_is_an_error():
    bank = WeightBank(small_layers())
    bank.quantize()
    loss = bank.weight("conv", 4).square().sum()
    bank.quantize()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_wrong_names_and_bits_are_named():
    bank = WeightBank(small_layers())
    with pytest.raises(RuntimeError, match=r"call quantize\(\) first"):
        bank.weight("conv", 4)
    bank.quantize()
    with pytest.raises(KeyError, match="no layer 'fc'"):
        bank.weight("fc", 4)
    with pytest.raises(KeyError, match="layer 'conv' has no 7 bits, those are"):
        bank.weight("conv", 7)


def test_a_bank_needs_layers():
    with pytest.raises(ValueError, match="at least one layer"):
        WeightBank({})


def test_memory_with_gaps_is_named():
    layers = small_layers()
    layers["wide"].weight = nn.Parameter(torch.randn(130, 600)[:, ::2])
    with pytest.raises(ValueError, match="layer 'wide': the weight's memory has gaps"):
        WeightBank(layers)


def test_a_device_without_kernels_is_named():
    layers = small_layers()
    layers["one"].to("meta")
    with pytest.raises(ValueError, match="layer 'one' is on meta, other layers are on cpu"):
        WeightBank(layers)
    with pytest.raises(ValueError, match="layer 'one' is on meta, where tensors hold no values"):
        WeightBank({"one": layers["one"]})


@pytest.mark.cuda
def test_layers_on_several_devices_are_named():
    layers = small_layers()
    layers["one"].to("cuda")
    with pytest.raises(ValueError, match="layer 'one' is on cuda:0, other layers are on cpu"):
        WeightBank(layers)


@pytest.mark.usefixtures("device")
def test_an_empty_weight_is_fine():
    layers = small_layers()
    layers["one"].weight = nn.Parameter(torch.empty(1, 0))
    bank = WeightBank(layers)
    bank.quantize()
    bank.weight("one", 4).sum().backward()
    bank.backward()
    assert layers["one"].weight.grad.shape == (1, 0)
    assert not layers["one"].weight_quantizer.scale.grad.any()


BANK = ([2], [-2, -4], [1, 3], [bank_module.NO_AXIS], [1e-5], [math.inf])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda weight: [weight.clone()], "1 outputs for 2 quantized weights"),
        (lambda weight: [weight.clone(), torch.randn(3, 4).T], "output 1 of weight 0 is not laid"),
        (lambda weight: [weight.clone(), weight], "an output shares memory with another tensor"),
        (lambda weight: [weight.clone()] * 2, "an output shares memory with another tensor"),
        (lambda weight: [weight.clone().view(torch.int32)] * 2, "output 0 of weight 0 is not laid"),
        (lambda weight: [freed(weight), weight.clone()], "an output has memory of 0 bytes"),
        (lambda weight: [weight.to("meta")] * 2, "different devices, cpu and meta"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs, message):
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match=message):
        bank_forward([weight], [torch.tensor([0.1, 0.2])], outputs(weight), *BANK)


def freed(weight):
    output = weight.clone()
    output.untyped_storage().resize_(0)
    return output


@pytest.mark.parametrize(
    ("grads", "places", "error", "message"),
    [
        ([torch.ones(4, 3)], [0, 1], ValueError, "1 gradients for 2 quantized weights"),
        ([torch.ones(4, 3)], [2], IndexError, "quantized weight 2 of 2 is none or out of order"),
        ([torch.ones(4, 3)] * 2, [1, 0], IndexError, "quantized weight 0 of 2 is none or out of"),
        ([torch.ones(3)], [0], ValueError, r"gradient has shape \[3\], x has \[4, 3\]"),
        ([torch.ones(4, 3, device="meta")], [0], ValueError, "different devices, cpu and meta"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grads, places, error, message):
    weight, scale = torch.randn(4, 3), torch.tensor([0.1, 0.2])
    with pytest.raises(error, match=message):
        bank_backward(grads, places, [weight], [scale], *BANK)


def test_a_weight_of_integers_is_refused():
    weight = torch.randn(4, 3).view(torch.int32)
    with pytest.raises(TypeError, match="x has dtype Int"):
        bank_forward([weight], [torch.ones(2)], [weight.clone(), weight.clone()], *BANK)


def test_a_scale_that_lost_its_rows_before_backward_is_an_error():
    layers = small_layers()
    bank = WeightBank(layers)
    bank.quantize()
    bank.weight("conv", 4).sum().backward()
    scale = layers["conv"].weight_quantizer.scale
    scale.data = scale.data[:1]
    with pytest.raises(RuntimeError, match=r"replaced between quantize\(\) and backward\(\)"):
        bank.backward()


def test_weights_and_gradients_with_the_negative_bit_have_the_right_sign():
    real = torch.randn(4, 3, 2)
    negated = torch.view_as_complex(real).conj().imag  # contiguous() would resolve the bit
    weight, scale = torch.randn(4, 3), torch.tensor([0.1, 0.2])
    assert negated.is_neg()
    outputs = [torch.empty(4, 3), torch.empty(4, 3)]
    dense = torch.empty(4, 3)
    dense = torch._neg_view(dense.copy_(real[..., 1]))
    assert dense.is_neg()
    bank_forward([dense], [scale], outputs, *BANK)
    assert torch.equal(outputs[0], lsq_fake_quantize(-real[..., 1], scale[0], -2, 1))
    (ours,), _ = bank_backward([negated], [1], [weight], [scale], *BANK)
    (expected,), _ = bank_backward([-real[..., 1]], [1], [weight], [scale], *BANK)
    assert torch.equal(ours, expected)
