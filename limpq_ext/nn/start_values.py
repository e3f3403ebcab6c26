"""Where step sizes begin: the rules, and what they need to know of the values that are quantized.

A weight is seen as it is: the kernel that sums errors tries many step sizes of all channels in one
pass. Activations are seen as a distribution, a histogram of many batches. There the squared error
of a step size is a sum over the levels of the quantizer,

    sum over q of  sum of (x - q * s)^2 = sum x^2 - 2 q s sum x + q^2 s^2 n    over the x nearest q,

and prefix sums of n, x and x^2 give each level's share by two look-ups. So one candidate costs as
much as the quantizer has levels, whatever the number of values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Final, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from limpq_ext.kernels.ops import MOST_BIT_WIDTHS, quantization_error_sums
from limpq_ext.nn.processes import is_distributed

ScaleStart = Literal["mse", "lsq", "max", "percentile"]
"""How step sizes begin: the least squared error, LSQ's rule, without clipping, or with the largest
one in 10,000 values clipped."""

SCALE_STARTS: Final = get_args(ScaleStart)

PERCENTILE: Final = 0.9999
"""The share of values that the rule "percentile" does not clip."""

_FEW: Final = 256  # values of a channel of which single ones matter, as in a depthwise convolution
_REFINED: Final = 17  # of each of the two searches between the best one's neighbours
_MANY_LEVELS: Final = 128  # from here on the first search takes what is rounded for noise
_MOST_LEVELS: Final = 1025  # from here on all do
_MOST_LOOKUPS: Final = 2**24  # at once; more channels are done one part after the other
_BINS: Final = 8192
_SHORT: Final = 64  # channels of fewer values lie beside each other in memory while they are tried


class _Searched(ABC):
    """Values by channel, among whose step sizes that of the least squared error is sought."""

    @property
    @abstractmethod
    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value, ``[channels]`` each, float64."""

    @property
    @abstractmethod
    def mean_magnitude(self) -> Tensor:
        """The mean of ``|x|``, ``[channels]``, float64."""

    @property
    @abstractmethod
    def few(self) -> bool:
        """Whether a channel has so few values that single ones matter."""

    @abstractmethod
    def percentile(self, share: float, quant_min: int, quant_max: int) -> Tensor:
        """The least step size at which this share of the values lies in the range, ``[channels]``.

        As much is left out on either side where the range has two.
        """

    @property
    @abstractmethod
    def _candidates(self) -> int:
        """How many step sizes are tried first, in equal ratios."""

    @abstractmethod
    def _looks_at_values(self, levels: int, refines: int) -> bool:
        """Whether errors are those of the values, or what is rounded is taken for noise."""

    @abstractmethod
    def _improved(
        self, tried: Tensor, quant_min: int, quant_max: int, *, exactly: bool
    ) -> tuple[Tensor, Tensor]:
        """The best step sizes for what those that are tried round to, and their squared errors.

        Args:
            tried: ``[channels, m]``, positive.
            quant_min: Lowest level.
            quant_max: Highest level.
            exactly: As `_looks_at_values` says; else the step sizes are those that were tried.

        Returns:
            Each ``[channels, m]``, float64.
        """

    def no_clipping(self, quant_min: int, quant_max: int) -> Tensor:
        """The least step size at which no value lies outside the range, ``[channels]``."""
        return _covering(*self.ends, quant_min, quant_max)

    def least_error(self, quant_min: int, quant_max: int) -> Tensor:
        """The step size of the least squared error, ``[channels]``; 0 where all values are 0.

        It is sought among step sizes in equal ratios, from one that clips most values to one that
        clips none, and then twice between the neighbours of the best. Each that is tried says which
        values are nearest to which level q, and for these the best step size is known,
        ``sum(q * x) / sum(q^2)``; that is what is compared, and found.
        """
        high = self.no_clipping(quant_min, quant_max)
        low = torch.minimum(high, self.mean_magnitude / (2 * max(quant_max, -quant_min)))
        nothing = ~(low > 0)
        low, high = (torch.where(nothing, torch.ones_like(end), end) for end in (low, high))
        high = 2 * high if self.few else high  # a few may lie on coarser levels by chance
        found = high
        least = torch.full_like(found, math.inf)
        for refines, candidates in enumerate((self._candidates, _REFINED, _REFINED)):
            steps = torch.linspace(0, 1, candidates, dtype=torch.float64, device=low.device)
            tried = low[:, None] * (high / low)[:, None] ** steps
            exactly = self._looks_at_values(quant_max - quant_min + 1, refines)
            scales, errors = self._improved(tried, quant_min, quant_max, exactly=exactly)
            best = errors.argmin(dim=1, keepdim=True)
            error, scale = (every.gather(1, best).squeeze(1) for every in (errors, scales))
            if refines == 0 and not exactly:
                found = scale  # its error is another measure than that of the next ones
            else:
                found = torch.where(error < least, scale, found)
                least = torch.minimum(error, least)
            low, high = (
                tried.gather(1, (best + side).clamp(0, candidates - 1)).squeeze(1)
                for side in (-1, 1)
            )
        return torch.where(nothing, torch.zeros_like(found), found)


