"""What limpq_ext is compared with, written from the formulas.

``plain_chain`` is the contract itself and decides whether a result is right. The others are peers:
LSQ in eager PyTorch as the original LIMPQ code runs it, alone and compiled, and PyTorch's own
learnable fake quantization. The eager LSQ network at the end is the original's joint step.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.kernels.ops import SCALE_MIN
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import weight_start_scale


class Thresholds(NamedTuple):
    """One quantizer: its range, the factor of its scale's gradient, the axis of its scales."""

    quant_min: int
    quant_max: int
    grad_factor: float
    channel_axis: int | None = None


class Outcome(NamedTuple):
    """What a forward and a backward give; ``terms`` is the sum of absolute terms of dscale."""

    y: Tensor
    dx: Tensor
    dscale: Tensor
    terms: Tensor


def plain_chain(x: Tensor, scale: Tensor, grad: Tensor, how: Thresholds) -> Outcome:
    """The contract: ``(x / s).clamp(Qn, Qp).round() * s`` with straight-through gradients."""
    x, scale = x.detach(), along_channels(scale.detach(), x, how.channel_axis)
    v = x.float() / scale
    q = v.clamp(how.quant_min, how.quant_max).round()
    inside = (v >= how.quant_min) & (v <= how.quant_max)
    terms = grad.double() * torch.where(inside, q - v, q).double()
    dims = [d for d in range(x.dim()) if d != how.channel_axis]
    return Outcome(
        (q * scale).to(x.dtype),
        torch.where(inside, grad, torch.zeros_like(grad)),
        (terms.sum(dims) * how.grad_factor).flatten(),
        (terms.abs().sum(dims) * how.grad_factor).flatten(),
    )


def along_channels(scale: Tensor, x: Tensor, channel_axis: int | None) -> Tensor:
    """``scale`` in a shape that broadcasts along the channel axis of ``x``."""
    if channel_axis is None:
        return scale
    return scale.reshape([-1 if d == channel_axis else 1 for d in range(x.dim())])


# --- limpq_ext itself ---------------------------------------------------------------------------


def fused(x: Tensor, scale: Tensor, how: Thresholds) -> Tensor:
    """limpq_ext's operator, called as its quantizer modules call it."""
    return torch.ops.limpq_ext.fake_quantize(
        x,
        scale,
        [0],
        [how.quant_min],
        [how.quant_max],
        how.channel_axis,
        [how.grad_factor],
        SCALE_MIN,
        math.inf,
        stacked=False,
    )


# --- the eager chain ----------------------------------------------------------------------------


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """``value``, whose gradient is multiplied by ``factor``."""
    scaled = value * factor
    return (value - scaled).detach() + scaled


def round_straight_through(value: Tensor) -> Tensor:
    """``value`` rounded, with the gradient of the identity."""
    return (value.round() - value).detach() + value


def eager(x: Tensor, scale: Tensor, how: Thresholds) -> Tensor:
    """LSQ as a chain of PyTorch operators; arithmetic in float32, the result in x's dtype."""
    s = scale_gradient(along_channels(scale, x, how.channel_axis), how.grad_factor)
    v = torch.clamp(x / s, how.quant_min, how.quant_max)
    return (round_straight_through(v) * s).to(x.dtype)


def compiled() -> Callable[[Tensor, Tensor, Thresholds], Tensor]:
    """``torch.compile`` of :func:`eager`, with nothing left from other shapes.

    A graph break, or one shape too many for the cache, is an error: torch would go on in eager
    mode, and the eager chain would be timed under this name.
    """
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False, fullgraph=True)


