"""What is saved comes back, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import ClassVar

import pytest

from limpq_ext.values import files
from limpq_ext.values.files import Document, Strict, open_atomically
from limpq_ext.values.reading import FileFormatError


@dataclasses.dataclass(frozen=True)
class Part(Strict):
    name: str
    count: int
    share: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Whole(Document):
    parts: tuple[Part, ...]
    total: int | float | None = None

    FORMAT: ClassVar[str] = "test"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("there are no parts")


WHOLE = Whole((Part("a", 3, {2: 0.5, 4: 1.0}), Part("b", 10**20, {})), 0.1)
DOCUMENT = {
    "format": "test",
    "version": 1,
    "parts": [{"name": "a", "count": 3, "share": {"2": 0.5}}],
    "total": 1,
}


def test_a_document_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "whole.json"
    WHOLE.save(path)
    assert Whole.load(path) == WHOLE
    assert list(json.loads(path.read_text()))[:2] == ["format", "version"]


def changed(**fields):
    return json.dumps({**DOCUMENT, **fields})


def part(**fields):
    return changed(parts=[{**DOCUMENT["parts"][0], **fields}])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (changed()[:-20], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", r"holds \[1, 2\], not a JSON object"),
        ('{"format": "test", "format": "test"}', "field 'format' stands twice"),
        ("{}", "format: is missing"),
        (changed(format="other"), 'format: is "other"; this limpq_ext reads format "test"'),
        (changed(version=2), "version: is 2; this limpq_ext reads version 1"),
        (changed(version=True), "version: is true; this limpq_ext reads version 1"),
        (changed(parts=3), "parts: .*, got 3"),
        (changed(parts=[]), "there are no parts"),
        (changed(total="1"), r'total: .*, got "1"'),
        (changed(extra=1), "extra: unknown key"),
        (json.dumps({"format": "test", "version": 1}), "parts: is missing"),
        (part(count="3"), r"parts\[0\]\.count: .*integer, got \"3\""),
        (part(count=3.0), r"parts\[0\]\.count: .*integer, got 3.0"),
        (part(count=True), r"parts\[0\]\.count: .*integer, got true"),
        (part(odd=1), r"parts\[0\]\.odd: unknown key"),
        (part(share={"x": 1}), r"parts\[0\]\.share\.x: .*integer"),
        (part(share={"2": None}), r"parts\[0\]\.share\.2: .*number, got null"),
        (part(name=1, count="x"), r"parts\[0\]\.name: .*\(and 1 more\)"),
        (changed(parts=[{"name": "a", "share": {}}]), r"parts\[0\]\.count: is missing"),
    ],
)
def test_a_wrong_document_is_named_by_file_field_and_reason(tmp_path, text, reason):
    path = tmp_path / "whole.json"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=reason) as caught:
        Whole.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_every_cut_of_a_document_is_refused(tmp_path):
    path = tmp_path / "whole.json"
    text = changed()
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(FileFormatError):
            Whole.load(path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "whole.json"
    path.write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(FileFormatError, match="not UTF-8 text"):
        Whole.load(path)


def test_a_missing_file_is_a_file_not_found_error_of_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot read the test file") as caught:
        Whole.load(tmp_path / "none.json")
    assert "none.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_cannot_be_read(tmp_path):
    with pytest.raises(IsADirectoryError, match="cannot read the test file"):
        Whole.load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_cannot_be_read(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(changed())
    path.chmod(0)
    with pytest.raises(PermissionError, match="cannot read the test file"):
        Whole.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "old.json"
    path.write_text("old")
    with pytest.raises((TypeError, ValueError), match=r"old\.json: not written"):
        files.write_json(path, {"a": value})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "old.bin"
    path.write_bytes(b"old")

    def chunks():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_atomically(path) as file:
        file.writelines(chunks())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(OSError), open_atomically(folder) as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == [folder]


def test_writing_replaces_what_a_link_points_to_and_keeps_the_link(tmp_path):
    target = tmp_path / "target.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    files.write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(target.read_text()) == [1]


def test_a_new_file_has_the_usual_permissions(tmp_path):
    usual, ours = tmp_path / "usual", tmp_path / "ours"
    usual.write_bytes(b"")
    files.write_json(ours, {})
    assert ours.stat().st_mode == usual.stat().st_mode


def test_a_file_that_is_larger_than_files_are_is_not_read_whole(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(FileFormatError, match="larger than a test file may be, 32 MiB"):
        Whole.load(path)


def test_a_file_with_a_mark_in_front_is_read(tmp_path):
    path = tmp_path / "whole.json"
    path.write_text(changed(), encoding="utf-8-sig")
    assert Whole.load(path).parts[0].name == "a"
