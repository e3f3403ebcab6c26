"""What every training stage shares: epochs over a loader, records, checkpoints."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limpq_ext.nn.inputs import moved, samples_in
from limpq_ext.training.batches import batches_of_epoch, length_of
from limpq_ext.training.checkpoint import Checkpoint, Stateful
from limpq_ext.training.course import Course
from limpq_ext.training.distributed import agree, broadcast_state, is_main
from limpq_ext.training.metrics import Journal, Meter, Record
from limpq_ext.training.model_state import device_of
from limpq_ext.training.nonfinite import NonFiniteError
from limpq_ext.training.optimizers import cosine_with_warmup
from limpq_ext.training.records import Records
from limpq_ext.training.signals import Interrupted, StopSignals

StepDone = Callable[[int, int], None]
"""Called after every optimizer step with the steps done and the steps in all."""

EpochDone = Callable[[Record], None]
"""Called after every epoch with its numbers: "epoch" (from 1), "loss", "lr", ..."""


@dataclass(frozen=True)
class Recording:
    """What a training keeps beside its result.

    Attributes:
        checkpoint: Where its state is kept; it goes on from there if there is one.
        journal: Where its records go.
        log_steps: A record after this many steps; 0: after every epoch alone.
    """

    checkpoint: Checkpoint | None = None
    journal: Journal | None = None
    log_steps: int = 0


def run_epochs(
    take_step: Callable[[Any, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    loader: Iterable[tuple[Any, Any]],
    *,
    model: nn.Module,
    epochs: int,
    warmup_epochs: float = 0.0,
    parts: Mapping[str, Stateful],
    meter: Meter | None = None,
    check: Callable[[], None] | None = None,
    observe: Callable[[], Record] | None = None,
    recording: Recording | None = None,
    on_step: StepDone | None = None,
    on_epoch: EpochDone | None = None,
) -> list[Record]:
    """Run epochs over a loader, with the learning rate's course.

    The host waits for the device where records are written and checkpoints saved, not in between.
    SIGINT and SIGTERM end the run after the step, with a checkpoint where ``recording`` has one.
    A run that goes on from a checkpoint ends, on the CPU, with the same bits as one that was never
    stopped, if the order of ``loader`` depends on the epoch alone: that of
    `limpq_ext.make_loader`, a list, or a DataLoader whose sampler has ``set_epoch``.
    An epoch is as many batches as the loader's length says, or fewer where it gives fewer.

    Args:
        take_step: Takes one optimizer step on a batch and returns its loss, a detached scalar.
        optimizer: The one that ``take_step`` uses.
        loader: Pairs of inputs, as for `inputs.call`, and targets; it has a length.
        model: What is trained. Batches are moved to its device; at the end all processes get the
            buffers of process 0 (batch normalisation has statistics per process until then).
        epochs: At least 1.
        warmup_epochs: Epochs of linear warm-up.
        parts: What has a state that a checkpoint keeps, by name: together with the learning rate's
            course, all that ``take_step`` depends on.
        meter: What ``take_step`` adds its numbers to.
        check: Raises if a step since the last call was not finite.
        observe: More numbers for every record.
        recording: Checkpoints and records.
        on_step: Called after every step.
        on_epoch: Called after every epoch.

    Returns:
        One record per epoch: epoch, step (steps so far), loss (mean over its steps), lr (the last),
        accuracy or branches (on the training batches), images_per_second, memory in bytes,
        guarded_scales (how many step sizes are at their lower bound), and what ``observe`` gives.

    Raises:
        ValueError: ``epochs`` is below 1, the loader is empty or gives no batches in an epoch, or
            the loss became NaN or infinite.
        FileFormatError: The checkpoint cannot be read or belongs to another training.
        Interrupted: A signal came.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1")
    steps_per_epoch = length_of(loader)
    if steps_per_epoch == 0:
        raise ValueError("cannot train on an empty data set")
    total = epochs * steps_per_epoch
    recording = recording or Recording()
    checkpoint = recording.checkpoint
    journal = recording.journal or Journal("", say=lambda line: None)
    device = device_of(model)
    schedule = cosine_with_warmup(
        optimizer, steps=total, warmup_steps=round(warmup_epochs * steps_per_epoch)
    )
    course = Course({**parts, "schedule": schedule}, meter or Meter(device))
    if checkpoint is not None and course.load(checkpoint, optimizer, total):
        journal.report(f"going on after step {course.step} of {total} from {checkpoint.path}")
    journal.start(course.step)
    records = Records(course, schedule, model, journal, observe)
    keeping = _Keeping(course, checkpoint, total)
    warned = False

    def finish_epoch() -> None:
        record = records.of_epoch()
        course.finish_epoch(record)
        if on_epoch is not None:
            on_epoch(record)

    def after_step() -> None:
        """Look, write records, keep and stop: what of it is due."""
        ends = course.batch == steps_per_epoch
        logs = recording.log_steps > 0 and course.step % recording.log_steps == 0
        keeps = keeping.is_due()
        if check is not None and (ends or logs or keeps):
            check()
        if ends or logs:
            sums = course.read()
            if logs:
                records.of_steps(sums)
        if ends:
            finish_epoch()
        if keeps:
            keeping.keep()

    with keeping.noticing():
        while course.epochs < epochs:
            epoch = course.epochs + 1
            batches = batches_of_epoch(loader, epoch - 1, course.batch)
            course.take_over(journal)
            for batch in itertools.islice(batches, steps_per_epoch - course.batch):
                x, target = moved(batch, device)
                course.count(take_step(x, target), samples_in(x))
                schedule.step()
                if on_step is not None:
                    on_step(course.step, total)
                after_step()
            if course.epochs == epoch:
                continue
            if course.batch == 0:
                raise ValueError(f"epoch {epoch}: the loader gave no batches")
            if not warned:
                warnings.warn(
                    f"epoch {epoch}: the loader gave {course.batch} batches, but its length is"
                    f" {steps_per_epoch}, by which the learning rate falls",
                    stacklevel=2,
                )
            warned = True
            if check is not None:
                check()
            course.read()
            finish_epoch()
    broadcast_state(model, buffers_only=True)
    return course.records


