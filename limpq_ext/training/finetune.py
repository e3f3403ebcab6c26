"""Fine-tuning: ordinary training of a model, quantized or float."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def finetune(
    model: nn.Module,
    train_loader: Iterable[tuple[Any, Tensor]],
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float = 0.04,
    momentum: float = 0.9,
    weight_decay: float = 2.5e-5,
    warmup_epochs: float = 0.0,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
    distill_weight: float = 0.5,
    temperature: float = 1.0,
    ema_decay: float = 0.0,
    autocast: torch.dtype | None = None,
    reestimate_batches: int = 0,
    recording: Recording | None = None,
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
) -> list[Record]:
    """Train a classifier with cross entropy, cosine learning rate and warm-up, in place.

    A quantized model trains its weights and its step sizes (LSQ, arXiv 1902.08153). The defaults
    are LIMPQ's for ImageNet, but for epochs. In a run of several processes (torchrun, with
    torch.distributed initialised) their gradients are averaged once per step.

    Args:
        model: Maps a batch to class scores; trained in place, on the device it is on. Its modules
            are put back into the modes they were in. Where the model is in training mode, those
            that are in evaluation mode stay so: a frozen batch normalisation is not updated.
        train_loader: Pairs of inputs (a tensor, a tuple or list of positional ones, or a dict of
            keyword ones) and class indices; it has a length.
        epochs: At least 1.
        optimizer: "sgd" or "adamw".
        lr: Highest learning rate.
        momentum: Of SGD.
        weight_decay: Of the weights of layers, as `make_optimizer` says.
        warmup_epochs: Epochs over which the learning rate rises.
        label_smoothing: 0 to 1.
        teacher: Knowledge distillation: a model of the same classes, usually the float one, on the
            same device; it is evaluated, not trained (Hinton et al., arXiv 1503.02531).
        distill_weight: Share of the teacher in the loss, 0 to 1:
            ``(1 - w) * cross entropy + w * T**2 * KL(teacher / T, model / T)``.
        temperature: T, above 0.
        ema_decay: The model ends with the exponential moving average of its parameters, which
            keeps this share of itself in every step; 0: with the last ones.
        autocast: The dtype of the forward's autocast, torch.bfloat16 or torch.float16 (with a
            gradient scaler); None: the model's own.
        reestimate_batches: At the end the running statistics of batch normalisation are computed
            anew from this many training batches; 0: they are kept.
        recording: Checkpoints to go on from, and records.
        on_step: Called after every optimizer step with steps done and steps in all.
        on_epoch: Called after every epoch with its record.

    Returns:
        One record per epoch: epoch, loss (mean over its steps), lr (the last), and more as in
        `run_epochs`.

    Raises:
        ValueError: A number is out of range, or the data set is empty.
        NonFiniteError: A loss or gradient became NaN or infinite; it names step and layer.
        Interrupted: A signal came; the checkpoint is written.
    """
    for name, value, least, most in (
        ("distill_weight", distill_weight, 0, 1),
        ("ema_decay", ema_decay, 0, 1),
        ("reestimate_batches", reestimate_batches, 0, None),
    ):
        if value < least or (most is not None and value > most):
            raise ValueError(f"{name} is {value}, expected {least} to {most or 'any number'}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    updates = make_optimizer(model, optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay)
    device = device_of(model)
    meter = Meter(device)
    scaler = torch.amp.GradScaler(device.type) if autocast == torch.float16 else None
    average = None
    if ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))

    def computing() -> AbstractContextManager[Any]:
        return nullcontext() if autocast is None else torch.autocast(device.type, autocast)

    def passed(x: Any, target: Any) -> tuple[Tensor, Tensor]:
        with computing():
            scores = call(model, x)
            loss = F.cross_entropy(scores, target, label_smoothing=label_smoothing)
            if teacher is not None:
                with torch.no_grad():
                    taught = call(teacher, x)
                distance = _distance(scores, taught, temperature)
                loss = (1 - distill_weight) * loss + distill_weight * distance
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
            epochs=epochs,
            warmup_epochs=warmup_epochs,
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
        if reestimate_batches:
            batches = batches_of_epoch(train_loader, epochs)
            reestimate_batch_norm(model, itertools.islice(batches, reestimate_batches))
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
