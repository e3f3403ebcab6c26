"""Crops of photographs that Debian's packages have, for networks that were trained on ImageNet.

`scripts/real_networks_setup.sh` unpacks the packages. What is a photograph is told by its folder
and by its colours; drawings have few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SUFFIXES: Final = (".jpg", ".png", ".webp")
DRAWN: Final = ("cartoon", "symbols", "toys", "html", "screenshot", "flags", "images_dark")
"""Parts of paths of what is no photograph, or no other one than one that is there."""
LEAST_SIDE: Final = 96
"""Smaller pictures than this, in pixels, are left out."""
LEAST_COLOURS: Final = 1500
"""Of a thumbnail of 64 x 64 pixels; a photograph has more."""
LEAST_AREA: Final = 0.35
"""The share of the largest square that a crop has at least."""


@dataclass(frozen=True)
class Crops:
    """Square crops of some photographs.

    Attributes:
        pixels: ``[n, 3, size, size]``, uint8.
        photographs: How many there are.
    """

    pixels: Tensor
    photographs: int

    def normalised(self, mean: float = 0.5, deviation: float = 0.5) -> Tensor:
        """The crops as a network reads them, float32."""
        return (self.pixels.float() / 255 - mean) / deviation


def find_photographs(folder: Path) -> list[Path]:
    """The photographs below a folder, by name; of a wallpaper in many sizes the largest file."""
    found: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part in str(inner) for part in DRAWN):
            continue
        if not path.is_file() or not _is_photograph(path):
            continue
        key = path.parent if path.parent.parent.name == "contents" else path
        if key not in found or path.stat().st_size > found[key].stat().st_size:
            found[key] = path
    return list(found.values())


def split_photographs(
    paths: Sequence[Path], share: float, seed: int
) -> tuple[list[Path], list[Path]]:
    """Two lists without a photograph in common, the second with this share of them."""
    order = np.random.default_rng(seed).permutation(len(paths))
    second = round(share * len(paths))
    return [paths[i] for i in order[second:]], [paths[i] for i in order[:second]]


def draw_crops(paths: Sequence[Path], count: int, size: int, seed: int) -> Crops:
    """As many crops of every photograph as it takes, the first of each from its middle.

    Args:
        paths: Photographs.
        count: Number of crops in all.
        size: Height and width of a crop.
        seed: Of the places, areas and flips of the further ones; a crop depends on it, on the place
            of its photograph in the list and on its own number only.
    """
    pixels = torch.empty((count, 3, size, size), dtype=torch.uint8)
    for place, path in enumerate(paths):
        numbers = range(place, count, len(paths))
        if not numbers:
            break
        picture = read_photograph(path)
        for number in numbers:
            random = np.random.default_rng([seed, place, number // len(paths)])
            pixels[number] = _crop(picture, size, random if number >= len(paths) else None)
    return Crops(pixels, min(count, len(paths)))


def read_photograph(path: Path) -> Any:
    """A picture in RGB; what is transparent lies on a light grey."""
    picture: Any = Image.open(path)
    if picture.mode in ("RGBA", "LA", "P", "PA"):
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, (236, 236, 236, 255))
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _is_photograph(path: Path) -> bool:
    with Image.open(path) as picture:
        if min(picture.size) < LEAST_SIDE:
            return False
        picture.draft("RGB", (256, 256))  # a JPEG needs not be read in full
        picture.thumbnail((256, 256))
        colours: NDArray[np.uint8] = np.asarray(picture.convert("RGB").resize((64, 64)))
    return len(np.unique(colours.reshape(-1, 3), axis=0)) >= LEAST_COLOURS


def _crop(picture: Any, size: int, random: np.random.Generator | None) -> Tensor:
    width, height = picture.size
    side = float(min(width, height))
    left, top = (width - side) / 2, (height - side) / 2
    if random is not None:
        side *= float(random.uniform(LEAST_AREA, 1)) ** 0.5
        left, top = random.uniform(0, width - side), random.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    crop = picture.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
    return pixels.flip(2) if random is not None and random.random() < 0.5 else pixels