def compiled_for_all_bits() -> Callable[[Tensor, Tensor, Thresholds], Tensor]:
    """The same for a network: compiled for any shape; thresholds and factor are inputs.

    As constants they would make a graph for each layer and bit-width, which takes an hour.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 1024

    @torch.compile(dynamic=True, fullgraph=True)
    def chain(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
        s = scale * factor
        s = (scale - s).detach() + s
        return round_straight_through(torch.clamp(x / s, low, high)) * s

    @functools.cache
    def on(device: torch.device, value: float) -> Tensor:
        return torch.tensor(float(value), device=device)

    def run(x: Tensor, scale: Tensor, how: Thresholds) -> Tensor:
        limits = (how.quant_min, how.quant_max, how.grad_factor)
        return chain(x, scale, *(on(x.device, value) for value in limits)).to(x.dtype)

    return run


# --- PyTorch's own ------------------------------------------------------------------------------


def learnable(x: Tensor, scale: Tensor, how: Thresholds) -> Tensor:
    """PyTorch's learnable fake quantization; its zero point is 0 and is not trained."""
    zero_point = torch.zeros_like(scale)
    limits = (how.quant_min, how.quant_max, how.grad_factor)
    if how.channel_axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, *limits)
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point, how.channel_axis, *limits
    )


# --- agreement ----------------------------------------------------------------------------------


def assert_exact(outcome: Sequence[Tensor], expected: Outcome) -> None:
    """Ours: y and dx are those of the contract bit by bit, dscale to 1e-5 of its terms."""
    y, dx, dscale = outcome
    assert torch.equal(y, expected.y), "y differs from the plain chain"
    assert torch.equal(dx, expected.dx), "dx differs from the plain chain"
    error = (dscale.double() - expected.dscale).abs()
    assert bool((error <= 1e-5 * expected.terms).all()), "dscale differs from the plain chain"


def assert_close(
    outcome: Sequence[Tensor], expected: Outcome, scale: Tensor, how: Thresholds
) -> None:
    """A peer: the same but for the few elements that its other arithmetic moves by one step.

    The straight-through tricks change the last bit of the scale, and PyTorch's own multiplies by
    1/s: an element near a tie or a threshold may fall to the other side. PyTorch's own also lets
    the gradient of what rounds into the range pass, up to half a step outside of it, and those few
    elements weigh heavily in dscale.
    """
    y, dx, dscale = outcome
    steps = along_channels(scale.detach(), y, how.channel_axis)
    distance = (y.detach().float() - expected.y.float()).abs() / steps
    rounding = 2.0**-7 * how.quant_max if y.dtype == torch.bfloat16 else 1e-3
    assert float((distance > rounding).float().mean()) <= 1e-3, "y differs from the plain chain"
    assert float(distance.max()) <= 1 + rounding, "y is more than one step off"
    moved = ~torch.isclose(dx, expected.dx, rtol=1e-2, atol=1e-6)
    assert float(moved.float().mean()) <= 1e-2, "dx differs from the plain chain"
    error = (dscale.double().flatten() - expected.dscale).abs()
    assert bool((error <= 0.1 * expected.terms).all()), "dscale differs from the plain chain"


# --- the original's network ---------------------------------------------------------------------


