"""Data sets by name, split and batched the same way every time."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from .distributed import rank, world_size
from .extras import require

DATA_SETS = ("digits",)


@dataclass(frozen=True)
class Data:
    """A data set for classification.

    Attributes:
        train: Pairs of image ``[channels, height, width]`` and class index.
        test: The same, for evaluation alone.
        num_classes: How many classes there are.
        image_shape: (channels, height, width).
    """

    train: Dataset[tuple[Tensor, ...]]
    test: Dataset[tuple[Tensor, ...]]
    num_classes: int
    image_shape: tuple[int, int, int]


def load_data(name: str) -> Data:
    """A data set by name.

    Args:
        name: ``digits``.

    Raises:
        ValueError: The name is unknown.
        ImportError: What it needs is missing.
    """
    if name == "digits":
        return _digits()
    raise ValueError(f"unknown data set '{name}': expected one of {', '.join(DATA_SETS)}")


def _digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey; a quarter of each class is for testing.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    raw = require("sklearn.datasets", "train").load_digits()
    split = require("sklearn.model_selection", "train").train_test_split
    images = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    train, test = split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=raw.target)
    # Of the training images, grey levels 0 to 16.
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    return Data(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        num_classes=10,
        image_shape=(1, 8, 8),
    )


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The batches of every epoch, shuffled anew by seed and epoch, shared by all processes.

    Batch k of an epoch holds the same samples for any number of processes; each takes an equal
    share. A last batch that is not full is left out, unless it is the only one.

    Yields lists of (epoch, index of the sample).

    Args:
        size: Samples in the data set.
        batch_size: Samples in a batch, over all processes.
        seed: Of the shuffling.
        rank: This process.
        processes: How many there are.

    Raises:
        ValueError: A batch cannot be shared equally.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int, processes: int) -> None:
        if batch_size % processes:
            raise ValueError(
                f"batch_size is {batch_size}, which {processes} processes cannot share equally"
            )
        self.batch_size = min(batch_size, size - size % processes)
        if self.batch_size == 0:
            raise ValueError(f"the data set has {size} samples, too few for {processes} processes")
        self.size = size
        self.seed = seed
        self.share = range(self.batch_size)[rank * self.batch_size // processes :][
            : self.batch_size // processes
        ]
        self._epoch = 0
        self._batch = 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """Let the next iteration be this epoch, from this batch on; both count from 0."""
        self._epoch = epoch
        self._batch = batch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches from the position on; the iteration after it is the next epoch."""
        epoch, first = self._epoch, self._batch
        self.set_position(epoch + 1)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.size).tolist()
        for batch in range(first, len(self)):
            start = batch * self.batch_size
            yield [(epoch, order[start + at]) for at in self.share]


class _BySample(Dataset[Any]):
    """A data set by (epoch, index), whose random augmentation depends on seed and sample alone.

    So it is the same for any number of loading processes, and after a resume.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data = data
        self.seed = seed
        # Tensors are not augmented, and need no seeds.
        self.plain = isinstance(data, TensorDataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        if self.plain:
            return [self.data[index] for _, index in keys]
        before = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
        try:
            return [self._seeded(epoch, index) for epoch, index in keys]
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])

    def _seeded(self, epoch: int, index: int) -> Any:
        words = np.random.SeedSequence([self.seed, epoch, index]).generate_state(3)
        torch.default_generator.manual_seed(int(words[0]))
        np.random.seed(words[1])  # noqa: NPY002  # the global one is what augmentations use
        random.seed(int(words[2]))
        return self.data[index]


def make_loader(
    data: Dataset[tuple[Tensor, ...]],
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of a data set, shuffled by ``seed`` for training and in order for evaluation.

    In a run of several processes each gets its share: for training an equal part of every batch,
    for evaluation every ``world_size``-th sample, no sample twice. Every iteration of a training
    loader is the next epoch; a training that goes on from a checkpoint continues in the same order,
    and random augmentation gives every sample what it would have got.

    Args:
        data: With a length.
        batch_size: At least 1; over all processes.
        train: Shuffle, and leave out a last batch that is not full (unless it is the only one).
        seed: Of the shuffling and of the random augmentation.
        workers: Processes that load; 0 is this one.

    Raises:
        ValueError: The data set is empty, ``batch_size`` is below 1, or a training batch cannot be
            shared equally by the processes.
    """
    size = len(data)  # type: ignore[arg-type]  # Dataset declares no __len__, map-style ones have it
    if size == 0:
        raise ValueError("the data set is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    common: dict[str, Any] = {
        # Its own, so that starting an epoch draws nothing from the global generator.
        "generator": torch.Generator().manual_seed(seed),
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _ignore_interrupt if workers else None,
    }
    if train:
        batches = TrainingBatches(size, batch_size, seed, rank(), world_size())
        return DataLoader(_BySample(data, seed), batch_sampler=batches, **common)
    share = range(rank(), size, world_size())
    return DataLoader(Subset(data, share), batch_size=-(-batch_size // world_size()), **common)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the training decides when loading ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
