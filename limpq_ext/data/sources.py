"""Where data sets come from: digits, glyphs, folders of images, and those of torchvision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limpq_ext.data.glyphs import CLASSES, GlyphImages
from limpq_ext.data.images import ImageFiles, Images, image_files
from limpq_ext.data.transforms import Augment
from limpq_ext.training.distributed import from_main
from limpq_ext.values.optional import require

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@dataclass(frozen=True)
class Kind:
    """How the images of a data set are treated where the user does not say otherwise.

    Attributes:
        size: Height and width.
        channels: 1 or 3.
        augment: Of training images.
        statistics: Mean and standard deviation per channel, of pixels from 0 to 1.
        crop_share: Of the shorter side, what evaluation cuts out.
        resize: Whether the files have sizes of their own.
    """

    size: int = 224
    channels: int = 3
    augment: Augment = "resized_crop_flip"
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET
    crop_share: float = 0.875
    resize: bool = True


@dataclass(frozen=True)
class TorchvisionSet:
    """How a data set of torchvision.datasets is opened.

    Attributes:
        constructor: Its class.
        train: Arguments that open the training images.
        test: Likewise; None where the set has no such split, and it is carved out of train.
        val: Likewise.
        kind: How its images are treated.
    """

    constructor: str
    train: Mapping[str, Any]
    test: Mapping[str, Any] | None
    val: Mapping[str, Any] | None = None
    kind: Kind = field(default_factory=Kind)


def _small(size: int, augment: Augment, mean: Any = None, std: Any = None) -> Kind:
    """Images of one size that are not cut for evaluation."""
    statistics = _HALF if mean is None else (mean, std)
    return Kind(size, len(statistics[0]), augment, statistics, crop_share=1.0, resize=False)


_FLAGS: tuple[Any, Any] = ({"train": True}, {"train": False})
_SPLITS: tuple[Any, Any] = ({"split": "train"}, {"split": "test"})
_THREE: tuple[Any, Any, Any] = (*_SPLITS, {"split": "val"})
_GREY = _small(28, "crop", (0.1307,), (0.3081,))

TORCHVISION: Mapping[str, TorchvisionSet] = {
    "caltech101": TorchvisionSet("Caltech101", {}, None),
    "caltech256": TorchvisionSet("Caltech256", {}, None),
    "cifar10": TorchvisionSet(
        "CIFAR10",
        *_FLAGS,
        kind=_small(32, "crop_flip", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "cifar100": TorchvisionSet(
        "CIFAR100",
        *_FLAGS,
        kind=_small(32, "crop_flip", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ),
    "country211": TorchvisionSet("Country211", *_SPLITS, {"split": "valid"}),
    "dtd": TorchvisionSet("DTD", *_THREE),
    "emnist": TorchvisionSet(
        "EMNIST",
        {"split": "balanced", "train": True},
        {"split": "balanced", "train": False},
        kind=_small(28, "crop", (0.1751,), (0.3332,)),
    ),
    "eurosat": TorchvisionSet("EuroSAT", {}, None, kind=_small(64, "crop_flip")),
    "fashionmnist": TorchvisionSet(
        "FashionMNIST", *_FLAGS, kind=_small(28, "crop_flip", (0.2860,), (0.3530,))
    ),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", *_THREE),
    "flowers102": TorchvisionSet("Flowers102", *_THREE),
    "food101": TorchvisionSet("Food101", *_SPLITS),
    "gtsrb": TorchvisionSet(
        "GTSRB", *_SPLITS, kind=replace(_small(32, "crop"), resize=True, crop_share=1.0)
    ),
    "imagenette": TorchvisionSet("Imagenette", {"split": "train"}, {"split": "val"}),
    "kmnist": TorchvisionSet("KMNIST", *_FLAGS, kind=_small(28, "crop", (0.1918,), (0.3483,))),
    "mnist": TorchvisionSet("MNIST", *_FLAGS, kind=_GREY),
    "oxfordiiitpet": TorchvisionSet("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "pcam": TorchvisionSet("PCAM", *_THREE, kind=_small(96, "crop_flip")),
    "places365": TorchvisionSet(
        "Places365", {"split": "train-standard", "small": True}, {"split": "val", "small": True}
    ),
    "qmnist": TorchvisionSet("QMNIST", *_FLAGS, kind=_GREY),
    "renderedsst2": TorchvisionSet(
        "RenderedSST2", *_THREE, kind=Kind(augment="none", crop_share=1.0)
    ),
    "stanfordcars": TorchvisionSet("StanfordCars", *_SPLITS),
    "stl10": TorchvisionSet("STL10", *_SPLITS, kind=_small(96, "crop_flip")),
    "sun397": TorchvisionSet("SUN397", {}, None),
    "svhn": TorchvisionSet(
        "SVHN",
        *_SPLITS,
        kind=_small(32, "crop", (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    ),
    "usps": TorchvisionSet("USPS", *_FLAGS, kind=_small(16, "crop", (0.2469,), (0.2989,))),
}
"""The classification sets of torchvision.datasets with integer classes, by lower-case name. The
ImageNet layout is ``imagenet`` here, which needs no development kit."""

BUILT_IN = ("digits", "glyphs")
FOLDERS = ("imagefolder", "imagenet")
DATA_SETS = (*BUILT_IN, *FOLDERS, *TORCHVISION)


@dataclass(frozen=True)
class Opened:
    """The splits that a data set comes with.

    Attributes:
        train: Training images.
        val: Validation images; None where it has none of its own.
        test: Likewise.
        classes: Their names.
        kind: How the images are treated.
        ready: Whether they are what the network reads, without any transform.
    """

    train: Images
    val: Images | None
    test: Images | None
    classes: Sequence[str]
    kind: Kind
    ready: bool = False

    def splits(self) -> dict[str, Images]:
        """The splits that it has, by name."""
        given = {"train": self.train, "val": self.val, "test": self.test}
        return {name: images for name, images in given.items() if images is not None}


def canonical_name(name: str) -> str:
    """The name of a data set as DATA_SETS has it.

    Raises:
        ValueError: It is unknown.
    """
    prefix, _, rest = name.rpartition("/")
    known = TORCHVISION if prefix == "torchvision" else () if prefix else DATA_SETS
    if rest.lower() not in known:
        raise ValueError(f"unknown data set '{name}': expected one of {', '.join(DATA_SETS)}")
    return rest.lower()


def open_source(
    name: str,
    root: str | os.PathLike[str] | None,
    *,
    download: bool,
    image_size: int | None,
    channels: int | None,
    seed: int,
    glyphs: Mapping[str, Any],
) -> Opened:
    """Open a data set; see :func:`limpq_ext.data.datasets.load_data` for the arguments.

    Args:
        name: One of ``DATA_SETS``.
        root: Folder of the data.
        download: Let torchvision fetch what is missing.
        image_size: Of glyphs, which are drawn in that size.
        channels: 1 or 3; None is what is usual.
        seed: Of glyphs.
        glyphs: Options of glyphs.

    Raises:
        ValueError: The classes or images are wrong.
        FileNotFoundError: They do not exist.
    """
    if name in BUILT_IN:
        if root is not None:
            raise ValueError(f"data.root is '{root}', but {name} is not read from files")
        if name == "digits":
            return _digits()
        return _glyphs(image_size or 32, channels or 3, seed, glyphs)
    if root is None:
        raise ValueError(f"data.root is missing: {name} is read from a folder")
    folder = Path(root).expanduser()
    if not folder.is_dir() and not (download and name in TORCHVISION):
        raise FileNotFoundError(f"data.root '{folder}' is not a folder")
    if name in FOLDERS:
        return _folders(name, folder, channels or 3)
    return _torchvision(name, folder, download, channels)


@dataclass(frozen=True)
class TensorImages:
    """Images that are in memory.

    Attributes:
        images: ``[count, channels, height, width]``.
        labels: Class of each, from 0.
    """

    images: Tensor
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image and class."""
        return self.images[index], int(self.labels[index])

    def identity(self) -> list[Any]:
        """What the samples depend on."""
        digest = hashlib.sha256(self.images.numpy().tobytes() + self.labels.tobytes())
        return [len(self), digest.hexdigest()]


