"""Checkpoints of a training that may be stopped at any moment and goes on as if it had not been.

A checkpoint holds everything that the rest of the training depends on; it is written by process 0
and read by process 0 for all. Batch normalisation keeps statistics per process, as in
DistributedDataParallel, and those of process 0 are the ones that are saved: they take no part in
training, and at its end all processes get them.
"""

from __future__ import annotations

import io
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

from .distributed import agree, from_main, gather, is_distributed, is_main, rank, world_size
from .files import FileFormatError, open_atomically, read_bytes, remove_leftovers
from .indicators import KINDS, StepSizes, check_started
from .quantizers import mean_step_sizes

FORMAT = "limpq-checkpoint"
VERSION = 1


class Stateful(Protocol):
    """What has a state: a module, an optimizer, a gradient scaler, a JointTrainer, ..."""

    def state_dict(self) -> dict[str, Any]:
        """The state: numbers, strings, tensors and containers of them."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state back."""


class Interrupted(SystemExit):
    """The training was stopped by a signal after it had finished its step.

    Uncaught, it ends the process with the conventional status, 128 + the signal's number.

    Attributes:
        reason: One sentence for the user.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(128 + number)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopSignals:
    """Notices SIGINT and SIGTERM, so that the step that runs can be finished.

    A second signal ends the process at once. Signals reach only the main thread; in another one
    this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice signals for as long as the block lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Interrupted(number, "stopped at once by a second signal; no checkpoint written")
        self.received = number


class Checkpoint:
    """The checkpoint file of one training.

    Args:
        path: The file; its folder exists.
        key: Says what the training depends on (a digest of its recipe and inputs). A file with
            another key is refused.
        steps: Write after this many steps; 0: not by steps.
        minutes: Write when this many minutes have passed; 0: not by time.

    Raises:
        ValueError: ``steps`` or ``minutes`` is negative.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, key: str = "", steps: int = 0, minutes: float = 10.0
    ) -> None:
        if steps < 0 or not minutes >= 0:
            raise ValueError(
                f"checkpoint every {steps} steps or {minutes} minutes: expected no negative number"
            )
        self.path = Path(path)
        self.key = key
        self.steps = steps
        self.minutes = minutes
        self._written = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to write one after this many steps; process 0 has the clock."""
        if self.steps and step % self.steps == 0:
            return True
        return bool(self.minutes) and time.monotonic() - self._written >= 60 * self.minutes

    def save(self, state: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> None:
        """Replace the file by one with this state and what every process has of its own.

        All processes call this; process 0 writes while the others wait.

        Args:
            state: The same in every process.
            own: Of this process; its random states are added.

        Raises:
            OSError: The file cannot be written; the former one is kept.
        """
        processes = gather({"random": random_states(), **(own or {})})
        header = {"format": FORMAT, "version": VERSION, "key": self.key}
        content = {**header, "processes": processes, **state}

        def write() -> None:
            with open_atomically(self.path) as file:
                torch.save(content, file)

        from_main(write)
        self._written = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state in the file, or None where there is no file. All processes call this.

        What killed runs left half-written beside the file is removed.

        Raises:
            FileFormatError: The file is not a checkpoint, or one of another recipe or inputs.
        """
        state = from_main(self._read)
        self._written = time.monotonic()
        return state

    def remove(self) -> None:
        """Remove the file, where there is one."""
        if is_main():
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any] | None:
        remove_leftovers(self.path)
        if not self.path.exists():
            return None
        advice = "remove it to start this stage over"
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise FileFormatError(
                f"{self.path}: not a readable checkpoint ({reason}); {advice}"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise FileFormatError(f"{self.path}: not a checkpoint of a training; {advice}")
        if state.get("version") != VERSION:
            raise FileFormatError(
                f"{self.path}: version is {state.get('version')}, this limpq_ext reads {VERSION};"
                f" {advice}"
            )
        if state.get("key") != self.key:
            raise FileFormatError(
                f"{self.path}: this checkpoint belongs to another recipe or other inputs; go on"
                f" with those, or {advice}"
            )
        return state


def load_plain(path: str | os.PathLike[str], what: str) -> Any:
    """The tensors, containers, strings and numbers that ``torch.save`` wrote, on the CPU.

    Args:
        path: The file.
        what: What it should be, for the error message.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is no such file, or asks for a class.
    """
    data = read_bytes(path, what)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileFormatError(f"not a readable checkpoint: {reason}") from error


def read_step_sizes(path: str | os.PathLike[str]) -> Iterator[StepSizes]:
    """The step sizes of all layers in a checkpoint of a joint training.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it holds no joint training.
        ValueError: If a step size has no start value yet.
    """
    state = _joint_state(load_plain(path, "checkpoint"))
    if state is None:
        raise FileFormatError("holds no state of a joint training")
    tensors, bounds = state["model"], state.get("scale_bounds", {})
    ending = ".weight_quantizer.scale"
    for name in (key.removesuffix(ending) for key in tensors if key.endswith(ending)):
        quantizers = [f"{name}.weight_quantizer", f"{name}.input_quantizer"]
        check_started(
            (name, kind, state["bits"], tensors[f"{quantizer}.initialized"].tolist())
            for kind, quantizer in zip(KINDS, quantizers, strict=True)
        )
        weight, activation = (
            dict(zip(state["bits"], sizes.tolist(), strict=True))
            for sizes in (
                mean_step_sizes(tensors[f"{quantizer}.scale"], *bounds.get(quantizer, ()))
                for quantizer in quantizers
            )
        )
        yield name, weight, activation


def _joint_state(content: Any) -> dict[str, Any] | None:
    """The first state of a JointTrainer in containers of states."""
    if not isinstance(content, dict):
        return None
    if {"bits", "model", "seed"} <= content.keys():
        return content
    return next(filter(None, map(_joint_state, content.values())), None)


def random_states() -> dict[str, Any]:
    """The states of this process's random generators: torch (CPU and CUDA), NumPy, Python."""
    # The global generator is the one that augmentations use.
    name, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(words, np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the random generators of this process back into these states."""
    torch.set_rng_state(states["torch"])
    name, words, *rest = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def own_part(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint keeps for this process; None where it is of another number of processes."""
    processes = state["processes"]
    return processes[rank()] if len(processes) == world_size() else None


def agree_to_stop(
    signals: StopSignals, checkpoint: Checkpoint | None, step: int
) -> tuple[int, bool]:
    """The signal that stops all processes (0: none), and whether a checkpoint is due."""
    due = checkpoint is not None and is_main() and checkpoint.is_due(step)
    if not is_distributed():
        return signals.received, due
    received, wanted = agree(signals.received, int(due))
    return received, bool(wanted)
