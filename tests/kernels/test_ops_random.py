"""The operators against the plain PyTorch chain on thousands of random calls of every kind."""

import math
import random

import pytest
import torch
from test_ops import DTYPES, along, assert_same_bits, compute_dtype

from limpq_ext.kernels import ops

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e30, 0.5, -1.5)
BATCHES = [pytest.param(seed, marks=[] if seed < 6 else pytest.mark.slow) for seed in range(100)]
CALLS = 500


def random_tensor(choose, shape, dtype):
    """Values of some kind, in memory of some kind: permuted, with gaps, expanded, offset."""
    kind = choose.choice(("normal", "normal", "wide", "special", "zeros"))
    if kind == "special":
        values = torch.tensor([choose.choice(SPECIAL) for _ in range(math.prod(shape))])
        values = values.reshape(shape)
    else:
        width = {"normal": 1.0, "wide": 10.0 ** choose.randint(-6, 6), "zeros": 0.0}[kind]
        values = torch.randn(shape, dtype=torch.float64) * width
    x = values.to(dtype)
    axes = list(range(len(shape)))
    layout = choose.choice(("plain", "permuted", "gaps", "offset", "expanded", "negative bit"))
    if layout == "permuted" and axes:
        choose.shuffle(axes)
        inverse = [axes.index(axis) for axis in range(len(axes))]
        x = x.permute(axes).contiguous().permute(inverse)
    elif layout == "gaps" and axes:
        x = torch.stack([x, x], dim=-1)[..., 0]
    elif layout == "offset" and x.numel():
        x = torch.cat([x.new_zeros(choose.randint(1, 7)), x.flatten()])[-x.numel() :].view(shape)
    elif layout == "expanded" and axes:
        axis = choose.choice(axes)
        x = x.narrow(axis, 0, min(1, shape[axis])).expand(shape) if shape[axis] else x
    elif layout == "negative bit":
        x = torch._neg_view(-x)
    return x


def random_scale(choose, shape, dtype):
    scale = torch.rand(shape, dtype=torch.float64) * 10.0 ** choose.randint(-3, 2)
    if choose.random() < 0.2 and scale.numel():
        scale.view(-1)[choose.randrange(scale.numel())] = choose.choice((0.0, -1.0, 1e-9, 1e9))
    scale = scale.to(dtype)
    return torch.stack([scale, scale], dim=-1)[..., 0] if choose.random() < 0.3 else scale


def expected_of(x, scale, low, high, axis, relu_max, guard, grad):
    """y, dx, the sum of dscale and that of its terms' magnitudes, as the chain gives them."""
    behind = x.contiguous().detach().requires_grad_()
    rectified = behind
    if relu_max is not None:
        rectified = torch.nn.functional.hardtanh(behind, 0.0, relu_max)
        rectified = behind.relu() if relu_max == math.inf else rectified
    compute = compute_dtype(x.dtype)
    used = along(scale.to(compute).clamp(max=guard[1]).clamp(min=guard[0]), axis, x)
    v = rectified.detach().to(compute) / used
    q = v.clamp(low, high).round()
    inside = (v >= low) & (v <= high)
    dx = torch.where(inside, grad, torch.zeros_like(grad)).to(x.dtype)
    if relu_max is not None:
        (dx,) = torch.autograd.grad(rectified, behind, dx)
    terms = grad.double() * torch.where(inside, q.double() - v.double(), q.double())
    rest = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    free = (scale.to(compute) >= guard[0]) & (scale.to(compute) <= guard[1])
    sums = [t.sum(rest) if rest else t for t in (terms, terms.abs())]
    return (q * used).to(x.dtype), dx, *(torch.where(free, s, torch.zeros_like(s)) for s in sums)


def one_call(choose):
    dims = choose.randint(0, 4)
    shape = tuple(choose.choice((0, 1, 1, 2, 3, 5, 8, 17)) for _ in range(dims))
    if choose.random() < 0.02:
        shape = (choose.choice((1023, 4099, 20_001)),)
    dtype = choose.choice(DTYPES)
    x = random_tensor(choose, shape, dtype)
    axis = choose.randrange(-len(shape), len(shape)) if shape and choose.random() < 0.5 else None
    relu_max = choose.choice((None, None, None, math.inf, 6.0))
    count = choose.randint(1, 4)
    signed = relu_max is None and choose.random() < 0.5
    bits = [choose.randint(2, 16) for _ in range(count)]
    ranges = [(-(2 ** (b - 1)), 2 ** (b - 1) - 1) if signed else (0, 2**b - 1) for b in bits]
    channels = () if axis is None else (shape[axis],)
    scale = random_scale(choose, (count, *channels), choose.choice((dtype, torch.float32)))
    guard = (1e-5, choose.choice((math.inf, 1.0)))
    grad = random_tensor(choose, (count, *shape), choose.choice((dtype, dtype, torch.float32)))
    factor = choose.choice((None, 1.0, 0.37))
    tail = (axis, None if factor is None else [factor] * count, *guard, relu_max)
    lows, highs = [low for low, _ in ranges], [high for _, high in ranges]
    form = choose.choice(("single", "multi", "selected"))
    used = list(range(count)) if form == "multi" else [choose.randrange(count)]
    leaf, rows = x.detach().requires_grad_(), scale.detach().requires_grad_()
    if form == "multi":
        y = ops.fake_quantize(leaf, rows, (used, lows, highs, *tail))
    elif form == "selected":
        y = ops.fake_quantize_selected(leaf, rows, torch.tensor(used[0]), (lows, highs, *tail))[
            None
        ]
    else:
        k = used[0]
        factors = None if factor is None else [factor]
        how = ([k], [lows[k]], [highs[k]], axis, factors, *guard, relu_max, False)
        y = ops.fake_quantize(leaf, rows, how)[None]
    given = grad[used].to(dtype)
    dx, dscale = torch.autograd.grad(y, (leaf, rows), given)
    parts = [
        expected_of(x, scale[k], *ranges[k], axis, relu_max, guard, given[i])
        for i, k in enumerate(used)
    ]
    assert y.dtype == dtype
    for ours, (expected, *_) in zip(y.detach(), parts, strict=True):
        assert_same_bits(ours, expected)
    total = parts[0][1].to(compute_dtype(dtype))
    for part in parts[1:]:
        total = total + part[1]
    assert_same_bits(dx, total.to(dtype))
    assert not dscale[[k for k in range(count) if k not in used]].any()
    shared = x.numel() // max(1, math.prod(channels))
    for k, (_, _, terms, size) in zip(used, parts, strict=True):
        per = factor if factor is not None else (shared * highs[k]) ** -0.5 if shared else 1.0
        error = (dscale[k].double() - per * terms).abs()
        allowed = 1e-5 * per * size + per * 1e-37
        if rows.dtype in (torch.float16, torch.bfloat16):
            info = torch.finfo(rows.dtype)
            allowed = allowed + info.eps * (per * terms).abs() + info.smallest_normal
            beyond = (per * terms).abs() > info.max / 2
        else:
            beyond = (per * terms).abs() > torch.finfo(torch.float32).max / 2
        defined = terms.isfinite() & size.isfinite() & ~beyond
        assert bool((error <= allowed)[defined].all()), (form, dtype, shape, axis)


@pytest.mark.parametrize("seed", BATCHES)
def test_random_calls_equal_the_chain(seed):
    choose = random.Random(seed)
    for call in range(CALLS):
        torch.manual_seed(seed * CALLS + call)
        try:
            one_call(choose)
        except AssertionError as error:
            raise AssertionError(f"call {call} of seed {seed}") from error
