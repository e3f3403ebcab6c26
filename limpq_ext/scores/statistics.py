"""Scores from weights and activations alone: no gradients, no targets, no output of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from limpq_ext.nn.inputs import call, samples_in
from limpq_ext.nn.layers import QuantizedLayer, channel_axis
from limpq_ext.scores.calls import Call, Calls
from limpq_ext.scores.squared_errors import SquaredErrors
from limpq_ext.scores.subject import Subject
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind

Statistic = Literal["mean_variance", "max_variance", "mean_magnitude"]


@torch.no_grad()
def weight_error(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    relative: bool = True,
    **options: Any,
) -> Indicators:
    """The squared error of each tensor, as a share of its sum of squares.

    The plainest measure, and what others are compared with: it knows nothing of what a layer is
    for. Relative errors are the default, since those of unlike layers can be compared and batch
    normalisation makes the size of the weights before it meaningless; a layer with twice the
    weights counts as much. NNCF's data-free criterion, ``weight_quantization_error``, ranks layers
    by one error of their weights at 8 bits. The errors at every bit-width, and those of the inputs,
    are ours: a search over activations needs them.

    The score needs no targets and no gradients. It takes a forward of each batch, and another to
    begin the step sizes.

    Args:
        model: The float model; any output. It is left as it is, and runs in evaluation mode.
        batches: Some batches of inputs and targets, on any device; the targets do not matter.
        bits: Candidate bit-widths.
        relative: Divide by the sum of squares of the tensor. Else errors of weights are sums, and
            those of inputs means over samples, in squared units of the tensor.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input.

    Raises:
        ValueError: There are no batches, a score is not finite, or the model cannot be prepared.
    """
    subject = Subject(model, batches, bits, **options)
    inputs, errors, samples = _watched(subject, bits)

    def score(name: str, kind: Kind, width: int) -> float:
        error = errors.of[name, kind, width]
        if not relative:
            return float(error if kind == "weight" else error / samples)
        squares = (
            _squares(subject.layers[name].weight) if kind == "weight" else inputs[name].squares
        )
        return float(error / squares)

    found = subject.scores("weight_error", bits, score)
    return replace(found, meta={**found.meta, "relative": relative})


@torch.no_grad()
def activation_variance(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    statistic: Statistic = "mean_variance",
    **options: Any,
) -> Indicators:
    """The spread of what a layer gets times the squared error of its weights, after NNCF.

    Where the elements of the input are independent, an output element moves by the sum over its
    weights of ``variance(x) * (w_q - w)^2``, and where the input is quantized by the sum of
    ``w^2 * (x_q - x)^2``. The scores are the means of those over the output channels: mean
    statistic times squared error per channel for the weights, squared weights per channel times
    mean squared error for the input.

    NNCF's criteria for mixed precision of weights, ``mean_activation_variance``,
    ``max_activation_variance`` and ``mean_activation_magnitude``, are these statistics times the
    inverse of an error of the weights at 8 bits, since it ranks layers for a choice between that
    and fewer bits. Ours are the error at each candidate in the place of that, the score of the
    inputs, statistics over all samples and positions and not along one axis, and the square of the
    magnitude, so that all have one unit.

    The score needs no targets and no gradients. It takes a forward of each batch, and another to
    begin the step sizes.

    Args:
        model: The float model; any output. It is left as it is, and runs in evaluation mode.
        batches: Some batches of inputs and targets, on any device; the targets do not matter.
        bits: Candidate bit-widths.
        statistic: "mean_variance" or "max_variance", the mean or the maximum over the input's
            channels of their variance, or "mean_magnitude", the squared mean over the channels of
            the largest magnitude. It changes the scores of weights alone.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in squared units of its output.

    Raises:
        ValueError: There is no such statistic, there are no batches, a score is not finite, or the
            model cannot be prepared.
    """
    if statistic not in get_args(Statistic):
        known = ", ".join(get_args(Statistic))
        raise ValueError(f"statistic is {statistic!r}, expected one of {known}")
    subject = Subject(model, batches, bits, **options)
    inputs, errors, _ = _watched(subject, bits)

    def score(name: str, kind: Kind, width: int) -> float:
        layer, seen = subject.layers[name], inputs[name]
        error = errors.of[name, kind, width]
        if kind == "weight":
            return float(seen.of(statistic) * error / seen.outputs)
        return float(_squares(layer.weight) / seen.outputs * error / seen.elements)

    found = subject.scores("activation_variance", bits, score)
    return replace(found, meta={**found.meta, "statistic": statistic})


class _Inputs:
    """What is known of a layer's inputs, by channel.

    Attributes:
        outputs: The channels of what it puts out.
        elements: How many were counted.
        squares: The sum of their squares.
    """

    def __init__(self) -> None:
        self.outputs = 1
        self.elements = 0
        self._sums: list[Tensor] = []
        self._largest: list[Tensor] = []

    def add(self, layer: QuantizedLayer, one: Call) -> None:
        x = one.input.movedim(channel_axis(layer, one.input), 0).flatten(1)
        sums = [x.sum(dim=1, dtype=torch.float64), x.square().sum(dim=1, dtype=torch.float64)]
        self._sums.append(torch.stack(sums))  # [2, channels]
        self._largest.append(x.abs().amax(dim=1))
        self.outputs = one.output.shape[channel_axis(layer, one.output)]
        self.elements += x.numel()

    @property
    def squares(self) -> Tensor:
        return torch.stack(self._sums)[:, 1].sum()

    def of(self, statistic: Statistic) -> Tensor:
        if statistic == "mean_magnitude":
            return torch.stack(self._largest).amax(dim=0).double().mean().square()
        total = torch.stack(self._sums).sum(dim=0)
        mean, square = total / (self.elements / total.shape[1])
        variance = (square - mean.square()).clamp(min=0)
        return variance.mean() if statistic == "mean_variance" else variance.amax()


def _watched(
    subject: Subject, bits: Sequence[int]
) -> tuple[dict[str, _Inputs], SquaredErrors, int]:
    """The inputs of all layers and the errors of all tensors, and how many samples there were."""
    inputs: defaultdict[str, _Inputs] = defaultdict(_Inputs)
    errors = SquaredErrors(subject, bits)
    for x, _ in subject.batches:
        with Calls(subject) as calls:
            call(subject.network, x)
        for name, layer in subject.layers.items():
            errors.add_inputs(name, calls.of[name])
            for one in calls.of[name]:
                inputs[name].add(layer, one)
    return inputs, errors, sum(samples_in(x) for x, _ in subject.batches)


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(dtype=torch.float64)
