"""The functional API: LSQ fake quantization of tensors, for one bit-width or many in one pass.

The kernels are compiled (csrc/) against torch's stable ABI, so that one binary serves every torch.
What that ABI lacks is here: autograd, the shapes that torch.compile needs, the types of exceptions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from limpq_ext.values.bits import check_bits


def _load_libraries() -> None:
    """Register torch.ops.limpq_ext: the CPU kernels, and those of CUDA where torch has it too."""
    folder = Path(__file__).parent
    try:
        torch.ops.load_library(folder / "_cpu.abi3.so")
    except OSError as error:
        raise ImportError(
            f"limpq_ext needs torch 2.11 or newer, and its compiled part; this is torch"
            f" {torch.__version__}: {error}"
        ) from None
    if torch.version.cuda is not None and (folder / "_cuda.abi3.so").exists():
        try:
            torch.ops.load_library(folder / "_cuda.abi3.so")
        except OSError as error:
            raise ImportError(
                f"limpq_ext's CUDA kernels do not load beside torch {torch.__version__}, which is"
                f" of CUDA {torch.version.cuda}; build limpq_ext with this torch: {error}"
            ) from None


_load_libraries()
_operators = torch.ops.limpq_ext

How = tuple[Any, ...]
"""What an operator takes after its tensors, in the order of its schema."""

MOST_BIT_WIDTHS = 15
"""The most bit-widths in one call, those from 2 to 16."""

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
        NotImplementedError: A second or forward-mode derivative, or torch.vmap, is asked for.

    Source:
        Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
    """
    factors = None if grad_factor is None else [grad_factor]
    ranges = ([quant_min], [quant_max])
    how = ([0], *ranges, channel_axis, factors, scale_min, scale_max, None, False)
    return fake_quantize(x, scale, how)


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
    rows = list(range(len(quant_mins)))
    factors = None if grad_factors is None else list(grad_factors)
    ranges = (list(quant_mins), list(quant_maxs))
    how = (rows, *ranges, channel_axis, factors, scale_min, scale_max, None)
    return fake_quantize(x, scales, how)


def lsq_grad_factor(x: Tensor, quant_max: int, channel_axis: int | None = None) -> float:
    """LSQ's factor of the scale's gradient, ``1 / sqrt(N * quant_max)`` (arXiv 1902.08153, 2.2).

    Args:
        x: The tensor that is quantized.
        quant_max: Upper threshold in steps.
        channel_axis: The axis that has a scale per index; None for one scale.

    Returns:
        The factor; 1.0 for an empty tensor. N is the number of elements that share a scale.

    Raises:
        IndexError: ``x`` has no such axis.
    """
    shared = x.numel()
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


# --- autograd -----------------------------------------------------------------------------------

_NO_SECOND_DERIVATIVE = (
    "fake_quantize has no second derivative: its straight-through gradient is not the derivative of"
    " any function. Call backward() without create_graph=True."
)
_NO_FORWARD_MODE = "fake_quantize has no forward-mode derivative; use backward()."
_NO_VMAP = (
    "fake_quantize does not support torch.vmap: one call quantizes a whole batch; for several"
    " scales use channel_axis or lsq_fake_quantize_multi."
)


def _typed(error: RuntimeError) -> Exception:
    """The exception that a kernel's check means: the stable ABI knows RuntimeError alone."""
    told = re.search(r"limpq_ext (ValueError|TypeError|IndexError): (.*)", str(error))
    if told is None:
        return error
    kind = {"ValueError": ValueError, "TypeError": TypeError, "IndexError": IndexError}[told[1]]
    return kind(told[2])


def _is_transformed() -> bool:
    """Whether the call is inside torch.func.grad, vmap and the like."""
    return torch._C._are_functorch_transforms_active()


def _has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode AD follows one of them."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def _gradients(operator: Any, how: How, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Dx and dscale, from the gradient and what was saved."""
    try:
        if torch.is_grad_enabled() or _is_transformed() or _has_tangent(*tensors):
            return _Gradients.apply(operator, how, *tensors)
        return operator(*tensors, *how)
    except RuntimeError as error:
        raise _typed(error) from None


