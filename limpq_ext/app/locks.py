"""One process at a time: locks of folders and files, and names that nobody else took."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from limpq_ext.training.distributed import from_main

PATIENCE = 6.0
"""Seconds to wait for a lock: what a killed process had started to load data ends within five."""


@contextlib.contextmanager
def only_one(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock for as long as the block lasts; of several processes, process 0 does.

    The lock ends with the process, however that ends.

    Args:
        lock: A file, made if it is missing and removed in the end.
        what: What the error says is in use.

    Raises:
        ValueError: Somebody else holds it.
        OSError: The file cannot be made.
    """
    # It comes with torch, and nothing but this needs it.
    from filelock import FileLock, Timeout

    held = FileLock(lock)

    def take() -> None:
        try:
            held.acquire(timeout=PATIENCE)
        except Timeout:
            raise ValueError(
                f"{what} is in use by another limpq process: wait until that has ended, or choose"
                " another --out"
            ) from None

    from_main(take)
    try:
        yield
    finally:
        if held.is_locked:
            lock.unlink(missing_ok=True)
            held.release()


def save_as_new(path: Path, save: Callable[[Path], object]) -> None:
    """Write a file under a name that nobody has; nothing is replaced.

    Args:
        path: The name.
        save: Writes the content under the name that it is given.

    Raises:
        FileExistsError: Somebody took the name meanwhile; the message says where the content is.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        save(temporary)
        try:
            os.link(temporary, target)  # unlike a rename, this fails where the name is taken
            return
        except OSError as error:
            if error.errno != errno.EEXIST and not target.exists():
                temporary.rename(target)  # a file system without links
                return
        kept = _free_name(target)
        temporary.rename(kept)
        raise FileExistsError(
            f"'{path}' was written by somebody else meanwhile and is not replaced; the result is in"
            f" '{path.with_name(kept.name)}'"
        )
    finally:
        temporary.unlink(missing_ok=True)


def _free_name(path: Path) -> Path:
    """A name beside a path that is not taken: policy.1.json, policy.2.json, ..."""
    number = 1
    while path.with_name(f"{path.stem}.{number}{path.suffix}").exists():
        number += 1
    return path.with_name(f"{path.stem}.{number}{path.suffix}")
