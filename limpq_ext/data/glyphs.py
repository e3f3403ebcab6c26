"""``glyphs``: letters and digits drawn from fonts, a data set of any size without a download.

Every image depends on seed, split and index alone, so a set is the same on every machine with the
same fonts and the same Pillow, in whatever order and in however many processes it is drawn.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limpq_ext.values.optional import require

CLASSES: Final = (
    *("0Oo", "1Il", *"23456789"),
    *("A", "B", "Cc", "D", "E", "F", "G", "H", "J", "Kk", "L", "M", "N", "Pp", "Q", "R", "Ss", "T"),
    *("Uu", "Vv", "Ww", "Xx", "Y", "Zz"),
)
"""The characters of each class. Those that cannot be told apart once position and size are random
are one class: zero and the letter O, one and the letters I and l, and the letters whose lower case
is a smaller upper case. That leaves 34."""

_CHARACTERS: Final = "".join(CLASSES)
_STREAMS: Final = {"train": 0, "test": 1}


class GlyphImages:
    """One split of the drawn data set; class ``i % 34`` has image ``i``.

    A glyph of a random font is scaled, stretched, sheared, rotated and moved, and blended into a
    background of another colour; both have a soft texture. Parts of other glyphs stand behind it,
    strokes cross it, and all of it is blurred and gets noise.

    Args:
        count: How many images.
        split: "train" or "test"; the two have no image in common.
        size: Height and width.
        channels: 1 (grey) or 3.
        seed: At least 0.
        difficulty: 0 draws clean, upright glyphs; 1 is the data set; more is harder.
        fonts: Font files to draw from beside those of matplotlib.
        cache: Keep what :meth:`load` draws in memory; without it every access draws.

    Raises:
        ImportError: matplotlib or Pillow is missing.
        FileNotFoundError: A font file does not exist.
        ValueError: A font lacks a character, or a number is out of range.
    """

    def __init__(
        self,
        count: int,
        split: str,
        *,
        size: int = 32,
        channels: int = 3,
        seed: int = 0,
        difficulty: float = 1.0,
        fonts: Sequence[str | os.PathLike[str]] = (),
        cache: bool = True,
    ) -> None:
        if count < len(CLASSES):
            raise ValueError(f"glyphs: {count} images are too few for {len(CLASSES)} classes")
        if size < 8:
            raise ValueError(f"glyphs: the image size is {size}, expected at least 8")
        if channels not in (1, 3):
            raise ValueError(f"glyphs: channels is {channels}, expected 1 or 3")
        if not 0 <= difficulty <= 3:
            raise ValueError(f"glyphs: difficulty is {difficulty}, expected 0 to 3")
        self.labels: NDArray[np.int64] = np.arange(count, dtype=np.int64) % len(CLASSES)
        self._key = (seed, _STREAMS[split])
        self._size = size
        self._channels = channels
        self._difficulty = difficulty
        self._cache = cache
        self._fonts = [*matplotlib_fonts(), *map(_checked, fonts)]
        self._atlas = _atlas(self._fonts, 2 * size)
        self._pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Tensor, int]:
        """Image ``[channels, size, size]``, uint8, and its class."""
        if self._pixels is not None:
            return self._pixels[index], int(self.labels[index])
        return torch.from_numpy(self._draw(index)), int(self.labels[index])

    def load(self) -> None:
        """Draw all images, once, where they are cached."""
        if self._cache and self._pixels is None:
            shape = (len(self), self._channels, self._size, self._size)
            pixels = torch.empty(shape, dtype=torch.uint8, device="cpu")
            for index in range(len(self)):
                pixels[index] = torch.from_numpy(self._draw(index))
            self._pixels = pixels

    def identity(self) -> list[Any]:
        """What the images depend on."""
        fonts = [path.name for path in self._fonts]
        return [len(self), *self._key, self._size, self._channels, self._difficulty, fonts]

    def _draw(self, index: int) -> NDArray[np.uint8]:
        random = np.random.default_rng([*self._key, index])
        hard = self._difficulty
        paper, ink = self._colours(random)
        image = self._textured(random, paper)
        for _ in range((random.random(3) < 0.6 * hard).sum()):
            # Beside the glyph, so that parts of it are seen at the border.
            angle = random.uniform(0, 2 * math.pi)
            at = (0.62 * math.cos(angle), 0.62 * math.sin(angle))
            mask = self._mask(random, int(random.integers(len(_CHARACTERS))), at)
            _blend(image, self._textured(random, _between(random, paper, ink)), mask)
        characters = CLASSES[index % len(CLASSES)]
        character = _CHARACTERS.index(characters[random.integers(len(characters))])
        move = 0.12 * hard
        at = (random.uniform(-move, move), random.uniform(-move, move))
        _blend(image, self._textured(random, ink), self._mask(random, character, at))
        for _ in range((random.random(2) < 0.4 * hard).sum()):
            _blend(image, self._textured(random, _between(random, paper, ink)), self._line(random))
        return self._worn(random, image)

    def _colours(self, random: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
        """Of background and glyph; the harder, the nearer they may be to each other."""
        paper = random.uniform(30, 225, self._channels)
        least = 110 / (1 + 1.2 * self._difficulty)
        direction = random.choice((-1.0, 1.0))
        if not least <= paper.mean() + direction * least <= 255 - least:
            direction = -direction
        step = direction * random.uniform(least, 2 * least)
        ink = paper + step + random.uniform(-20, 20, self._channels)
        return paper, ink

    def _textured(self, random: np.random.Generator, colour: NDArray[Any]) -> NDArray[np.float32]:
        """A colour with soft random spots, ``[channels, size, size]``."""
        image = require("PIL.Image", "train")
        cells = int(random.integers(2, 8))
        coarse = random.integers(0, 256, (cells, cells), dtype=np.uint8)
        spots = image.fromarray(coarse).resize((self._size, self._size), image.Resampling.BICUBIC)
        strength = random.uniform(0, 0.35 * min(self._difficulty, 2.0))
        soft = (np.asarray(spots, dtype=np.float32) - 127.5) * np.float32(strength)
        return colour.astype(np.float32)[:, None, None] + soft

    def _mask(
        self, random: np.random.Generator, character: int, at: tuple[float, float]
    ) -> NDArray[np.float32]:
        """Where a glyph of a random font covers the image, 0 to 1; ``at`` is from the centre."""
        image = require("PIL.Image", "train")
        hard = self._difficulty
        cell = image.fromarray(self._atlas[random.integers(len(self._fonts)), character])
        height = random.uniform(0.75 - 0.3 * min(hard, 1.5), 0.85)
        stretch = math.exp(random.uniform(-0.25, 0.25) * hard)
        shear = random.uniform(-0.3, 0.3) * hard
        angle = math.radians(random.uniform(-25, 25) * hard)
        # Pillow wants the way back: from a pixel of the mask, turn, then undo stretch and shear.
        # A glyph is as high as the atlas cell, and the mask is drawn at twice the size.
        cosine, sine = math.cos(angle) / height, math.sin(angle) / height
        back = (
            ((cosine + shear * sine) / stretch, (sine - shear * cosine) / stretch),
            (-sine, cosine),
        )
        side = 2 * self._size
        x, y = (side / 2 + side * offset for offset in at)
        rows = [number for a, b in back for number in (a, b, side / 2 - a * x - b * y)]
        moved = cell.transform(
            (side, side), image.Transform.AFFINE, rows, image.Resampling.BILINEAR
        )
        return np.asarray(moved.reduce(2), dtype=np.float32) / np.float32(255)

    def _line(self, random: np.random.Generator) -> NDArray[np.float32]:
        """Where a straight stroke through the middle part covers the image."""
        image, draw = require("PIL.Image", "train"), require("PIL.ImageDraw", "train")
        side = 2 * self._size
        canvas = image.new("L", (side, side))
        ends = random.uniform(0, side, 4)
        width = max(1, round(random.uniform(0.02, 0.07) * side))
        draw.Draw(canvas).line([tuple(ends[:2]), tuple(ends[2:])], fill=255, width=width)
        return np.asarray(canvas.reduce(2), dtype=np.float32) / np.float32(255)

    def _worn(self, random: np.random.Generator, image: NDArray[Any]) -> NDArray[np.uint8]:
        """The image blurred and with noise."""
        pil, filters = require("PIL.Image", "train"), require("PIL.ImageFilter", "train")
        blur = random.uniform(0, 0.02 * self._difficulty) * self._size
        deviation = random.uniform(0, 30) * self._difficulty
        # Sums of bytes instead of normal numbers: cheap, and exact on every machine.
        grains = random.integers(0, 256, (4, *image.shape), dtype=np.uint8).sum(
            axis=0, dtype=np.int32
        )
        noise = (grains - 510) * np.float32(deviation / 147.8)
        soft = np.stack(
            [
                pil.fromarray(plane).filter(filters.BoxBlur(blur))
                for plane in image.clip(0, 255).round().astype(np.uint8)
            ]
        )
        return (soft + noise).round().clip(0, 255).astype(np.uint8)


def _between(random: np.random.Generator, paper: NDArray[Any], ink: NDArray[Any]) -> NDArray[Any]:
    """A colour from the background's to the glyph's."""
    return paper + (ink - paper) * random.uniform(0.3, 1.0)


def _blend(image: NDArray[Any], colour: NDArray[Any], mask: NDArray[Any]) -> None:
    """Paint a colour where the mask is 1, in place."""
    image += (colour - image) * mask


def matplotlib_fonts() -> list[Path]:
    """The fonts of letters that matplotlib carries, without those of symbols, by name.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder = Path(require("matplotlib", "fonts").get_data_path()) / "fonts" / "ttf"
    return [path for path in sorted(folder.glob("*.ttf")) if _has_letters(path)]