class EagerQuantizer(nn.Module):
    """An eager LSQ quantizer with a scale for each bit-width, picked by ``bits``."""

    def __init__(
        self,
        bits: Sequence[int],
        start: Callable[[int], Tensor | None],
        signed: bool,
        chain: Callable[[Tensor, Tensor, Thresholds], Tensor] = eager,
    ):
        super().__init__()
        self.chain = chain
        self.signed = signed
        self.bits = bits[0]
        scales = {str(b): start(b) for b in bits}
        self.started = {b for b in bits if scales[str(b)] is not None}
        self.scale = nn.ParameterDict(
            {
                b: nn.Parameter((torch.ones(1) if s is None else s).reshape(1))
                for b, s in scales.items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x`` at ``self.bits``; the first batch at a bit-width gives its start value."""
        quant_min = -(2 ** (self.bits - 1)) if self.signed else 0
        quant_max = 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1
        scale = self.scale[str(self.bits)]
        if self.bits not in self.started:
            with torch.no_grad():
                scale.copy_(2 * x.abs().mean() / math.sqrt(quant_max))
            self.started.add(self.bits)
        factor = 1 / math.sqrt(x.numel() * quant_max)
        return self.chain(x, scale, Thresholds(quant_min, quant_max, factor))


class EagerConv2d(nn.Conv2d):
    """A convolution on eagerly quantized input and weight."""

    input_quantizer: EagerQuantizer
    weight_quantizer: EagerQuantizer

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of the quantized input."""
        return self._conv_forward(
            self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias
        )


class EagerSwitchableNorm(nn.Module):
    """A list of batch normalisations, one for each bit-width of the layer ``source``."""

    def __init__(self, norm: nn.Module, bits: Sequence[int], source: str):
        super().__init__()
        self.source = source
        self.bits = bits[0]
        self.norms = nn.ModuleDict({str(b): copy.deepcopy(norm) for b in bits})

    def forward(self, x: Tensor) -> Tensor:
        """The normalisation of ``self.bits``."""
        return self.norms[str(self.bits)](x)


class EagerJointTrainer:
    """The original's joint step: a plain loop over n uniform branches and a random one.

    Args:
        model: The float network, which is left as it is; its searchable layers are convolutions.
        prepared: The same network as :func:`limpq_ext.prepare` returned it, after its first batch:
            it names the searchable layers, the sign of their inputs, and the normalisation that
            each feeds.
        bits: The candidates, from the highest down.
        chain: What quantizes: :func:`eager` or its compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        prepared: nn.Module,
        bits: Sequence[int],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        clip_value: float = 1.0,
        chain: Callable[[Tensor, Tensor, Thresholds], Tensor] = eager,
    ):
        self.model = copy.deepcopy(model).train()
        self.bits = tuple(bits)
        self.loss_fn = loss_fn
        self.clip_value = clip_value
        modules = dict(self.model.named_modules())
        self.layers: dict[str, EagerConv2d] = {}
        for name, fused_layer in quantized_layers(prepared).items():
            layer = modules[name]
            if type(layer) is not nn.Conv2d:
                raise TypeError(f"layer '{name}' is a {type(layer).__name__}, expected a Conv2d")
            layer.__class__ = EagerConv2d
            weight = layer.weight
            layer.weight_quantizer = EagerQuantizer(
                self.bits, lambda b, w=weight: weight_start_scale(w, b), signed=True, chain=chain
            )
            layer.input_quantizer = EagerQuantizer(
                self.bits,
                lambda b: None,
                signed=bool(fused_layer.input_quantizer.signed),
                chain=chain,
            )
            self.layers[name] = layer
        self.norms: list[EagerSwitchableNorm] = []
        for name, norm in prepared.named_modules():
            if hasattr(norm, "source"):
                parent, _, child = name.rpartition(".")
                switchable = EagerSwitchableNorm(modules[name], self.bits, norm.source)
                setattr(modules[parent], child, switchable)
                self.norms.append(switchable)
        self.model.to(next(model.parameters()).device)
        self.optimizer = optimizer(self.model.parameters())

    def step(self, x: Tensor, target: Tensor, draw: dict[str, int]) -> dict[str, Tensor]:
        """One joint step; ``draw`` holds the bits of the random branch. The losses by branch."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = {}
        branches = {str(b): dict.fromkeys(self.layers, b) for b in self.bits}
        for branch, bits in {**branches, "random": draw}.items():
            for name, layer in self.layers.items():
                layer.input_quantizer.bits = layer.weight_quantizer.bits = bits[name]
            for norm in self.norms:
                norm.bits = bits[norm.source]
            loss = self.loss_fn(self.model(x), target)
            loss.backward()
            losses[branch] = loss.detach()
        nn.utils.clip_grad_value_(self.model.parameters(), self.clip_value)
        self.optimizer.step()
        return losses
