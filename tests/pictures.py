"""Small folders of images, written for a test."""

import numpy as np
from PIL import Image


def pixels(seed, size=(12, 10), channels=3):
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder, count, *, seed=0, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = Image.fromarray(pixels(100 * seed + number))
        image.save(folder / f"{number}{suffix}")


def write_classes(root, counts, *, suffix=".png", seed=0):
    """One folder per class with as many images as ``counts`` says by name."""
    for at, (name, count) in enumerate(counts.items()):
        write_images(root / name, count, seed=seed + at, suffix=suffix)
    return root


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
