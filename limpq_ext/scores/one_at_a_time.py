"""One tensor quantized at a time, all others float: what it moves at the output.

The layer-wise analysis of Gluska and Grobman (arXiv 2012.08420) with ZeroQ's measure, the
Kullback-Leibler divergence of the outputs (arXiv 2001.00281, equation 2), under the correction of
batch normalisation and biases that a quantized network is calibrated with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.graph.trace import trace
from limpq_ext.nn.swapping import in_place_of
from limpq_ext.scores.replay import Forward, Replay, Treatment
from limpq_ext.scores.subject import KINDS, Subject, checked_classes, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.training.correction import (
    FloatMoments,
    Moments,
    by_channel,
    correctable,
    corrected_statistics,
    correction_of_bias,
    joined_inputs,
)
from limpq_ext.training.model_state import device_of
from limpq_ext.values.indicators import Indicators, Kind

Measure = Literal["kl", "loss"]
"""What is measured at the output: the divergence from the float network, or the loss."""

MEASURES: Final = get_args(Measure)

MEMORY: Final = 2**30
"""The most bytes that outputs of a batch are kept in, unless somebody says otherwise."""

Variant = Callable[[], AbstractContextManager[Any]]
"""Quantizes a layer, one way, for as long as a block lasts."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Is told the place of a variant, what the layer puts out with it, and what it does in float."""


