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


def written(folder, image, name="image.png", **options):
    image.save(folder / name, **options)
    return folder / name


def broken_files(folder):
    """Files that are no images, and the words that say why."""
    written(folder, Image.fromarray(np.zeros((4, 4), np.float32)), "float.tif")
    written(folder, Image.fromarray(np.full((4, 4), 70000, np.int32)), "deep.tif")
    for name in ("cut.png", "cut.jpg"):
        cut_short(written(folder, Image.fromarray(pixels(1, (64, 64))), name))
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    return {
        "float.tif": "the range of floating-point pixels is not known",
        "deep.tif": "grey levels from 70000 to 70000 do not fit 16 bits",
        "cut.png": "",
        "cut.jpg": "truncated",
        "empty.png": "is not an image",
        "text.png": "is not an image",
        "missing.png": "No such file",
    }
