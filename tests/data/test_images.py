"""Image files of every kind, and broken ones."""

import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from pictures import cut_short, pixels, write_images
from PIL import Image

from limpq_ext.data.images import UnreadableImageError, image_files, read_image, scan_images

RGB = pixels(0)
GREY = pixels(0, channels=1)


def written(folder, image, name="image.png", **options):
    image.save(folder / name, **options)
    return folder / name


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


def test_a_broken_file_is_named_in_one_line(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImageError) as error:
            read_image(tmp_path / name, 3)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["open", "decode"])
def test_a_scan_finds_all_of_them(tmp_path, how):
    expected = broken_files(tmp_path)
    good = ["good.png", "good.jpg", "good.webp", "trailing.jpg"]
    for name in good:
        written(tmp_path, Image.fromarray(RGB), name)
    with (tmp_path / "trailing.jpg").open("ab") as file:
        file.write(b"what a camera adds")
    broken = scan_images([*good, *expected], tmp_path, how).broken
    assert set(broken) == set(expected)
    assert all(reason in broken[name] for name, reason in expected.items())


def test_without_a_scan_nothing_is_looked_at(tmp_path):
    assert scan_images(["missing.png"], tmp_path, "off").broken == {}


def test_a_jpeg_that_is_damaged_inside_is_found_by_decoding_alone(tmp_path):
    path = written(tmp_path, Image.fromarray(pixels(1, (64, 64))), "hole.jpg")
    content = bytearray(path.read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = 16 * b"\xff"
    path.write_bytes(content)
    assert scan_images(["hole.jpg"], tmp_path, "open").broken == {}
    assert list(scan_images(["hole.jpg"], tmp_path, "decode").broken) == ["hole.jpg"]


def test_a_scan_is_paid_once(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, 3)
    (tmp_path / "data" / "a" / "bad.png").write_bytes(b"")
    root, cache = tmp_path / "data", tmp_path / "run" / "scan.json"
    names = [os.path.relpath(path, root) for path in image_files(root)]
    first = scan_images(names, root, "open", cache)
    assert first.looked_at == 7
    again = scan_images(names, root, "open", cache)
    assert (again.looked_at, again.broken) == (0, first.broken)
    (root / "b" / "1.png").write_bytes(b"broken later")
    later = scan_images(names, root, "open", cache)
    assert later.looked_at == 3
    assert set(later.broken) == {"a/bad.png", "b/1.png"}
    assert scan_images(names, root, "decode", cache).looked_at == 7
    assert cache.stat().st_size < 1000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"a": 3}',
        '{"a": {"key": "b"}}',
        '{"a": {"key": "b", "broken": []}}',
        '{"a": {"key": "b", "broken": {"c": 1}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_memory_of_a_scan_is_made_anew(tmp_path, content):
    write_images(tmp_path / "a", 2)
    cache = tmp_path / "scan.json"
    cache.write_text(content)
    assert scan_images(["a/0.png", "a/1.png"], tmp_path, "open", cache).looked_at == 2
    assert list(json.loads(cache.read_text())["a:0"]) == ["key", "broken"]


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


def test_of_a_large_folder_only_the_piece_that_changed_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr("limpq_ext.data.images.PIECE", 4)
    write_images(tmp_path / "a", 10)
    names = [f"a/{number}.png" for number in range(10)]
    cache = tmp_path / "scan.json"
    assert scan_images(names, tmp_path, "open", cache).looked_at == 10
    (tmp_path / "a" / "9.png").write_bytes(b"")
    again = scan_images(names, tmp_path, "open", cache)
    assert (again.looked_at, list(again.broken)) == (2, ["a/9.png"])
