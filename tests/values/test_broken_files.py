"""Mutations of valid files of every kind, read in a process with little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "broken_files.py"


def read_broken(folder, *options, timeout=600):
    """The worker's last line, and what it found to be wrong."""
    command = [sys.executable, str(WORKER), str(folder), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, f"after {lines[-1:]}: {ended.stderr[-3000:]}"
    return lines[-1], [line for line in lines if "problem" in line]


def test_broken_files_end_in_a_value_or_in_one_sentence(tmp_path):
    counts, problems = read_broken(tmp_path, "--count", "500")
    assert not problems
    assert sum(counts["tried"].values()) == 500


def test_files_made_to_take_all_memory_or_for_ever_are_refused_with_the_reason(tmp_path):
    _, problems = read_broken(tmp_path, "--hostile")
    assert not problems


@pytest.mark.slow
def test_many_broken_files_do_so_too(tmp_path):
    options = ("--count", "20000", "--seed", "1000000")
    counts, problems = read_broken(tmp_path, *options, timeout=7200)
    assert not problems
    assert sum(counts["tried"].values()) == 20_000