class _FakeQuantize(torch.autograd.Function):
    """An operator with its step back: apply((forward, backward, how), x, scale, ...).

    Only ``x`` is saved that is as large as ``x``; the kernel computes the rounded values again.
    """

    @staticmethod
    def forward(ctx: Any, call: tuple[Any, Any, How], *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return call[0](*tensors, *call[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, operator, how = ctx.call
        tensors = ctx.saved_tensors
        dx, dscale = _gradients(operator, how, grad, *tensors)
        return (None, dx, dscale) if len(tensors) == 2 else (None, dx, dscale, None)


# The Python half of Function.apply takes longer than a kernel does on a small tensor, and it only
# serves torch.func, which gets a class of its own.
_apply = super(torch.autograd.Function, _FakeQuantize).apply


class _ForTransforms(torch.autograd.Function):
    """What torch.func's transforms need to know of a function: its first derivative alone."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(_NO_VMAP)


class _TransformedFakeQuantize(_ForTransforms):
    """_FakeQuantize inside torch.func.grad, vmap and the like."""

    @staticmethod
    def forward(call: tuple[Any, Any, How], *tensors: Tensor) -> Tensor:
        return call[0](*tensors, *call[2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    backward = _FakeQuantize.backward


class _Gradients(_ForTransforms):
    """The step back where it may be differentiated itself, which is refused."""

    @staticmethod
    def forward(operator: Any, how: How, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return operator(*tensors, *how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(_NO_SECOND_DERIVATIVE)


def _call(forward: Any, backward: Any, how: How, *tensors: Tensor) -> Tensor:
    """An operator as users see it: differentiable, with exceptions of the right type."""
    if torch.compiler.is_compiling():
        return forward(*tensors, *how)
    try:
        if _is_transformed():
            return _TransformedFakeQuantize.apply((forward, backward, how), *tensors)
        if _has_tangent(*tensors):
            raise NotImplementedError(_NO_FORWARD_MODE)
        if torch.is_grad_enabled():
            return _apply((forward, backward, how), *tensors)
        with torch._C._AutoDispatchBelowAutograd():
            return forward(*tensors, *how)
    except RuntimeError as error:
        raise _typed(error) from None


def fake_quantize(x: Tensor, scale: Tensor, how: How) -> Tensor:
    """The operator for a list of bit-widths: ``how`` is what its schema has after ``scale``."""
    return _call(_FORWARD, _BACKWARD, how, x, scale)


def fake_quantize_selected(x: Tensor, scale: Tensor, selected: Tensor, how: How) -> Tensor:
    """The operator for one of several bit-widths, that a tensor names."""
    return _call(_FORWARD_SELECTED, _BACKWARD_SELECTED, how, x, scale, selected)


# Named overloads: without one, torch.ops tries all of them in every call.
_FORWARD = _operators.fake_quantize.default
_BACKWARD = _operators.fake_quantize_backward.default
_FORWARD_SELECTED = _operators.fake_quantize_selected.default
_BACKWARD_SELECTED = _operators.fake_quantize_selected_backward.default


# --- shapes -------------------------------------------------------------------------------------


def _check_devices(x: Tensor, *others: Tensor) -> None:
    # A call with one tensor on the meta device comes here, whatever the device of the others.
    for other in others:
        if other.device != x.device:
            raise ValueError(
                f"fake_quantize: tensors are on different devices, {x.device} and {other.device}"
            )


def _shape(
    x: Tensor,
    scale: Tensor,
    scale_rows: list[int],
    quant_mins: list[int],
    quant_maxs: list[int],
    channel_axis: int | None,
    grad_factors: list[float] | None,
    scale_min: float,
    scale_max: float,
    relu_max: float | None = None,
    stacked: bool = True,
) -> Tensor:
    _check_devices(x, scale)
    slice_like = torch.empty_like(x)
    if not stacked:
        return slice_like
    strides = (torch.sym_max(x.numel(), 1), *slice_like.stride())
    return slice_like.new_empty_strided((len(scale_rows), *x.shape), strides)


def _shape_selected(x: Tensor, scale: Tensor, selected: Tensor, *how: object) -> Tensor:
    _check_devices(x, scale, selected)
    return torch.empty_like(x)


def _shape_backward(grad: Tensor, x: Tensor, scale: Tensor, *how: object) -> tuple[Tensor, Tensor]:
    _check_devices(x, scale, grad)
    return torch.empty_like(x), torch.empty_like(scale, memory_format=torch.contiguous_format)


def _shape_selected_backward(
    grad: Tensor, x: Tensor, scale: Tensor, selected: Tensor, *how: object
) -> tuple[Tensor, Tensor]:
    _check_devices(selected, x)
    return _shape_backward(grad, x, scale)


def _shape_bank(
    weights: list[Tensor], scales: list[Tensor], outputs: list[Tensor], *how: object
) -> None:
    _check_devices(*weights, *scales, *outputs)


def _shape_bank_backward(
    grads: list[Tensor],
    places: list[int],
    weights: list[Tensor],
    scales: list[Tensor],
    counts: list[int],
    *how: object,
) -> tuple[list[Tensor], list[Tensor]]:
    _check_devices(*weights, *scales, *grads)
    layers = [layer for layer, count in enumerate(counts) for _ in range(count)]
    used = sorted({layers[place] for place in places})
    contiguous = torch.contiguous_format
    return (
        [torch.empty_like(weights[i]) for i in used],
        [torch.empty_like(scales[i], memory_format=contiguous) for i in used],
    )


def _register(
    name: str, tensors: int, shape: Callable[..., Any], shape_backward: Callable[..., Any]
) -> None:
    """Give an operator of so many tensors its shapes, its gradient, and its refusal of vmap."""
    backward_operator = getattr(_operators, f"{name}_backward").default

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.how = inputs[tensors:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dscale = _gradients(backward_operator, ctx.how, grad, *ctx.saved_tensors)
        return dx, dscale, *[None] * (tensors - 2 + len(ctx.how))

    torch.library.register_fake(f"limpq_ext::{name}", shape)
    torch.library.register_fake(f"limpq_ext::{name}_backward", shape_backward)
    torch.library.register_autograd(f"limpq_ext::{name}", backward, setup_context=setup_context)
    for each in (name, f"{name}_backward"):
        torch.library.register_vmap(f"limpq_ext::{each}", _ForTransforms.vmap)


_register("fake_quantize", 2, _shape, _shape_backward)
_register("fake_quantize_selected", 3, _shape_selected, _shape_selected_backward)
torch.library.register_fake("limpq_ext::bank_forward", _shape_bank)
torch.library.register_fake("limpq_ext::bank_backward", _shape_bank_backward)


# --- the weight bank ----------------------------------------------------------------------------


def bank_forward(*args: Any) -> None:
    """Fill the outputs of a weight bank; arguments as in the operator's schema."""
    try:
        _operators.bank_forward.default(*args)
    except RuntimeError as error:
        raise _typed(error) from None


def bank_backward(*args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of those weights and scales of a bank that have any."""
    try:
        return _operators.bank_backward.default(*args)
    except RuntimeError as error:
        raise _typed(error) from None


# --- what the errors add to the loss ------------------------------------------------------------


class ErrorSums(NamedTuple):
    """What :func:`quantization_error_sums` returns.

    Attributes:
        sums: ``[K]`` or ``[K, n]``, float64: the sums of ``grad * error``.
        squares: Of the same shape: the sums of ``(grad * error) ** 2``.
    """

    sums: Tensor
    squares: Tensor


def quantization_error_sums(
    x: Tensor,
    grad: Tensor,
    scales: Tensor,
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    *,
    channel_axis: int | None = None,
    sum_axis: int | None = None,
    scale_min: float = SCALE_MIN,
    scale_max: float = math.inf,
    relu_max: float | None = None,
) -> ErrorSums:
    """What the error of K bit-widths adds to a loss, to first order, in one pass over x and grad.

    With the error ``e_k = lsq_fake_quantize(x, scales[k], ...) - x`` in the type that is computed
    in, it sums ``grad * e_k`` and its square, in double precision and always in the same order: the
    same bits for any number of threads. Nothing as large as ``x`` is written.

    Args:
        x: Tensor of any shape, as for :func:`lsq_fake_quantize`.
        grad: Of ``x``'s shape: the gradient of a loss.
        scales: ``[K]`` per tensor, ``[K, x.shape[channel_axis]]`` per channel.
        quant_mins: K lower thresholds in steps, each at most 0.
        quant_maxs: K upper thresholds in steps, each above 0.
        channel_axis: The axis that has a scale per index; None for one scale per bit-width.
        sum_axis: The axis that has a sum per index, 0 for a sum of each sample; None: one sum over
            all. With scales per channel it is their axis, or None.
        scale_min: As for :func:`lsq_fake_quantize`.
        scale_max: As for :func:`lsq_fake_quantize`.
        relu_max: ``min(relu(x), relu_max)`` is quantized in the place of ``x``, infinity for ReLU;
            None: x itself. Only with lower thresholds of 0.

    Returns:
        The sums, ``[K]``, or ``[K, x.shape[sum_axis]]``; float64. They have no gradient.

    Raises:
        TypeError: A dtype is not a supported floating-point one.
        ValueError: Thresholds, shapes or devices do not fit, or K is not 1 to 15.
        IndexError: ``x`` has no such axis.
        NotImplementedError: torch.vmap is asked for.
    """
    how = (list(quant_mins), list(quant_maxs), channel_axis, sum_axis)
    try:
        both = _ERROR_SUMS(
            x.detach(), grad.detach(), scales.detach(), *how, scale_min, scale_max, relu_max
        )
    except RuntimeError as error:
        raise _typed(error) from None
    # Channels with scales of their own have sums of their own too, until here.
    return ErrorSums(*(both if sum_axis is not None else both.sum(dim=2)))


def _shape_error_sums(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    quant_mins: list[int],
    quant_maxs: list[int],
    channel_axis: int | None,
    sum_axis: int | None,
    *how: object,
) -> Tensor:
    _check_devices(x, scale, grad)
    axis = channel_axis if channel_axis is not None else sum_axis
    groups = 1 if axis is None else x.shape[axis]
    return x.new_empty((2, len(quant_mins), groups), dtype=torch.float64)


_ERROR_SUMS = _operators.quantization_error_sums.default
torch.library.register_fake("limpq_ext::quantization_error_sums", _shape_error_sums)
torch.library.register_vmap("limpq_ext::quantization_error_sums", _ForTransforms.vmap)


# --- the build ----------------------------------------------------------------------------------


def build_info() -> dict[str, str]:
    """How the compiled part was built, and the instruction set that it uses here.

    Returns:
        "compiler", "flags", "built with torch", "cpu capability"; "cuda version" and "cuda
        architectures" where the CUDA kernels are loaded.

    Raises:
        RuntimeError: LIMPQ_CPU_CAPABILITY names no instruction set.
    """
    lines = _operators.build_info().splitlines()
    if hasattr(_operators, "cuda_build_info"):
        lines += _operators.cuda_build_info().splitlines()
    return dict(line.split(": ", 1) for line in lines)
