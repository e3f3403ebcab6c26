"""The cases of the kernel benchmarks: what is called, on what data, how many bytes it has to move.

A case is built only when its turn comes, and building it checks first that every contender computes
the right values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from limpq_ext.kernels.bank import WeightBank
from limpq_ext.kernels.ops import (
    SCALE_MIN,
    lsq_fake_quantize,
    lsq_grad_factor,
    quantization_error_sums,
    thresholds,
)
from limpq_ext.nn.layers import quantize_layer
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import weight_start_scale

from . import peers
from .peers import Thresholds
from .report import FLOOR, OURS
from .timing import Contender

BITS = (2, 3, 4, 5, 6)
DIRECTIONS = ("forward", "backward", "forward+backward")
Implementation = Callable[[Tensor, Tensor, Thresholds], Tensor]

ACTIVATIONS = (32, 64, 56, 56)
LARGE_WEIGHTS = (512, 512, 3, 3)
SMALL_WEIGHTS = (64, 64, 3, 3)

# The searchable convolutions of ResNet-18: all but the first, which stays in float with the
# classifier.
RESNET18_WEIGHTS = (
    *[(64, 64, 3, 3)] * 4,
    *[(128, 64, 3, 3), (128, 128, 3, 3), (128, 64, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3)],
    *[(256, 128, 3, 3), (256, 256, 3, 3), (256, 128, 1, 1), (256, 256, 3, 3), (256, 256, 3, 3)],
    *[(512, 256, 3, 3), (512, 512, 3, 3), (512, 256, 1, 1), (512, 512, 3, 3), (512, 512, 3, 3)],
)


@dataclass(frozen=True)
class Workload:
    """A case that is ready to be timed.

    Attributes:
        contenders: By name, limpq_ext first; "floor" copies the same bytes.
        bytes: What the operation has to read and write at least, see NOTES.md.
    """

    contenders: dict[str, Contender]
    bytes: int


@dataclass(frozen=True)
class Case:
    """A case by name.

    Attributes:
        name: What is computed, on which shape and dtype.
        build: Makes the data, checks the contenders against the plain chain, and returns them.
        targets: The least ratio (a contender's time over limpq_ext's) that is wanted.
        quick: Whether the quick run has it.
    """

    name: str
    build: Callable[[], Workload]
    targets: dict[str, float] = field(default_factory=dict)
    quick: bool = False


def all_cases(device: str, *, quick: bool) -> list[Case]:
    """The cases for "cpu" or "cuda"; a quick run has fewer and compiles nothing."""
    cases = [*_single_cases(device, quick), *_multi_cases(device), *_resnet_cases(device)]
    cases += _error_sums_cases(device)
    return [case for case in cases if case.quick or not quick]


# --- one bit-width ------------------------------------------------------------------------------

# Least ratios; a bound such as "at most 1.1 times the floor" is written as 1 / 1.1.
CPU_TARGETS = {
    "activations": {FLOOR: 1 / 1.1, "eager": 15, "learnable": 10, "compiled": 1.3},
    "large weights": {"eager": 10, "learnable": 10, "compiled": 1.8},
    "small weights": {"eager": 4, "learnable": 4, "compiled": 3},
    "one element": {"relu": 1 / 1.3},
}
CUDA_FLOOR = {"forward": 0.90, "backward": 0.85}
CUDA_TARGETS = {"eager": 8, "learnable": 3, "compiled": 1}
CUDA_SMALL_TARGETS = {"eager": 2, "learnable": 2, "compiled": 1}


def _single_cases(device: str, quick: bool) -> Iterator[Case]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    # label, shape, dtype, signed, channel axis, directions
    rows: list[tuple[str, Sequence[int], torch.dtype, bool, int | None, Sequence[str]]] = [
        ("activations", ACTIVATIONS, float32, False, None, DIRECTIONS),
        ("activations", ACTIVATIONS, bfloat16, False, None, DIRECTIONS),
        ("large weights", LARGE_WEIGHTS, float32, True, None, DIRECTIONS),
        ("large weights per channel", LARGE_WEIGHTS, float32, True, 0, DIRECTIONS[2:]),
        ("small weights", SMALL_WEIGHTS, float32, True, None, DIRECTIONS),
        ("one element", (1,), float32, True, None, DIRECTIONS[2:]),
    ]
    if device == "cuda":
        for exponent in (26, 27):
            for dtype in (float32, bfloat16):
                rows.append(("vector", (2**exponent,), dtype, False, None, DIRECTIONS))
    for label, shape, dtype, signed, axis, directions in rows:
        for direction in directions:
            yield Case(
                f"{label} {_shape(shape)} {_dtype(dtype)} {direction}",
                lambda s=shape, d=dtype, g=signed, a=axis, w=direction: _build_single(
                    device, s, d, g, a, w, compile_eager=not quick
                ),
                _single_targets(device, label, shape, dtype, direction),
                quick=direction == "forward+backward" and dtype == float32 and axis is None,
            )


def _single_targets(
    device: str, label: str, shape: Sequence[int], dtype: torch.dtype, direction: str
) -> dict[str, float]:
    if device == "cpu":
        known = direction == "forward+backward" and dtype == torch.float32
        return CPU_TARGETS.get(label, {}) if known else {}
    targets: dict[str, float] = {}
    if math.prod(shape) >= 2**26 and direction in CUDA_FLOOR:
        targets[FLOOR] = CUDA_FLOOR[direction]
    if direction == "forward+backward" and label != "one element":
        targets |= CUDA_SMALL_TARGETS if label == "small weights" else CUDA_TARGETS
    return targets


def _build_single(
    device: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    signed: bool,
    channel_axis: int | None,
    direction: str,
    *,
    compile_eager: bool,
) -> Workload:
    one_element = math.prod(shape) == 1
    implementations: dict[str, Implementation] = {
        OURS: peers.fused,
        "eager": peers.eager,
        "learnable": peers.learnable,
    }
    if one_element:
        implementations["relu"] = lambda x, scale, how: torch.relu(x)
        implementations["functional API"] = lambda x, scale, how: lsq_fake_quantize(
            x, scale, how.quant_min, how.quant_max
        )
    elif compile_eager:
        implementations["compiled"] = peers.compiled()

    element = torch.empty((), dtype=dtype).element_size()
    streams = {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
    moved = streams * element * math.prod(shape)
    quant_min, quant_max = thresholds(4, signed=signed)
    data = []
    for _ in range(_rotation(device, moved)):
        x = torch.randn(shape, device=device)
        x = x * 0.05 if signed else x.abs()
        if one_element:
            scale = torch.full((1,), 0.05, device=device)
        elif signed:
            scale = weight_start_scale(x, 4, channel_axis=0 if channel_axis == 0 else None).reshape(
                -1
            )
        else:
            scale = (2 * x.mean() / math.sqrt(quant_max)).reshape(1)
        x = x.to(dtype).requires_grad_()
        data.append((x, scale.requires_grad_(), torch.randn_like(x)))
    factor = lsq_grad_factor(data[0][0], quant_max, channel_axis)
    how = Thresholds(quant_min, quant_max, factor, channel_axis)

    x, scale, grad = data[0]
    expected = peers.plain_chain(x, scale, grad, how)
    for name, implementation in implementations.items():
        if name == "relu":
            continue
        y = implementation(x, scale, how)
        outcome = (y, *torch.autograd.grad(y, (x, scale), grad))
        if name in (OURS, "functional API"):
            peers.assert_exact(outcome, expected)
        else:
            peers.assert_close(outcome, expected, scale, how)

    contenders = {
        name: _contender(implementation, data, how, direction, trains_scale=name != "relu")
        for name, implementation in implementations.items()
    }
    if not one_element:
        parts = {"forward": [2], "backward": [3], "forward+backward": [2, 3]}[direction]
        contenders[FLOOR] = floor(device, [moved * part // streams for part in parts])
    return Workload(contenders, moved)


def _contender(
    implementation: Implementation,
    data: Sequence[tuple[Tensor, Tensor, Tensor]],
    how: Thresholds,
    direction: str,
    *,
    trains_scale: bool = True,
) -> Contender:
    """One implementation through autograd; only the named direction is timed."""

    def inputs(call: int) -> tuple[Tensor, Tensor, Tensor]:
        return data[call % len(data)]

    def forward(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, scale, _ = given
        return implementation(x, scale, how)

    def forward_first(call: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        given = inputs(call)
        return forward(given), given

    def backward(given: tuple[Tensor, tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        y, (x, scale, grad) = given
        return torch.autograd.grad(y, (x, scale) if trains_scale else (x,), grad)

    if direction == "forward":
        return Contender(forward, inputs)
    if direction == "backward":
        return Contender(backward, forward_first)
    return Contender(lambda given: backward((forward(given), given)), inputs)


def floor(device: str, parts: Sequence[int]) -> Contender:
    """Copies that move ``parts`` bytes each, reads and writes counted, between ready tensors."""
    sizes = [max(1, part // 8) for part in parts]  # float32, half of it read and half written
    pairs = [
        [(torch.randn(size, device=device), torch.zeros(size, device=device)) for size in sizes]
        for _ in range(_rotation(device, sum(parts)))
    ]

    def copy(call: int) -> None:
        for source, destination in pairs[call % len(pairs)]:
            destination.copy_(source)

    return Contender(copy)


def _rotation(device: str, moved: int) -> int:
    """How many sets of data take turns: on a GPU so many that its L2 cache holds none of them."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(math.ceil(4 * cache / max(moved, 1)), 64)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- many bit-widths in one pass ----------------------------------------------------------------

