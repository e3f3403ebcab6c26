"""The operators against the plain PyTorch chain, bit for bit."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from limpq_ext import lsq_fake_quantize, lsq_fake_quantize_multi
from limpq_ext.kernels import ops as limpq_ops
from limpq_ext.kernels.ops import lsq_grad_factor, thresholds

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(0,), (), (1,), (3,), (31,), (1023,), (4099,), (100_003,), (2, 3, 5, 7)]
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_same_bits(ours, reference):
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    both_nan = ours.isnan() & reference.isnan()
    kind = INTEGERS[ours.dtype]
    same = ours.contiguous().view(kind) == reference.contiguous().view(kind)
    assert bool((same | both_nan).all())


def along(scale, axis, x):
    """The scales as a tensor that broadcasts against x."""
    if axis is None:
        return scale
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape)


def chain(x, scale, quant_min, quant_max, axis=None):
    """The plain chain in the compute type: v, q and y."""
    scale = along(scale, axis, x)
    v = x.to(scale.dtype) / scale
    q = v.clamp(quant_min, quant_max).round()
    return v, q, (q * scale).to(x.dtype)


def check(x, scale, quant_min, quant_max, axis=None, grad_factor=1.0):
    """Forward, dx and dscale of the operator against the chain and its formulas."""
    x = x.detach().requires_grad_()
    scale = scale.detach().requires_grad_()
    y = lsq_fake_quantize(
        x, scale, quant_min, quant_max, channel_axis=axis, grad_factor=grad_factor
    )
    grad = torch.randn(x.shape, dtype=torch.float64).to(x)
    dx, dscale = torch.autograd.grad(y, (x, scale), grad)
    with torch.no_grad():
        v, q, expected = chain(x, scale, quant_min, quant_max, axis)
        assert_same_bits(y.detach(), expected)
        inside = (v >= quant_min) & (v <= quant_max)
        assert_same_bits(dx, torch.where(inside, grad, torch.zeros_like(grad)))
        terms = grad.double() * torch.where(inside, q.double() - v.double(), q.double())
        if axis is None:
            total, size = terms.sum(), terms.abs().sum()
        else:
            rest = [d for d in range(x.dim()) if d != axis % x.dim()]
            total = terms.sum(rest) if rest else terms
            size = terms.abs().sum(rest) if rest else terms.abs()
        error = (dscale.double().reshape(total.shape) - grad_factor * total).abs()
        assert bool((error <= 1e-5 * grad_factor * size + 1e-30).all())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True), (8, False)])
def test_per_tensor_equals_the_chain(dtype, shape, bits, signed):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    scale = torch.tensor(0.11, dtype=compute_dtype(dtype))
    check(x, scale, *thresholds(bits, signed=signed))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((8, 5, 3, 3), 0),
        ((8, 5, 3, 3), 1),
        ((4, 6), -1),
        ((7, 1), 1),
        ((1, 9), 0),
        ((3, 20_001), 0),
        ((1, 300, 2, 70), 1),
        ((0, 4), 1),
        ((700, 33), 1),
    ],
)
def test_per_channel_equals_the_chain(dtype, shape, axis):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    check_per_channel(x, axis)
    if x.dim() == 4:
        check_per_channel(x.to(memory_format=torch.channels_last), axis)


def check_per_channel(x, axis):
    scale = torch.rand(x.shape[axis], dtype=compute_dtype(x.dtype)) * 0.3 + 0.02
    check(x, scale, -4, 3, axis)
    y = lsq_fake_quantize(x, scale, -4, 3, channel_axis=axis)
    assert y.stride() == x.stride()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
def test_special_values_equal_the_chain(dtype, signed):
    tiny = torch.finfo(dtype).smallest_normal
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, tiny, -tiny, tiny / 4, -tiny / 4, 1e4, -1e4]
    ties = [step * 0.25 for step in range(-40, 41)]
    x = torch.tensor(values + ties, dtype=torch.float64).to(dtype)
    for step in (0.5, 0.25, 0.1, 1e-5, 1e3):
        scale = torch.tensor(step, dtype=compute_dtype(dtype))
        quant_min, quant_max = thresholds(4, signed=signed)
        y = lsq_fake_quantize(x, scale, quant_min, quant_max)
        assert_same_bits(y, chain(x, scale, quant_min, quant_max)[2])
        finite = x[x.isfinite()]
        check(finite, scale, quant_min, quant_max)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bits", range(2, 17))
def test_every_bit_width_equals_the_chain(bits):
    x = torch.randn(5000) * 2**bits / 4
    for signed in (True, False):
        check(x, torch.tensor(0.9), *thresholds(bits, signed=signed))


@pytest.mark.usefixtures("device")
def test_all_half_precision_numbers_equal_the_chain():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for step in (1.0, 0.037, 3e-5, 812.0):
            scale = torch.tensor(step)
            assert_same_bits(lsq_fake_quantize(x, scale, -128, 127), chain(x, scale, -128, 127)[2])


@pytest.mark.usefixtures("device")
def test_memory_with_gaps_works_and_keeps_its_values():
    base = torch.randn(6, 10, 8)
    for x in (base[:, ::2], base[1:, 3:, 1:], base[:, :1].expand(6, 4, 8), base.transpose(0, 2)):
        check(x, torch.tensor(0.2), -8, 7)
        check(x, torch.rand(x.shape[1]) + 0.1, -8, 7, 1)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("channel_axis", [None, 1])
def test_many_bit_widths_equal_single_calls(channel_axis):
    x = torch.randn(6, 5, 40).requires_grad_()
    bits = (2, 3, 4, 5, 6)
    ranges = [thresholds(b, signed=True) for b in bits]
    mins, maxs = zip(*ranges, strict=True)
    shape = (5,) if channel_axis is None else (5, 5)
    scales = (torch.rand(shape) + 0.05).requires_grad_()
    grads = torch.randn(5, *x.shape)
    ys = lsq_fake_quantize_multi(x, scales, mins, maxs, channel_axis=channel_axis)
    dx, dscales = torch.autograd.grad(ys, (x, scales), grads)
    total = torch.zeros_like(x)
    for k, (low, high) in enumerate(ranges):
        scale = scales[k].detach().requires_grad_()
        y = lsq_fake_quantize(x, scale, low, high, channel_axis=channel_axis)
        assert_same_bits(ys[k].detach(), y.detach())
        one_dx, one_dscale = torch.autograd.grad(y, (x, scale), grads[k])
        total += one_dx
        assert torch.equal(dscales[k], one_dscale)
    assert torch.equal(dx, total)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("scale", "used", "free"),
    [(1e-7, 1e-5, False), (-3.0, 1e-5, False), (5.0, 2.0, False), (1.5, 1.5, True)],
)
def test_the_guard_replaces_the_scale_and_stops_its_gradient(scale, used, free):
    x = torch.randn(100).requires_grad_()
    s = torch.tensor(scale, requires_grad=True)
    y = lsq_fake_quantize(x, s, -8, 7, scale_max=2.0)
    assert torch.equal(y, lsq_fake_quantize(x, torch.tensor(used), -8, 7))
    y.sum().backward()
    assert bool(s.grad != 0) is free


@pytest.mark.usefixtures("device")
def test_the_default_gradient_factor_is_that_of_lsq():
    x, scale = torch.randn(6, 50), torch.tensor(0.3, requires_grad=True)
    (lsq,) = torch.autograd.grad(lsq_fake_quantize(x, scale, -8, 7).sum(), scale)
    (plain,) = torch.autograd.grad(lsq_fake_quantize(x, scale, -8, 7, grad_factor=1.0).sum(), scale)
    assert float(lsq) == pytest.approx(float(plain) / math.sqrt(300 * 7), rel=1e-6)
    assert lsq_grad_factor(x, 7, 0) == pytest.approx(1 / math.sqrt(50 * 7))


def digest():
    torch.manual_seed(0)
    answer = hashlib.sha256()
    for dtype in DTYPES:
        x = (torch.randn(3, 70_001) * 3).to(dtype)
        grad = torch.randn(3, 70_001).to(dtype)
        for axis, scale in (
            (None, torch.tensor(0.1)),
            (0, torch.rand(3) + 0.1),
            (1, torch.rand(70_001) + 0.1),
        ):
            s = scale.to(compute_dtype(dtype)).requires_grad_()
            leaf = x.clone().requires_grad_()
            y = lsq_fake_quantize(leaf, s, -8, 7, channel_axis=axis)
            y.backward(grad)
            values = [y.detach(), leaf.grad, s.grad]
            how = (axis, [0.5], 1e-5, math.inf, 0.6, False)
            y = torch.ops.limpq_ext.fake_quantize(leaf, s, [0], [0], [7], *how)
            values += [y.detach(), *torch.autograd.grad(y, (leaf, s), grad)]
            if axis != 0:
                rows = torch.stack([s.detach(), s.detach() * 2, s.detach() / 2]).requires_grad_()
                ranges = ([-8, -2, 0], [7, 1, 255])
                leaf = x.clone().requires_grad_()
                y = lsq_fake_quantize_multi(leaf, rows, *ranges, channel_axis=axis)
                given = grad.expand(3, 3, -1)
                values += [y.detach(), *torch.autograd.grad(y, (leaf, rows), given)]
            for value in values:
                answer.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return answer.hexdigest()


def test_the_result_does_not_depend_on_the_threads():
    threads = torch.get_num_threads()
    digests = set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            digests.add(digest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_the_result_does_not_depend_on_the_instruction_set(capability):
    code = (
        "import test_ops; from limpq_ext.kernels.ops import build_info;"
        "print(build_info()['cpu capability'], test_ops.digest())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LIMPQ_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    if told[0] != capability:
        pytest.skip(f"this processor has no {capability}")
    assert told[1] == digest()


def test_an_unknown_instruction_set_is_an_error():
    code = "from limpq_ext.kernels.ops import build_info; build_info()"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "LIMPQ_CPU_CAPABILITY": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode != 0
    assert "LIMPQ_CPU_CAPABILITY is 'mmx'" in told.stderr


def operator_samples():
    x, scale = torch.randn(4, 6), torch.tensor([0.2, 0.3])
    per_channel = torch.rand(2, 6) + 0.1
    one = ([1], [-4], [3], None, [0.5], 1e-5, math.inf, None, False)
    many = ([1, 0], [-4, -8], [3, 7], None, [0.5, 0.25], 1e-5, math.inf)
    ops = torch.ops.limpq_ext
    for wants in (False, True):
        leaf, s = x.clone().requires_grad_(wants), scale.clone().requires_grad_(wants)
        c = per_channel.clone().requires_grad_(wants)
        last = torch.randn(2, 6, 3, 3).to(memory_format=torch.channels_last).requires_grad_(wants)
        yield ops.fake_quantize, (leaf, s, *one)
        yield ops.fake_quantize, (last, c, [1], [-4], [3], 1, [0.5], 1e-5, math.inf, None, False)
        yield ops.fake_quantize, (leaf, s, [1], [0], [3], None, [0.5], 1e-5, math.inf, 6.0, False)
        yield ops.fake_quantize_selected, (leaf, s, torch.tensor(1), *many[1:])
        yield ops.fake_quantize, (leaf, s, *many)
        yield ops.fake_quantize, (last, c, [0, 1], [-4, 0], [3, 15], 1, [1.0, 1.0], 1e-5, 2.0)
    yield ops.fake_quantize_backward, (torch.randn(4, 6), x, scale, *one)
    yield (
        ops.fake_quantize_selected_backward,
        (torch.randn(4, 6), x, scale, torch.tensor(1), *many[1:]),
    )
    yield ops.fake_quantize_backward, (torch.randn(2, 4, 6), x, scale, *many)
    grad, per_axis = torch.randn_like(last), ([0, 1], [-4, 0], [3, 15], 1, [1.0, 1.0], 1e-5, 2.0)
    last, c = last.detach(), per_channel
    yield (
        ops.fake_quantize_backward,
        (grad, last, c, [1], [-4], [3], 1, [0.5], 1e-5, math.inf, None, False),
    )
    yield ops.fake_quantize_backward, (torch.stack([grad, grad]), last, c, *per_axis)
    weights, scales = [x, last], [scale, c]
    bank = ([2, 2], [-4, -8, -4, 0], [3, 7, 3, 15], [-(2**63), 1], [1e-5] * 2, [math.inf] * 2)
    outputs = [torch.empty_like(weight) for weight in weights for _ in range(2)]
    yield ops.bank_forward, (weights, scales, outputs, *bank)
    yield ops.bank_backward, ([x, grad], [1, 2], weights, scales, *bank)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("sample", range(len(list(operator_samples()))))
def test_opcheck(sample):
    operator, arguments = list(operator_samples())[sample]
    torch.library.opcheck(operator.default, arguments)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
        self.scales = torch.nn.Parameter(torch.tensor([0.1, 0.2]))

    def forward(self, x):
        weight = lsq_fake_quantize(self.weight, self.scales[0], -8, 7)
        x = lsq_fake_quantize(x, self.scales[1], 0, 15)
        return torch.nn.functional.conv2d(x, weight).relu()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend):
    block, x = Block(), torch.rand(2, 4, 8, 8)
    expected = block(x)
    expected.sum().backward()
    grads = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    for ours, reference in zip([p.grad for p in block.parameters()], grads, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("axis", [None, 1])
def test_many_bit_widths_compile_without_a_graph_break(axis):
    x = torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    scales = (torch.rand(2 if axis is None else (2, 6)) + 0.1).requires_grad_()

    def gradients(function):
        y = function(x, scales)
        return y, *torch.autograd.grad(y.square().sum(), (x, scales))

    def quantize(x, scales):
        return lsq_fake_quantize_multi(x * 2, scales, [-8, -2], [7, 1], channel_axis=axis)

    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(gradients(compiled), gradients(quantize), strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


def test_works_under_autocast(device):
    block, x = Block(), torch.rand(2, 4, 8, 8)
    with torch.autocast(device, torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


def two_rows(function):
    """lsq_fake_quantize_multi with the arguments of lsq_fake_quantize."""
    return lambda x, scale, low, high, **options: function(
        x, torch.stack([scale, scale * 2]), [low, low], [high, high], **options
    )


EVERY_FUNCTION = pytest.mark.parametrize(
    "function",
    [lsq_fake_quantize, two_rows(lsq_fake_quantize_multi)],
    ids=["single", "multi"],
)


@EVERY_FUNCTION
def test_autocast_changes_no_dtype(function, device):
    scale = torch.tensor(0.1, requires_grad=True)
    for dtype in DTYPES:
        x = torch.randn(10, 20, dtype=dtype, requires_grad=True)
        with torch.autocast(device, torch.bfloat16):
            y = function(x, scale, -8, 7)
        dx, dscale = torch.autograd.grad(y.sum(), (x, scale))
        assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, torch.float32)


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_dense_tensor_is_not_copied(function, layout):
    dense = torch.randn(4, 6, 5, 7).to(memory_format=layout)
    scale = torch.tensor(0.1, requires_grad=True)

    def copies_of(x):
        x = x.detach().requires_grad_()
        grad = torch.randn_like(function(x, scale, -8, 7))
        with torch.profiler.profile(record_shapes=True, acc_events=True) as told:
            y = function(x, scale, -8, 7)
            torch.autograd.grad(y, x, grad)
        assert y.stride()[-4:] == torch.empty_like(x).stride()
        copies = ("aten::copy_", "aten::clone", "aten::contiguous")
        return [
            event.name
            for event in told.events()
            if event.name in copies and list(x.shape) in event.input_shapes
        ]

    assert not copies_of(dense)
    assert copies_of(dense[:, ::2])


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_only_the_input_is_saved_for_backward(function):
    saved = []
    x = torch.randn(1000, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(x, scale, -8, 7)
    assert sum(t.nbytes for t in saved) <= 4 * 1000 + 8
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_an_input_changed_before_backward_is_an_error(function):
    leaf = torch.randn(1000, requires_grad=True)
    x = leaf * 1
    y = function(x, torch.tensor(0.1), -8, 7)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_backward_twice_needs_a_kept_graph(function):
    x = torch.randn(10, requires_grad=True)
    y = function(x, torch.tensor(0.1), -8, 7).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_a_forward_mode_derivative_is_refused(function):
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(10), torch.ones(10))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            function(x, torch.tensor(0.1), -8, 7)


@pytest.mark.usefixtures("device")
def test_a_scale_of_another_dtype_is_converted_and_its_gradient_back():
    x = torch.randn(100, dtype=torch.float64)
    scale = torch.tensor(0.25, dtype=torch.bfloat16, requires_grad=True)
    y = lsq_fake_quantize(x, scale, -8, 7)
    assert torch.equal(y, lsq_fake_quantize(x, scale.detach().double(), -8, 7))
    y.sum().backward()
    assert scale.grad.dtype == torch.bfloat16


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_a_second_derivative_is_refused(function):
    x = torch.randn(10, requires_grad=True)
    y = function(x, torch.tensor(0.3, requires_grad=True), -8, 7)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fake_quantize has no second derivative"):
        dx.sum().backward()


@pytest.mark.usefixtures("device")
@EVERY_FUNCTION
def test_vmap_is_refused(function):
    with pytest.raises(NotImplementedError, match=r"fake_quantize\w* does not support torch\.vmap"):
        torch.vmap(lambda row: function(row, torch.tensor(0.3), -8, 7))(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("x", "scale", "options", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int32), 0.1, {}, TypeError, "x has dtype Int"),
        (torch.ones(3), torch.tensor(1), {}, TypeError, "scale has dtype Long"),
        (torch.ones(3), [0.1, 0.2], {"channel_axis": 0}, ValueError, r"shape \[2\] for 3 channels"),
        (torch.ones(3), [[0.1]], {}, ValueError, "pass channel_axis to quantize per channel"),
        (torch.ones(3), [0.1], {"channel_axis": 4}, IndexError, "channel_axis is 4, but x has 1"),
        (torch.ones(3), 0.1, {"quant_min": 1}, ValueError, "thresholds are 1 and 7"),
        (torch.ones(3), 0.1, {"quant_max": 0}, ValueError, "thresholds are -8 and 0"),
        (torch.ones(3), 0.1, {"quant_max": 2**23}, ValueError, "beyond the largest magnitude"),
        (torch.ones(3), 0.1, {"scale_min": 0.0}, ValueError, "scale_min is 0"),
        (torch.ones(3), 0.1, {"scale_max": 1e-6}, ValueError, "below scale_min"),
    ],
)
def test_wrong_arguments_are_named(x, scale, options, error, message):
    scale = scale if isinstance(scale, torch.Tensor) else torch.tensor(scale)
    arguments = {"quant_min": -8, "quant_max": 7, **options}
    with pytest.raises(error, match=message):
        lsq_fake_quantize(x, scale, **arguments)


def test_wrong_numbers_of_bit_widths_are_named():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="quant_maxs has 1 entries for 2 bit-widths"):
        lsq_fake_quantize_multi(x, torch.ones(2), [-2, -4], [1], grad_factors=[1.0, 1.0])
    with pytest.raises(ValueError, match="0 bit-widths in one call, expected 1 to 15"):
        lsq_fake_quantize_multi(x, torch.ones(2), [], [])
    with pytest.raises(IndexError, match="scale row 1 does not exist, scale has 1 rows"):
        lsq_fake_quantize_multi(x, torch.ones(1), [-2, -4], [1, 3])
    how = ([0, 0], [-2, -4], [1, 3], None, [1.0, 1.0], 1e-5, math.inf, None)
    with pytest.raises(ValueError, match="scale row 0 is used for two bit-widths"):
        limpq_ops.fake_quantize(x, torch.ones(1), how)
    how = ([0, 1], [-2, -4], [1, 3], None, None, 1e-5, math.inf, None, False)
    with pytest.raises(ValueError, match="2 bit-widths, expected 1 where they are not stacked"):
        limpq_ops.fake_quantize(x, torch.ones(2), how)


def test_wrong_gradients_are_named():
    x, scale = torch.ones(4), torch.ones(2)
    one = ([0], [-2], [1], None, [1.0], 1e-5, math.inf, None, False)
    many = ([0, 1], [-2, -4], [1, 3], None, [1.0, 1.0], 1e-5, math.inf)
    # The operators themselves know no other exception.
    with pytest.raises(RuntimeError, match=r"ValueError.*gradient has shape \[3\], x has \[4\]"):
        torch.ops.limpq_ext.fake_quantize_backward(torch.ones(3), x, scale, *one)
    with pytest.raises(RuntimeError, match=r"gradient has shape \[1, 4\] for 2 bit-widths"):
        torch.ops.limpq_ext.fake_quantize_backward(x[None], x, scale, *many)


@pytest.mark.cuda
def test_devices_that_differ_are_named():
    with pytest.raises(ValueError, match="x and scale are on different devices"):
        lsq_fake_quantize(torch.ones(3, device="cuda"), torch.tensor(0.1), -8, 7)


def relu(x, relu_max):
    """ReLU or, with a ceiling, ReLU6 as PyTorch computes it."""
    return F.relu(x) if relu_max == math.inf else F.hardtanh(x, 0.0, relu_max)


def around_a_ceiling(dtype, ceiling):
    """Values at both bounds and beside them, special ones, and ordinary ones on all sides."""
    info, kind = torch.finfo(dtype), INTEGERS[dtype]
    special = [0.0, info.smallest_normal, info.smallest_normal / 4, info.max, math.inf]
    bits = torch.tensor([0.0, min(ceiling, 1e4)], dtype=dtype).view(kind)
    beside = torch.cat([bits + step for step in (0, 1, 2)] + [bits[1:] - 1]).view(dtype)
    x = torch.cat([torch.tensor(special, dtype=dtype), beside])
    return torch.cat([x, -x, torch.tensor([math.nan], dtype=dtype), torch.randn(999).to(dtype) * 4])


def check_relu(x, relu_max, scale, quant_max):
    """The operator with a ReLU of its own against the eager chain behind PyTorch's."""
    scale = torch.tensor(scale, dtype=compute_dtype(x.dtype), requires_grad=True)
    x = x.detach().requires_grad_()
    y = torch.ops.limpq_ext.fake_quantize(
        x, scale, [0], [0], [quant_max], None, [0.5], 1e-5, math.inf, relu_max, False
    )
    grad = torch.randn(x.shape).to(x)
    dx, dscale = torch.autograd.grad(y, (x, scale), grad)
    behind = relu(x, relu_max)
    with torch.no_grad():
        v, q, expected = chain(behind, scale, 0, quant_max)
        assert_same_bits(y.detach(), expected)
        inside = (v >= 0) & (v <= quant_max)
        terms = grad.double() * torch.where(inside, q.double() - v.double(), q.double())
    (expected,) = torch.autograd.grad(behind, x, torch.where(inside, grad, torch.zeros_like(grad)))
    assert_same_bits(dx, expected)
    if not bool(x.detach().isnan().any()):
        assert abs(float(dscale) - 0.5 * float(terms.sum())) <= 1e-5 * float(terms.abs().sum())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu_max", [math.inf, 6.0, 1.5])