@torch.no_grad()
def layerwise(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    measure: Measure = "kl",
    correct: bool = True,
    memory: int = MEMORY,
    **options: Any,
) -> Indicators:
    """What is lost at the output where one tensor alone is quantized.

    It needs no gradients, and targets only for the loss. It takes ``2 * layers * len(bits)``
    forwards of each batch that begin at the layer, about half of the work of whole ones, and two
    whole ones; a forward has several bit-widths on the axis of the samples. A network in which that
    would change a result runs in full. Counted in ResNet-18 with five bit-widths and 32 images, it
    is the work of 94 forwards in the place of 190.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device; the classes matter only
            for the loss.
        bits: Candidate bit-widths.
        measure: "kl" is the divergence KL(float || quantized), "loss" what the cross entropy rises
            by, 0 where it falls.
        correct: Batch normalisation and biases behind the tensor are corrected by what it moves, as
            :func:`limpq_ext.calibrate` corrects them with a reference, in the same forward. All
            batches then run as one.
        memory: The most bytes that outputs of a batch are kept in, so that they are not computed
            again. A forward has as many bit-widths as let four of its largest outputs fit in as
            much. 0: every forward runs in full, with one bit-width.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the mean over the samples, in nats.

    Raises:
        ValueError: There are no batches or they cannot run as one, there is no such measure, the
            targets are no classes where the loss is measured, the output is no table of scores or
            not finite, a score is not finite, or the model cannot be prepared.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}")
    bench = OneAtATime(model, batches, bits, correct=correct, memory=memory, **options)
    subject = bench.subject
    sums: dict[tuple[str, Kind, int], Tensor] = {}
    samples = 0
    with bench.opened():
        for x, target in bench.batches:
            reference = log_probabilities(bench.begin(x))
            _check_finite(reference)
            samples += len(reference)
            lost = losing(measure, reference, target)
            for layer in bench.order():
                keys = [(layer, kind, width) for kind in KINDS for width in bits]
                outputs = bench.run({layer: [partial(subject.quantized, *key) for key in keys]})
                for key, output in zip(keys, outputs, strict=True):
                    sums[key] = sums.get(key, 0.0) + lost(log_probabilities(output))
    # A divergence is below 0 by rounding only.
    found = {key: float(value.clamp(min=0.0)) / samples for key, value in sums.items()}
    scores = subject.scores("layerwise", bits, lambda *key: found[key])
    return dataclasses.replace(scores, meta={**scores.meta, "measure": measure, "correct": correct})


class OneAtATime:
    """A float network in which layers are quantized for one forward, from the layer on.

    Args:
        model: The float model; it is left as it is.
        batches: Some batches of inputs and targets.
        bits: Candidate bit-widths.
        correct: Whether forwards are corrected by what quantization moves in them; the batches are
            then joined.
        memory: As for :class:`limpq_ext.scores.replay.Replay`.
        **options: As for :class:`limpq_ext.scores.subject.Subject`.

    Attributes:
        subject: The network.
        batches: What to measure on.

    Raises:
        ValueError: As of `Subject`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        bits: Sequence[int],
        *,
        correct: bool,
        memory: int,
        **options: Any,
    ) -> None:
        self.subject = Subject(model, batches, bits, **options)
        self.batches: list[tuple[Any, Any]] = self.subject.batches
        self._modules = dict(self.subject.network.named_modules())
        self._corrected: list[str] = []
        if correct:
            device = device_of(model)
            inputs = joined_inputs(self.batches, device)
            found = trace(model, inputs, exclude=options.get("exclude", ()))
            layers = [layer.name for layer in found.layers]
            self._corrected = correctable(self.subject.network, layers, found.norm_sources)
            self.batches = [(inputs, _joined_targets([target for _, target in self.batches]))]
        self._moments: dict[nn.Module, Moments] = {}
        self._replay = Replay(self.subject.network, memory)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make ready for forwards within the block."""
        with self._replay.opened():
            inputs, _ = self.batches[0]
            self._replay.prove(self.subject.layers.values(), inputs)
            yield

    def begin(self, inputs: Any) -> Any:
        """The output of the float network for a batch, which :meth:`run` goes on with."""
        told = FloatMoments({name: self._modules[name] for name in self._corrected})
        with told.listening():
            output = self._replay.first(inputs)
        self._moments = {self._modules[name]: of for name, of in told.once().items()}
        return output

    def order(self) -> list[str]:
        """The layers in the order in which they run; in this order forwards are cheapest."""
        names = {layer: name for name, layer in self.subject.layers.items()}
        return [names[layer] for layer in self._replay.in_order(names)]  # type: ignore[index]

    def run(
        self, variants: Mapping[str, Sequence[Variant]], observer: Observer | None = None
    ) -> list[Any]:
        """The outputs for the last batch with layers quantized in some ways.

        Args:
            variants: For each layer that is quantized the ways, as many for one as for another.
            observer: Is told what these layers put out.

        Returns:
            An output for each way.
        """
        layers = [self.subject.layers[name] for name in variants]
        count = len(next(iter(variants.values())))
        most = self._replay.most_copies(layers, self._moments)
        outputs: list[Any] = []
        for start in range(0, count, most):
            places = range(start, min(start + most, count))
            self._replay.treatments = {
                module: self._treatment(module, len(places)) for module in self._moments
            } | {
                layer: self._treatment(
                    layer, len(places), [ways[place] for place in places], start, observer
                )
                for layer, ways in zip(layers, variants.values(), strict=True)
            }
            output = self._replay.run(self._replay.in_order(layers)[0], len(places))
            outputs += output.chunk(len(places)) if len(places) > 1 else [output]
        return outputs

    def _treatment(
        self,
        module: nn.Module,
        copies: int,
        ways: Sequence[Variant] = (),
        start: int = 0,
        observer: Observer | None = None,
    ) -> Treatment:
        """The forward of a module for all copies: corrected, and of a layer quantized."""

        def treated(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if copies == 1:
                parts: Sequence[tuple[Any, ...]] = [args]
            else:
                parts = [
                    (part, *args[1:]) for part in self._replay.copies_of(module, args[0], copies)
                ]
            outputs = []
            for place, part in enumerate(parts):
                with ways[place]() if ways else nullcontext():
                    outputs.append(self._forward_corrected(module, forward, part, kwargs))
                if observer is not None:
                    observer(start + place, outputs[-1], forward(*part, **kwargs))
            return self._replay.joined(module, outputs)

        return treated

    def _forward_corrected(
        self, module: nn.Module, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        told = self._moments.get(module)
        if told is None:
            return forward(*args, **kwargs)
        if isinstance(module, _BatchNorm):
            # Of a switchable one all rows are those of the float network.
            own = {name: getattr(module, name) for name in ("running_mean", "running_var")}
            moved = corrected_statistics(module, args[0], told, own)
            mean, variance = (
                value.to(old.dtype) for value, old in zip(moved, own.values(), strict=True)
            )
            with in_place_of(module, running_mean=mean, running_var=variance):
                return forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        return output + by_channel(correction_of_bias(module, output, told), module, output)


def losing(measure: Measure, reference: Tensor, target: Any) -> Callable[[Tensor], Tensor]:
    """What is lost beside the float network, summed over samples.

    Args:
        measure: "kl" or "loss".
        reference: The logarithms of the float network's probabilities.
        target: The classes, for the loss.

    Returns:
        Takes the logarithms of a quantized network's probabilities.

    Raises:
        ValueError: The targets are no classes, where the loss is measured.
    """
    if measure == "kl":
        return lambda found: F.kl_div(found, reference, reduction="sum", log_target=True)
    classes = checked_classes(target, reference)
    before = F.nll_loss(reference, classes, reduction="sum")
    return lambda found: F.nll_loss(found, classes, reduction="sum") - before


def _check_finite(reference: Tensor) -> None:
    if not bool(torch.isfinite(reference).all()):
        raise ValueError("the float network puts out a NaN or an infinity")


def _joined_targets(targets: Sequence[Any]) -> Any:
    tensors = all(isinstance(target, Tensor) and target.dim() for target in targets)
    return torch.cat(list(targets)) if tensors else targets[0]
