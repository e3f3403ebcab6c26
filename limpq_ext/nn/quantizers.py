"""LSQ quantizers as modules: a learned step size for each candidate bit-width.

The step sizes are LIMPQ's importance indicators (arXiv 2203.08368): how large a step a layer learns
at a bit-width tells how much it suffers from that bit-width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.kernels.ops import (
    SCALE_MIN,
    ErrorSums,
    fake_quantize,
    fake_quantize_selected,
    quantization_error_sums,
    thresholds,
)
from limpq_ext.nn.processes import is_distributed
from limpq_ext.nn.start_values import (
    Histogram,
    ScaleStart,
    Values,
    check_rule,
    start_scales,
)
from limpq_ext.values.bits import check_candidates


def mean_step_sizes(
    scale: Tensor, scale_min: float = SCALE_MIN, scale_max: float = math.inf
) -> Tensor:
    """The step size in use for each bit-width, ``[K]``: the mean over channels if there are any.

    Args:
        scale: The parameter of a quantizer, ``[K]`` or ``[K, channels]``.
        scale_min: Scales below this act as this.
        scale_max: Scales above this act as this.
    """
    return scale.clamp(scale_min, scale_max).reshape(len(scale), -1).mean(dim=1)


class LsqQuantizer(nn.Module):
    """Fake-quantizes a tensor at one of several bit-widths, each with a step size of its own.

    Args:
        bits: Candidate bit-widths, each 2 to 16, no two the same.
        signed: Whether the range has negative values; None: decided by the first batch.
        symmetric: Leave out the lowest value of a signed range.
        channels: Number of scales per bit-width; 1 is one scale for the whole tensor.
        channel_axis: The axis that the scales belong to where ``channels`` is given.
        scale_min: Scales below this act as this and get no gradient. Positive, also in the type
            that the operators compute in, float32 unless the scales are float64.
        scale_max: Scales above this act as this and get no gradient (LIMPQ's own code: 1.0).
        scale_start: Where the step sizes begin: "mse" at the least squared error, "lsq" as LSQ and
            LIMPQ do, "max" without clipping, "percentile" with one value in 10,000 clipped.
        name: What errors call this quantizer.

    Attributes:
        selected: None: ``select()`` says which bit-width is used. A tensor: its one element does,
            int64, the place of the bit-width in ``bits``, on the device of the input. Then a graph
            that was captured or compiled once serves every bit-width.
        relu_max: None: ``x`` is quantized as it is. A number: ``min(relu(x), relu_max)`` is, in the
            same pass and with the same gradients; infinity is ReLU, 6 is ReLU6. Only an unsigned
            quantizer can.
        observe: None, or what is called with ``x``, which then is not quantized.
        scale: Parameter, ``[len(bits)]`` or ``[len(bits), channels]``: the step sizes.
        initialized: Buffer ``[len(bits)]``, whether a step size has its start value.

    Raises:
        ValueError: A bit-width is outside 2 to 16 or stands twice, or there is none; a bound of the
            scales is not positive, or the lower one is above the upper one; there is no such rule.
    """

    initialized: Tensor
    signed_range: Tensor

    def __init__(
        self,
        bits: Sequence[int],
        *,
        signed: bool | None,
        symmetric: bool = False,
        channels: int | None = None,
        channel_axis: int = 0,
        scale_min: float = SCALE_MIN,
        scale_max: float = math.inf,
        scale_start: ScaleStart = "mse",
        name: str = "",
    ) -> None:
        super().__init__()
        self.scale_start = check_rule(scale_start)
        self.bits = check_candidates(bits)
        self.symmetric = symmetric
        self.channel_axis = None if channels is None else channel_axis
        self.scale_min = scale_min
        self.scale_max = scale_max
        self.name = name
        self.relu_max: float | None = None
        self.selected: Tensor | None = None
        self.observe: Callable[[Tensor], None] | None = None
        shape = (len(self.bits),) if channels is None else (len(self.bits), channels)
        self.scale = nn.Parameter(torch.ones(shape))
        _check_bounds(name or "quantizer", scale_min, scale_max, self.scale.dtype)
        self.register_buffer("initialized", torch.zeros(len(self.bits), dtype=torch.bool))
        # -1: not decided yet, 0: unsigned, 1: signed.
        state = -1 if signed is None else int(signed)
        self.register_buffer("signed_range", torch.tensor(state, dtype=torch.int8))
        # What the buffers say, in Python, so that a forward never waits for the device.
        self._decide(signed)
        self._ready = [False] * len(self.bits)
        self._index = 0

    @property
    def selected_bits(self) -> int:
        """The bit-width that ``forward`` uses."""
        return self.bits[self._index]

    @property
    def signed(self) -> bool | None:
        """Whether the range has negative values; None before the first batch decides it."""
        return self._signed

    def select(self, bits: int) -> None:
        """Use this bit-width from now on.

        Raises:
            ValueError: ``bits`` is not a candidate.
        """
        try:
            self._index = self.bits.index(bits)
        except ValueError:
            raise ValueError(
                f"{self.name or 'quantizer'}: {bits} bits is not a candidate, those are {self.bits}"
            ) from None

    def keep_only(self, bits: int) -> None:
        """Forget all other bit-widths and their step sizes.

        Raises:
            ValueError: ``bits`` is not a candidate.
        """
        self.select(bits)
        row = slice(self._index, self._index + 1)
        self.bits = (bits,)
        self.scale = nn.Parameter(self.scale.detach()[row].clone(), self.scale.requires_grad)
        self.initialized = self.initialized[row].clone()
        self._ready, self._index = self._ready[row], 0
        self._decide(self._signed)

    def thresholds(self, bits: int) -> tuple[int, int]:
        """``(quant_min, quant_max)`` at a bit-width; signed as long as that is not decided."""
        signed = self._signed is None or self._signed
        return thresholds(bits, signed=signed, symmetric=self.symmetric and signed)

    def _decide(self, signed: bool | None) -> None:
        """Whether the range has negative values; thresholds are looked up in every forward."""
        self._signed = signed
        self._ranges = [self.thresholds(bits) for bits in self.bits]

    def set_scale(self, index: int, value: Tensor) -> None:
        """Give the step size of the ``index``-th bit-width its start value.

        Beyond the bounds it would never get a gradient: it begins at the upper one at most, and at
        least at twice the lower one, which leaves it room to fall and to be rounded.
        """
        with torch.no_grad():
            self.scale[index].copy_(value.clamp(2 * self.scale_min, self.scale_max))
            self.initialized[index] = True
        self._ready[index] = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` at the selected bit-width: the same shape, dtype and memory format."""
        if self.observe is not None:
            self.observe(x if self.relu_max is None else F.hardtanh(x, 0.0, self.relu_max))
            return x
        if self.selected is not None:
            return self._forward_selected(x, self.selected)
        if not self._ready[self._index]:
            self._start(x if self.relu_max is None else F.hardtanh(x, 0.0, self.relu_max))
        index = self._index
        quant_min, quant_max = self._ranges[index]
        ranges = ([quant_min], [quant_max], self.channel_axis)
        how = ([index], *ranges, None, self.scale_min, self.scale_max, self.relu_max, False)
        return fake_quantize(x, self.scale, how)

    def _forward_selected(self, x: Tensor, selected: Tensor) -> Tensor:
        if not all(self._ready):
            raise RuntimeError(
                f"{self.name or 'quantizer'} has not all its start values: run a batch at every"
                " bit-width before a tensor selects one"
            )
        mins, maxs = map(list, zip(*self._ranges, strict=True))
        guard = (self.scale_min, self.scale_max)
        how = (mins, maxs, self.channel_axis, None, *guard, self.relu_max)
        return fake_quantize_selected(x, self.scale, selected, how)

    def error_sums(self, x: Tensor, grad: Tensor, *, sum_axis: int) -> ErrorSums:
        """What its errors at all bit-widths add to a loss, see `quantization_error_sums`.

        Args:
            x: What it takes in.
            grad: The gradient of a loss at what it puts out, of ``x``'s shape.
            sum_axis: The axis that has a sum per index.

        Returns:
            The sums, ``[len(bits), x.shape[sum_axis]]``.
        """
        mins, maxs = map(list, zip(*self._ranges, strict=True))
        return quantization_error_sums(
            x,
            grad,
            self.scale,
            mins,
            maxs,
            channel_axis=self.channel_axis,
            sum_axis=sum_axis,
            scale_min=self.scale_min,
            scale_max=self.scale_max,
            relu_max=self.relu_max,
        )

    def values(self) -> dict[int, float]:
        """The step size in use for each bit-width, the mean over channels where it has any."""
        means = mean_step_sizes(self.scale.detach(), self.scale_min, self.scale_max)
        return dict(zip(self.bits, means.tolist(), strict=True))

    def extra_repr(self) -> str:
        """Bit-widths and range, as printed in a model."""
        kind = {None: "undecided", True: "signed", False: "unsigned"}[self._signed]
        return f"bits={self.bits}, selected={self.selected_bits}, {kind}"

    def _start(self, x: Tensor) -> None:
        raise RuntimeError(
            f"{self.name or 'quantizer'} has no start value at {self.selected_bits} bits"
        )

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        state = int(self.signed_range)
        self._decide(None if state < 0 else bool(state))
        self._ready = self.initialized.tolist()


class WeightQuantizer(LsqQuantizer):
    """Quantizes weights: signed, its start values taken from the weights it is made for.

    Weights that are all 0 have none; then they are taken from the first weights that are quantized.
    A single channel of zeros starts at the mean of the others.

    Args:
        weight: The float weights, any shape.
        bits: As for :class:`LsqQuantizer`.
        per_channel: One scale per output channel instead of one for all. The importance indicator,
            as :meth:`values` gives it, is the mean of the channels' scales.
        channel_axis: The axis of the output channels.
        **options: As for :class:`LsqQuantizer`.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: Sequence[int],
        *,
        per_channel: bool = False,
        channel_axis: int = 0,
        **options: Any,
    ) -> None:
        channels = weight.shape[channel_axis] if per_channel else None
        super().__init__(bits, signed=True, channels=channels, channel_axis=channel_axis, **options)
        self.to(weight.device)
        if weight.is_meta or bool(weight.detach().any()):
            self.start(weight)

    def start(self, weight: Tensor) -> None:
        """Give every step size that has no start value the one that these weights have.

        Raises:
            ValueError: The weights are all 0.
        """
        found: Values | None = None
        for index, width in enumerate(self.bits):
            if self._ready[index]:
                continue
            if self.scale_start == "lsq":
                scale = weight_start_scale(weight, width, channel_axis=self.channel_axis)
            elif weight.is_meta:
                scale = torch.empty_like(self.scale[index])
            else:
                found = found or Values(weight, self.channel_axis)
                scale = start_scales(found, self.scale_start, *self.thresholds(width))
                scale = scale if self.channel_axis is not None else scale[0]
            if not weight.is_meta:
                started = scale != 0
                if not bool(started.any()):
                    raise ValueError(
                        f"{self.name or 'weight quantizer'}: all weights are 0, which gives no step"
                        " size to start at: train or load the float weights first, or exclude the"
                        " layer"
                    )
                scale = torch.where(started, scale, scale[started].mean())
            self.set_scale(index, scale)

    def _start(self, x: Tensor) -> None:
        self.start(x)


class ActivationQuantizer(LsqQuantizer):
    """Quantizes activations: start values and sign come from the first training batch it sees.

    Signed where that batch has a negative value, else unsigned; the choice is kept and saved. Every
    bit-width takes its start value from the first batch that runs at it; one that is empty, not
    finite or holds nothing but zeros is a ValueError.

    Args:
        bits: As for :class:`LsqQuantizer`.
        signed: None lets the first batch decide.
        **options: As for :class:`LsqQuantizer`.
    """

    def __init__(self, bits: Sequence[int], *, signed: bool | None = None, **options: Any) -> None:
        super().__init__(bits, signed=signed, **options)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if not self.training:
            raise RuntimeError(
                f"{self.name or 'activation quantizer'} has no start value at {self.selected_bits}"
                " bits: run one batch in training mode first"
            )
        if x.numel() == 0:
            raise ValueError(f"{self.name or 'activation quantizer'}: the first batch is empty")
        if self.scale_start != "lsq":
            histogram = Histogram()
            try:
                histogram.add(x)
            except ValueError as error:
                name = self.name or "activation quantizer"
                raise ValueError(f"{name}: the first batch: {error}") from None
            self.start_from(histogram, [self._index])
            return
        mean_and_lowest = torch.stack([x.float().abs().mean(), x.float().min()])
        if is_distributed():
            lowest = mean_and_lowest[1].clone()
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(mean_and_lowest)
            mean_and_lowest /= torch.distributed.get_world_size()
            mean_and_lowest[1] = lowest
        mean, lowest_value = mean_and_lowest.tolist()
        if not math.isfinite(mean):
            raise ValueError(
                f"{self.name or 'activation quantizer'}: the first batch has a NaN or an infinity"
            )
        self._begin(lowest_value < 0, nothing=mean == 0)
        _, quant_max = self.thresholds(self.selected_bits)
        self.set_scale(self._index, 2 * mean_and_lowest[0] / math.sqrt(quant_max))

    @torch.no_grad()
    def start_from(self, histogram: Histogram, places: Sequence[int] | None = None) -> None:
        """Give step sizes their start values, from the inputs of one or several batches.

        In a run of several processes all call this, and all inputs count.

        Args:
            histogram: What was counted.
            places: Of which bit-widths in ``bits``; None: of all that have none yet.

        Raises:
            ValueError: All inputs were 0.
        """
        histogram.share()
        self._begin(histogram.lowest < 0, nothing=not histogram.bound)
        found = histogram.distribution()
        if places is None:
            places = [place for place, ready in enumerate(self._ready) if not ready]
        for place in places:
            levels = self.thresholds(self.bits[place])
            self.set_scale(place, start_scales(found, self.scale_start, *levels)[0])

    def _begin(self, signed: bool, *, nothing: bool) -> None:
        """Decide the sign, where it is not; ``nothing``: all that was seen is 0."""
        if nothing:
            raise ValueError(
                f"{self.name or 'activation quantizer'}: the first batch holds nothing but zeros,"
                " which gives no step size to start at: begin with another batch, or exclude the"
                " layer"
            )
        if self._signed is None:
            self._decide(signed)
            self.signed_range.fill_(int(signed))


def weight_start_scale(weight: Tensor, bits: int, *, channel_axis: int | None = None) -> Tensor:
    """LIMPQ's start value of a weight scale: ``max(|mean - 3 std|, |mean + 3 std|) / 2**(bits-1)``.

    Args:
        weight: Float weights.
        bits: 2 to 16.
        channel_axis: Over each channel along this axis; None: over all weights.

    Returns:
        A scalar, or ``[weight.shape[channel_axis]]``.
    """
    values = weight.detach().float()
    values = values.reshape(1, -1) if channel_axis is None else values.movedim(channel_axis, 0)
    values = values.flatten(1)
    mean = values.mean(dim=1)
    # The deviation of a single weight is 0, not undefined.
    deviation = values.std(dim=1, correction=min(1, values.shape[1] - 1))
    scale = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
    scale = scale / 2 ** (bits - 1)
    return scale[0] if channel_axis is None else scale


def _check_bounds(name: str, scale_min: float, scale_max: float, dtype: torch.dtype) -> None:
    """Refuse bounds that are no positive range in the type that the operators compute in."""
    computing = torch.float64 if dtype == torch.float64 else torch.float32
    for bound, value in (("scale_min", scale_min), ("scale_max", scale_max)):
        used = float(torch.tensor(value, dtype=computing))
        if not used > 0 or (bound == "scale_min" and math.isinf(used)):
            kind = str(computing).removeprefix("torch.")
            what = f", which is {used} in {kind}" if used != value else ""
            raise ValueError(f"{name}: {bound} is {value}{what}, expected a positive number")
    if scale_min > scale_max:
        raise ValueError(f"{name}: scale_min is {scale_min}, above scale_max, {scale_max}")
