"""What a training writes down of its steps and epochs: loss, accuracy, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.course import Course
from limpq_ext.training.metrics import Journal, Record, guarded_scales, memory
from limpq_ext.training.model_state import device_of


class Records:
    """Makes the records of a training and writes them to its journal.

    Args:
        course: How far the training is, and its sums.
        schedule: The learning rate's.
        model: What is trained.
        journal: Where the records go.
        observe: More numbers for every record.
    """

    def __init__(
        self,
        course: Course,
        schedule: LRScheduler,
        model: nn.Module,
        journal: Journal,
        observe: Callable[[], Record] | None,
    ) -> None:
        self._course = course
        self._schedule = schedule
        self._model = model
        self._device = device_of(model)
        self._journal = journal
        self._observe = observe

    def of_steps(self, sums: Mapping[str, float]) -> Record:
        """The record of the steps that came to these sums.

        Raises:
            ValueError: The loss became NaN or infinite.
        """
        return self._finish({"step": self._course.step}, sums)

    def of_epoch(self) -> Record:
        """The record of the epoch that ends.

        Raises:
            ValueError: The loss became NaN or infinite.
        """
        epoch = self._course.epochs + 1
        record = {"epoch": epoch, "step": self._course.step, **self._guarded(epoch)}
        return self._finish(record, self._course.epoch_sums)

    def _finish(self, record: Record, sums: Mapping[str, float]) -> Record:
        rate = float(self._schedule.get_last_lr()[0])
        record |= {**_means(sums), "lr": rate, **memory(self._device)}
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss became {record['loss']} by step {self._course.step}")
        if self._observe is not None:
            record |= self._observe()
        self._journal.write(record)
        return record

    def _guarded(self, epoch: int) -> Record:
        """How many step sizes are at their lower bound; the journal names some of them."""
        if not any(isinstance(module, LsqQuantizer) for module in self._model.modules()):
            return {}
        names = guarded_scales(self._model)
        if names:
            shown = "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
            self._journal.report(
                f"epoch {epoch}: {len(names)} step sizes are at their lower bound: {shown}"
            )
        return {"guarded_scales": len(names)}


def _means(sums: Mapping[str, float]) -> Record:
    """Loss, accuracy and speed from the sums of some steps."""
    means: Record = {"loss": sums["loss"] / sums["steps"]}
    branches: dict[str, Record] = {}
    for name, value in sums.items():
        kind, _, branch = name.partition(" ")
        if kind == "correct":
            accuracy = value / sums[f"samples {branch}"]
            (branches.setdefault(branch, {}) if branch else means)["accuracy"] = accuracy
        elif kind == "loss" and branch:
            branches.setdefault(branch, {})["loss"] = value / sums["steps"]
    if branches:
        means["branches"] = branches
    return {**means, "images_per_second": sums["images"] / max(sums["seconds"], 1e-9)}