MultiInput = tuple[Tensor, Tensor, list[Tensor]]  # x, a scale and a gradient per bit-width


def _multi_cases(device: str) -> Iterator[Case]:
    rows: list[tuple[str, Sequence[int], torch.dtype, bool]] = [
        ("activations", ACTIVATIONS, torch.float32, False),
        ("large weights", LARGE_WEIGHTS, torch.float32, True),
    ]
    if device == "cuda":
        rows += [("vector", (2**26,), dtype, False) for dtype in (torch.float32, torch.bfloat16)]
    for label, shape, dtype, signed in rows:
        for direction in DIRECTIONS[:2]:
            targets = {"five calls": 1 / 0.85 if direction == "forward" else 1 / 0.5}
            if device == "cuda":
                targets = {FLOOR: 0.85} if math.prod(shape) >= 2**26 else {}
            yield Case(
                f"{len(BITS)} bit-widths, {label} {_shape(shape)} {_dtype(dtype)} {direction}",
                lambda s=shape, d=dtype, g=signed, w=direction: _build_multi(device, s, d, g, w),
                targets,
                quick=label == "large weights",
            )


def _build_multi(
    device: str, shape: Sequence[int], dtype: torch.dtype, signed: bool, direction: str
) -> Workload:
    """All bit-widths in one call against a call for each, on the same tensors.

    Both write as many tensors: the five calls' outputs live as long as the one call's does. The
    five backward calls leave five dx, which are added up in place, as autograd does.
    """
    count = len(BITS)
    size = torch.empty((), dtype=dtype).element_size() * math.prod(shape)
    moved = size * (1 + count if direction == "forward" else 2 + count)
    ranges = [thresholds(bits, signed=signed) for bits in BITS]
    data = []
    for _ in range(_rotation(device, moved)):
        x = torch.randn(shape, device=device)
        x = x * 0.05 if signed else x.abs()
        start = [
            weight_start_scale(x, bits) if signed else 2 * x.mean() / math.sqrt(quant_max)
            for bits, (_, quant_max) in zip(BITS, ranges, strict=True)
        ]
        x = x.to(dtype)
        data.append((x, torch.stack(start), torch.stack([torch.randn_like(x) for _ in BITS])))
    factors = [lsq_grad_factor(data[0][0], quant_max) for _, quant_max in ranges]
    rows, mins, maxs = list(range(count)), [r[0] for r in ranges], [r[1] for r in ranges]
    guard = (SCALE_MIN, math.inf)

    def alone(k: int, factor: float) -> tuple[object, ...]:
        return [k], [mins[k]], [maxs[k]], None, [factor], *guard

    def forward(given: MultiInput) -> Tensor:
        x, scales, _ = given
        return torch.ops.limpq_ext.fake_quantize(x, scales, rows, mins, maxs, None, factors, *guard)

    def five_forwards(given: MultiInput) -> list[Tensor]:
        x, scales, _ = given
        return [
            torch.ops.limpq_ext.fake_quantize(x, scales, *alone(k, factors[k]), stacked=False)
            for k in rows
        ]

    def backward(given: MultiInput) -> tuple[Tensor, Tensor]:
        x, scales, grads = given
        return torch.ops.limpq_ext.fake_quantize_backward(
            grads, x, scales, rows, mins, maxs, None, factors, *guard
        )

    def five_backwards(given: MultiInput) -> tuple[Tensor, Tensor]:
        x, scales, grads = given
        total = dscale = None
        for k in rows:
            dx, dscale_k = torch.ops.limpq_ext.fake_quantize_backward(
                grads[k], x, scales, *alone(k, factors[k]), stacked=False
            )
            total = dx if total is None else total.add_(dx)
            dscale = dscale_k if dscale is None else dscale.add_(dscale_k)
        return total, dscale

    x, scales, grads = data[0]
    quantizers = [Thresholds(*ranges[k], factors[k]) for k in rows]
    expected = [peers.plain_chain(x, scales[k], grads[k], quantizers[k]) for k in rows]
    for ys in (forward(data[0]), five_forwards(data[0])):
        assert all(torch.equal(y, e.y) for y, e in zip(ys, expected, strict=True))
    dx_sum = sum(e.dx.float() for e in expected).to(dtype)
    for name, (dx, dscale) in {"one": backward(data[0]), "five": five_backwards(data[0])}.items():
        if name == "one" or dtype == torch.float32:  # five additions in bfloat16 round five times
            assert torch.equal(dx, dx_sum), f"dx of {name} differs from the plain chain"
        for k, e in enumerate(expected):
            assert abs(float(dscale[k]) - float(e.dscale)) <= 1e-5 * float(e.terms)
    ours, theirs = (
        (forward, five_forwards) if direction == "forward" else (backward, five_backwards)
    )

    def inputs(call: int) -> MultiInput:
        return data[call % len(data)]

    contenders = {
        OURS: Contender(ours, inputs),
        "five calls": Contender(theirs, inputs),
        FLOOR: floor(device, [moved]),
    }
    return Workload(contenders, moved)


