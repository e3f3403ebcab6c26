"""Scores from gradients of the float network: what an error of quantization adds to the loss.

With the gradient g of a sample's loss and the error e of a tensor, the loss moves by <g, e>, and
for a trained network its second order is half the mean of <g, e>^2 over samples: e' F e / 2 with
the empirical Fisher information F in the place of the Hessian (see Kunstner et al., arXiv
1905.12558, for when the two are alike). Nothing is left out of F within a tensor; between tensors
all is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from limpq_ext.nn.inputs import call
from limpq_ext.scores.subject import KINDS, Subject, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind


def fisher(
    model: nn.Module, batches: Batches, bits: Sequence[int] = (2, 3, 4, 5, 6), **options: Any
) -> Indicators:
    """Half the mean over samples of the squared first-order change of the loss.

    A layer is linear in its input and in its weights. So <g, e> of either is <g_y, y_q - y> with
    the gradient g_y at its output y, which holds for every sample by itself. It takes one forward
    and backward of each batch, and as much again as ``2 * len(bits)`` forwards of the layers.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and class indices, on any device.
        bits: Candidate bit-widths.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the score of its weights and of its input, in nats.

    Raises:
        ValueError: There are no batches, the targets are no classes, the output is no table of
            scores, a layer's output does not begin with the samples, or the model cannot be
            prepared.
    """
    subject = Subject(model, batches, bits, **options)
    sums: dict[tuple[str, Kind, int], float] = {}
    samples = 0
    for x, target in subject.batches:
        with _Calls(subject) as calls, torch.enable_grad():
            scores = log_probabilities(call(subject.network, x))
            _check_classes(target, scores)
            loss = F.nll_loss(scores, target, reduction="sum")
        gradients = calls.gradients(loss)
        samples += len(target)
        for name, layer in subject.layers.items():
            for kind in KINDS:
                for width in bits:
                    with subject.quantized(name, kind, width), torch.no_grad():
                        moved_by = torch.zeros(len(target), dtype=torch.float64, device=loss.device)
                        for (inputs, output), gradient in zip(
                            calls.of[name], gradients[name], strict=True
                        ):
                            if gradient is not None:
                                error = layer(*inputs) - output.detach()
                                moved_by += _by_sample(name, gradient * error, len(target))
                    key = name, kind, width
                    sums[key] = sums.get(key, 0.0) + float(moved_by.square().sum())
    return subject.scores("fisher", bits, lambda *key: sums[key] / (2 * samples))


class _Calls:
    """The inputs and outputs of the layers in one forward."""

    def __init__(self, subject: Subject) -> None:
        self.of: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {
            name: [] for name in subject.layers
        }
        self._layers = subject.layers
        self._handles: list[Any] = []

    def __enter__(self) -> _Calls:
        for name, layer in self._layers.items():

            def note(
                module: nn.Module, inputs: tuple[Any, ...], output: Tensor, name: str = name
            ) -> Tensor:
                # What comes after may change these in place.
                kept = tree_map_only(Tensor, lambda value: value.detach().clone(), inputs)
                self.of[name].append((kept, output))
                return output.clone()

            self._handles.append(layer.register_forward_hook(note))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def gradients(self, loss: Tensor) -> dict[str, list[Tensor | None]]:
        """The gradient of a loss at every output; None where it does not depend on it."""
        outputs = [output for calls in self.of.values() for _, output in calls]
        found = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
        return {name: [next(found) for _ in calls] for name, calls in self.of.items()}


def _by_sample(name: str, values: Tensor, samples: int) -> Tensor:
    """The sum of each sample's values, where they come first, perhaps in several parts each."""
    if values.dim() == 0 or values.shape[0] % samples:
        raise ValueError(
            f"layer '{name}' puts out {tuple(values.shape)}, which does not begin with the"
            f" {samples} samples: exclude it"
        )
    return values.double().reshape(samples, -1).sum(dim=1)


def _check_classes(target: Any, scores: Tensor) -> None:
    whole = isinstance(target, Tensor) and not target.is_floating_point()
    if not whole or target.shape != scores.shape[:1]:
        what = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"the targets are {what}, expected a class index for each sample")
    if bool(((target < 0) | (target >= scores.shape[1])).any()):
        raise ValueError(f"a target is not one of the {scores.shape[1]} classes")
