"""What a batch-norm correction leaves of a layer's error, by channel of its output.

Calibration against the float network (`limpq_ext.training.correction`) puts right what quantization
makes of the statistics: batch normalisation gets ``mean + (m_q - m_f)`` and ``var * v_q / v_f``,
and a bias without one ``bias + (m_f - m_q)``. To what comes after, the layer's output is then

    y' = (y_q - m_q) * sqrt(v_f / v_q) + m_f    or    y' = y_q - m_q + m_f,

m and v the mean and the variance of a channel on the same images. This is exact where batch
normalisation reads the layer's output itself, with statistics that are those of the images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.layers import QuantizedLayer, channel_axis
from limpq_ext.scores.calls import Calls
from limpq_ext.scores.subject import Subject
from limpq_ext.training.correction import LEAST_RATIO

Correction = Literal["none", "mean", "mean and variance"]


def corrections(subject: Subject, calls: Calls) -> dict[str, Correction]:
    """What of each layer's output calibration will put right; see `correct_statistics`.

    Args:
        subject: The network.
        calls: Of one forward of it.
    """
    feeds: dict[str, list[_BatchNorm]] = {}
    for module in subject.network.modules():
        if isinstance(module, SwitchableBatchNorm):
            feeds.setdefault(module.source, []).append(module)

    def correction(name: str, layer: nn.Module) -> Correction:
        if len(calls.of[name]) != 1:
            return "none"
        if name not in feeds:
            return "none" if layer.bias is None else "mean"
        corrected = any(
            norm.running_mean is not None and calls.norms[norm] == 1 for norm in feeds[name]
        )
        return "mean and variance" if corrected else "none"

    return {name: correction(name, layer) for name, layer in subject.layers.items()}


class Moments:
    """Mean and variance of each channel over many batches."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Count what is ``[samples, channels, n]``."""
        norms = torch.linalg.vector_norm(values, dim=2)
        sums = torch.stack([values.sum(dim=2), norms.square()])
        self._sums = self._sums + sums.sum(dim=1, dtype=torch.float64)  # [2, channels]
        self._count += values.shape[0] * values.shape[2]

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Each ``[channels]``, float64."""
        assert isinstance(self._sums, Tensor)
        mean, square = self._sums / self._count
        return mean, (square - mean.square()).clamp(min=0)


def factor_and_shift(kind: Correction, own: Moments, moved: Moments) -> tuple[Tensor, Tensor]:
    """What a correction makes of an output: ``y' = factor * y_q + shift``, each ``[channels]``.

    Args:
        kind: What is put right, not "none".
        own: Of the output in float.
        moved: Of the output with what is quantized.
    """
    (mean, variance), (moved_mean, moved_variance) = (
        own.mean_and_variance(),
        moved.mean_and_variance(),
    )
    if kind == "mean":
        factor = torch.ones_like(mean)
    else:
        ratio = torch.where(variance > 0, moved_variance / variance, 1.0)
        factor = ratio.clamp(LEAST_RATIO, 1 / LEAST_RATIO).rsqrt()
    return factor, mean - factor * moved_mean


class OutputCorrection:
    """Corrects what layers put out on one batch, as calibration on that batch would.

    Args:
        subject: The network.
        calls: Of its forward of the batch in float.
    """

    def __init__(self, subject: Subject, calls: Calls) -> None:
        self._subject = subject
        self._kinds = corrections(subject, calls)
        self._own = {
            name: self._moments(name, calls.of[name][0].output)
            for name, kind in self._kinds.items()
            if kind != "none"
        }

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Correct what one layer puts out, for as long as the block lasts."""
        if name not in self._own:
            yield
            return
        layer = self._subject.layers[name]

        def correct(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            moved = self._moments(name, output)
            shape = [1] * output.dim()
            shape[channel_axis(layer, output)] = -1
            factor, shift = (
                each.to(output.dtype).reshape(shape)
                for each in factor_and_shift(self._kinds[name], self._own[name], moved)
            )
            return output * factor + shift

        handle = layer.register_forward_hook(correct)
        try:
            yield
        finally:
            handle.remove()

    def _moments(self, name: str, output: Tensor) -> Moments:
        moments = Moments()
        moments.add(by_channel(name, self._subject.layers[name], output, samples=1))
        return moments


def by_channel(name: str, layer: QuantizedLayer, output: Tensor, samples: int) -> Tensor:
    """A layer's output as ``[samples, channels, n]``.

    Raises:
        ValueError: It does not begin with the samples, perhaps in several parts each.
    """
    if output.dim() == 0 or output.shape[0] % samples:
        raise ValueError(
            f"layer '{name}' puts out {tuple(output.shape)}, which does not begin with the"
            f" {samples} samples: exclude it"
        )
    axis = channel_axis(layer, output)
    return output.unflatten(0, (samples, -1)).movedim(axis + 1, 1).flatten(2)
