"""Image files: any kind decoded to the same tensors, and what is done about broken ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limpq_ext.values.files import write_json
from limpq_ext.values.optional import require
from limpq_ext.values.reading import FileFormatError, read_object

SUFFIXES: Final = frozenset(
    (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""What counts as an image in a folder; other files are not looked at."""

PIECE: Final = 500
"""Files that a scan remembers together, and that one thread looks at."""

Scan = Literal["off", "open", "decode"]
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
    try:
        with image.open(path) as file:
            return _to_tensor(file, channels)
    except MemoryError:
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


@dataclass(frozen=True)
class Scanned:
    """What a look at all files found.

    Attributes:
        broken: Reason by file, relative to the root.
        looked_at: Files that were opened; the others had not changed since the last scan.
    """

    broken: dict[str, str]
    looked_at: int


def scan_images(names: Sequence[str], root: Path, how: Scan, cache: Path | None = None) -> Scanned:
    """Find the files that cannot be read, before a training does.

    Args:
        names: Files, relative to the root.
        root: Their folder.
        how: "open" reads the header and end of a JPEG, the checksums of a PNG, and all of what is
            neither or looks cut short; "decode" reads every pixel; "off" nothing.
        cache: A file that remembers, for a few hundred files at a time, what was found; those of
            which no size and no time of change differs are not looked at again.

    Raises:
        OSError: The cache cannot be written.
    """
    if how == "off":
        return Scanned({}, 0)
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(name)  # noqa: PTH120
    pieces = {
        f"{folder}:{start}": files[start : start + PIECE]
        for folder, files in folders.items()
        for start in range(0, len(files), PIECE)
    }
    known = _read_cache(cache)

    def look_at(piece: str) -> tuple[dict[str, Any], int]:
        files = pieces[piece]
        key = _digest(how, os.fspath(root), *files, *(_stamp(root / name) for name in files))
        if known.get(piece, {}).get("key") == key:
            return known[piece], 0
        reasons = {name: _broken(root / name, how) for name in files}
        return {"key": key, "broken": {n: why for n, why in reasons.items() if why}}, len(files)

    # Threads: Pillow decodes, and files are read, without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(look_at, pieces))
    found = {piece: entry for piece, (entry, _) in zip(pieces, results, strict=True)}
    looked_at = sum(count for _, count in results)
    if cache is not None and looked_at:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, {**known, **found})
    broken = {name: why for entry in found.values() for name, why in entry["broken"].items()}
    return Scanned(broken, looked_at)


def _stamp(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()


def _broken(path: Path, how: Scan) -> str:
    """Why a file cannot be read, or nothing."""
    try:
        if how == "decode" or not _ends_well(path):
            read_image(path, 3)
    except MemoryError:
        raise
    except UnreadableImageError as error:
        return str(error).removeprefix(f"{path}: ")
    except Exception as error:  # see read_image
        return _reason(error)
    return ""


def _ends_well(path: Path) -> bool:
    """Whether header and end of a PNG or JPEG file say that it is whole."""
    with require("PIL.Image", "train").open(path) as file:
        kind = file.format
        if kind == "PNG":
            file.verify()  # all checksums
            return True
    if kind != "JPEG":
        return False
    with path.open("rb") as raw:
        raw.seek(-2, os.SEEK_END)
        return raw.read() == b"\xff\xd9"


def _read_cache(path: Path | None) -> dict[str, Any]:
    """What an earlier scan found; nothing, where its file is missing or damaged."""
    try:
        content = read_object(path, "scan") if path is not None else {}
    except (OSError, FileFormatError):
        return {}
    valid = all(
        isinstance(entry, dict)
        and set(entry) == {"key", "broken"}
        and isinstance(entry["broken"], dict)
        and all(isinstance(why, str) for why in entry["broken"].values())
        for entry in content.values()
    )
    return content if valid else {}
