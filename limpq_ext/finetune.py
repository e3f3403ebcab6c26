"""Fine-tuning: ordinary training of a model, quantized or float."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .metrics import Meter, Record
from .training import EpochDone, Recording, StepDone, device_of, make_optimizer, run_epochs
from .updates import Update


def finetune(
    model: nn.Module,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float = 0.04,
    momentum: float = 0.9,
    weight_decay: float = 2.5e-5,
    warmup_epochs: float = 0.0,
    label_smoothing: float = 0.0,
    recording: Recording | None = None,
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
) -> list[Record]:
    """Train a classifier with cross entropy, cosine learning rate and warm-up, in place.

    A quantized model trains its weights and its step sizes (LSQ, arXiv 1902.08153). The defaults
    are LIMPQ's for ImageNet, but for epochs. In a run of several processes (torchrun, with
    torch.distributed initialised) their gradients are averaged once per step.

    Args:
        model: Maps a batch to class scores; trained in place, on the device it is on.
        train_loader: Batches of inputs and class indices; it has a length.
        epochs: At least 1.
        optimizer: "sgd" or "adamw".
        lr: Highest learning rate.
        momentum: Of SGD.
        weight_decay: Of weights; step sizes, biases and batch normalisation have none.
        warmup_epochs: Epochs over which the learning rate rises.
        label_smoothing: 0 to 1.
        recording: Checkpoints to go on from, and records.
        on_step: Called after every optimizer step with steps done and steps in all.
        on_epoch: Called after every epoch with its record.

    Returns:
        One record per epoch: epoch, loss (mean over its steps), lr (the last), and more as in
        :func:`limpq_ext.training.run_epochs`.

    Raises:
        ValueError: A number is out of range, or the data set is empty.
        NonFiniteError: A loss or gradient became NaN or infinite; it names step and layer.
        Interrupted: A signal came; the checkpoint is written.
    """
    updates = make_optimizer(model, optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay)
    meter = Meter(device_of(model))

    def passed(x: Any, target: Any) -> tuple[Tensor, Tensor]:
        scores = model(x)
        loss = F.cross_entropy(scores, target, label_smoothing=label_smoothing)
        loss.backward()
        return scores.detach(), loss.detach()

    def repeat(step: int, branch: str, x: Any, target: Any) -> None:
        passed(x, target)

    update = Update(model, updates, repeat)

    def take_step(x: Tensor, target: Tensor) -> Tensor:
        updates.zero_grad(set_to_none=True)
        scores, loss = passed(x, target)
        meter.add_branch("", scores, target)
        return update.take({"": loss}, x, target)[""]

    training = model.training
    model.train()
    try:
        return run_epochs(
            take_step,
            updates,
            train_loader,
            model=model,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            parts={"model": model, "optimizer": updates, "update": update},
            meter=meter,
            check=update.watch.check,
            recording=recording,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    finally:
        model.train(training)
