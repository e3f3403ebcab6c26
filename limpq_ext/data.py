"""Data sets by name, split and batched the same way every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

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


def make_loader(
    data: Dataset[tuple[Tensor, ...]],
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of a data set, shuffled by ``seed`` for training and in order for evaluation.

    Args:
        data: With a length.
        batch_size: At least 1.
        train: Shuffle, and leave out a last batch that is not full (unless it is the only one).
        seed: Of the shuffling.
        workers: Processes that load; 0 is this one.

    Raises:
        ValueError: The data set is empty or ``batch_size`` is below 1.
    """
    size = len(data)  # type: ignore[arg-type]  # Dataset declares no __len__, map-style ones have it
    if size == 0:
        raise ValueError("the data set is empty")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train and size >= batch_size,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
