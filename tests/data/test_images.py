"""Image files of every kind, and broken ones."""

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from pictures import broken_files, pixels, write_images, written
from PIL import Image

from limpq_ext.data.images import UnreadableImageError, image_files, read_image

RGB = pixels(0)
GREY = pixels(0, channels=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_of_png_gives_the_same_kind_of_tensor(tmp_path, mode, channels):
    image = Image.fromarray(RGB).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = read_image(written(tmp_path, image), channels)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (channels, 12, 10)


def test_rgb_pixels_are_those_of_the_file(tmp_path):
    tensor = read_image(written(tmp_path, Image.fromarray(RGB)), 3)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), RGB)


def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path):
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        tensor = read_image(written(tmp_path, Image.fromarray(levels), name), 3)
        assert tensor[0].tolist() == tensor[2].tolist() == [[0, 0, 1, 1, 128, 255]]


def test_transparent_pixels_are_white_whatever_lies_under_them(tmp_path):
    rgba = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    rgba[:6, :, 3] = 0
    tensor = read_image(written(tmp_path, Image.fromarray(rgba)), 3).permute(1, 2, 0).numpy()
    assert (tensor[:6] == 255).all()
    assert np.array_equal(tensor[6:], RGB[6:])


def test_a_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(GREY).convert("P")
    path = written(tmp_path, image, transparency=int(np.asarray(image)[0, 0]))
    assert read_image(path, 3)[:, 0, 0].tolist() == [255, 255, 255]


def test_cmyk_is_converted(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    tensor = read_image(written(tmp_path, red, "red.jpg", quality=95), 3).float().mean((1, 2))
    assert tensor[0] > 220
    assert max(tensor[1], tensor[2]) < 40


def test_a_broken_file_is_named_in_one_line(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImageError) as error:
            read_image(tmp_path / name, 3)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


def test_other_files_of_a_folder_are_not_images(tmp_path):
    write_images(tmp_path / "b", 1, suffix=".JPEG")
    write_images(tmp_path / "a" / "deeper", 1)
    write_images(tmp_path / ".thumbnails", 1)
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / "._0.png").write_text("")
    found = [os.path.relpath(path, tmp_path) for path in image_files(tmp_path)]
    assert found == ["a/deeper/0.png", "b/0.JPEG"]


def test_the_error_of_a_loading_process_is_the_same_line():
    wrapped = torch._utils.ExceptionWrapper
    try:
        raise UnreadableImageError("x.png: truncated")
    except UnreadableImageError:
        sent = pickle.loads(pickle.dumps(wrapped(where="in DataLoader worker process 0")))
    with pytest.raises(UnreadableImageError, match=r"^x\.png: truncated$"):
        sent.reraise()
