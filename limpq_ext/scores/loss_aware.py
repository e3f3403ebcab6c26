"""The score that the kernel of error sums makes cheap: gradients near float, errors of all bits.

What a joint step measures beside its training (`limpq_ext.joint.sensitivity`), on a network that is
not trained: one forward and backward give the gradient g of every tensor that would be quantized,
and `limpq_ext.quantization_error_sums` the products of g with the errors at all bit-widths in one
pass over both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.joint.sensitivity import weight_sums
from limpq_ext.nn.inputs import call
from limpq_ext.nn.layers import QuantizedLayer, channel_axis
from limpq_ext.scores.calls import Call, Calls, loss_of
from limpq_ext.scores.moved_output import corrections
from limpq_ext.scores.subject import Subject
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators


def loss_aware(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    correct: bool = True,
    **options: Any,
) -> Indicators:
    """What errors at each bit-width add to the loss, from one forward and backward (ours).

    It is the indicator that :meth:`limpq_ext.JointTrainer.sensitivities` reports beside LIMPQ's
    (arXiv 2203.08368), measured in the float network: half the sum over channels of
    ``<G, e_b>**2 / N``, with the gradient G of a batch's summed loss at a layer's weights or input,
    the error ``e_b`` there at b bits, and the N samples of the batch. Weights have the output's
    channels, inputs their own. What the samples of a batch have in common counts N times as much
    as what they do not, so batches should be of one size; about 32 samples do.

    The score needs class indices. It takes one forward and backward of each batch, a forward of one
    and one to begin the step sizes, and reads every tensor and its gradient once.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        correct: Take gradients through the correction of batch normalisation and biases that
            :func:`limpq_ext.calibrate` with a reference makes on a batch: what moves a channel's
            mean, or where batch normalisation follows its scale, adds nothing.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in nats.

    Raises:
        ValueError: There are no batches, the targets are no classes, the output is no table of
            scores, a score is not finite, or the model cannot be prepared.
    """
    subject = Subject(model, batches, bits, **options)
    weights = [layer.weight for layer in subject.layers.values()]
    totals = {
        name: layer.weight.new_zeros(2, len(bits), dtype=torch.float64)
        for name, layer in subject.layers.items()
    }
    with _corrected_gradients(subject) if correct else ExitStack():
        for x, target in subject.batches:
            with Calls(subject) as calls, torch.enable_grad():
                loss = loss_of(subject, x, target)
            inputs = [one.input for own in calls.of.values() for one in own]
            slopes = iter(torch.autograd.grad(loss, [*weights, *inputs], allow_unused=True))
            of_weights = {name: next(slopes) for name in subject.layers}
            for name, layer in subject.layers.items():
                of_input = _of_input(layer, [(one, next(slopes)) for one in calls.of[name]])
                totals[name] += torch.stack([_of_weight(layer, of_weights[name]), of_input])
    samples = sum(len(target) for _, target in subject.batches)
    found = {name: (total / (2 * samples)).tolist() for name, total in totals.items()}
    ascending = sorted(bits)  # as in the quantizers
    scores = subject.scores(
        "loss_aware",
        bits,
        lambda name, kind, width: found[name][kind == "activation"][ascending.index(width)],
    )
    return replace(scores, meta={**scores.meta, "correct": correct})


@torch.no_grad()
def _of_weight(layer: QuantizedLayer, grad: Tensor | None) -> Tensor:
    if grad is None:
        return layer.weight.new_zeros(len(layer.weight_quantizer.bits), dtype=torch.float64)
    return weight_sums(layer, grad).square().sum(dim=1)


@torch.no_grad()
def _of_input(layer: QuantizedLayer, calls: Sequence[tuple[Call, Tensor | None]]) -> Tensor:
    """The squares of the channels' sums, added, for each bit-width."""
    quantizer = layer.input_quantizer
    total: Tensor = layer.weight.new_zeros(len(quantizer.bits), 1, dtype=torch.float64)
    for one, grad in calls:
        if grad is not None:
            x = one.input.detach()
            axis = channel_axis(layer, x)
            total = total + quantizer.error_sums(x, grad, sum_axis=axis).sums
    return total.square().sum(dim=1)


@contextmanager
def _corrected_gradients(subject: Subject) -> Iterator[None]:
    """Take from gradients what a correction on the same batch takes from errors."""
    x, _ = subject.batches[0]
    with Calls(subject) as calls, torch.no_grad():
        call(subject.network, x)
    kinds = corrections(subject, calls)
    with ExitStack() as stack:
        for module in subject.network.modules():
            if (
                isinstance(module, _BatchNorm)
                and module.running_mean is not None
                and calls.norms[module] == 1
            ):
                stack.callback(module.register_forward_pre_hook(_through_norm).remove)
        for name, layer in subject.layers.items():
            if kinds[name] == "mean":
                hook = _through_bias(channel_axis(layer, calls.of[name][0].output))
                stack.callback(layer.register_forward_hook(hook).remove)
        yield


def _through_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The input, whose gradient loses its mean and what lies along the normalised input."""
    x = inputs[0].clone()
    if not x.requires_grad:
        return inputs
    axes = _but(1, x)
    values = x.detach()
    variance, mean = torch.var_mean(values, dim=axes, keepdim=True, correction=0)
    scale = torch.where(variance > 0, variance, 1.0).rsqrt()

    def corrected(grad: Tensor) -> Tensor:
        along = (values - mean) * scale
        return (
            grad
            - grad.mean(dim=axes, keepdim=True)
            - along * (grad * along).mean(dim=axes, keepdim=True)
        )

    x.register_hook(corrected)
    return (x,)


def _through_bias(axis: int) -> Callable[..., Tensor]:
    """The output, whose gradient loses the mean of each channel."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if output.requires_grad:
            axes = _but(axis, output)
            output.register_hook(lambda grad: grad - grad.mean(dim=axes, keepdim=True))
        return output

    return hook


def _but(axis: int, x: Tensor) -> list[int]:
    return [place for place in range(x.dim()) if place != axis]
