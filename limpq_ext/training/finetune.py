"""Fine-tuning: ordinary training of a model, quantized or float."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from limpq_ext.nn.inputs import call
from limpq_ext.training.batches import batches_of_epoch
from limpq_ext.training.calibration import reestimate_batch_norm
from limpq_ext.training.checkpoint import Stateful
from limpq_ext.training.loop import EpochDone, Recording, StepDone, run_epochs
from limpq_ext.training.metrics import Meter, Record
from limpq_ext.training.model_state import device_of, modes_kept
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.training.update import Update
from limpq_ext.values.options import Options, option


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How a classifier is trained; LIMPQ's numbers for ImageNet, but for epochs.

    Attributes:
        epochs: Passes over the training data.
        optimizer: Which one.
        lr: Highest learning rate; it falls along half a cosine.
        momentum: Of SGD.
        weight_decay: Of the weights of layers, as `make_optimizer` says.
        warmup_epochs: Epochs over which the learning rate rises.
        label_smoothing: Of the cross entropy.

    Raises:
        ValueError: A number is out of range.
    """

    epochs: int = option(ge=1)
    optimizer: Literal["sgd", "adamw"] = option("sgd")
    lr: float = option(0.04, gt=0)
    momentum: float = option(0.9, ge=0, lt=1)
    weight_decay: float = option(2.5e-5, ge=0)
    warmup_epochs: float = option(0.0, ge=0)
    label_smoothing: float = option(0.0, ge=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainingOptions):
    """How a quantized classifier is fine-tuned.

    Attributes:
        distill_weight: Share of the teacher in the loss, where there is one:
            ``(1 - w) * cross entropy + w * T**2 * KL(teacher / T, model / T)``.
        temperature: T.
        ema_decay: The model ends with the exponential moving average of its parameters, which
            keeps this share of itself in every step; 0: with the last ones.
        reestimate_batches: At the end the running statistics of batch normalisation are computed
            anew from this many training batches; 0: they are kept.

    Raises:
        ValueError: A number is out of range.
    """

    distill_weight: float = option(
        0.5, ge=0, le=1, help="share of the float network's scores in the loss"
    )
    temperature: float = option(1.0, gt=0, help="of the scores in distillation")
    ema_decay: float = option(0.0, ge=0, lt=1, help="of the parameters' moving average; 0: off")
    reestimate_batches: int = option(
        0, ge=0, help="batches that batch normalisation's statistics are computed from anew"
    )


def finetune(
    model: nn.Module,
    train_loader: Iterable[tuple[Any, Tensor]],
    options: FinetuneOptions | None = None,
    *,
    teacher: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    recording: Recording | None = None,
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
    **changes: Any,
) -> list[Record]:
    """Train a classifier with cross entropy, cosine learning rate and warm-up, in place.

    A quantized model trains its weights and its step sizes (LSQ, arXiv 1902.08153). In a run of
    several processes (torchrun, with torch.distributed initialised) their gradients are averaged
    once per step.

    Args:
        model: Maps a batch to class scores; trained in place, on the device it is on. Its modules
            are put back into the modes they were in. Where the model is in training mode, those
            that are in evaluation mode stay so: a frozen batch normalisation is not updated.
        train_loader: Pairs of inputs (a tensor, a tuple or list of positional ones, or a dict of
            keyword ones) and class indices; it has a length.
        options: Epochs, learning rate, ... None: those of ``changes``.
        teacher: Knowledge distillation: a model of the same classes, usually the float one, on the
            same device; it is evaluated, not trained (Hinton et al., arXiv 1503.02531).
        autocast: The dtype of the forward's autocast, torch.bfloat16 or torch.float16 (with a
            gradient scaler); None: the model's own.
        recording: Checkpoints to go on from, and records.
        on_step: Called after every optimizer step with steps done and steps in all.
        on_epoch: Called after every epoch with its record.
        **changes: Fields of `FinetuneOptions` by keyword: ``finetune(model, loader, epochs=10)``.

    Returns:
        One record per epoch: epoch, loss (mean over its steps), lr (the last), and more as in
        `run_epochs`.

    Raises:
        TypeError: There is no such option, or ``epochs`` is missing.
        ValueError: A number is out of range, or the data set is empty.
        NonFiniteError: A loss or gradient became NaN or infinite; it names step and layer.
        Interrupted: A signal came; the checkpoint is written.
    """
    given = FinetuneOptions.chosen(options, changes)
    updates = make_optimizer(
        model,
        given.optimizer,
        lr=given.lr,
        momentum=given.momentum,
        weight_decay=given.weight_decay,
    )
    device = device_of(model)
    meter = Meter(device)
    scaler = torch.amp.GradScaler(device.type) if autocast == torch.float16 else None
    average = None
    if given.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(given.ema_decay))

    def computing() -> AbstractContextManager[Any]:
        return nullcontext() if autocast is None else torch.autocast(device.type, autocast)

    def passed(x: Any, target: Any) -> tuple[Tensor, Tensor]:
        with computing():
            scores = call(model, x)
            loss = F.cross_entropy(scores, target, label_smoothing=given.label_smoothing)
            if teacher is not None:
                with torch.no_grad():
                    taught = call(teacher, x)
                distance = _distance(scores, taught, given.temperature)
                loss = (1 - given.distill_weight) * loss + given.distill_weight * distance
        (loss if scaler is None else scaler.scale(loss)).backward()
        return scores.detach(), loss.detach()

    def repeat(step: int, branch: str, x: Any, target: Any) -> None:
        passed(x, target)

    update = Update(model, updates, repeat, scaler=scaler)
    parts: dict[str, Stateful] = {"model": model, "optimizer": updates, "update": update}
    if average is not None:
        parts["average"] = average

    def take_step(x: Any, target: Tensor) -> Tensor:
        updates.zero_grad(set_to_none=True)
        scores, loss = passed(x, target)
        meter.add_branch("", scores, target)
        loss = update.take({"": loss}, x, target)[""]
        if average is not None:
            average.update_parameters(model)
        return loss

    with modes_kept(*filter(None, (model, teacher))):
        if not model.training:
            model.train()
        if teacher is not None:
            teacher.eval()
        records = run_epochs(
            take_step,
            updates,
            train_loader,
            model=model,
            epochs=given.epochs,
            warmup_epochs=given.warmup_epochs,
            parts=parts,
            meter=meter,
            check=update.watch.check,
            recording=recording,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        if average is not None:
            with torch.no_grad():
                for own, mean in zip(model.parameters(), average.module.parameters(), strict=True):
                    own.copy_(mean)
        if given.reestimate_batches:
            batches = batches_of_epoch(train_loader, given.epochs)
            reestimate_batch_norm(model, itertools.islice(batches, given.reestimate_batches))
    return records


def _distance(scores: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """The Kullback-Leibler divergence of softened scores from the teacher's, in nats."""
    if scores.shape != taught.shape:
        raise ValueError(
            f"the teacher's scores have shape {tuple(taught.shape)}, the model's"
            f" {tuple(scores.shape)}"
        )
    ours = (scores / temperature).log_softmax(dim=1)
    theirs = (taught / temperature).log_softmax(dim=1)
    distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * distance
