"""Images of a split, and image files: any kind decoded to the same tensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limpq_ext.values.optional import require

SUFFIXES: Final = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""What counts as an image in a folder; other files are not looked at."""

OnCorrupt = Literal["error", "skip"]


class UnreadableImageError(ValueError):
    """An image cannot be decoded; one line that names file and reason."""

    def __init__(self, message: str) -> None:
        # A loading process sends an error as its traceback, which is made an error of the same
        # class again; of that, the last line is the message.
        last = message.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


def read_image(path: str | os.PathLike[str], channels: int) -> Tensor:
    """Decode an image file.

    Grey, palette, CMYK and 1-bit images are converted; 16-bit grey is scaled to 8 bits, not cut
    off; transparent pixels get a white background. Of several frames it is the first.

    Args:
        path: The file.
        channels: 1 for grey, 3 for RGB.

    Returns:
        uint8 ``[channels, height, width]``.

    Raises:
        UnreadableImageError: It is no image, cut short, or of a kind without a known range.
    """
    image = require("PIL.Image", "train")
    with decoding(path), image.open(path) as file:
        return _to_tensor(file, channels)


@contextlib.contextmanager
def decoding(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever Pillow raises into an UnreadableImageError that begins with the file's name."""
    try:
        yield
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # Pillow's decoders raise errors of many classes
        raise UnreadableImageError(f"{os.fspath(path)}: {_reason(error)}") from error


def _to_tensor(file: Any, channels: int) -> Tensor:
    image = require("PIL.Image", "train")
    if file.mode == "I" or file.mode.startswith("I;16"):
        file = image.fromarray(_scaled(np.asarray(file)))
    elif file.mode == "F":
        raise ValueError("the range of floating-point pixels is not known")
    elif file.has_transparency_data:
        rgba = file.convert("RGBA")
        file = image.alpha_composite(image.new("RGBA", rgba.size, "white"), rgba)
    pixels = np.array(file.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


def _scaled(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit grey levels as 8-bit ones, rounded."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ValueError(f"grey levels from {low} to {high} do not fit 16 bits")
    return ((grey.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def _reason(error: Exception) -> str:
    # Pillow repeats the file's name, which the message has already.
    if type(error).__name__ == "UnidentifiedImageError":
        return "is not an image that Pillow can identify"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


class Images(Protocol):
    """Decoded images of one split and their classes, before any transform."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every sample, from 0."""

    def __len__(self) -> int:
        """How many."""

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image ``[channels, height, width]`` and class."""

    def identity(self) -> list[Any]:
        """What the samples depend on, in a form that JSON has."""


class ImageFiles:
    """Image files and their classes.

    Args:
        paths: The files.
        labels: Class of each, from 0.
        root: What their names are relative to where they are written down.
        channels: 1 or 3.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | NDArray[np.int64],
        *,
        root: Path,
        channels: int = 3,
    ) -> None:
        # An array of bytes: a list of a million paths would be copied into every loading process.
        prefix = os.path.join(root, "")  # noqa: PTH118  # of a million files
        self._names = np.array(
            [os.fsencode(path).removeprefix(os.fsencode(prefix)) for path in paths]
        )
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.root = root
        self._channels = channels
        # Loading processes write into it, too.
        self._broken = torch.zeros(len(paths), dtype=torch.bool, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.root / os.fsdecode(self._names[index])

    def names(self) -> list[str]:
        """All files, relative to the root."""
        return [os.fsdecode(name) for name in self._names]

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image ``[channels, height, width]``, uint8, and class of a sample.

        Raises:
            UnreadableImageError: The file cannot be read; it is in :meth:`broken` from then on.
        """
        try:
            return read_image(self.path(index), self._channels), int(self.labels[index])
        except UnreadableImageError:
            self._broken[index] = True
            raise

    def broken(self) -> list[str]:
        """The files that could not be read so far, by this process and those that load for it."""
        return [os.fsdecode(name) for name in self._names[self._broken.numpy()]]

    def without(self, names: Mapping[str, str]) -> ImageFiles:
        """The same but for some files."""
        keep = [i for i, name in enumerate(self.names()) if name not in names]
        paths = [self.path(i) for i in keep]
        return ImageFiles(paths, self.labels[keep], root=self.root, channels=self._channels)

    def identity(self) -> list[Any]:
        """What the samples depend on: names, sizes and classes of the files."""
        digest = hashlib.sha256()
        for at, name in enumerate(self._names):
            digest.update(name + b"\0%d\0%d\n" % (_size(self.path(at)), self.labels[at]))
        return [len(self), digest.hexdigest()]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def image_files(folder: Path) -> Iterator[Path]:
    """The image files of a folder and the folders in it, in the order of their names."""
    for inside, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:  # noqa: PTH122  # faster than a Path
                yield Path(inside, name)