def test_relu_in_the_quantizer_is_relu_in_front_of_it(dtype, relu_max):
    torch.manual_seed(0)
    x = around_a_ceiling(dtype, relu_max)
    # Ceilings below, at and above the upper threshold, and steps that no activation has.
    for scale in (relu_max / 3.4, relu_max / 7, relu_max / 7.2, 0.1, 0.7, 1e-5, 1e4):
        if math.isfinite(scale):
            check_relu(x, relu_max, scale, 7)
            check_relu(x[~x.isnan()], relu_max, scale, 7)
            check_relu(x.repeat(20)[1:], relu_max, scale, 255)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ceiling_is_rounded_to_the_dtype(dtype):
    x = around_a_ceiling(dtype, 6.1).requires_grad_()
    results = []
    for relu_max in (6.1, float(torch.tensor(6.1, dtype=dtype))):
        y = torch.ops.limpq_ext.fake_quantize(
            x, torch.tensor(0.9), [0], [0], [7], None, [0.5], 1e-5, math.inf, relu_max, False
        )
        results.append((y.detach(), *torch.autograd.grad(y, x, torch.ones_like(y))))
    for ours, reference in zip(*results, strict=True):
        assert_same_bits(ours, reference)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 1, 2])
@pytest.mark.parametrize("relu_max", [math.inf, 1.5])
def test_every_operator_with_relu_is_the_operator_behind_relu(dtype, axis, relu_max):
    torch.manual_seed(0)
    x = (torch.randn(6, 7, 33) * 2).to(dtype)
    rows = (3,) if axis is None else (3, x.shape[axis])
    scale = torch.rand(rows, dtype=compute_dtype(dtype)) * 0.5 + 0.1
    many = ([0, 0, 0], [3, 15, 63], axis, [1.0, 0.5, 0.25], 1e-5, math.inf)
    ops = torch.ops.limpq_ext
    calls = (
        (ops.fake_quantize, ([1], [0], [15], axis, [0.5], 1e-5, math.inf), {"stacked": False}),
        (ops.fake_quantize, ([2, 0, 1], *many), {}),
        (ops.fake_quantize_selected, (torch.tensor(2), *many), {}),
    )
    for operator, how, options in calls:
        results = []
        for fused in (True, False):
            leaf, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
            given = leaf if fused else relu(leaf, relu_max)
            y = operator(given, step, *how, relu_max=relu_max if fused else None, **options)
            grad = torch.sin(torch.arange(y.numel())).reshape(y.shape).to(y)
            results.append((y.detach(), *torch.autograd.grad(y, (leaf, step), grad)))
        for ours, reference in zip(*results, strict=True):
            assert_same_bits(ours, reference)


