"""Scores from traces: how curved the loss is in a tensor, times how far quantization moves it.

HAWQ-V2's takes the trace of the Hessian and the measured error; the one after LampQ the trace of
the Fisher information, what a few layers of the same type lose, and how errors fall with bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from limpq_ext.nn.inputs import call
from limpq_ext.nn.layers import quantizable_base
from limpq_ext.scores.calls import Calls, loss_of
from limpq_ext.scores.moved_output import OutputCorrection
from limpq_ext.scores.squared_errors import SquaredErrors
from limpq_ext.scores.subject import KINDS, Subject, checked_classes, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind
from limpq_ext.values.reading import first_line

Tensors = dict[tuple[str, Kind], list[Tensor]]
"""The weights, and the inputs call by call, of layers."""

Traces = dict[tuple[str, Kind], Tensor]
"""The traces of those, float64."""


def hessian(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    probes: int = 8,
    seed: int = 0,
    **options: Any,
) -> Indicators:
    """The mean trace of the Hessian times the squared error, as HAWQ-V2's (arXiv 1911.03852).

    A tensor x at b bits costs ``trace(H) / n * ||Q_b(x) - x||^2`` (equations 1 and 9), H the
    Hessian of the loss in its n elements, once for the weights and once for the input of a layer.
    That of the weights is the Hessian of the mean loss; that of an input is one sample's, and trace
    and error are means over samples. Traces are estimated by Hutchinson's method with random signs,
    for all tensors at once. A trace that comes out negative counts as 0: to second order the tensor
    does not matter. Ours is that the signs of a tensor are divided by the norm of its gradient and
    its trace multiplied again, without which small traces are lost in the noise of large ones.

    The score needs class indices and a network that can be differentiated twice. It takes a forward
    and ``1 + probes`` backwards of each batch, all but the first of them through the graph of the
    gradient, which is kept in memory, and a forward to begin the step sizes. There is no
    correction: a trace knows no directions, and what is corrected is some of them.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        probes: Random vectors that the traces are averaged over, for each batch.
        seed: Of those.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in nats.

    Raises:
        ValueError: There are no probes or no batches, the targets are no classes, the output is no
            table of scores, the network cannot be differentiated twice, a score is not finite, or
            the model cannot be prepared.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}, expected 1 or more")
    subject = Subject(model, batches, bits, **options)
    generator = torch.Generator().manual_seed(seed)
    traces = _no_traces()
    elements: defaultdict[str, int] = defaultdict(int)
    errors = SquaredErrors(subject, bits)
    for x, target in subject.batches:
        # Of attention only the plain form has a second derivative.
        with Calls(subject) as calls, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(subject, x, target)
            tensors = _tensors(subject, calls)
            try:
                _add_hessian_traces(traces, loss, tensors, probes, generator)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise ValueError(
                    f"{type(model).__name__} cannot be differentiated twice: {first_line(error)}"
                ) from error
        for name in subject.layers:
            elements[name] += sum(value.numel() for value in tensors[name, "activation"])
            errors.add_inputs(name, calls.of[name])
    samples = sum(len(target) for _, target in subject.batches)

    def score(name: str, kind: Kind, width: int) -> float:
        trace, error = traces[name, kind].clamp(min=0), errors.of[name, kind, width]
        if kind == "activation":
            return float(trace / elements[name] * error / samples)
        return float(trace / samples / subject.layers[name].weight.numel() * error)

    return subject.scores("hessian", bits, score)


