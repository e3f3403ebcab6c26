"""Scores from gradients at the layers' outputs: what an error of quantization adds to the loss.

With the gradient g of a sample's loss and the error e of a layer's output y, the loss moves by
<g, e>, and for a trained network its second order is half the mean of <g, e>^2 over samples:
e' F e / 2 with the empirical Fisher information F in the place of the Hessian (see Kunstner et al.,
arXiv 1905.12558, for when the two are alike). Between layers nothing of F counts, and within one
all of it or its diagonal.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from limpq_ext.scores.calls import Call, Calls, loss_of
from limpq_ext.scores.moved_output import (
    Correction,
    Moments,
    by_channel,
    corrections,
    factor_and_shift,
)
from limpq_ext.scores.subject import KINDS, Subject
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind

Form = Literal["per_sample", "diagonal"]


def fisher(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    form: Form = "per_sample",
    correct: bool = True,
    **options: Any,
) -> Indicators:
    """Half the second moment of what each error changes of the loss, to first order.

    ``"per_sample"`` is half the mean over samples of <g, e>^2, with all of F within a layer.
    ``"diagonal"`` takes the elements of the layer's output as if they were independent: half the
    mean over samples of the sum of g^2 * e^2. The errors of the weights are taken at the output
    too: there those of all weights of an output element are summed with their signs, which a
    diagonal over weights would ignore, it costs no gradient of the weights for every sample, and
    there the correction acts.

    A layer is linear in its input and in its weights. So <g, e> at the output is what it is at
    either of them, which holds for every sample by itself. The score needs class indices. It takes
    one forward and backward of each batch, as much again as ``2 * len(bits)`` forwards of the
    layers, and a forward to begin the step sizes. Per sample and corrected it keeps
    ``2 * len(bits) + 2`` numbers for each sample and channel.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        form: "per_sample" or "diagonal".
        correct: Measure the errors that are left when calibration has corrected batch normalisation
            and biases, as :func:`limpq_ext.calibrate` with a reference does: without the mean of
            each channel and, where batch normalisation follows, at the scale that it had. Mean and
            variance are over all batches. A layer that runs several times in a forward is not
            corrected, there as here.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in nats.

    Raises:
        ValueError: There is no such form, there are no batches, the targets are no classes, the
            output is no table of scores, a layer's output does not begin with the samples, a score
            is not finite, or the model cannot be prepared.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}, expected one of {', '.join(get_args(Form))}")
    subject = Subject(model, batches, bits, **options)
    layers: dict[str, _Layer] = {}
    for x, target in subject.batches:
        with Calls(subject) as calls, torch.enable_grad():
            loss = loss_of(subject, x, target)
        if not layers:
            puts_right = corrections(subject, calls)
            layers = {
                name: _Layer(subject, name, form, puts_right[name] if correct else "none")
                for name in subject.layers
            }
        gradients = calls.gradients(loss, "outputs")
        for name, layer in layers.items():
            layer.add(calls.of[name], gradients[name], len(target), bits)
    samples = sum(len(target) for _, target in subject.batches)
    totals = {name: layer.totals(bits) for name, layer in layers.items()}
    found = subject.scores("fisher", bits, lambda name, *which: totals[name][which] / (2 * samples))
    return replace(found, meta={**found.meta, "form": form, "correct": correct})


def gradient(
    model: nn.Module, batches: Batches, bits: Sequence[int] = (2, 3, 4, 5, 6), **options: Any
) -> Indicators:
    """The sum of squared gradients times squared errors at the layers' outputs, as ModelOpt's.

    NVIDIA's Model Optimizer scores a format of a layer by the sum over batches and elements of
    ``g^2 * (y_q - y)^2``, g the gradient of the batch's mean loss (``auto_quantize`` with
    ``method="gradient"``). There a format is one for weights and input; here each has a score of
    its own, with the other in float. It is the diagonal form of :func:`fisher` in other units and
    without the correction.

    The score needs class indices. It takes one forward and backward of each batch, as much again as
    ``2 * len(bits)`` forwards of the layers, and a forward to begin the step sizes.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in squared nats.

    Raises:
        ValueError: There are no batches, the targets are no classes, the output is no table of
            scores, a score is not finite, or the model cannot be prepared.
    """
    subject = Subject(model, batches, bits, **options)
    sums: dict[tuple[str, Kind, int], Tensor | float] = {}
    for x, target in subject.batches:
        with Calls(subject) as calls, torch.enable_grad():
            loss = loss_of(subject, x, target, "mean")
        gradients = calls.gradients(loss, "outputs")
        for name, layer in subject.layers.items():
            for kind in KINDS:
                for width in bits:
                    total = sums.get((name, kind, width), 0.0)
                    with subject.quantized(name, kind, width), torch.no_grad():
                        for one, g in zip(calls.of[name], gradients[name], strict=True):
                            if g is not None:
                                error = layer(*one.inputs, **one.keywords) - one.output
                                total = total + (g * error).square().sum(dtype=torch.float64)
                    sums[name, kind, width] = total
    return subject.scores("gradient", bits, lambda *key: float(sums[key]))


