"""Images as networks read them, batched the same way every time."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from limpq_ext.data.images import Images, OnCorrupt, UnreadableImageError
from limpq_ext.data.splits import stratified_part
from limpq_ext.training.distributed import rank, world_size

MOST_IN_A_ROW = 100
"""So many unreadable images in a row are no accident: a disk is gone, not a file."""


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Some of the images, as the network reads them: pairs of image and class index.

    Args:
        images: Where they come from.
        indices: Which of them.
        transform: From the decoded image to what the network reads; None where they are the same.
        random: Whether the transform draws random numbers.
        plain: The transform that draws none, for :meth:`unaugmented`.
        on_corrupt: What happens where a file cannot be read: an error, or ("skip") the next one of
            these samples that can be takes its place, class and all.

    Attributes:
        labels: Class of every sample.
    """

    def __init__(
        self,
        images: Images,
        indices: NDArray[np.int64],
        transform: Callable[[Tensor], Tensor] | None = None,
        *,
        random: bool = False,
        plain: Callable[[Tensor], Tensor] | None = None,
        on_corrupt: OnCorrupt = "error",
    ) -> None:
        self.images = images
        self.indices = indices
        self.labels: NDArray[np.int64] = images.labels[indices]
        self.random = random
        self._transform = transform
        self._plain = plain
        self._on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._read(index)
        return (image if self._transform is None else self._transform(image)), label

    def _read(self, index: int) -> tuple[Tensor, int]:
        start = range(len(self))[index]
        for following in range(min(len(self), MOST_IN_A_ROW)):
            try:
                return self.images.read(int(self.indices[(start + following) % len(self)]))
            except UnreadableImageError as error:
                if self._on_corrupt == "error":
                    raise
                last = error
        raise UnreadableImageError(f"{following + 1} images in a row cannot be read, last {last}")

    def part(self, fraction: float, seed: int) -> ImageSet:
        """A part of the samples, at random within each class; at least one of each.

        Args:
            fraction: Above 0, up to 1.
            seed: Of the draw.

        Raises:
            ValueError: ``fraction`` is out of range.
        """
        chosen = self.indices[stratified_part(self.labels, fraction, seed)]
        return ImageSet(
            self.images,
            chosen,
            self._transform,
            random=self.random,
            plain=self._plain,
            on_corrupt=self._on_corrupt,
        )

    def unaugmented(self) -> ImageSet:
        """The same samples as evaluation reads them."""
        if not self.random:
            return self
        return ImageSet(self.images, self.indices, self._plain, on_corrupt=self._on_corrupt)

    def load(self) -> None:
        """Do now what would be done at the first access in every loading process."""
        load = getattr(self.images, "load", None)
        if load is not None:
            load()


@dataclass(frozen=True)
class Data:
    """A data set for classification.

    Attributes:
        train: Training images, augmented.
        val: Validation images, for choices between trained networks; empty where none were wanted.
        test: Test images, for the result alone.
        classes: Their names.
        image_shape: (channels, height, width).
        record: What the data are, in a form that JSON has: sizes, seed and fractions of the splits,
            files that were skipped, and a "fingerprint" of all.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    record: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)

    def broken(self) -> list[str]:
        """The files that this process could not read so far, found after the scan."""
        sources = {id(split.images): split.images for split in (self.train, self.val, self.test)}
        return [name for images in sources.values() for name in getattr(images, "broken", list)()]


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
        # What draws nothing needs no seeds.
        self.plain = isinstance(data, TensorDataset) or not getattr(data, "random", True)

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
    data: Dataset[Any],
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
    if isinstance(data, ImageSet):
        data.load()
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