def lampq(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    gamma: float = 4.0,
    sampled: int = 3,
    type_of: Callable[[str, nn.Module], str] | None = None,
    correct: bool = True,
    **options: Any,
) -> Indicators:
    """The trace of the Fisher information times a factor for the type of layer, after LampQ.

    A tensor at b bits costs ``alpha * trace(F) * gamma^(c - b)``, F the empirical Fisher
    information, whose trace is the mean over samples of the squared norm of the gradient, and alpha
    a factor for the type of the layer that makes traces of unlike layers comparable: over a few
    layers of the type, the mean of what is lost with that layer's tensor alone quantized, over the
    mean of their traces (arXiv 2511.10004).

    Ours, not the paper's: weights and inputs have factors of their own; what is lost is the
    divergence KL(float || quantized) of the outputs and no accuracy, which a few batches give in
    coarse steps and which may rise; it is lost at the lowest candidate, c bits, so that scores are
    in nats; the layers of a type are taken at equal distances from its first to its last; and the
    types, so that convolutional networks have some too.

    The score needs class indices. It takes a forward and a backward of every sample by itself, one
    forward of each batch, ``2 * sampled`` more for each type, and one to begin the step sizes.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        gamma: By how much one more bit divides a cost: 4 is that of a squared error.
        sampled: The layers of each type that are measured; all where it has no more.
        type_of: The type of a layer by its name and the layer; None: :func:`layer_type`.
        correct: Measure what is lost as :func:`limpq_ext.calibrate` with a reference corrects the
            layer's output, as for :func:`limpq_ext.scores.fisher`, by the statistics of each batch.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in nats; the factors are in
        ``meta``, by type and kind.

    Raises:
        ValueError: ``gamma`` is not above 1, no layers are sampled, there are no batches, the
            targets are no classes, the output is no table of scores, a score is not finite, or the
            model cannot be prepared.
    """
    if not gamma > 1:
        raise ValueError(f"gamma is {gamma}, expected more than 1")
    if sampled < 1:
        raise ValueError(f"sampled is {sampled}, expected 1 or more layers of each type")
    subject = Subject(model, batches, bits, **options)
    types: defaultdict[str, list[str]] = defaultdict(list)
    for name, layer in subject.layers.items():
        types[(type_of or layer_type)(name, layer)].append(name)
    lost = _Lost(subject, correct=correct)
    traces = _fisher_traces(subject)
    lowest = min(bits)
    factors = {
        kind_of_layer: {
            kind: _ratio(
                [lost.at(name, kind, lowest) for name in chosen],
                [traces[name, kind] for name in chosen],
            )
            for kind in KINDS
        }
        for kind_of_layer, names in types.items()
        for chosen in [_spread(names, sampled)]
    }
    of_type = {name: kind_of_layer for kind_of_layer, names in types.items() for name in names}

    def score(name: str, kind: Kind, width: int) -> float:
        factor = factors[of_type[name]][kind]
        return factor * float(traces[name, kind]) * gamma ** (lowest - width)

    found = subject.scores("lampq", bits, score)
    return replace(found, meta={**found.meta, "correct": correct, "factors": factors})


def layer_type(name: str, layer: nn.Module) -> str:
    """The type of a layer, by its shape and its place in a block.

    Convolutions are depthwise, pointwise or of their class. A linear layer has the name that its
    block gives it, such as ``qkv``, ``proj``, ``fc1`` or ``mlp.0``.

    Args:
        name: As in ``named_modules()``.
        layer: Convolution or linear layer.
    """
    if isinstance(layer, nn.Linear):
        *blocks, own = name.split(".")
        return ".".join([*blocks[-1:], own]) if own.isdigit() else own
    convolution: Any = layer
    if 1 < convolution.groups == convolution.in_channels:
        return "depthwise"
    if set(convolution.kernel_size) == {1}:
        return "pointwise"
    base = quantizable_base(layer)
    assert base is not None
    return base.__name__


def _no_traces() -> Traces:
    return defaultdict(lambda: torch.zeros((), dtype=torch.float64))


def _tensors(subject: Subject, calls: Calls) -> Tensors:
    found: Tensors = {}
    for name, layer in subject.layers.items():
        found[name, "weight"] = [layer.weight]
        found[name, "activation"] = [one.input for one in calls.of[name]]
    return found