class Values(_Searched):
    """The values of a tensor, all or by channel, as they are.

    Args:
        x: Any shape, float.
        channel_axis: The axis of the channels; None: all values are one.
    """

    def __init__(self, x: Tensor, channel_axis: int | None = None) -> None:
        x = x.detach()
        rows = x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)
        self._rows = rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        lowest, highest = torch.aminmax(self._rows, dim=1)
        self._ends = lowest.double(), highest.double()
        self._axis = 1 if rows.shape[1] < _SHORT else 0
        self._laid = (self._rows.t() if self._axis else self._rows).contiguous()
        self._ones = torch.ones_like(self._laid)
        self._squares = _norm(self._rows, 2).square()[:, None]

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value, ``[channels]`` each, float64."""
        return self._ends

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean of ``|x|``, ``[channels]``, float64."""
        return _norm(self._rows, 1) / self._rows.shape[1]

    @property
    def few(self) -> bool:
        """Whether a channel has so few values that single ones matter."""
        return self._rows.shape[1] <= _FEW

    def percentile(self, share: float, quant_min: int, quant_max: int) -> Tensor:
        """The least step size at which this share of the values lies in the range."""
        return Distribution.of(self._rows, 0).percentile(share, quant_min, quant_max)

    @property
    def _candidates(self) -> int:
        return 512 if self.few else 32

    def _looks_at_values(self, levels: int, refines: int) -> bool:
        return True

    def _improved(
        self, tried: Tensor, quant_min: int, quant_max: int, *, exactly: bool
    ) -> tuple[Tensor, Tensor]:
        scales = tried.to(self._laid.dtype)
        errors = self._sums(scales, self._ones, quant_min, quant_max, "squares")
        # What the others would come to is not less than what the best few do, or hardly.
        best = errors.topk(MOST_BIT_WIDTHS if self.few else 1, largest=False).indices
        products = self._sums(scales.gather(1, best), self._laid, quant_min, quant_max, "sums")
        scales = scales.double()
        scale, error = (every.gather(1, best) for every in (scales, errors))
        # With y = q * scale and e = y - x: what sum(q * e) and sum(q^2) are.
        along = (products + error) / scale
        across = (self._squares + 2 * products + error) / scale.square()
        shift = torch.where(across > 0, along / across, torch.zeros_like(along))
        better = (scale - shift, error - across * shift.square())
        return scales.scatter(1, best, better[0]), errors.scatter(1, best, better[1])

    def _sums(
        self,
        scales: Tensor,
        factor: Tensor,
        quant_min: int,
        quant_max: int,
        which: Literal["sums", "squares"],
    ) -> Tensor:
        """Sums of a factor times the error, or of its square: ``[channels, m]`` as the scales."""
        parts = []
        for part in scales.split(MOST_BIT_WIDTHS, dim=1):
            count = part.shape[1]
            found = quantization_error_sums(
                self._laid,
                factor,
                part.t().contiguous(),
                [quant_min] * count,
                [quant_max] * count,
                channel_axis=self._axis,
                sum_axis=self._axis,
                scale_min=torch.finfo(part.dtype).tiny,
            )
            parts.append(getattr(found, which).t())
        return torch.cat(parts, dim=1)