def _digits() -> Opened:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey; a quarter of each class is for testing.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    raw = require("sklearn.datasets", "train").load_digits()
    split = require("sklearn.model_selection", "train").train_test_split
    images = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1)
    labels = raw.target.astype(np.int64)
    train, test = split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    # Of the training images, grey levels 0 to 16.
    images = (images - images[train].mean()) / images[train].std()
    return Opened(
        TensorImages(images[train], labels[train]),
        None,
        TensorImages(images[test], labels[test]),
        [str(digit) for digit in range(10)],
        _small(8, "none", (0.5,), (0.25,)),
        ready=True,
    )


def _glyphs(size: int, channels: int, seed: int, options: Mapping[str, Any]) -> Opened:
    options = dict(options)
    counts = [options.pop(f"{split}_images", count) for split, count in _GLYPHS.items()]
    train, test = (
        GlyphImages(count, split, size=size, channels=channels, seed=seed, **options)
        for split, count in zip(_GLYPHS, counts, strict=True)
    )
    kind = replace(_small(size, "none"), channels=channels)
    return Opened(train, None, test, CLASSES, kind)


_GLYPHS = {"train": 20_000, "test": 10_000}


def _folders(name: str, root: Path, channels: int) -> Opened:
    """Folders of classes: root/class, or root/split/class."""
    names = {"train": "train", "test": "val"} if name == "imagenet" else _OWN_NAMES
    if name == "imagefolder" and not _class_folders(root / "train"):
        names = {"train": "."}
    classes: list[str] | None = None
    splits: dict[str, ImageFiles | None] = {"train": None, "val": None, "test": None}
    for split, part in names.items():
        folder = root / part
        if name == "imagefolder" and split != "train" and not folder.is_dir():
            continue
        here = _class_folders(folder)
        if not here:
            raise FileNotFoundError(
                f"data set {name}: '{folder}' has no folders of classes; expected {_LAYOUTS[name]}"
            )
        if classes is None:
            classes = here
        elif here != classes:
            odd = sorted(set(here) ^ set(classes))[0]
            where = [names["train"], part] if odd in classes else [part, names["train"]]
            raise ValueError(
                f"data set {name}: class '{odd}' is a folder in {where[0]}/ but not in {where[1]}/"
                f" ({len(classes)} and {len(here)} classes)"
            )
        found = [(path, at) for at, one in enumerate(here) for path in image_files(folder / one)]
        if not found:
            raise ValueError(f"data set {name}: there are no images in '{folder}'")
        splits[split] = ImageFiles(
            [path for path, _ in found],
            [at for _, at in found],
            root=root,
            channels=channels,
        )
    assert splits["train"] is not None
    assert classes is not None
    return Opened(splits["train"], splits["val"], splits["test"], classes, Kind())


