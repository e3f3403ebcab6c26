"""One process at a time, and names that nobody else took."""

import os
import signal
import subprocess
import sys

import pytest

from limpq_ext.app import locks
from limpq_ext.app.locks import only_one, save_as_new

HOLD = """
import sys, time
from pathlib import Path
from limpq_ext.app.locks import only_one
with only_one(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_waits_no_longer_than_said_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    lock = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="the folder is in use by another limpq process"),
            only_one(lock, "the folder"),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with only_one(lock, "the folder"):
        assert lock.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_free_again_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    with pytest.raises(KeyError), only_one(tmp_path / "lock", "it"):
        raise KeyError
    with only_one(tmp_path / "lock", "it"):
        pass


def test_a_new_file_gets_its_name_and_nothing_is_left_beside_it(tmp_path):
    save_as_new(tmp_path / "out.json", lambda path: path.write_text("mine"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out.json": "mine"}


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_was_taken_meanwhile_is_kept_and_the_result_too(tmp_path, monkeypatch, links):
    def refuse(*arguments):
        raise PermissionError(1, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out.json"
    (tmp_path / "out.1.json").write_text("older")

    def save(path):
        path.write_text("mine")
        out.write_text("theirs")

    with pytest.raises(
        FileExistsError, match=r"'.*out\.json' was written by somebody else.*out\.2"
    ):
        save_as_new(out, save)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "out.json": "theirs", "out.1.json": "older", "out.2.json": "mine"
    }  # fmt: skip
    out.unlink()
    save_as_new(out, lambda path: path.write_text("mine"))
    assert out.read_text() == "mine"


def test_a_save_that_fails_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_as_new(tmp_path / "out.json", fail)
    assert list(tmp_path.iterdir()) == []
