"""Sums of gradient times quantization error, against the plain chain in float64."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limpq_ext import lsq_fake_quantize, quantization_error_sums
from limpq_ext.kernels.ops import thresholds

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BITS = (2, 3, 5, 8)


def ranges(signed=True, bits=BITS):
    mins, maxs = zip(*(thresholds(b, signed=signed) for b in bits), strict=True)
    return list(mins), list(maxs)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(shape, dtype=torch.float32, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), grad.to(dtype)


def make_scales(dtype=torch.float32, channels=None, bits=BITS):
    generator = torch.Generator().manual_seed(7)
    shape = (len(bits),) if channels is None else (len(bits), channels)
    return (0.05 + 0.3 * torch.rand(shape, generator=generator)).to(compute_dtype(dtype))


def plain(x, grad, scales, mins, maxs, *, channel_axis=None, sum_axis=None, relu_max=None):
    """The two sums and those of the terms' magnitudes: errors in the compute type, then float64."""
    wide = x.to(scales.dtype)
    if relu_max is not None:
        wide = wide.clamp(0, relu_max)
    terms = []
    for scale, low, high in zip(scales, mins, maxs, strict=True):
        if channel_axis is not None:
            shape = [1] * x.dim()
            shape[channel_axis] = -1
            scale = scale.reshape(shape)
        error = (wide / scale).clamp(low, high).round() * scale - wide
        terms.append(grad.double() * error.double())
    all_terms = torch.stack(terms)
    kept = [0] if sum_axis is None else [0, 1 + sum_axis % x.dim()]
    away = [axis for axis in range(all_terms.dim()) if axis not in kept]

    def total(values):
        return values.sum(dim=away) if away else values

    return total(all_terms), total(all_terms.square()), total(all_terms.abs())


def check(x, grad, scales, mins, maxs, **options):
    sums, squares = quantization_error_sums(x, grad, scales, mins, maxs, **options)
    expected, expected_squares, magnitudes = plain(x, grad, scales, mins, maxs, **options)
    assert sums.dtype == squares.dtype == torch.float64
    assert sums.shape == expected.shape == squares.shape
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-5
    assert bool(((sums - expected).abs() <= tolerance * magnitudes + 1e-300).all())
    torch.testing.assert_close(squares, expected_squares, rtol=tolerance, atol=1e-300)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (31,), (1023,), (50_003,), (3, 5, 7), (6, 8, 9, 10)])
def test_one_sum_over_the_whole_tensor(shape, dtype):
    check(*make(shape, dtype), make_scales(dtype), *ranges())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (7, 1), (5, 33), (600, 2), (4, 6, 7, 9), (2, 20_001)])
def test_a_sum_for_each_sample(shape, dtype):
    check(*make(shape, dtype), make_scales(dtype), *ranges(), sum_axis=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("shape", [(40, 33), (6, 5, 7, 9), (1, 600, 2)])
def test_a_sum_along_any_axis_with_one_scale_or_one_for_each(shape, axis, dtype):
    x, grad = make(shape, dtype)
    check(x, grad, make_scales(dtype), *ranges(), sum_axis=axis)
    scales = make_scales(dtype, channels=shape[axis])
    check(x, grad, scales, *ranges(), sum_axis=axis, channel_axis=axis)
    check(x, grad, scales, *ranges(), channel_axis=axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(70, 19, 7, 7), (300, 3, 2), (9, 40, 8, 8), (1, 9, 33), (5, 8, 65)]
)
def test_short_spans_of_a_channel_are_put_together(shape, dtype):
    x, grad = make(shape, dtype)
    check(x, grad, make_scales(dtype), *ranges(), sum_axis=1)
    scales = make_scales(dtype, channels=shape[1])
    check(x, grad, scales, *ranges(), sum_axis=1, channel_axis=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu_max", [1.5, math.inf])
def test_the_relu_in_front_is_part_of_what_is_quantized(relu_max, dtype):
    x, grad = make((6, 5, 7), dtype)
    x[0, 0, :3] = torch.tensor([0.0, -0.0, 1.5])
    for options in ({}, {"sum_axis": 0}, {"sum_axis": 2}):
        check(x, grad, make_scales(dtype), *ranges(signed=False), relu_max=relu_max, **options)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_other_layouts_of_memory_give_the_same_sums(axis):
    x, grad = make((4, 6, 5, 3))
    scales, (mins, maxs) = make_scales(), ranges()
    wide = torch.zeros(4, 6, 5, 6)
    wide[..., ::2] = x
    for laid_out in (
        x.to(memory_format=torch.channels_last),
        x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        wide[..., ::2],
    ):
        for other in (grad, grad.to(memory_format=torch.channels_last)):
            check(laid_out, other, scales, mins, maxs, sum_axis=axis)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty_tensors_have_sums_of_0(shape):
    x, grad = make(shape)
    for axis in (None, 0):
        sums, squares = quantization_error_sums(x, grad, make_scales(), *ranges(), sum_axis=axis)
        assert sums.shape == squares.shape == ((4,) if axis is None else (4, shape[0]))
        assert not sums.any()
        assert not squares.any()


def test_the_error_is_that_of_the_quantizer_to_the_bit():
    x, _ = make((501,), torch.float64)
    x[7] = x[11] = 1e5  # far outside
    scales = make_scales(torch.float64)
    mins, maxs = ranges()
    for place in range(len(x)):
        grad = torch.zeros_like(x)
        grad[place] = 1.0
        found = quantization_error_sums(x, grad, scales, mins, maxs).sums
        for k, bounds in enumerate(zip(mins, maxs, strict=True)):
            error = lsq_fake_quantize(x, scales[k], *bounds) - x
            assert found[k] == error[place]


def test_a_guarded_scale_is_the_one_in_use():
    x, grad = make((100,))
    scales = torch.tensor([1e-9, 5.0])
    mins, maxs = ranges(bits=(2, 8))
    guard = {"scale_min": 0.1, "scale_max": 0.3}
    guarded = quantization_error_sums(x, grad, scales, mins, maxs, **guard)
    plainly = quantization_error_sums(x, grad, torch.tensor([0.1, 0.3]), mins, maxs)
    assert torch.equal(torch.stack(guarded), torch.stack(plainly))


def test_a_nan_stays_in_the_sum_of_its_sample():
    x, grad = make((3, 40))
    x[1, 5] = math.nan
    sums = quantization_error_sums(x, grad, make_scales(), *ranges(), sum_axis=0).sums
    assert sums.isnan().all(dim=0).tolist() == [False, True, False]
    assert not sums[:, 0].isnan().any()


DIGEST = """
import hashlib, sys, torch
from limpq_ext import quantization_error_sums
torch.set_num_threads(int(sys.argv[1]))
generator = torch.Generator().manual_seed(3)
digest = hashlib.sha256()
for shape in ((3, 200_000), (300_001,), (50, 64, 9, 9)):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x, grad = torch.randn((2, *shape), generator=generator).to(dtype)
        for axis in (None, 0, len(shape) - 1):
            sums = quantization_error_sums(
                x, grad, torch.tensor([0.5, 0.2]), [-2, -4], [1, 3], sum_axis=axis
            )
            digest.update(torch.stack(sums).numpy().tobytes())
print(digest.hexdigest())
"""


def test_the_bits_depend_on_neither_threads_nor_instruction_set():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, threads],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "LIMPQ_CPU_CAPABILITY": capability},
            cwd=Path(__file__).resolve().parents[2],
        ).stdout.strip()
        for threads, capability in (("1", "avx512"), ("3", "avx2"), ("2", "baseline"))
    }
    assert len(digests) == 1
    assert len(digests.pop()) == len(hashlib.sha256().hexdigest())


