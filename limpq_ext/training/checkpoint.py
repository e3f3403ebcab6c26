"""Checkpoints of a training that may be stopped at any moment and goes on as if it had not been.

A checkpoint holds everything that the rest of the training depends on; it is written by process 0
and read by process 0 for all. Behind what ``torch.save`` writes stands its SHA-256, so that nobody
goes on from a damaged file. Batch normalisation keeps statistics per process, as in
DistributedDataParallel, and those of process 0 are the ones that are saved: they take no part in
training, and at its end all processes get them.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from limpq_ext.training.distributed import (
    from_main,
    gather,
    is_main,
)
from limpq_ext.training.random_state import random_states
from limpq_ext.values.files import open_atomically, remove_leftovers
from limpq_ext.values.reading import FileFormatError, open_regular, shown
from limpq_ext.values.tensor_files import read_saved

FORMAT = "limpq-checkpoint"
VERSION = 2

_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = 73


class Stateful(Protocol):
    """What has a state: a module, an optimizer, a gradient scaler, a JointTrainer, ..."""

    def state_dict(self) -> dict[str, Any]:
        """The state: numbers, strings, tensors and containers of them."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state back."""


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
                write_sealed(file, content)

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
        """Remove the file, where there is one. Process 0 alone does something.

        Raises:
            FileFormatError: The file is not a checkpoint of this training; it is kept.
        """
        if is_main() and self._read() is not None:
            self.path.unlink()

    def _read(self) -> dict[str, Any] | None:
        remove_leftovers(self.path)
        if not self.path.exists():
            return None
        advice = "remove it to start this stage over"
        try:
            state, sealed = read_sealed(self.path, "checkpoint")
        except FileFormatError as error:
            raise FileFormatError(f"{error}; {advice}") from error
        if not isinstance(state, dict) or not _is(state.get("format"), FORMAT):
            raise FileFormatError(f"{self.path}: not a checkpoint of a training; {advice}")
        if not _is(state.get("version"), VERSION):
            raise FileFormatError(
                f"{self.path}: version is {shown(state.get('version'))}, this limpq_ext reads"
                f" {VERSION}; {advice}"
            )
        if not sealed:
            raise FileFormatError(f"{self.path}: damaged: its checksum is missing; {advice}")
        if not _is(state.get("key"), self.key):
            raise FileFormatError(
                f"{self.path}: this checkpoint belongs to another recipe or other inputs; go on"
                f" with those, or {advice}"
            )
        if not _is_of_processes(state.get("processes")):
            raise FileFormatError(f"{self.path}: processes: is no list of states; {advice}")
        return state


def write_sealed(file: BinaryIO, content: Any) -> None:
    """Write what ``torch.save`` writes and its SHA-256 behind it; ``torch.load`` reads it too."""
    hashing = _Hashing(file)
    torch.save(content, hashing)  # type: ignore[arg-type]  # it needs no more than this
    file.write(f"\nsha256 {hashing.digest.hexdigest()}\n".encode())


class _Hashing:
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def read_sealed(path: str | os.PathLike[str], what: str) -> tuple[Any, bool]:
    """What a file of ``torch.save`` holds, and whether it has a checksum, which is right then.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is no such file, or is damaged.
    """
    with open_regular(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - _SEAL_BYTES))
        seal = _SEAL.fullmatch(file.read())
        file.seek(0)
        if seal is not None:
            digest, left = hashlib.sha256(), size - _SEAL_BYTES
            while left > 0 and (data := file.read(min(left, 2**20))):
                digest.update(data)
                left -= len(data)
            if digest.hexdigest().encode() != seal[1]:
                raise FileFormatError(f"{os.fspath(path)}: damaged: its checksum is another one")
            file.seek(0)
        return read_saved(file, path), seal is not None


def _is(value: Any, expected: str | int) -> bool:
    """Whether they are equal, where the value may be a tensor, whose comparison is no bool."""
    return type(value) is type(expected) and value == expected


def _is_of_processes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(own, dict) and isinstance(own.get("random"), dict) for own in value
    )
