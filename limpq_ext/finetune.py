"""Fine-tuning: ordinary training of a model, quantized or float."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .training import EpochDone, StepDone, device_of, make_optimizer, run_epochs


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
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
) -> list[dict[str, float]]:
    """Train a classifier with cross entropy, cosine learning rate and warm-up, in place.

    A quantized model trains its weights and its step sizes (LSQ, arXiv 1902.08153). The defaults
    are LIMPQ's for ImageNet, but for epochs.

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
        on_step: Called after every optimizer step with steps done and steps in all.
        on_epoch: Called after every epoch with its record.

    Returns:
        One record per epoch: epoch, loss (mean over its steps), lr (the last).

    Raises:
        ValueError: A number is out of range, the data set is empty, or the loss became NaN.
    """
    device = device_of(model)
    updates = make_optimizer(model, optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def take_step(x: Tensor, target: Tensor) -> Tensor:
        updates.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target, label_smoothing=label_smoothing)
        loss.backward()
        updates.step()
        return loss.detach()

    training = model.training
    model.train()
    try:
        return run_epochs(
            take_step,
            updates,
            train_loader,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            device=torch.device(device),
            on_step=on_step,
            on_epoch=on_epoch,
        )
    finally:
        model.train(training)
