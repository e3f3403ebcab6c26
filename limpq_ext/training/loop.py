"""What every training stage shares: epochs over a loader, records, checkpoints."""

from __future__ import annotations

import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limpq_ext.nn.inputs import moved, samples_in
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.batches import batches_of_epoch, length_of
from limpq_ext.training.checkpoint import (
    Checkpoint,
    Stateful,
    check_alike,
    check_optimizer,
    own_part,
)
from limpq_ext.training.distributed import (
    agree,
    broadcast_state,
    is_distributed,
    is_main,
    rank,
    world_size,
)
from limpq_ext.training.metrics import Journal, Meter, Record, guarded_scales, memory
from limpq_ext.training.model_state import device_of
from limpq_ext.training.nonfinite import NonFiniteError
from limpq_ext.training.optimizers import cosine_with_warmup
from limpq_ext.training.random_state import set_random_states
from limpq_ext.training.signals import Interrupted, StopSignals
from limpq_ext.values.reading import reading, shown

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
    checkpoint, journal = recording.checkpoint, recording.journal
    device = device_of(model)
    meter = meter or Meter(device)
    schedule = cosine_with_warmup(
        optimizer, steps=total, warmup_steps=round(warmup_epochs * steps_per_epoch)
    )
    course = _Course({**parts, "schedule": schedule})
    saved = None if checkpoint is None else checkpoint.load()
    if checkpoint is not None and saved is not None:
        with reading(checkpoint.path):
            if type(saved.get("step")) is not int or not 0 <= saved["step"] <= total:
                raise ValueError(f"step: is {shown(saved.get('step'))}, expected 0 to {total}")
            course.load_state_dict(saved)
            check_optimizer(optimizer)
        if journal is not None:
            journal.report(f"going on after step {course.step} of {total} from {checkpoint.path}")
    if journal is not None:
        journal.start(course.step)

    def finished(record: Record, sums: Mapping[str, float]) -> Record:
        """The record with all its numbers, written to the journal."""
        record |= {**_means(sums), "lr": float(schedule.get_last_lr()[0]), **memory(device)}
        if not math.isfinite(record["loss"]):
            raise ValueError(f"the loss became {record['loss']} by step {course.step}")
        if observe is not None:
            record |= observe()
        if journal is not None:
            journal.write(record)
        return record

    def finish_epoch() -> None:
        epoch = course.epochs + 1
        record = {"epoch": epoch, "step": course.step, **_guarded(model, epoch, journal)}
        course.records.append(finished(record, course.epoch_sums))
        course.finish_epoch()
        if on_epoch is not None:
            on_epoch(record)

    warned = False
    signals = StopSignals()
    with signals.noticed(), _naming_kept(checkpoint):
        while course.epochs < epochs:
            epoch = course.epochs + 1
            batches = batches_of_epoch(loader, epoch - 1, course.batch)
            if saved is not None:
                # After the loader started, which may have drawn numbers.
                with reading(checkpoint.path if checkpoint is not None else ""):
                    _take_over(saved, meter, journal)
                saved = None
            for batch in itertools.islice(batches, steps_per_epoch - course.batch):
                x, target = moved(batch, device)
                meter.add("loss", take_step(x, target))
                meter.add("steps", 1)
                meter.add("images", samples_in(x))
                schedule.step()
                course.step += 1
                course.batch += 1
                if on_step is not None:
                    on_step(course.step, total)
                ends = course.batch == steps_per_epoch
                logs = recording.log_steps > 0 and course.step % recording.log_steps == 0
                received, due = _agree_to_stop(signals, checkpoint, course.step)
                if check is not None and (ends or logs or received or due):
                    check()
                if ends or logs:
                    sums = course.read(meter)
                    if logs:
                        finished({"step": course.step}, sums)
                if ends:
                    finish_epoch()
                if checkpoint is not None and (received or due):
                    checkpoint.save(course.state_dict(), {"meter": meter.state_dict()})
                if received:
                    raise Interrupted(received, _farewell(received, course.step, total, checkpoint))
            if course.epochs < epoch:
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
                course.read(meter)
                finish_epoch()
    broadcast_state(model, buffers_only=True)
    return course.records


