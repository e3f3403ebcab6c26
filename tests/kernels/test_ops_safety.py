"""The operators under arguments that no layer gives: no crash, and nothing silently wrong."""

import math

import pytest
import torch
from test_ops import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

from limpq_ext import ActivationQuantizer, WeightBank, lsq_fake_quantize, lsq_fake_quantize_multi
from limpq_ext.kernels import ops
from limpq_ext.nn.layers import quantize_layer

HOW = ([0], [-4], [3], None, None, 1e-5, math.inf, None, False)
MANY = ([0, 1], [-4, -8], [3, 7], None, None, 1e-5, math.inf, None)
SELECTED = MANY[1:]

# Every way to have an empty tensor whose memory says nothing of its channels.
EMPTY = {
    "no step along the channels": lambda: torch.zeros(1, 0).expand(4, 0),
    "no channels": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.zeros(4, 0, 5).transpose(0, 2),
    "channels last": lambda: torch.zeros(4, 3, 0, 2).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", ["single", "multi", "selected"])
def test_an_empty_tensor_has_no_gradient_and_does_no_harm(kind, axis, function):
    x = EMPTY[kind]().requires_grad_()
    scale = torch.ones(2, x.shape[axis]).requires_grad_()
    if function == "single":
        y = lsq_fake_quantize(x, scale, -4, 3, channel_axis=axis)
    elif function == "multi":
        y = lsq_fake_quantize_multi(x, scale, [-4, -2], [3, 1], channel_axis=axis)
    else:
        how = ([-4, -2], [3, 1], axis, None, 1e-5, math.inf, None)
        y = ops.fake_quantize_selected(x, scale, torch.tensor(1), how)
    dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
    assert dx.shape == x.shape
    assert dscale.shape == scale.shape
    assert not dscale.any()


def test_a_layer_with_empty_weights_does_no_harm():
    layer = quantize_layer(nn.Linear(3, 4), (2, 4), (2, 4), per_channel_weights=True)
    layer.weight = nn.Parameter(torch.zeros(1, 0).expand(4, 0).clone())
    bank = WeightBank({"layer": layer})
    bank.quantize()
    bank.weight("layer", 4).sum().backward()
    bank.backward()
    assert not layer.weight_quantizer.scale.grad.any()


@pytest.mark.parametrize("place", ["x", "scale", "selected", "grad"])
def test_a_tensor_on_the_meta_device_among_others_is_an_error(place):
    tensors = {
        "x": torch.randn(4),
        "scale": torch.ones(2),
        "selected": torch.tensor(0),
        "grad": torch.randn(4),
    }
    tensors[place] = tensors[place].to("meta")
    grad, x, scale, selected = (tensors[name] for name in ("grad", "x", "scale", "selected"))
    operators = torch.ops.limpq_ext
    with pytest.raises(ValueError, match="different devices"):
        operators.fake_quantize_selected_backward(grad, x, scale, selected, *SELECTED)
    if place != "grad":
        with pytest.raises(ValueError, match="different devices"):
            ops.fake_quantize_selected(x, scale, selected, SELECTED)
    if place != "selected":
        with pytest.raises(ValueError, match="different devices"):
            operators.fake_quantize_backward(grad, x, scale, *HOW)
        many = torch.stack([grad, grad])
        with pytest.raises(ValueError, match="different devices"):
            operators.fake_quantize_backward(many, x, scale, *MANY)
    if place in ("x", "scale"):
        with pytest.raises(ValueError, match="different devices"):
            ops.fake_quantize(x, scale, HOW)
        with pytest.raises(ValueError, match="different devices"):
            ops.fake_quantize(x, scale, MANY)


def test_memory_that_was_freed_under_a_tensor_is_an_error():
    for name in ("x", "scale"):
        tensors = {"x": torch.randn(100), "scale": torch.ones(2)}
        tensors[name].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has memory of 0 bytes"):
            ops.fake_quantize(tensors["x"], tensors["scale"], HOW)


def negated(x):
    """x as a tensor that torch only marks as negated, twice: its memory holds -x."""
    marked = torch._neg_view(-x)
    assert marked.is_neg()
    return marked


def test_the_negative_bit_is_resolved():
    x, scale, grad = torch.randn(40), torch.tensor([0.1, 0.2]), torch.randn(40)
    calls = {
        "single": lambda x: ops.fake_quantize(x, scale, HOW),
        "multi": lambda x: ops.fake_quantize(x, scale, MANY),
        "selected": lambda x: ops.fake_quantize_selected(x, scale, torch.tensor(1), SELECTED),
    }
    for call in calls.values():
        assert_same_bits(call(negated(x)), call(x))
        results = []
        for change in (torch.clone, negated):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            given = change(grad.expand_as(y).contiguous())
            results += torch.autograd.grad(y, leaf, given)
        assert_same_bits(*results)


@pytest.mark.parametrize("value", [1e-50, 1e-300, 0.0, -1.0, math.nan])
def test_a_smallest_scale_that_is_no_positive_float_is_refused(value):
    with pytest.raises(ValueError, match="scale_min is"):
        lsq_fake_quantize(torch.ones(3), torch.ones(()), -4, 3, scale_min=value)


def test_a_smallest_scale_counts_in_the_type_that_is_computed_with():
    x = torch.ones(3, dtype=torch.float64)
    y = lsq_fake_quantize(x, torch.zeros((), dtype=torch.float64), -4, 3, scale_min=1e-50)
    assert torch.equal(y, x * 3e-50)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("relu_max", [math.inf, 6.0])
def test_an_infinite_scale_behind_a_relu_has_the_gradient_of_the_chain(relu_max):
    x = torch.tensor([-math.inf, -1.0, 0.0, 2.0] * 20, requires_grad=True)
    scale = torch.tensor([math.inf], requires_grad=True)
    how = ([0], [0], [7], None, [1.0], 1e-5, math.inf)
    y = ops.fake_quantize(x, scale, (*how, relu_max, False))
    behind = nn.functional.hardtanh(x, 0.0, relu_max)
    expected = ops.fake_quantize(behind, scale, (*how, None, False))
    ours = torch.autograd.grad(y, (x, scale), torch.ones_like(y))
    plain = torch.autograd.grad(expected, (x, scale), torch.ones_like(y))
    for one, other in zip(ours, plain, strict=True):
        assert_same_bits(one, other)
    assert float(ours[1]) == 0


# --- derivatives of every kind ------------------------------------------------------------------


def single(x, scale):
    return lsq_fake_quantize(x, scale, -4, 3)


def multi(x, scale):
    return lsq_fake_quantize_multi(x, torch.stack([scale, scale * 2]), [-4, -8], [3, 7])


def selected(x, scale):
    rows = torch.stack([scale, scale * 2])
    return ops.fake_quantize_selected(x, rows, torch.tensor(1, device=x.device), SELECTED)


EVERY = pytest.mark.parametrize("function", [single, multi, selected])


@EVERY
def test_first_derivatives_of_torch_func_are_those_of_autograd(function):
    x, scale = torch.randn(30), torch.tensor(0.3)

    def loss(x, scale):
        return function(x, scale).square().sum()

    leaves = (x.clone().requires_grad_(), scale.clone().requires_grad_())
    expected = torch.autograd.grad(loss(*leaves), leaves)
    ours = torch.func.grad(loss, argnums=(0, 1))(x, scale)
    _, pull = torch.func.vjp(loss, x, scale)
    for by_grad, by_vjp, reference in zip(ours, pull(torch.tensor(1.0)), expected, strict=True):
        assert torch.equal(by_grad, reference)
        assert torch.equal(by_vjp, reference)


@EVERY
def test_higher_derivatives_of_torch_func_are_refused(function):
    x, scale = torch.randn(30), torch.tensor(0.3)

    def slope(x):
        return torch.func.grad(lambda x: function(x, scale).square().sum())(x).sum()

    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.grad(slope)(x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: function(x, scale), (x,), (torch.ones(30),))
    with pytest.raises(NotImplementedError, match=r"does not support torch\.vmap"):
        torch.vmap(lambda x: function(x, scale))(torch.randn(3, 4))


@EVERY
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_a_tangent_is_refused_with_and_without_a_gradient(function, wants_gradient):
    with torch.autograd.forward_ad.dual_level():
        leaf = torch.randn(30).requires_grad_(wants_gradient)
        x = torch.autograd.forward_ad.make_dual(leaf, torch.ones(30))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            function(x, torch.tensor(0.3))


@EVERY
def test_a_tangent_that_comes_with_the_gradient_is_refused(function):
    x = torch.randn(30, requires_grad=True)
    y = function(x, torch.tensor(0.3))
    with torch.autograd.forward_ad.dual_level():
        grad = torch.autograd.forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.autograd.grad(y, x, grad)


def test_a_quantizer_works_in_a_checkpoint_that_is_unpacked_first():
    torch.manual_seed(0)
    quantizer = ActivationQuantizer((4,), signed=True)
    quantizer(torch.randn(8, 5))
    results = []
    for how in (quantizer, lambda x: checkpoint(quantizer, x, use_reentrant=False)):
        x = torch.linspace(-1, 1, 40).requires_grad_()
        y = how(x)
        assert y.grad_fn.saved_tensors  # unpacking recomputes
        results.append(torch.autograd.grad(y.square().sum(), (x, quantizer.scale)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_compiled_autograd_gives_the_same_gradients():
    from torch._dynamo import compiled_autograd

    x, scale = torch.randn(6, 5), torch.tensor(0.3)

    def gradients(compiled):
        leaves = (x.clone().requires_grad_(), scale.clone().requires_grad_())
        loss = single(leaves[0] * 2, leaves[1]).square().sum() + multi(*leaves).sum()
        if compiled:
            with compiled_autograd._enable(torch.compile(backend="eager")):
                loss.backward()
        else:
            loss.backward()
        return [leaf.grad for leaf in leaves]

    for ours, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, expected)
