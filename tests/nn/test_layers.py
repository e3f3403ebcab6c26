import copy

import pytest
import torch
import torch._dynamo.testing
from networks import PaddedConv2d, StandardizedConv2d
from torch import nn
from torch.nn import functional as F

from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantizedLayer,
    QuantLinear,
    quantize_layer,
)
from limpq_ext.nn.quantizers import weight_start_scale

LAYERS = [
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 9), QuantConv1d, F.conv1d),
    (
        lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False),
        (5, 4, 9, 8),
        QuantConv2d,
        F.conv2d,
    ),
    (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 4, 4), QuantConv3d, F.conv3d),
]


def started(module, shape, **options):
    layer = quantize_layer(module, (2, 4), (3, 5), name="conv", **options).train()
    layer.select(4, 3)
    x = torch.randn(shape)
    layer(x)
    return layer, x


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("make_module", "shape", "cls", "function"), LAYERS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_convolution_runs_on_quantized_input_and_weight(
    make_module, shape, cls, function, per_channel
):
    module = make_module()
    layer, x = started(module, shape, per_channel_weights=per_channel)
    assert isinstance(layer, cls)
    quantized = layer.weight_quantizer(module.weight)
    expected = function(
        layer.input_quantizer(x),
        quantized,
        module.bias,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
    )
    assert torch.equal(layer(x), expected)
    assert not torch.equal(expected, module(x))
    assert len(quantized[0].unique()) <= 2**4
    assert (layer.weight_bits, layer.activation_bits) == (4, 3)


@pytest.mark.usefixtures("device")
def test_a_linear_layer_runs_on_quantized_input_and_weight():
    module = nn.Linear(6, 4)
    layer, x = started(module, (5, 6))
    assert isinstance(layer, QuantLinear)
    expected = F.linear(
        layer.input_quantizer(x), layer.weight_quantizer(module.weight), module.bias
    )
    assert torch.equal(layer(x), expected)


TRANSPOSED = [
    (
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
        (5, 4, 9),
        QuantConvTranspose1d,
        F.conv_transpose1d,
    ),
    (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=3, output_padding=(1, 2), dilation=2),
        (5, 4, 3, 4),
        QuantConvTranspose2d,
        F.conv_transpose2d,
    ),
    (
        lambda: nn.ConvTranspose3d(2, 3, 2, padding=1, bias=False),
        (2, 2, 4, 4, 4),
        QuantConvTranspose3d,
        F.conv_transpose3d,
    ),
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("make_module", "shape", "cls", "function"), TRANSPOSED)
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_transposed_convolution_runs_on_quantized_input_and_weight(
    make_module, shape, cls, function, per_channel
):
    module = make_module()
    layer, x = started(module, shape, per_channel_weights=per_channel, scale_start="lsq")
    assert isinstance(layer, cls)
    assert isinstance(layer, type(module))
    quantized = layer.weight_quantizer(module.weight)
    expected = function(
        layer.input_quantizer(x),
        quantized,
        module.bias,
        module.stride,
        module.padding,
        module.output_padding,
        module.groups,
        module.dilation,
    )
    assert torch.equal(layer(x), expected)
    if per_channel:
        assert layer.weight_quantizer.channel_axis == 1
        assert layer.weight_quantizer.scale.shape == (2, module.weight.shape[1])
        start = [weight_start_scale(module.weight[:, i], 4) for i in range(module.weight.shape[1])]
        torch.testing.assert_close(layer.weight_quantizer.scale[1].detach(), torch.stack(start))


@pytest.mark.usefixtures("device")
def test_a_transposed_convolution_can_be_told_its_output_size():
    module = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1)
    layer, x = started(module, (2, 3, 5, 5))
    for size in ((9, 10), (10, 9)):
        assert layer(x, output_size=size).shape == (2, 4, *size)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, (20, 20))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes_are_kept(mode, padding):
    module = nn.Conv2d(4, 4, 3, padding=padding, padding_mode=mode, groups=2)
    layer, x = started(module, (2, 4, 5, 5))
    twin = copy.deepcopy(module)
    twin.weight = nn.Parameter(layer.weight_quantizer(module.weight).detach())
    assert torch.equal(layer(x), twin(layer.input_quantizer(x)))


@pytest.mark.usefixtures("device")
def test_parameters_are_shared_with_the_float_layer_and_the_class_is_kept():
    module = nn.Conv2d(3, 4, 3)
    layer = quantize_layer(module, (4,), (4,))
    assert isinstance(layer, nn.Conv2d)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert list(module.state_dict()) == ["weight", "bias"]


