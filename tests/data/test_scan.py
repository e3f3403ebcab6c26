"""Files are looked at before a training, and once."""

import json
import os

import pytest
from pictures import broken_files, pixels, write_images, written
from PIL import Image

from limpq_ext.data import scan
from limpq_ext.data.images import image_files
from limpq_ext.data.scan import scan_images


@pytest.fixture
def looked_at(monkeypatch):
    """The files that were opened since it was emptied."""
    files = []
    broken = scan._broken

    def record(path, how):
        files.append(path)
        return broken(path, how)

    monkeypatch.setattr(scan, "_broken", record)
    return files


@pytest.mark.parametrize("how", ["open", "decode"])
def test_a_scan_finds_all_of_them(tmp_path, how):
    expected = broken_files(tmp_path)
    good = ["good.png", "good.jpg", "good.webp", "trailing.jpg"]
    for name in good:
        written(tmp_path, Image.fromarray(pixels(0)), name)
    with (tmp_path / "trailing.jpg").open("ab") as file:
        file.write(b"what a camera adds")
    broken = scan_images([*good, *expected], tmp_path, how)
    assert set(broken) == set(expected)
    assert all(reason in broken[name] for name, reason in expected.items())


def test_without_a_scan_nothing_is_looked_at(tmp_path):
    assert scan_images(["missing.png"], tmp_path, "off") == {}


def test_a_jpeg_that_is_damaged_inside_is_found_by_decoding_alone(tmp_path):
    path = written(tmp_path, Image.fromarray(pixels(1, (64, 64))), "hole.jpg")
    content = bytearray(path.read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = 16 * b"\xff"
    path.write_bytes(content)
    assert scan_images(["hole.jpg"], tmp_path, "open") == {}
    assert list(scan_images(["hole.jpg"], tmp_path, "decode")) == ["hole.jpg"]


def test_a_scan_is_paid_once(tmp_path, looked_at):
    for name in ("a", "b"):
        write_images(tmp_path / "data" / name, 3)
    (tmp_path / "data" / "a" / "bad.png").write_bytes(b"")
    root, cache = tmp_path / "data", tmp_path / "run" / "scan.json"
    names = [os.path.relpath(path, root) for path in image_files(root)]
    first = scan_images(names, root, "open", cache)
    assert len(looked_at) == 7
    looked_at.clear()
    assert scan_images(names, root, "open", cache) == first
    assert not looked_at
    (root / "b" / "1.png").write_bytes(b"broken later")
    assert set(scan_images(names, root, "open", cache)) == {"a/bad.png", "b/1.png"}
    assert len(looked_at) == 3
    looked_at.clear()
    scan_images(names, root, "decode", cache)
    assert len(looked_at) == 7
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
def test_a_damaged_memory_of_a_scan_is_made_anew(tmp_path, content, looked_at):
    write_images(tmp_path / "a", 2)
    cache = tmp_path / "scan.json"
    cache.write_text(content)
    scan_images(["a/0.png", "a/1.png"], tmp_path, "open", cache)
    assert len(looked_at) == 2
    assert list(json.loads(cache.read_text())["a:0"]) == ["key", "broken"]


def test_of_a_large_folder_only_the_piece_that_changed_is_looked_at_again(
    tmp_path, monkeypatch, looked_at
):
    monkeypatch.setattr(scan, "PIECE", 4)
    write_images(tmp_path / "a", 10)
    names = [f"a/{number}.png" for number in range(10)]
    cache = tmp_path / "scan.json"
    scan_images(names, tmp_path, "open", cache)
    assert len(looked_at) == 10
    looked_at.clear()
    (tmp_path / "a" / "9.png").write_bytes(b"")
    assert list(scan_images(names, tmp_path, "open", cache)) == ["a/9.png"]
    assert len(looked_at) == 2