def _add_hessian_traces(
    traces: Traces, loss: Tensor, tensors: Tensors, probes: int, generator: torch.Generator
) -> None:
    keys = [key for key, values in tensors.items() for _ in values]
    flat = [value for values in tensors.values() for value in values]
    gradients = torch.autograd.grad(loss, flat, create_graph=True, materialize_grads=True)
    # What other tensors' signs add to a trace has a mean of 0. Against the trace itself it is least
    # where signs are scaled by 1 / sqrt(trace), for which the norms of the gradients stand.
    norms = torch.stack([g.detach().double().norm() for g in gradients])
    scales = 1 / norms.clamp(min=1e-6 * float(norms.max()) + 1e-30)
    for _ in range(probes):
        signs = [torch.randint(2, v.shape, generator=generator).to(v) * 2 - 1 for v in flat]
        inner = torch.stack(
            [(g * s).sum() * c for g, s, c in zip(gradients, signs, scales, strict=True)]
        ).sum()
        products = torch.autograd.grad(inner, flat, retain_graph=True, materialize_grads=True)
        for key, product, sign, scale in zip(keys, products, signs, scales, strict=True):
            own = (product * sign).sum(dtype=torch.float64) / scale
            traces[key] = traces[key] + own / probes


def _fisher_traces(subject: Subject) -> Traces:
    """The mean over samples of the squared norms of the gradients."""
    traces = _no_traces()
    samples = 0
    for x, target in subject.batches:
        for place in range(len(target)):
            with Calls(subject) as calls, torch.enable_grad():
                loss = loss_of(subject, _sample(x, place), _sample(target, place))
            tensors = _tensors(subject, calls)
            flat = [value for values in tensors.values() for value in values]
            gradients = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
            for key, values in tensors.items():
                for _ in values:
                    norm = next(gradients).square().sum(dtype=torch.float64)
                    traces[key] = traces[key] + norm
        samples += len(target)
    return {key: trace / samples for key, trace in traces.items()}


def _sample(x: Any, place: int) -> Any:
    """One sample of a batch, as a batch."""
    x = dict(x) if isinstance(x, Mapping) else x
    return tree_map_only(Tensor, lambda value: value[place : place + 1], x)


def _ratio(above: Sequence[float], below: Sequence[Tensor]) -> float:
    """The ratio of the means of as many numbers; 0 where those below are."""
    total = float(torch.stack(list(below)).sum())
    return sum(above) / total if total else 0.0


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of these, at equal distances from the first to the last."""
    if len(names) <= count:
        return list(names)
    last = len(names) - 1
    return [names[round(place * last / max(1, count - 1))] for place in range(count)]


class _Lost:
    """What is lost with one tensor quantized: the divergence of the outputs from those in float.

    Args:
        subject: The network.
        correct: Correct the output of the layer that is quantized.
    """

    def __init__(self, subject: Subject, *, correct: bool) -> None:
        self._subject = subject
        self._references: list[Tensor] = []
        self._corrections: list[OutputCorrection] = []
        for x, target in subject.batches:
            with Calls(subject) as calls, torch.no_grad():
                scores = log_probabilities(call(subject.network, x))
            checked_classes(target, scores)
            self._references.append(scores)
            if correct:
                self._corrections.append(OutputCorrection(subject, calls))

    @torch.no_grad()
    def at(self, name: str, kind: Kind, width: int) -> float:
        """In nats, the mean over samples."""
        total = 0.0
        for place, ((x, _), reference) in enumerate(
            zip(self._subject.batches, self._references, strict=True)
        ):
            with ExitStack() as stack:
                if self._corrections:
                    stack.enter_context(self._corrections[place].of(name))
                stack.enter_context(self._subject.quantized(name, kind, width))
                scores = log_probabilities(call(self._subject.network, x))
            divergence = F.kl_div(scores, reference, reduction="sum", log_target=True)
            total += float(divergence.clamp(min=0))  # below 0 by rounding only
        return total / sum(len(reference) for reference in self._references)
