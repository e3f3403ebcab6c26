"""Whether other processes take part in what is computed here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def is_distributed() -> bool:
    """Whether this process is one of several that work together."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """A block that this process runs alone, while the others wait for what comes of it."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)
