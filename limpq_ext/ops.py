"""The functional API: LSQ fake quantization of tensors, for one bit-width or many in one pass.

The operators themselves, with their autograd, are compiled (csrc/ops.cpp); this module gives them
the names and defaults that people type, and the shapes that torch.compile needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C as _C  # loading it registers torch.ops.limpq
from .bits import check_bits

# Named overloads: without one, torch.ops tries all of them in every call.
fake_quantize = torch.ops.limpq.fake_quantize.default
fake_quantize_multi = torch.ops.limpq.fake_quantize_multi.default
fake_quantize_grouped = torch.ops.limpq.fake_quantize_grouped.default
fake_quantize_selected = torch.ops.limpq.fake_quantize_selected.default

SCALE_MIN = 1e-5
"""The smallest scale in use by default: a step can never be zero or negative."""


def lsq_fake_quantize(
    x: Tensor,
    scale: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    channel_axis: int | None = None,
    grad_factor: float | None = None,
    scale_min: float = SCALE_MIN,
    scale_max: float = math.inf,
) -> Tensor:
    """Fake-quantize ``x`` with a learned step size, differentiable in ``x`` and ``scale``.

    ``round(clamp(x / scale, quant_min, quant_max)) * scale`` with straight-through gradients, in
    float32 arithmetic (float64 for float64 tensors), rounded to nearest, ties to even.

    Args:
        x: Tensor of any shape, float32, float64, float16 or bfloat16, on the CPU or CUDA.
        scale: The step size: a scalar or ``[1]``; per channel ``[x.shape[channel_axis]]``.
        quant_min: Lower threshold in steps, at most 0.
        quant_max: Upper threshold in steps, above 0.
        channel_axis: The axis that has a scale per index; None for one scale.
        grad_factor: Multiplies the gradient of ``scale``. None is LSQ's ``1 / sqrt(N * quant_max)``
            with N the elements that share a scale; 1.0 switches it off.
        scale_min: The scale used is at least this; a smaller one gets no gradient.
        scale_max: The scale used is at most this; a larger one gets no gradient.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format.

    Raises:
        TypeError: A dtype is not a supported floating-point one.
        ValueError: Thresholds, shapes or devices do not fit.

    Source:
        Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """
    if grad_factor is None:
        grad_factor = lsq_grad_factor(x, quant_max, channel_axis)
    return fake_quantize(
        x, scale, 0, quant_min, quant_max, channel_axis, grad_factor, scale_min, scale_max
    )


def lsq_fake_quantize_multi(
    x: Tensor,
    scales: Tensor,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    *,
    channel_axis: int | None = None,
    grad_factors: Sequence[float] | None = None,
    scale_min: float = SCALE_MIN,
    scale_max: float = math.inf,
) -> Tensor:
    """Fake-quantize ``x`` to K bit-widths in one pass: ``x`` is read once, forward and backward.

    Args:
        x: Tensor of any shape, as for :func:`lsq_fake_quantize`.
        scales: ``[K]`` per tensor, ``[K, x.shape[channel_axis]]`` per channel.
        quant_mins: K lower thresholds in steps, each at most 0.
        quant_maxs: K upper thresholds in steps, each above 0.
        channel_axis: The axis that has a scale per index; None for one scale per bit-width.
        grad_factors: K factors of the scales' gradients; None is LSQ's for each.
        scale_min: As for :func:`lsq_fake_quantize`.
        scale_max: As for :func:`lsq_fake_quantize`.

    Returns:
        ``[K, *x.shape]``: slice k equals ``lsq_fake_quantize`` with the k-th scale and thresholds.

    Raises:
        TypeError: A dtype is not a supported floating-point one.
        ValueError: Thresholds, shapes or devices do not fit, or K is not 1 to 15.
    """
    if grad_factors is None:
        grad_factors = [lsq_grad_factor(x, quant_max, channel_axis) for quant_max in quant_maxs]
    rows = list(range(len(quant_mins)))
    return fake_quantize_multi(
        x,
        scales,
        rows,
        list(quant_mins),
        list(quant_maxs),
        channel_axis,
        list(grad_factors),
        scale_min,
        scale_max,
    )


def lsq_fake_quantize_grouped(
    x: Tensor,
    scales: Tensor,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    *,
    channel_axis: int | None = None,
    grad_factors: Sequence[float] | None = None,
    scale_min: float = SCALE_MIN,
    scale_max: float = math.inf,
) -> Tensor:
    """Fake-quantize K parts of a batch, each to a bit-width of its own, in one call.

    Axis 0 of ``x`` is K branches of equal size one after the other, as ``torch.cat`` stacks them.
    Contiguous and channels_last tensors are read where they are; a tensor whose axis 0 is not the
    outermost in memory is copied first.

    Args:
        x: Tensor of at least one axis, as for :func:`lsq_fake_quantize`; ``x.shape[0]`` is a
            multiple of K.
        scales: ``[K]`` per tensor, ``[K, x.shape[channel_axis]]`` per channel: a row for each part.
        quant_mins: K lower thresholds in steps, each at most 0.
        quant_maxs: K upper thresholds in steps, each above 0.
        channel_axis: The axis that has a scale per index, not 0; None for one scale per part.
        grad_factors: K factors of the scales' gradients; None is LSQ's for each, N the elements of
            one part that share a scale.
        scale_min: As for :func:`lsq_fake_quantize`.
        scale_max: As for :func:`lsq_fake_quantize`.

    Returns:
        A tensor of ``x``'s shape and dtype: part k equals ``lsq_fake_quantize`` of part k of ``x``
        with the k-th scale and thresholds.

    Raises:
        TypeError: A dtype is not a supported floating-point one.
        ValueError: Thresholds, shapes or devices do not fit, or K is not 1 to 16.
    """
    parts = len(quant_mins)
    if grad_factors is None:
        grad_factors = [
            lsq_grad_factor(x, quant_max, channel_axis, parts=parts) for quant_max in quant_maxs
        ]
    return fake_quantize_grouped(
        x,
        scales,
        list(range(parts)),
        list(quant_mins),
        list(quant_maxs),
        channel_axis,
        list(grad_factors),
        scale_min,
        scale_max,
    )


def lsq_grad_factor(
    x: Tensor, quant_max: int, channel_axis: int | None = None, *, parts: int = 1
) -> float:
    """LSQ's factor of the scale's gradient, ``1 / sqrt(N * quant_max)`` (arXiv 1902.08153, 2.2).

    Args:
        x: The tensor that is quantized.
        quant_max: Upper threshold in steps.
        channel_axis: The axis that has a scale per index; None for one scale.
        parts: How many parts of ``x`` have scales of their own.

    Returns:
        The factor; 1.0 for an empty tensor. N is the number of elements that share a scale.

    Raises:
        IndexError: ``x`` has no such axis.
    """
    shared = x.numel() // max(parts, 1)
    if channel_axis is not None and not -x.dim() <= channel_axis < x.dim():
        raise IndexError(f"channel_axis is {channel_axis}, but x has {x.dim()} dimensions")
    if channel_axis is not None and shared:
        shared //= x.shape[channel_axis]
    return (shared * quant_max) ** -0.5 if shared > 0 and quant_max > 0 else 1.0


def thresholds(bits: int, *, signed: bool, symmetric: bool = False) -> tuple[int, int]:
    """The integer range of a bit-width: ``(quant_min, quant_max)``.

    Args:
        bits: 2 to 16.
        signed: ``-2**(bits-1) .. 2**(bits-1) - 1``; else ``0 .. 2**bits - 1``.
        symmetric: With ``signed``: ``-2**(bits-1) + 1 .. 2**(bits-1) - 1``.

    Raises:
        TypeError: ``bits`` is not an integer.
        ValueError: ``bits`` is outside 2 to 16, or an unsigned range is asked to be symmetric.
    """
    check_bits("thresholds", bits)
    if not signed:
        if symmetric:
            raise ValueError("an unsigned range cannot be symmetric")
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return (1 - half if symmetric else -half), half - 1


def _fake_forward(x: Tensor, scale: Tensor, *how: object) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, *how: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale, memory_format=torch.contiguous_format)


def _fake_forward_multi(x: Tensor, scale: Tensor, scale_rows: list[int], *how: object) -> Tensor:
    slice_like = torch.empty_like(x)
    slice_stride = max(x.numel(), 1)
    return slice_like.new_empty_strided(
        (len(scale_rows), *x.shape), (slice_stride, *slice_like.stride())
    )


def _fake_forward_grouped(x: Tensor, scale: Tensor, *how: object) -> Tensor:
    y = torch.empty_like(x)
    # As the kernel: the parts stand one after the other in memory.
    if x.numel() == 0 or y.stride(0) * y.shape[0] == y.numel():
        return y
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward_grouped(
    grad: Tensor, x: Tensor, scale: Tensor, *how: object
) -> tuple[Tensor, Tensor]:
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format)
    return _fake_forward_grouped(x, scale), dscale


torch.library.register_fake("limpq::fake_quantize", _fake_forward)
torch.library.register_fake("limpq::fake_quantize_backward", _fake_backward)
torch.library.register_fake("limpq::fake_quantize_selected", _fake_forward)
torch.library.register_fake("limpq::fake_quantize_selected_backward", _fake_backward)
torch.library.register_fake("limpq::fake_quantize_multi", _fake_forward_multi)
torch.library.register_fake("limpq::fake_quantize_multi_backward", _fake_backward)
torch.library.register_fake("limpq::fake_quantize_grouped", _fake_forward_grouped)
torch.library.register_fake("limpq::fake_quantize_grouped_backward", _fake_backward_grouped)
