"""What every training stage shares: optimizers, the course of the learning rate, evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR

from .quantizers import LsqQuantizer

OPTIMIZERS = ("sgd", "adamw")

StepDone = Callable[[int, int], None]
"""Called after every optimizer step with the steps done and the steps in all."""

EpochDone = Callable[[dict[str, float]], None]
"""Called after every epoch with its numbers: "epoch" (from 1), "loss", "lr", ..."""


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a data set.

    Attributes:
        accuracy: Share of samples whose highest score is their class, 0 to 1.
        loss: Mean cross entropy in nats.
        samples: How many samples were evaluated.
    """

    accuracy: float
    loss: float
    samples: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, on_step: StepDone | None = None
) -> Evaluation:
    """Evaluate a classifier; it is put back into the mode it was in.

    Args:
        model: Maps a batch to class scores ``[batch, classes]``.
        loader: Batches of inputs and class indices; moved to the model's device.
        on_step: Called after every batch.

    Raises:
        ValueError: The loader gives no samples.
    """
    device = device_of(model)
    training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    samples = 0
    try:
        for step, (x, target) in enumerate(loader, start=1):
            x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
            scores = model(x)
            correct += (scores.argmax(dim=1) == target).sum()
            loss += F.cross_entropy(scores, target, reduction="sum").double()
            samples += len(target)
            if on_step is not None:
                on_step(step, _length(loader))
    finally:
        model.train(training)
    if samples == 0:
        raise ValueError("cannot evaluate on an empty data set")
    return Evaluation(int(correct) / samples, float(loss) / samples, samples)


def make_optimizer(
    model: nn.Module,
    optimizer: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer that decays weights only: no step sizes, biases or batch normalisation.

    Args:
        model: Whose parameters that need a gradient it takes.
        optimizer: "sgd" or "adamw".
        lr: Learning rate, above 0.
        momentum: Of SGD.
        weight_decay: At least 0.

    Raises:
        ValueError: The name is unknown or a number is out of range.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            spared = isinstance(module, LsqQuantizer | _BatchNorm) or name == "bias"
            (plain if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    raise ValueError(f"optimizer is '{optimizer}', expected one of {', '.join(OPTIMIZERS)}")


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup_steps: int = 0
) -> LambdaLR:
    """The learning rate rises linearly over the warm-up, then falls to 0 along half a cosine.

    Args:
        optimizer: Whose learning rate is the highest value.
        steps: Optimizer steps in all; call ``step()`` after each.
        warmup_steps: How many of them are the warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)


def run_epochs(
    take_step: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    warmup_epochs: float = 0.0,
    device: torch.device,
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
) -> list[dict[str, float]]:
    """Run epochs over a loader, with the learning rate's course.

    Args:
        take_step: Takes one optimizer step on a batch and returns its loss, a detached scalar.
        optimizer: The one that ``take_step`` uses.
        loader: Batches of inputs and targets; it has a length.
        epochs: At least 1.
        warmup_epochs: Epochs of linear warm-up.
        device: Where batches are moved.
        on_step: Called after every step.
        on_epoch: Called after every epoch.

    Returns:
        One record per epoch: epoch, loss (mean over steps), lr (the last).

    Raises:
        ValueError: ``epochs`` is below 1, the loader is empty, or the loss became NaN or infinite.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1")
    steps_per_epoch = _length(loader)
    if steps_per_epoch == 0:
        raise ValueError("cannot train on an empty data set")
    total = epochs * steps_per_epoch
    schedule = cosine_with_warmup(
        optimizer, steps=total, warmup_steps=round(warmup_epochs * steps_per_epoch)
    )
    records = []
    done = 0
    for epoch in range(1, epochs + 1):
        loss_sum = torch.zeros((), device=device)
        for x, target in loader:
            x, target = x.to(device, non_blocking=True), target.to(device, non_blocking=True)
            loss_sum += take_step(x, target)
            schedule.step()
            done += 1
            if on_step is not None:
                on_step(done, total)
        loss = float(loss_sum) / steps_per_epoch
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} in epoch {epoch}: lower the learning rate")
        record = {"epoch": epoch, "loss": loss, "lr": float(schedule.get_last_lr()[0])}
        records.append(record)
        if on_epoch is not None:
            on_epoch(record)
    return records


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _length(loader: Iterable[Any]) -> int:
    if not isinstance(loader, Sized):
        raise ValueError("the loader has no length; pass a DataLoader or a list of batches")
    return len(loader)