_Which = tuple[Kind, int]
_Parts = tuple[Tensor, Tensor, Tensor]
"""Of one call the error, the output and the gradient, each ``[samples, channels, n]``; the first is
overwritten."""


class _Layer:
    """What batches tell of the errors of one layer.

    What a correction leaves of the error e of an output y is ``factor * e + (factor - 1) * y +
    shift``. Factor and shift are known after the last batch, so what a score is made of is kept for
    e, y and 1 apart.
    """

    def __init__(self, subject: Subject, name: str, form: Form, corrected: Correction) -> None:
        self._subject, self._name, self._corrected = subject, name, corrected
        self._products = _PerSample() if form == "per_sample" else _Diagonal()
        self._own = Moments()
        self._moved: defaultdict[_Which, Moments] = defaultdict(Moments)

    @torch.no_grad()
    def add(
        self,
        calls: Sequence[Call],
        gradients: Sequence[Tensor | None],
        samples: int,
        bits: Sequence[int],
    ) -> None:
        """Count the calls of one forward, with the gradients of the summed losses there."""
        layer = self._subject.layers[self._name]

        def parts(output: Tensor) -> Tensor:
            return by_channel(self._name, layer, output, samples)

        outputs = [parts(one.output) for one in calls]
        slopes = [
            torch.zeros_like(y) if gradient is None else parts(gradient)
            for gradient, y in zip(gradients, outputs, strict=True)
        ]
        if self._corrected != "none":  # of a layer that runs once
            self._own.add(outputs[0])
            self._products.add_output(outputs[0], slopes[0])
        for kind in KINDS:
            for width in bits:
                with self._subject.quantized(self._name, kind, width):
                    moved = [parts(layer(*one.inputs, **one.keywords)) for one in calls]
                if self._corrected != "none":
                    self._moved[kind, width].add(moved[0])
                # In place, since new memory for every tensor takes as long as the sums.
                errors = [after.sub_(y) for after, y in zip(moved, outputs, strict=True)]
                self._products.add_errors(
                    (kind, width), list(zip(errors, outputs, slopes, strict=True))
                )

    def totals(self, bits: Sequence[int]) -> dict[_Which, float]:
        """The sum over samples of the squares, for each kind and bit-width."""
        found: dict[_Which, Tensor] = {}
        for which in itertools.product(KINDS, bits):
            if self._corrected == "none":
                found[which] = self._products.total(which)
            else:
                how = factor_and_shift(self._corrected, self._own, self._moved[which])
                found[which] = self._products.corrected_total(which, *how)
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


class _PerSample:
    """<g, e>, <g, y> and <g, 1> of each channel in each sample."""

    def __init__(self) -> None:
        self._of_errors: defaultdict[_Which, list[Tensor]] = defaultdict(list)
        self._of_outputs: list[Tensor] = []
        self._of_ones: list[Tensor] = []

    def add_output(self, y: Tensor, g: Tensor) -> None:
        self._of_outputs.append((g * y).sum(dim=2))
        self._of_ones.append(g.sum(dim=2))

    def add_errors(self, which: _Which, calls: Sequence[_Parts]) -> None:
        self._of_errors[which].append(
            torch.stack([error.mul_(g).sum(dim=2) for error, _, g in calls]).sum(dim=0)
        )

    def total(self, which: _Which) -> Tensor:
        return torch.cat(self._of_errors[which]).double().sum(dim=1).square().sum()

    def corrected_total(self, which: _Which, factor: Tensor, shift: Tensor) -> Tensor:
        moved_by = torch.cat(self._of_errors[which]).double() * factor
        moved_by += torch.cat(self._of_outputs) * (factor - 1)
        moved_by += torch.cat(self._of_ones) * shift
        return moved_by.sum(dim=1).square().sum()


class _Diagonal:
    """The sums over samples of the products of g * e, g * y and g with each other, by channel."""

    def __init__(self) -> None:
        self._with_errors: defaultdict[_Which, list[Tensor]] = defaultdict(list)
        self._without: list[Tensor] = []

    def add_output(self, y: Tensor, g: Tensor) -> None:
        self._without.append(_sums((g * y, g * y), (g * y, g), (g, g)))

    def add_errors(self, which: _Which, calls: Sequence[_Parts]) -> None:
        for error, y, g in calls:
            own = error.mul_(g)
            self._with_errors[which].append(_sums((own, own), (own, g * y), (own, g)))

    def total(self, which: _Which) -> Tensor:
        return torch.stack(self._with_errors[which])[:, 0].sum()

    def corrected_total(self, which: _Which, factor: Tensor, shift: Tensor) -> Tensor:
        squares, with_output, with_one = torch.stack(self._with_errors[which]).sum(dim=0)
        outputs, output_with_one, ones = torch.stack(self._without).sum(dim=0)
        scaled = factor - 1
        total = factor.square() * squares + scaled.square() * outputs + shift.square() * ones
        total += 2 * factor * (scaled * with_output + shift * with_one)
        total += 2 * scaled * shift * output_with_one
        return total.sum().clamp(min=0)  # below 0 by rounding only


def _sums(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """The sums over samples and values of products, ``[pairs, channels]``."""
    return torch.stack([(a * b).sum(dim=2).sum(dim=0, dtype=torch.float64) for a, b in pairs])
