"""Data sets by name, split into images for training, validation and testing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from limpq_ext.values.options import Options, option


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Which data set, and how it is read and split.

    Attributes:
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
        glyphs: ``train_images``, ``test_images``, ``difficulty``, ``fonts``, ``cache``.
    """

    name: str = option(help="data set, see limpq_ext.data.sources.DATA_SETS")
    root: str | None = option(None, help="folder of the data")
    download: bool = option(False, help="let torchvision fetch what root lacks")
    image_size: int | None = option(None, ge=1, help="height and width")
    channels: Literal[1, 3] | None = option(None, help="1 is grey")
    augment: Literal["auto"] | Augment = option("auto", help="of training images")
    mean: tuple[float, ...] | None = option(None, help="per channel, of pixels from 0 to 1")
    std: tuple[float, ...] | None = option(None)
    val_fraction: float = option(
        0.1, ge=0, lt=1, help="of training images, where there are none for validation"
    )
    test_fraction: float = option(0.2, gt=0, lt=1, help="of all, where there are none")
    seed: int = option(0, ge=0, help="of the splits, and of glyphs")
    on_corrupt: OnCorrupt = option(
        "error", help="files that cannot be read and empty classes; skip counts them"
    )
    scan: Scan = option("open", help="how files are tried before training")
    glyphs: Mapping[str, Any] | None = option(None)


def load_data(data: str | DataOptions, *, scan_cache: Path | None = None, **changes: Any) -> Data:
    """A data set, split into training, validation and test images.

    A split that the source does not have is carved out of its training images, class by class. Of
    ``imagenet``, the folder val/ is the test set, as the field reports it. Where a file is broken
    after the scan, see :class:`limpq_ext.data.images.ImageFiles`. In a run of several processes the
    first one downloads and scans.

    Args:
        data: The name of the set, or which set and how it is read.
        scan_cache: Where the scan is remembered.
        **changes: Fields of `DataOptions` by keyword: ``load_data("imagenet", root="data")``.

    Raises:
        TypeError: There is no such option.
        ValueError: The name is unknown, a number does not fit, or the images or classes are wrong:
            none, an empty class, other classes in another split, a broken file.
        FileNotFoundError: ``root`` or the data in it do not exist.
        ImportError: What the set needs is missing.
    """
    named = {"name": data, **changes} if isinstance(data, str) else changes
    given = DataOptions.chosen(None if isinstance(data, str) else data, named)
    image_size, channels, augment = given.image_size, given.channels, given.augment
    mean, std = given.mean, given.std
    name = canonical_name(given.name)
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
        given.root,
        download=given.download,
        image_size=image_size,
        channels=channels,
        seed=given.seed,
        glyphs=given.glyphs or {},
    )
    opened, notes = _without_broken(opened, given.on_corrupt, given.scan, scan_cache)
    kind = opened.kind
    kind = replace(
        kind,
        size=image_size or kind.size,
        channels=channels or kind.channels,
        augment=kind.augment if augment == "auto" else augment,
        resize=kind.resize or image_size not in (None, kind.size),
    )
    statistics = _statistics(kind, mean, std)
    _check_classes(name, opened, given.on_corrupt)
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
            plain=evaluating,
            on_corrupt=given.on_corrupt,
        )
        for split, (images, chosen) in _split(
            opened, given.val_fraction, given.test_fraction, given.seed
        ).items()
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
            for split, fraction in (("val", given.val_fraction), ("test", given.test_fraction))
            if split not in opened.splits() and fraction
        },
        "seed": given.seed,
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