@pytest.mark.usefixtures("device")
def test_a_subclass_runs_its_own_forward_with_the_quantized_weight():
    module = PaddedConv2d(3, 4, 3)
    layer, x = started(module, (2, 3, 5, 5))
    assert isinstance(layer, PaddedConv2d)
    assert isinstance(layer, QuantizedLayer)
    quantized = layer.weight_quantizer(module.weight)
    expected = F.conv2d(F.pad(layer.input_quantizer(x), (1, 1, 1, 1)), quantized, module.bias)
    out = layer(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert module.weight.grad is not None
    assert layer.weight is module.weight


def test_a_subclass_without_a_forward_of_its_own_is_an_ordinary_convolution():
    class Named(nn.Conv2d):
        pass

    layer = quantize_layer(Named(3, 4, 3), (4,), (4,))
    assert isinstance(layer, Named)
    assert isinstance(layer, QuantConv2d)


def test_other_modules_are_an_error_that_names_the_layer():
    with pytest.raises(
        TypeError, match=r"layer 'mix' is a Bilinear; quantized are nn\.Conv1d, .*nn\.Linear"
    ):
        quantize_layer(nn.Bilinear(3, 3, 3), (4,), (4,), name="mix")


@pytest.mark.usefixtures("device")
def test_copies_and_state_dicts_work():
    layer, x = started(StandardizedConv2d(3, 4, 3), (2, 3, 5, 5))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    fresh = quantize_layer(StandardizedConv2d(3, 4, 3), (2, 4), (3, 5)).train()
    fresh.load_state_dict(layer.state_dict())
    fresh.select(4, 3)
    assert torch.equal(fresh(x), layer(x))


def quantized_block(layout):
    """Convolution, batch norm, ReLU and a quantized convolution, with start values; an input."""
    convolution = quantize_layer(nn.Conv2d(8, 6, 3), (2, 4), (3, 5), name="conv")
    block = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), convolution)
    block = block.to(memory_format=layout).train()
    x = torch.randn(2, 4, 9, 9).to(memory_format=layout).requires_grad_()
    block(x)
    return block, x


def outcome(run, block, x):
    """Output, gradients and statistics of one training step."""
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), (x, *block[-1].parameters()))
    return [y.detach(), *gradients, *(buffer.clone() for buffer in block.buffers())]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_quantized_block_compiles_without_a_graph_break(backend, layout):
    block, x = quantized_block(layout)
    twin = copy.deepcopy(block)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    expected = outcome(block, block, x)
    for ours, reference in zip(outcome(compiled, twin, x), expected, strict=True):
        if backend == "aot_eager":
            assert torch.equal(ours, reference)
            assert ours.stride() == reference.stride()
        else:  # batch norm is fused, which moves a few values into another step
            difference = (ours.double() - reference.double()).abs()
            assert difference.mean() <= 1e-3 * reference.double().abs().mean()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("module", [PaddedConv2d, StandardizedConv2d])
def test_a_subclass_compiles_without_a_graph_break(module):
    layer, x = started(module(3, 4, 3), (2, 3, 5, 5))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert isinstance(layer.weight, nn.Parameter)


class Searchable(nn.Module):
    """A searchable convolution and the batch norm that follows it."""

    def __init__(self):
        super().__init__()
        self.conv = quantize_layer(nn.Conv2d(4, 6, 3), (2, 4, 6), (2, 4, 6), name="conv")
        self.norm = SwitchableBatchNorm.from_float(nn.BatchNorm2d(6), (2, 4, 6), "conv")

    def forward(self, x):
        return self.norm(self.conv(x))

    def select(self, bits):
        self.conv.select(bits, bits)
        self.norm.select(bits)

    def select_by(self, tensor):
        for module in (self.conv.weight_quantizer, self.conv.input_quantizer, self.norm):
            module.selected = tensor


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_tensor_selects_the_bits_as_select_does_with_one_graph_for_all(compiled):
    block, x = Searchable().train(), torch.randn(2, 4, 8, 8)
    for bits in (2, 4, 6):
        block.select(bits)
        block(x)
    twin, selected = copy.deepcopy(block), torch.zeros((), dtype=torch.int64)
    twin.select_by(selected)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(twin, fullgraph=True, backend=counter) if compiled else twin
    for place, bits in enumerate((2, 4, 6)):
        block.select(bits)
        selected.fill_(place)
        y, expected = run(x), block(x)
        assert torch.equal(y, expected)
        for ours, reference in zip(
            torch.autograd.grad(y.square().sum(), list(twin.parameters())),
            torch.autograd.grad(expected.square().sum(), list(block.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(ours, reference)
        for name, value in block.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value), name
    if compiled:
        assert counter.frame_count == 1


def test_a_tensor_cannot_select_before_all_start_values_are_there():
    block = Searchable().train()
    block.select_by(torch.tensor(0))
    with pytest.raises(RuntimeError, match="input quantizer has not all its start values"):
        block(torch.randn(2, 4, 8, 8))