class _Course:
    """How far a training is, and all that the rest of it depends on."""

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self.step = 0
        self.epochs = 0  # whole ones
        self.batch = 0  # of the epoch that runs
        self.records: list[Record] = []
        self.epoch_sums: dict[str, float] = {}
        self._parts = parts
        self._clock = time.monotonic()

    def read(self, meter: Meter) -> dict[str, float]:
        """What the meter says since the last read; the sums of the epoch get it too."""
        now = time.monotonic()
        sums = {**meter.read(), "seconds": now - self._clock}
        meter.reset()
        self._clock = now
        for name, value in sums.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
        return sums

    def finish_epoch(self) -> None:
        self.epochs += 1
        self.batch = 0
        self.epoch_sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epochs": self.epochs,
            "batch": self.batch,
            "records": self.records,
            "epoch_sums": self.epoch_sums,
            "seconds": time.monotonic() - self._clock,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_alike(state, self.state_dict(), "")
        if not all(isinstance(record, dict) for record in state["records"]):
            raise ValueError("records: are no records of epochs")
        for name, value in state["epoch_sums"].items():
            if type(value) is not float:
                raise ValueError(f"epoch_sums: {shown(name)} is {shown(value)}, no sum")
            kind, _, branch = name.partition(" ")
            if kind == "correct" and f"samples {branch}" not in state["epoch_sums"]:
                raise ValueError(f"epoch_sums: 'samples {branch}' is missing")
        self.step, self.epochs, self.batch = state["step"], state["epochs"], state["batch"]
        self.records = list(state["records"])
        self.epoch_sums = dict(state["epoch_sums"])
        self._clock = time.monotonic() - state["seconds"]
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])


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


def _guarded(model: nn.Module, epoch: int, journal: Journal | None) -> Record:
    """How many step sizes are at their lower bound; the journal names some of them."""
    if not any(isinstance(module, LsqQuantizer) for module in model.modules()):
        return {}
    names = guarded_scales(model)
    if names and journal is not None:
        shown = "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
        journal.report(f"epoch {epoch}: {len(names)} step sizes are at their lower bound: {shown}")
    return {"guarded_scales": len(names)}


def _take_over(saved: Mapping[str, Any], meter: Meter, journal: Journal | None) -> None:
    """Go on with what this process had of its own: its random numbers and its sums."""
    own = own_part(saved)
    if own is not None:
        set_random_states(own["random"])
        meter.load_state_dict(own["meter"])
        return
    # Another seed for every process; what it draws was never drawn before.
    torch.manual_seed(torch.initial_seed() + world_size() * saved["step"] + rank())
    if journal is not None:
        journal.report(
            f"the checkpoint is of {len(saved['processes'])} processes, now there are"
            f" {world_size()}: the result is not the same to the bit, and sums of the epoch start"
            " anew"
        )


@contextmanager
def _naming_kept(checkpoint: Checkpoint | None) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        if checkpoint is not None and checkpoint.path.exists():
            error.args = (f"{error}; the last good checkpoint is kept: {checkpoint.path}",)
        raise


def _farewell(number: int, step: int, total: int, checkpoint: Checkpoint | None) -> str:
    reason = f"stopped by {signal.Signals(number).name} after step {step} of {total}"
    if checkpoint is None:
        return f"{reason}; there is no checkpoint to go on from"
    return f"{reason}; the same command goes on from {checkpoint.path}"


def _agree_to_stop(
    signals: StopSignals, checkpoint: Checkpoint | None, step: int
) -> tuple[int, bool]:
    """The signal that stops all processes (0: none), and whether a checkpoint is due."""
    due = checkpoint is not None and is_main() and checkpoint.is_due(step)
    if not is_distributed():
        return signals.received, due
    received, wanted = agree(signals.received, int(due))
    return received, bool(wanted)