_OWN_NAMES = {split: split for split in ("train", "val", "test")}
_LAYOUTS = {
    "imagefolder": "root/CLASS/*.jpg, or root/train/CLASS/*.jpg with val/ and test/ beside train/",
    "imagenet": "root/train/CLASS/*.JPEG and root/val/CLASS/*.JPEG",
}


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."
    )


class TorchvisionImages:
    """A data set of torchvision that gives images of Pillow."""

    def __init__(self, data: Any, channels: int) -> None:
        self.labels = _labels(data)
        self._data = data
        self._mode = "L" if channels == 1 else "RGB"
        self._channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image ``[channels, height, width]``, uint8, and its class."""
        pixels = np.array(self._data[index][0].convert(self._mode))
        pixels = pixels.reshape(*pixels.shape[:2], self._channels)
        return torch.from_numpy(pixels).permute(2, 0, 1), int(self.labels[index])

    def identity(self) -> list[Any]:
        """What the samples depend on: torchvision checks the digests of its files itself."""
        digest = hashlib.sha256(self.labels.tobytes()).hexdigest()
        return [type(self._data).__name__, len(self), self._channels, digest]


def _torchvision(
    name: str,
    root: Path,
    download: bool,
    channels: int | None,
) -> Opened:
    entry = TORCHVISION[name]
    constructor = getattr(require("torchvision.datasets", "train"), entry.constructor)

    def construct(arguments: Mapping[str, Any], download: bool) -> Any:
        try:
            return constructor(root, **arguments, download=download)
        except (RuntimeError, OSError) as error:
            # It says "not found or corrupted": the digests of its files are checked there.
            reason = str(error).replace("download=True", "data.download: true")
            raise FileNotFoundError(f"data set {name} in '{root}': {reason}") from error

    def fetch(arguments: Mapping[str, Any]) -> None:
        construct(arguments, True)

    splits: dict[str, Any] = {"train": None, "val": None, "test": None}
    classes: Sequence[str] | None = None
    for split in splits:
        arguments = getattr(entry, split)
        if arguments is None:
            continue
        if download:
            from_main(partial(fetch, arguments))
        data = construct(arguments, False)
        classes = classes or getattr(data, "classes", None)
        splits[split] = _as_images(data, channels or entry.kind.channels, root)
    if classes is None:
        classes = [str(label) for label in range(int(splits["train"].labels.max()) + 1)]
    return Opened(**splits, classes=[str(one) for one in classes], kind=entry.kind)


def _as_images(data: Any, channels: int, root: Path) -> Images:
    """Files where the set is a list of files, so that broken ones are treated as elsewhere."""
    paths = getattr(data, "_image_files", None) or getattr(data, "_images", None)
    for attribute in ("samples", "_samples", "imgs"):
        paths = paths or [pair[0] for pair in getattr(data, attribute, None) or ()]
    if isinstance(paths, list) and paths and isinstance(paths[0], str | Path):
        return ImageFiles(
            [Path(path) for path in paths],
            _labels(data),
            root=root,
            channels=channels,
        )
    return TorchvisionImages(data, channels)


def _labels(data: Any) -> NDArray[np.int64]:
    """The classes of a set of torchvision, whose classes call them by different names."""
    for attribute in ("targets", "labels", "_labels", "y"):
        labels = getattr(data, attribute, None)
        if labels is not None:
            # QMNIST has more about a sample behind its class.
            return np.asarray(labels, dtype=np.int64).reshape(len(labels), -1)[:, 0]
    samples = getattr(data, "_samples", None)
    if samples is not None:
        return np.asarray([sample[1] for sample in samples], dtype=np.int64)
    return np.asarray([data[index][1] for index in range(len(data))], dtype=np.int64)