def test_it_has_no_gradient():
    x, grad = make((10,))
    sums, squares = quantization_error_sums(
        x.requires_grad_(), grad, make_scales().requires_grad_(), *ranges()
    )
    assert not sums.requires_grad
    assert not squares.requires_grad


@pytest.mark.parametrize("axes", [(None, None), (None, 0), (1, 1), (1, None)])
def test_opcheck(axes):
    x, grad = make((4, 5, 6))
    scales = make_scales(channels=None if axes[0] is None else 5)
    arguments = (x, grad, scales, *ranges(), *axes, 1e-5, math.inf, None)
    torch.library.opcheck(torch.ops.limpq_ext.quantization_error_sums.default, arguments)


def test_the_meta_device_knows_the_shapes():
    x = torch.empty(4, 5, device="meta")
    scales = torch.empty(4, device="meta")
    assert quantization_error_sums(x, x, scales, *ranges()).sums.shape == (4,)
    assert quantization_error_sums(x, x, scales, *ranges(), sum_axis=1).squares.shape == (4, 5)


def test_compiled_it_gives_the_same():
    x, grad = make((4, 50))
    scales = make_scales()

    def sums(x, grad):
        return quantization_error_sums(x, grad, scales, *ranges(), sum_axis=0)

    compiled = torch.compile(sums, backend="aot_eager", fullgraph=True)(x, grad)
    assert torch.equal(torch.stack(compiled), torch.stack(sums(x, grad)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"sum_axis": 2}, IndexError, "sum_axis is 2, but x has 2 dimensions"),
        ({"sum_axis": 0, "channel_axis": 1}, ValueError, "scales are along axis 1"),
        ({"channel_axis": 3}, IndexError, "channel_axis is 3"),
        ({"grad": torch.zeros(4, 6)}, ValueError, "gradient has shape"),
        ({"x": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "x has dtype"),
        ({"scales": torch.ones(3)}, IndexError, "scale row 3 does not exist"),
        ({"quant_mins": [-1]}, ValueError, "entries for 1 bit-widths"),
        ({"relu_max": 6.0}, ValueError, "expected 0 with relu_max"),
        ({"grad": torch.zeros(4, 5, device="meta")}, ValueError, "different devices"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, error, words):
    x, grad = make((4, 5))
    mins, maxs = ranges()
    scales = make_scales(channels=5 if change.get("channel_axis") == 1 else None)
    arguments = {"x": x, "grad": grad, "scales": scales, "quant_mins": mins, "quant_maxs": maxs}
    with pytest.raises(error, match=words):
        quantization_error_sums(**{**arguments, **change})


def test_vmap_is_refused():
    x, grad = make((4, 5))
    scales = make_scales()
    with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
        torch.vmap(lambda x, grad: quantization_error_sums(x, grad, scales, *ranges()))(x, grad)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size = 2**31 + 1000
    x = torch.zeros(size, dtype=torch.bfloat16)
    x[-1] = 0.75
    sums = quantization_error_sums(x, x, torch.ones(1), [-2], [1]).sums
    assert sums.tolist() == [0.75 * 0.25]
