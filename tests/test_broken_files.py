"""Mutations of valid files of every kind, read in a process with little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("broken_files.py")


def read_broken(folder, count, *, seed=0):
    """The worker's last line, and what it found to be wrong."""
    command = [sys.executable, str(WORKER), str(folder), "--count", str(count), "--seed", str(seed)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120 + count, check=False
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"after {lines[-1:]}: {ended.stderr[-3000:]}"
    return lines[-1], [line for line in lines if "problem" in line]


def test_broken_files_end_in_a_value_or_in_one_sentence(tmp_path):
    counts, problems = read_broken(tmp_path, 500)
    assert not problems
    assert sum(counts["tried"].values()) == 500


@pytest.mark.slow
def test_many_broken_files_do_so_too(tmp_path):
    counts, problems = read_broken(tmp_path, 20_000, seed=1_000_000)
    assert not problems
    assert sum(counts["tried"].values()) == 20_000