def _has_letters(path: Path) -> bool:
    """Whether the glyphs are what their codes say: TeX's symbols stand at codes of letters."""
    font = require("matplotlib.ft2font", "fonts").FT2Font(str(path))
    codes = font.get_charmap()
    if not all(ord(character) in codes for character in _CHARACTERS):
        return False
    letter, digit = (font.get_glyph_name(codes[ord(character)]) for character in "A3")
    return letter == "A" and digit.startswith("three")


def _checked(font: str | os.PathLike[str]) -> Path:
    """A font of the user's that has all characters."""
    path = Path(font)
    if not path.is_file():
        raise FileNotFoundError(f"glyphs: the font '{path}' does not exist")
    try:
        codes = require("matplotlib.ft2font", "fonts").FT2Font(str(path)).get_charmap()
    except RuntimeError as error:
        raise ValueError(f"glyphs: '{path}' is not a font: {error}") from error
    missing = [character for character in _CHARACTERS if ord(character) not in codes]
    if missing:
        raise ValueError(f"glyphs: the font '{path}' has no '{missing[0]}'")
    return path


def _atlas(fonts: Sequence[Path], side: int) -> NDArray[np.uint8]:
    """Every character of every font, ``[fonts, characters, side, side]``, filling the height."""
    image, draw = require("PIL.Image", "train"), require("PIL.ImageDraw", "train")
    truetype = require("PIL.ImageFont", "train").truetype
    atlas = np.zeros((len(fonts), len(_CHARACTERS), side, side), dtype=np.uint8)
    for number, path in enumerate(fonts):
        font = truetype(os.fspath(path), 2 * side)
        for at, character in enumerate(_CHARACTERS):
            left, top, right, bottom = font.getbbox(character)
            width, height = right - left, bottom - top
            drawn = image.new("L", (width, height))
            draw.Draw(drawn).text((-left, -top), character, fill=255, font=font)
            scale = side / max(width, height)
            fit = drawn.resize(
                (max(1, round(width * scale)), max(1, round(height * scale))),
                image.Resampling.BOX,
            )
            cell = image.new("L", (side, side))
            cell.paste(fit, ((side - fit.width) // 2, (side - fit.height) // 2))
            atlas[number, at] = np.asarray(cell)
    return atlas