# --- what the errors add to a loss --------------------------------------------------------------


def _error_sums_cases(device: str) -> Iterator[Case]:
    rows: list[tuple[str, Sequence[int], torch.dtype, bool]] = [
        ("activations", ACTIVATIONS, torch.float32, False),
        ("activations", ACTIVATIONS, torch.bfloat16, False),
        ("large weights", LARGE_WEIGHTS, torch.float32, True),
    ]
    for label, shape, dtype, signed in rows:
        yield Case(
            f"{len(BITS)} bit-widths, error sums of {label} {_shape(shape)} {_dtype(dtype)}",
            lambda s=shape, d=dtype, g=signed: _build_error_sums(device, s, d, g),
            quick=signed,
        )


def _build_error_sums(
    device: str, shape: Sequence[int], dtype: torch.dtype, signed: bool
) -> Workload:
    """Sums along the first axis, of samples or output channels, in one call and in plain torch."""
    moved = 2 * torch.empty((), dtype=dtype).element_size() * math.prod(shape)
    ranges = [thresholds(bits, signed=signed) for bits in BITS]
    mins, maxs = [r[0] for r in ranges], [r[1] for r in ranges]
    data = []
    for _ in range(_rotation(device, moved)):
        x = torch.randn(shape, device=device)
        x = x * 0.05 if signed else x.abs()
        start = [2 * x.abs().mean() / math.sqrt(quant_max) for quant_max in maxs]
        data.append((x.to(dtype), torch.randn_like(x).to(dtype), torch.stack(start)))

    def ours(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return torch.stack(quantization_error_sums(*given, mins, maxs, sum_axis=0))

    def eager(given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, grad, scales = given
        wide, wide_grad = x.float(), grad.float()
        sums, squares = [], []
        for scale, (low, high) in zip(scales, ranges, strict=True):
            term = ((wide / scale).clamp(low, high).round() * scale - wide) * wide_grad
            sums.append(term.flatten(1).sum(1))
            squares.append(term.square().flatten(1).sum(1))
        return torch.stack([torch.stack(sums), torch.stack(squares)])

    (sums, squares), (plain_sums, plain_squares) = ours(data[0]), eager(data[0])
    assert torch.allclose(squares.float(), plain_squares, rtol=1e-4)
    bound = 1e-4 * (squares * math.prod(shape[1:])).sqrt()  # of the sum of magnitudes
    assert bool(((sums - plain_sums.double()).abs() <= bound).all())

    def inputs(call: int) -> tuple[Tensor, Tensor, Tensor]:
        return data[call % len(data)]

    contenders = {
        OURS: Contender(ours, inputs),
        "eager": Contender(eager, inputs),
        FLOOR: floor(device, [moved]),
    }
    return Workload(contenders, moved)


# --- all weights of a network -------------------------------------------------------------------


def _resnet_cases(device: str) -> Iterator[Case]:
    label = f"ResNet-18 weights x {len(BITS)} bit-widths"
    yield Case(
        f"{label}, one call per layer float32 forward+backward",
        lambda: _build_resnet(device, with_bank=False),
    )
    yield Case(
        f"{label}, weight bank float32 forward+backward",
        lambda: _build_resnet(device, with_bank=True),
        {"call each": 1.5, "eager": 10} if device == "cpu" else {"eager": 20},
        quick=True,
    )


def _build_resnet(device: str, *, with_bank: bool) -> Workload:
    """Every weight at every bit-width, then the gradients of all of them back to weight and scale.

    "call each" is a call per layer and bit-width, whose gradients autograd adds up.
    """
    model = _ResNet18Weights().to(device)
    layers = quantized_layers(model)
    weights = [layer.weight for layer in layers.values()]
    scales = [layer.weight_quantizer.scale for layer in layers.values()]
    grads = [[torch.randn_like(weight) for _ in BITS] for weight in weights]
    flat_grads = [grad for of_layer in grads for grad in of_layer]
    stacked_grads = [torch.stack(of_layer) for of_layer in grads]
    ranges = [thresholds(bits, signed=True) for bits in BITS]
    mins, maxs = [r[0] for r in ranges], [r[1] for r in ranges]
    quantizers = [
        [Thresholds(*r, lsq_grad_factor(weight, r[1])) for r in ranges] for weight in weights
    ]
    rows = list(range(len(BITS)))
    guard = (SCALE_MIN, math.inf)

    def alone(k: int, factor: float) -> tuple[object, ...]:
        return [k], [mins[k]], [maxs[k]], None, [factor], *guard

    def call_per_layer(_: object) -> tuple[Tensor, ...]:
        ys = [
            torch.ops.limpq_ext.fake_quantize(
                weight, scale, rows, mins, maxs, None, [h.grad_factor for h in hows], *guard
            )
            for weight, scale, hows in zip(weights, scales, quantizers, strict=True)
        ]
        return torch.autograd.grad(ys, weights + scales, stacked_grads)

    def call_each(_: object) -> tuple[Tensor, ...]:
        ys = [
            torch.ops.limpq_ext.fake_quantize(
                weight, scale, *alone(k, hows[k].grad_factor), stacked=False
            )
            for weight, scale, hows in zip(weights, scales, quantizers, strict=True)
            for k in rows
        ]
        return torch.autograd.grad(ys, weights + scales, flat_grads)

    # The original keeps a parameter for each scale.
    own_scales = [[scale[k : k + 1].detach().requires_grad_() for k in rows] for scale in scales]
    flat_scales = [scale for of_layer in own_scales for scale in of_layer]

    def eager(_: object) -> tuple[Tensor, ...]:
        ys = [
            peers.eager(weight, of_layer[k], hows[k])
            for weight, of_layer, hows in zip(weights, own_scales, quantizers, strict=True)
            for k in rows
        ]
        return torch.autograd.grad(ys, weights + flat_scales, flat_grads)

    bank = WeightBank(layers)

    def through_bank(_: object) -> None:
        for parameter in (*weights, *scales):
            parameter.grad = None
        bank.quantize()
        for name, of_layer in zip(layers, grads, strict=True):
            for bits, grad in zip(BITS, of_layer, strict=True):
                bank.weight(name, bits).grad = grad  # as backward leaves it
        bank.backward()

    count = len(weights)
    by_layer = call_per_layer(None)
    calls = {"a call per layer": by_layer, "a call each": call_each(None)}
    eager_dx = eager(None)[:count]
    if with_bank:
        through_bank(None)
        calls["the bank"] = [*(w.grad for w in weights), *(s.grad for s in scales)]
        for name, weight, scale, hows in zip(layers, weights, scales, quantizers, strict=True):
            for k, bits in enumerate(BITS):
                expected = peers.plain_chain(weight, scale[k], torch.ones_like(weight), hows[k])
                assert torch.equal(bank.weight(name, bits), expected.y), "the bank's weights differ"
        model.zero_grad()
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        expected = [
            peers.plain_chain(weight, scale[k], grads[i][k], quantizers[i][k]) for k in rows
        ]
        dx = sum(e.dx for e in expected)
        for name, result in calls.items():
            assert torch.allclose(result[i], dx, rtol=1e-5, atol=1e-5), f"dx of {name} differs"
            for k, e in enumerate(expected):
                error = abs(float(result[count + i][k]) - float(e.dscale))
                assert error <= 1e-5 * float(e.terms), f"dscale of {name} differs"
        differ = (eager_dx[i] - dx).abs() > 1e-5
        assert float(differ.float().mean()) <= 5e-3, "dx of the eager chain differs"

    contenders = {OURS: Contender(through_bank if with_bank else call_per_layer)}
    if with_bank:
        contenders["call per layer"] = Contender(call_per_layer)
    moved = 4 * sum(weight.numel() for weight in weights) * (1 + len(BITS) + 2 + len(BITS))
    forward_share = moved * (1 + len(BITS)) // (3 + 2 * len(BITS))
    contenders |= {
        "call each": Contender(call_each),
        "eager": Contender(eager),
        FLOOR: floor(device, [forward_share, moved - forward_share]),
    }
    return Workload(contenders, moved)


class _ResNet18Weights(nn.Module):
    """The searchable convolutions of ResNet-18 with their quantizers, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        for index, (channels, in_channels, height, width) in enumerate(RESNET18_WEIGHTS):
            layer = nn.Conv2d(in_channels, channels, (height, width), bias=False)
            self.add_module(f"conv{index}", quantize_layer(layer, BITS, BITS))