class Distribution(_Searched):
    """Values or bins of them, by channel, sorted, with what the error of a step size needs.

    Args:
        values: ``[channels, n]``, in ascending order along the last axis.
        counts: Of the same shape, how often each stands; None: once.
    """

    def __init__(self, values: Tensor, counts: Tensor | None = None) -> None:
        self.values = values.double().contiguous()
        ones = torch.ones_like(self.values) if counts is None else counts.double()
        self._sums = _from_the_left(
            torch.stack([ones, ones * self.values, ones * self.values.square()])
        )

    @classmethod
    def of(cls, x: Tensor, channel_axis: int | None = None) -> Distribution:
        """That of all values of a tensor, or of each channel along an axis."""
        x = x.detach()
        rows = x.reshape(1, -1) if channel_axis is None else x.movedim(channel_axis, 0).flatten(1)
        computing = torch.float64 if x.dtype == torch.float64 else torch.float32
        return cls(rows.to(computing).sort(dim=1).values)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest value, ``[channels]`` each, float64."""
        return self.values[:, 0], self.values[:, -1]

    @property
    def few(self) -> bool:
        """Whether a channel has so few values that single ones matter."""
        return self.values.shape[1] <= _FEW

    @property
    def mean_magnitude(self) -> Tensor:
        """The mean of ``|x|``, ``[channels]``, float64."""
        total = self._sums[:, :, -1]
        place = torch.searchsorted(self.values, torch.zeros_like(self.values[:, :1]))
        below = self._sums[1].gather(1, place).squeeze(1)
        return (total[1] - 2 * below) / total[0]

    def percentile(self, share: float, quant_min: int, quant_max: int) -> Tensor:
        """The least step size at which this share of the values lies in the range."""
        counted = self._sums[0, :, 1:]
        left_out = (1 - share) / (2 if quant_min < 0 else 1)
        total = counted[:, -1:]
        last = self.values.shape[1] - 1
        low = torch.searchsorted(counted.contiguous(), total * left_out, right=True)
        high = torch.searchsorted(counted.contiguous(), total * (1 - left_out))
        lowest, highest = (
            self.values.gather(1, place.clamp(max=last)).squeeze(1) for place in (low, high)
        )
        return _covering(lowest, highest, quant_min, quant_max)

    def squared_error(self, scales: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """The sum of squared errors at step sizes.

        Args:
            scales: Positive, ``[channels, m]``.
            quant_min: Lowest level.
            quant_max: Highest level.

        Returns:
            ``[channels, m]``, float64.
        """
        count, total, squares, levels = self._by_level(scales, quant_min, quant_max)
        where = levels * scales.double()[..., None]
        error = squares - 2 * where * total + where.square() * count
        return error.sum(dim=2)

    @property
    def _candidates(self) -> int:
        return 1024 if self.few else 96

    def _looks_at_values(self, levels: int, refines: int) -> bool:
        return levels < (_MOST_LEVELS if self.few or refines else _MANY_LEVELS)

    def _improved(
        self, tried: Tensor, quant_min: int, quant_max: int, *, exactly: bool
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, _MOST_LOOKUPS // (tried.shape[1] * (quant_max - quant_min if exactly else 2)))
        parts = []
        for start, part in zip(range(0, len(tried), rows), tried.split(rows), strict=True):
            own = self._rows(start, start + rows)
            if not exactly:
                parts.append((part, own._squared_error_of_noise(part, quant_min, quant_max)))
                continue
            along, across = own._looked_up(part, quant_min, quant_max)
            scale = torch.where(along > 0, along / across, part)
            error = own._sums[2, :, -1:] - scale * (2 * along - scale * across)
            parts.append((scale, error))
        scales, errors = (torch.cat(every) for every in zip(*parts, strict=True))
        return scales, errors

    def _looked_up(self, scales: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
        """``sum(q * x)`` and ``sum(q^2)`` of what values round to, ``[channels, m]``, by levels."""
        count, total, _, q = self._by_level(scales, quant_min, quant_max)
        return (q * total).sum(dim=2), (q.square() * count).sum(dim=2)

    def _squared_error_of_noise(self, scales: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """The squared error where what is rounded is noise, and what is clipped counts exactly."""
        edges = torch.tensor([quant_min - 0.5, quant_max + 0.5], device=scales.device)
        ends = torch.tensor([quant_min, 0, quant_max], device=scales.device).double()
        count, total, squares = self._between(edges.double() * scales[..., None])
        where = ends * scales[..., None]
        error = squares - 2 * where * total + where.square() * count
        error[..., 1] = count[..., 1] * scales.square() / 12
        return error.sum(dim=2)

    def _by_level(
        self, scales: Tensor, quant_min: int, quant_max: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The count, the sum and the sum of squares of what is nearest to each level, and those.

        Each is ``[channels, m, levels]``.
        """
        levels = torch.arange(quant_min, quant_max + 1, device=scales.device).double()
        count, total, squares = self._between((levels[:-1] + 0.5) * scales.double()[..., None])
        return count, total, squares, levels

    def _between(self, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The count, the sum and the sum of squares of the values between edges.

        Args:
            edges: ``[channels, m, n]``, ascending.

        Returns:
            Each ``[channels, m, n + 1]``.
        """
        places = torch.searchsorted(self.values, edges.flatten(1))
        inner = self._sums.gather(2, places.expand(3, *places.shape)).reshape(3, *edges.shape)
        ends = self._sums[:, :, None, -1:].expand(3, *edges.shape[:2], 1)
        parts = torch.diff(inner, dim=3, prepend=torch.zeros_like(ends), append=ends)
        return parts[0], parts[1], parts[2]

    def _rows(self, start: int, stop: int) -> Distribution:
        part = object.__new__(Distribution)
        part.values, part._sums = self.values[start:stop], self._sums[:, start:stop]
        return part


def _covering(lowest: Tensor, highest: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The least step size at which values from the lowest to the highest are in the range."""
    least = highest.clamp(min=0) / quant_max
    return torch.maximum(least, (-lowest).clamp(min=0) / -quant_min) if quant_min else least


def _norm(rows: Tensor, power: int) -> Tensor:
    """The norm of each row, summed in float64."""
    return torch.linalg.vector_norm(rows, power, dim=1, dtype=torch.float64)


def _from_the_left(terms: Tensor) -> Tensor:
    """The sums of all terms to the left of each, ``[3, channels, n + 1]``."""
    return torch.cat([terms.new_zeros((*terms.shape[:2], 1)), terms.cumsum(dim=2)], dim=2)


def start_scales(
    found: Values | Distribution, rule: ScaleStart, quant_min: int, quant_max: int
) -> Tensor:
    """Where the step sizes of these values begin, ``[channels]``; 0 where all values are 0.

    Args:
        found: The values.
        rule: "lsq" is that of activations, ``2 * mean|x| / sqrt(quant_max)`` (arXiv 1902.08153,
            section 2.1); the others are the same for weights.
        quant_min: Lowest level.
        quant_max: Highest level.
    """
    if rule == "mse":
        return found.least_error(quant_min, quant_max)
    if rule == "max":
        return found.no_clipping(quant_min, quant_max)
    if rule == "percentile":
        scale = found.percentile(PERCENTILE, quant_min, quant_max)
        # Where nearly all values are 0, all others would be clipped to it.
        return torch.where(scale > 0, scale, found.no_clipping(quant_min, quant_max))
    return 2 * found.mean_magnitude / math.sqrt(quant_max)


def check_rule(rule: str) -> ScaleStart:
    """The rule, if there is one of this name.

    Raises:
        ValueError: There is none.
    """
    if rule not in SCALE_STARTS:
        raise ValueError(f"scale_start is {rule!r}, expected one of {', '.join(SCALE_STARTS)}")
    return rule  # type: ignore[return-value]  # as was just looked at


class Histogram:
    """Counts of values over many batches, in bins that widen as larger values come.

    The bins are equal and go from ``-bound`` to ``bound``, a power of two that doubles, so that two
    bins become one and nothing that was counted is counted wrongly.

    Attributes:
        counts: Float64, ``[bins]``; None before the first values.
        bound: Of the magnitude.
        lowest: The least value so far; infinity before the first.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.bound = 0.0
        self.lowest = math.inf

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor.

        Raises:
            ValueError: One is NaN or infinite.
        """
        x = x.detach().float()
        if x.numel() == 0:
            return
        low, high = torch.stack(torch.aminmax(x)).tolist()
        most = max(-low, high)
        if not math.isfinite(most):
            raise ValueError("a batch has a NaN or an infinity")
        self.lowest = min(self.lowest, low)
        if self.counts is None:
            self.counts = torch.zeros(_BINS, dtype=torch.float64, device=x.device)
        # Above the largest value, which else would stand on the edge.
        self.widen(2.0 ** math.frexp(most)[1] if most else 0.0)
        if self.bound:
            width = 2 * self.bound / _BINS
            # In float64 the sum is exact, so that a bin's edge is the same at any bound.
            places = ((x.flatten().double() + self.bound) / width).long().clamp_(0, _BINS - 1)
            self.counts += torch.bincount(places, minlength=_BINS)
        else:
            self.counts[_BINS // 2] += x.numel()

    def widen(self, bound: float) -> None:
        """Let the bins go to a bound, a power of two; a lower one changes nothing."""
        if not self.bound:
            self.bound = bound
        while self.bound < bound and self.counts is not None:
            halves = self.counts.reshape(-1, 2).sum(dim=1)
            quarter = _BINS // 4
            self.counts = torch.zeros_like(self.counts)
            self.counts[quarter : 3 * quarter] = halves
            self.bound *= 2

    def share(self) -> None:
        """Add up what all processes counted, in each of them."""
        if not is_distributed():
            return
        assert self.counts is not None
        ends = self.counts.new_tensor([self.bound, -self.lowest])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        bound, lowest = ends.tolist()
        self.widen(bound)
        self.lowest = -lowest
        dist.all_reduce(self.counts)

    def distribution(self) -> Distribution:
        """What was counted, at the middles of the bins."""
        assert self.counts is not None
        width = 2 * self.bound / _BINS
        places = torch.arange(_BINS, dtype=torch.float64, device=self.counts.device)
        middles = (places + 0.5) * width - self.bound
        used = self.counts > 0
        return Distribution(middles[used][None], self.counts[used][None])