@pytest.mark.parametrize(
    ("quant_min", "relu_max", "message"),
    [
        (-8, 6.0, "quant_min is -8, expected 0 with relu_max"),
        (0, 0.0, "relu_max is 0, expected a positive number"),
        (0, -1.0, "relu_max is -1, expected a positive number"),
        (0, math.nan, "relu_max is nan, expected a positive number"),
    ],
)
def test_wrong_relus_are_named(quant_min, relu_max, message):
    how = ([0], [quant_min], [7], None, [1.0], 1e-5, math.inf, relu_max, False)
    with pytest.raises(ValueError, match=message):
        limpq_ops.fake_quantize(torch.randn(3), torch.ones(1), how)


CANDIDATES = {"quant_mins": [0, 0, 0], "quant_maxs": [3, 15, 63]}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("relu_max", [None, 1.5])
def test_a_selected_bit_width_is_that_of_a_plain_call(dtype, axis, relu_max):
    x = torch.randn(5, 7, 33).to(dtype).requires_grad_()
    shape = (3,) if axis is None else (3, 7)
    scale = (torch.rand(shape, dtype=compute_dtype(dtype)) + 0.1).requires_grad_()
    grad = torch.randn(5, 7, 33).to(dtype)
    factors, ops = [1.0, 0.5, 0.25], torch.ops.limpq_ext
    for k, (low, high) in enumerate(zip(*CANDIDATES.values(), strict=True)):
        plain = ops.fake_quantize(
            x, scale, [k], [low], [high], axis, [factors[k]], 1e-5, math.inf, relu_max, False
        )
        chosen = ops.fake_quantize_selected(
            x,
            scale,
            torch.tensor([k]),
            *CANDIDATES.values(),
            axis,
            factors,
            1e-5,
            math.inf,
            relu_max,
        )
        expected = (plain, *torch.autograd.grad(plain, (x, scale), grad))
        for ours, reference in zip(
            (chosen, *torch.autograd.grad(chosen, (x, scale), grad)), expected, strict=True
        ):
            assert_same_bits(ours.detach(), reference.detach())


@pytest.mark.parametrize(
    ("selected", "error", "message"),
    [
        (torch.tensor(3), IndexError, "selected is 3, expected 0 to 2"),
        (torch.tensor(-1), IndexError, "selected is -1, expected 0 to 2"),
        (torch.tensor(1.0), TypeError, "selected has dtype Float, expected int64"),
        (torch.tensor([0, 1]), ValueError, r"selected has shape \[2\], expected one element"),
    ],
)
def test_a_wrong_selection_is_named(selected, error, message):
    how = (*CANDIDATES.values(), None, [1.0] * 3, 1e-5, math.inf, None)
    with pytest.raises(error, match=message):
        limpq_ops.fake_quantize_selected(torch.randn(3), torch.ones(3), selected, how)
