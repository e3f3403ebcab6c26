"""Batches: what they hold, how many a loader gives, and those of one epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from torch import Tensor

Batches = Iterable[tuple[Any, Tensor]]
"""Inputs, as for :func:`limpq_ext.nn.inputs.call`, and class indices."""


def length_of(loader: Iterable[Any]) -> int:
    """How many batches a loader gives.

    Raises:
        ValueError: It has no length.
    """
    if not isinstance(loader, Sized):
        raise ValueError("the loader has no length; pass a DataLoader or a list of batches")
    return len(loader)


def batches_of_epoch(
    loader: Iterable[tuple[Any, Any]], epoch: int, skip: int = 0
) -> Iterator[tuple[Any, Any]]:
    """The batches of an epoch (from 0) but for the first ones, which are not loaded if possible."""
    batches: Any = getattr(loader, "batch_sampler", None)
    if hasattr(batches, "set_position"):
        batches.set_position(epoch, skip)
        return iter(loader)
    sampler: Any = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return itertools.islice(iter(loader), skip, None)
