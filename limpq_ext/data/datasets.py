"""Data sets by name, split into images for training, validation and testing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from limpq_ext.data.images import ImageFiles, Images, OnCorrupt
from limpq_ext.data.loading import Data, ImageSet
from limpq_ext.data.scan import Scan, scan_images
from limpq_ext.data.sources import Kind, Opened, canonical_name, open_source
from limpq_ext.data.splits import stratified_split
from limpq_ext.data.transforms import Augment, evaluation_transform, training_transform
from limpq_ext.training.distributed import from_main


def load_data(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
    augment: Literal["auto"] | Augment = "auto",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    on_corrupt: OnCorrupt = "error",
    scan: Scan = "open",
    scan_cache: Path | None = None,
    glyphs: Mapping[str, Any] | None = None,
) -> Data:
    """A data set by name, split into training, validation and test images.

    A split that the source does not have is carved out of its training images, class by class. Of
    ``imagenet``, the folder val/ is the test set, as the field reports it. Where a file is broken
    after the scan, see :class:`limpq_ext.data.images.ImageFiles`. In a run of several processes the
    first one downloads and scans.

    Args:
        name: One of ``DATA_SETS``; ``torchvision/NAME`` for a set of torchvision.datasets.
        root: Folder of the data; digits and glyphs have none.
        download: Let torchvision fetch what is not in ``root``.
        image_size: Height and width; None is what is usual for the set.
        channels: 1 (grey) or 3; None is what is usual.
        augment: Of training images; "auto" is what is usual.
        mean: Per channel, of pixels from 0 to 1; None is what is usual.
        std: Likewise.
        val_fraction: Of the training images, where the set has no validation images; 0: none.
        test_fraction: Of all, where the set has no test images.
        seed: Of the splits, and of glyphs.
        on_corrupt: Broken files and empty classes are an error, or ("skip") left out and counted.
        scan: How files are tried before training.
        scan_cache: Where the scan is remembered.
        glyphs: ``train_images``, ``test_images``, ``difficulty``, ``fonts``, ``cache``.

    Raises:
        ValueError: The name is unknown, a number does not fit, or the images or classes are wrong:
            none, an empty class, other classes in another split, a broken file.
        FileNotFoundError: ``root`` or the data in it do not exist.
        ImportError: What the set needs is missing.
    """
    name = canonical_name(name)
    if name == "digits" and (
        image_size not in (None, 8) or channels not in (None, 1) or augment not in ("auto", "none")
    ):
        raise ValueError("digits are 8x8 and grey and not augmented: leave these options out")
    if name == "digits" and (mean is not None or std is not None):
        raise ValueError(
            "digits have the mean 0 and the standard deviation 1 of their training images already:"
            " leave data.mean and data.std out"
        )
    opened = open_source(
        name,
        root,
        download=download,
        image_size=image_size,
        channels=channels,
        seed=seed,
        glyphs=glyphs or {},
    )
    opened, notes = _without_broken(opened, on_corrupt, scan, scan_cache)
    kind = opened.kind
    kind = replace(
        kind,
        size=image_size or kind.size,
        channels=channels or kind.channels,
        augment=kind.augment if augment == "auto" else augment,
        resize=kind.resize or image_size not in (None, kind.size),
    )
    statistics = _statistics(kind, mean, std)
    _check_classes(name, opened, on_corrupt)
    training = evaluating = None
    if not opened.ready:
        how: dict[str, Any] = {"resize": kind.resize, "crop_share": kind.crop_share}
        training = training_transform(kind.augment, kind.size, *statistics, **how)
        evaluating = evaluation_transform(kind.size, *statistics, **how)
    sets = {
        split: ImageSet(
            images,
            chosen,
            training if split == "train" else evaluating,
            random=split == "train" and kind.augment != "none",
            on_corrupt=on_corrupt,
        )
        for split, (images, chosen) in _split(opened, val_fraction, test_fraction, seed).items()
    }
    per_class = {
        split: np.bincount(images.labels, minlength=len(opened.classes)).tolist()
        for split, images in sets.items()
    }
    record = {
        "name": name,
        "splits": {split: len(images) for split, images in sets.items()},
        "carved_from_train": {
            split: fraction
            for split, fraction in (("val", val_fraction), ("test", test_fraction))
            if split not in opened.splits() and fraction
        },
        "seed": seed,
        "image_shape": [kind.channels, kind.size, kind.size],
        "classes": list(opened.classes),
        "images_per_class": per_class,
        "empty_classes": [
            empty
            for empty, count in zip(opened.classes, per_class["train"], strict=True)
            if count == 0
        ],
        **notes,
        "fingerprint": from_main(lambda: _fingerprint(opened, sets)),
    }
    return Data(
        **sets,
        classes=tuple(opened.classes),
        image_shape=(kind.channels, kind.size, kind.size),
        record=record,
    )


def _statistics(
    kind: Kind, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    usual = kind.statistics
    if len(usual[0]) != kind.channels:
        # Grey from the mean of the colours, three channels from one that is repeated.
        spread = [[sum(values) / len(values)] * kind.channels for values in usual]
        usual = (tuple(spread[0]), tuple(spread[1]))
    chosen = (mean or usual[0], std or usual[1])
    for what, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) != kind.channels:
            raise ValueError(
                f"data.{what} has {len(values)} numbers, but the images {kind.channels} channels"
            )
    if min(chosen[1]) <= 0:
        raise ValueError(f"data.std is {list(chosen[1])}, expected numbers above 0")
    return chosen


def _split(
    opened: Opened, val_fraction: float, test_fraction: float, seed: int
) -> dict[str, tuple[Images, NDArray[np.int64]]]:
    """Images and indices of every split."""
    result = {split: (images, np.arange(len(images))) for split, images in opened.splits().items()}
    for number, (split, fraction) in enumerate((("test", test_fraction), ("val", val_fraction))):
        if split in result:
            continue
        images, rest = result["train"]
        kept, part = stratified_split(images.labels[rest], fraction, seed + number)
        result["train"], result[split] = (images, rest[kept]), (images, rest[part])
    return result


def _check_classes(name: str, opened: Opened, on_corrupt: str) -> None:
    count = len(opened.classes)
    for split, images in opened.splits().items():
        if len(images) == 0:
            raise ValueError(f"data set {name}: there are no images to {_USES[split]}")
        highest = int(images.labels.max())
        if int(images.labels.min()) < 0 or highest >= count:
            raise ValueError(
                f"data set {name}: a class of the {split} images is"
                f" {min(int(images.labels.min()), highest)}..{highest}, expected 0 to {count - 1}"
            )
        empty = np.flatnonzero(np.bincount(images.labels, minlength=count) == 0)
        if len(empty) and on_corrupt == "error":
            raise ValueError(
                f"data set {name}: class '{opened.classes[empty[0]]}' has no {split} images"
                f"{f' (and {len(empty) - 1} more classes)' if len(empty) > 1 else ''};"
                " data.on_corrupt: skip keeps such classes without images"
            )


_USES = {"train": "train on", "val": "validate on", "test": "test on"}


def _fingerprint(opened: Opened, sets: Mapping[str, ImageSet]) -> str:
    """A digest of the images of every split, of their classes and order."""
    digest = hashlib.sha256()
    for split, source in opened.splits().items():
        digest.update(f"{split} {source.identity()}".encode())
    for split, images in sets.items():
        digest.update(split.encode() + images.indices.astype("<i8").tobytes())
    return digest.hexdigest()


def _without_broken(
    opened: Opened,
    on_corrupt: OnCorrupt,
    scan: Scan,
    cache: Path | None,
) -> tuple[Opened, dict[str, Any]]:
    """The data set without files that cannot be read, and a note of what they are."""
    files = {
        split: images for split, images in opened.splits().items() if isinstance(images, ImageFiles)
    }
    if not files:
        return opened, {}
    root = next(iter(files.values())).root
    names = [name for images in files.values() for name in images.names()]
    broken = from_main(lambda: scan_images(names, root, scan, cache))
    if not broken:
        return opened, {"skipped": {}}
    if on_corrupt == "error":
        first, reason = next(iter(broken.items()))
        raise ValueError(
            f"{len(broken)} of {len(names)} images cannot be read, the first:"
            f" {root / first}: {reason}; data.on_corrupt: skip leaves them out"
        )
    kept: dict[str, Any] = {split: images.without(broken) for split, images in files.items()}
    return replace(opened, **kept), {"skipped": broken}