class _Keeping:
    """Keeps how far a training is in its checkpoint, when that is due and when a signal ends it."""

    def __init__(self, course: Course, checkpoint: Checkpoint | None, total: int) -> None:
        self._course = course
        self._checkpoint = checkpoint
        self._total = total
        self._signals = StopSignals()
        self._received = 0  # by any process

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Notice signals; a step that is not finite ends with the name of what is kept."""
        with self._signals.noticed():
            try:
                yield
            except NonFiniteError as error:
                if self._checkpoint is not None and self._checkpoint.path.exists():
                    kept = f"the last good checkpoint is kept: {self._checkpoint.path}"
                    error.args = (f"{error}; {kept}",)
                raise

    def is_due(self) -> bool:
        """Whether all processes have to `keep` after this step."""
        due = (
            self._checkpoint is not None
            and is_main()
            and self._checkpoint.is_due(self._course.step)
        )
        self._received, wanted = agree(self._signals.received, int(due))
        return bool(self._received or wanted)

    def keep(self) -> None:
        """Write the checkpoint.

        Raises:
            Interrupted: A signal came.
        """
        if self._checkpoint is not None:
            self._course.save(self._checkpoint)
        if self._received:
            name = signal.Signals(self._received).name
            reason = f"stopped by {name} after step {self._course.step} of {self._total}"
            if self._checkpoint is None:
                raise Interrupted(self._received, f"{reason}; there is no checkpoint to go on from")
            command = f"the same command goes on from {self._checkpoint.path}"
            raise Interrupted(self._received, f"{reason}; {command}")
