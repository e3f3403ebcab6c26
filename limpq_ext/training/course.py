"""How far a training is, what of it a checkpoint keeps, and how it goes on from one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from limpq_ext.training.checkpoint import Checkpoint, Stateful
from limpq_ext.training.distributed import rank, world_size
from limpq_ext.training.metrics import Journal, Meter, Record
from limpq_ext.training.random_state import set_random_states
from limpq_ext.values.reading import reading, shown


class Course:
    """How far a training is, and all that the rest of it depends on.

    Args:
        parts: What has a state that a checkpoint keeps, by name.
        meter: Where the sums of steps are.

    Attributes:
        step: Steps so far.
        epochs: Whole epochs so far.
        batch: Batches so far of the epoch that runs.
        records: Of the whole epochs.
        epoch_sums: Of the epoch that runs, up to the last `read`.
    """

    def __init__(self, parts: Mapping[str, Stateful], meter: Meter) -> None:
        self.step = 0
        self.epochs = 0
        self.batch = 0
        self.records: list[Record] = []
        self.epoch_sums: dict[str, float] = {}
        self._parts = parts
        self._meter = meter
        self._clock = time.monotonic()
        self._saved: tuple[str | os.PathLike[str], Mapping[str, Any]] | None = None

    def count(self, loss: Tensor, images: int) -> None:
        """A step was taken."""
        self._meter.add("loss", loss)
        self._meter.add("steps", 1)
        self._meter.add("images", images)
        self.step += 1
        self.batch += 1

    def read(self) -> dict[str, float]:
        """What the meter says since the last read; the sums of the epoch get it too."""
        now = time.monotonic()
        sums = {**self._meter.read(), "seconds": now - self._clock}
        self._meter.reset()
        self._clock = now
        for name, value in sums.items():
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value
        return sums

    def finish_epoch(self, record: Record) -> None:
        """The epoch is over and came to this."""
        self.records.append(record)
        self.epochs += 1
        self.batch = 0
        self.epoch_sums = {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint. All processes call this."""
        checkpoint.save(self._state_dict(), {"meter": self._meter.state_dict()})

    def load(self, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, total: int) -> bool:
        """Go on from a checkpoint, if there is one. All processes call this.

        Args:
            checkpoint: The file.
            optimizer: One of the parts, or of a part's own.
            total: Steps in all.

        Raises:
            FileFormatError: It cannot be read or belongs to another training.
        """
        saved = checkpoint.load()
        if saved is None:
            return False
        with reading(checkpoint.path):
            if type(saved.get("step")) is not int or not 0 <= saved["step"] <= total:
                raise ValueError(f"step: is {shown(saved.get('step'))}, expected 0 to {total}")
            self._load_state_dict(saved)
            _check_optimizer(optimizer)
        self._saved = checkpoint.path, saved
        return True

    def take_over(self, journal: Journal) -> None:
        """Go on with what this process had of its own: its random numbers and its sums.

        Once, after `load` and after the loader started, which may have drawn numbers.
        """
        if self._saved is None:
            return
        (path, saved), self._saved = self._saved, None
        processes = saved["processes"]
        if len(processes) == world_size():
            with reading(path):
                set_random_states(processes[rank()]["random"])
                self._meter.load_state_dict(processes[rank()]["meter"])
            return
        # Another seed for every process; what it draws was never drawn before.
        torch.manual_seed(torch.initial_seed() + world_size() * self.step + rank())
        journal.report(
            f"the checkpoint is of {len(processes)} processes, now there are {world_size()}: the"
            " result is not the same to the bit, and sums of the epoch start anew"
        )

    def _state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epochs": self.epochs,
            "batch": self.batch,
            "records": self.records,
            "epoch_sums": self.epoch_sums,
            "seconds": time.monotonic() - self._clock,
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_alike(state, self._state_dict(), "")
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


def _check_alike(saved: Any, own: Any, where: str) -> None:
    """Make sure that values of a checkpoint are of the kinds that a training's own state has.

    Keys that only one of them has are passed over: they come and go with versions of torch, and
    whoever takes the state back misses what it needs. Tensors are for their owners to judge.

    Args:
        saved: The state in the checkpoint.
        own: The state of the training that takes it back.
        where: What both are called.

    Raises:
        ValueError: A value is of another kind; the message says which.
    """
    if isinstance(own, dict):
        fits = isinstance(saved, dict)
        pairs = [(key, saved[key], own[key]) for key in own if fits and key in saved]
    elif isinstance(own, list | tuple):
        # A list that is empty yet, such as that of the records, may have grown.
        fits = isinstance(saved, list | tuple) and (not own or len(saved) == len(own))
        pairs = list(zip(range(len(own)), saved, own)) if fits else []  # noqa: B905
    else:
        numbers = (int, float)
        undecided = (type(None), bool)  # an optimizer's "fused", which depends on the device
        fits = (
            (type(own) in undecided and type(saved) in undecided)
            or isinstance(own, torch.Tensor)
            or type(own) is type(saved)
            or (type(own) in numbers and type(saved) in numbers)
        )
        if fits and type(saved) in numbers and not math.isfinite(saved):
            fits = type(own) is float and not math.isfinite(own)
        pairs = []
    if not fits:
        raise ValueError(f"{where}: is {shown(saved)}, expected something like {shown(own)}")
    for key, one, other in pairs:
        _check_alike(one, other, f"{where}.{key}" if where else f"{key}")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make sure that what an optimizer of ours took back belongs to its parameters.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        if missing := optimizer.defaults.keys() - group.keys():
            raise ValueError(f"optimizer: {min(missing)} is missing")
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        if parameter not in known or not isinstance(state, dict):
            raise ValueError("optimizer: its state is not of these parameters")
        for name, value in state.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if value is not None and getattr(value, "shape", None) != shape:
                raise ValueError(
                    f"optimizer: {shown(name)} does not fit a parameter of shape"
                    f" {tuple(parameter.shape)}"
                )
