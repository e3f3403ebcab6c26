"""How well a network does, and where a quantized one decides otherwise than the float one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpq_ext.nn.inputs import call, moved
from limpq_ext.training.batches import Batches, length_of
from limpq_ext.training.distributed import add_up, gather
from limpq_ext.training.loop import StepDone
from limpq_ext.training.model_state import device_of, modes_kept

TOP = 5
"""Of how many best scores one has to be the class for `Evaluation.top5`."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a data set.

    Attributes:
        accuracy: Share of samples whose highest score is their class (top-1), 0 to 1.
        top5: Share of samples whose class is among the five highest scores; None where there are
            no more than five classes.
        loss: Mean cross entropy in nats.
        samples: How many samples were evaluated.
        class_accuracy: For each class the share of its samples with the highest score for it; None
            where it has no samples.
    """

    accuracy: float
    top5: float | None
    loss: float
    samples: int
    class_accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class Confusion:
    """Where a model decides otherwise than a reference on a data set.

    Attributes:
        agreement: Share of samples for which both have the same class first, 0 to 1.
        gained: Share of samples that the model has right and the reference wrong.
        lost: Share of samples that the model has wrong and the reference right.
        samples: How many samples were compared.
        counts: ``counts[i][j]``: samples for which the reference says class i, the model class j.
    """

    agreement: float
    gained: float
    lost: float
    samples: int
    counts: tuple[tuple[int, ...], ...]


@torch.no_grad()
def evaluate(model: nn.Module, loader: Batches, *, on_step: StepDone | None = None) -> Evaluation:
    """Evaluate a classifier; every module of it is put back into the mode it was in.

    In a run of several processes each evaluates the batches of its own loader, and all get the
    result over all of them; :func:`limpq_ext.data.loading.make_loader` gives each its share.

    Args:
        model: Maps a batch to class scores ``[batch, classes]``.
        loader: Pairs of inputs (a tensor, a tuple or list of positional ones, or a dict of keyword
            ones) and class indices; moved to the model's device.
        on_step: Called after every batch.

    Raises:
        ValueError: The loader gives no samples.
    """
    counts = None
    for (scores,), target in _scores([model], loader, on_step):
        counts = _plus(counts, _counts(scores, target))
    return _evaluation(counts, device_of(model))


@torch.no_grad()
def confuse(
    model: nn.Module, reference: nn.Module, loader: Batches, *, on_step: StepDone | None = None
) -> Confusion:
    """Compare what a model decides with what a reference does; both keep their modes.

    Args:
        model: Maps a batch to class scores ``[batch, classes]``, for example the quantized one.
        reference: The same, for example the float one.
        loader: As for :func:`evaluate`.
        on_step: Called after every batch.

    Raises:
        ValueError: The loader gives no samples, or the models have other classes.
    """
    counts = None
    for (ours, theirs), target in _scores([model, reference], loader, on_step):
        counts = _plus(counts, _counts_beside(ours, theirs, target))
    return _confusion(counts, device_of(model))


@torch.no_grad()
def evaluate_beside(
    model: nn.Module, reference: nn.Module, loader: Batches, *, on_step: StepDone | None = None
) -> tuple[Evaluation, Confusion]:
    """What :func:`evaluate` and :func:`confuse` say, from one pass over the loader.

    Raises:
        ValueError: As they do.
    """
    counts = beside = None
    for (ours, theirs), target in _scores([model, reference], loader, on_step):
        counts = _plus(counts, _counts(ours, target))
        beside = _plus(beside, _counts_beside(ours, theirs, target))
    device = device_of(model)
    return _evaluation(counts, device), _confusion(beside, device)


def _counts(scores: Tensor, target: Tensor) -> Tensor:
    """The right, those among the best, the sum of losses; then the right and all by class."""
    classes = scores.shape[1]
    right = scores.argmax(dim=1) == target
    best = scores.topk(min(TOP, classes), dim=1).indices == target[:, None]
    loss = F.cross_entropy(scores.float(), target, reduction="sum")
    return torch.cat(
        [
            torch.stack([right.sum(), best.any(dim=1).sum(), loss]),
            target[right].bincount(minlength=classes),
            target.bincount(minlength=classes),
        ]
    ).double()  # counts are exact in float64 up to 2**53


def _evaluation(counts: Tensor | None, device: torch.device) -> Evaluation:
    (correct, among_best, loss_sum), per_class = _added(counts, device, apart=3)
    rights, samples = per_class.reshape(2, -1).tolist()
    count = sum(samples)
    return Evaluation(
        accuracy=correct / count,
        top5=among_best / count if len(samples) > TOP else None,
        loss=loss_sum / count,
        samples=int(count),
        class_accuracy=tuple(
            right / of_class if of_class else None
            for right, of_class in zip(rights, samples, strict=True)
        ),
    )


def _counts_beside(ours: Tensor, theirs: Tensor, target: Tensor) -> Tensor:
    """The gained and the lost; then all by the classes that they and we say."""
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the models give scores of shape {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
    classes = ours.shape[1]
    ours, theirs = ours.argmax(dim=1), theirs.argmax(dim=1)
    gained = ((ours == target) & (theirs != target)).sum()
    lost = ((ours != target) & (theirs == target)).sum()
    pairs = (theirs * classes + ours).bincount(minlength=classes**2)
    return torch.cat([torch.stack([gained, lost]), pairs]).double()


def _confusion(counts: Tensor | None, device: torch.device) -> Confusion:
    (gains, losses), flat = _added(counts, device, apart=2)
    matrix = flat.reshape(math.isqrt(len(flat)), -1)
    samples = int(matrix.sum())
    return Confusion(
        agreement=float(matrix.diagonal().sum()) / samples,
        gained=gains / samples,
        lost=losses / samples,
        samples=samples,
        counts=tuple(tuple(map(int, row)) for row in matrix.tolist()),
    )


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _scores(
    models: list[nn.Module], loader: Batches, on_step: StepDone | None
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What the models say to every batch, in evaluation mode, and its targets."""
    device = device_of(models[0])
    with modes_kept(*models):
        for model in models:
            model.eval()
        for step, batch in enumerate(loader, start=1):
            x, target = moved(batch, device)
            yield [call(model, x) for model in models], target
            if on_step is not None:
                on_step(step, length_of(loader))


def _added(
    totals: Tensor | None, device: torch.device, *, apart: int
) -> tuple[list[float], Tensor]:
    """The sums of all processes, of which some may have had no batch: the first ones, the rest."""
    length = max(gather(0 if totals is None else len(totals)))
    if length == 0:
        raise ValueError("cannot evaluate on an empty data set")
    if totals is None:
        totals = torch.zeros(length, dtype=torch.float64, device=device)
    totals = add_up(totals).cpu()
    return totals[:apart].tolist(), totals[apart:]
