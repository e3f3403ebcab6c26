"""How reading a file ends: in a value, or in one line."""

import os

import pytest
from torch import nn

from limpq_ext import FileFormatError, Indicators, LatencyTable, Policy
from limpq_ext.app.recipe import load_recipe, load_restrictions
from limpq_ext.app.weights import load_weights
from limpq_ext.training.checkpoint import Checkpoint
from limpq_ext.training.metrics import MetricsFile
from limpq_ext.values.reading import first_line, reading


@pytest.mark.parametrize("name", ["pipe", "zero"])
@pytest.mark.parametrize(
    "read",
    [
        Policy.load,
        Indicators.from_limpq,
        Indicators.from_limpq_checkpoint,
        Indicators.from_checkpoint,
        lambda path: Policy.from_limpq(path, ["a"]),
        LatencyTable.load,
        lambda path: load_weights(nn.Linear(1, 1), path),
        lambda path: load_weights(nn.Linear(1, 1), path.with_suffix(".safetensors")),
        lambda path: load_recipe(path),
        lambda path: load_restrictions(path),
        lambda path: Checkpoint(path).load(),
        lambda path: MetricsFile(path).start("a"),
    ],
)
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, name, read):
    for path in (tmp_path / name, tmp_path / f"{name}.safetensors"):
        if name == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    with pytest.raises(FileFormatError, match="a pipe or a device, not a"):
        read(tmp_path / name)


def test_an_error_is_one_printable_line_of_bounded_length():
    error = FileFormatError("x.json: layer 'a\x1b[31m\u2028\ud800\nb': wrong" + "x" * 10**6)
    assert str(error).startswith("x.json: layer 'a\\x1b[31m ")
    assert str(error).isprintable()
    assert len(str(error)) == 1000


def test_whatever_a_parser_raises_names_the_file():
    for raised, said in (
        (KeyError("x"), "not a list: KeyError: 'x'"),
        (MemoryError(), "not a list: needs more memory than there is"),
        (RecursionError(), "not a list: is nested too deeply"),
        (ValueError("wrong"), "not a list: wrong"),
        (FileFormatError("a.txt: wrong"), "wrong"),
        (FileFormatError("field: wrong"), "field: wrong"),
    ):
        with pytest.raises(FileFormatError) as caught, reading("a.txt", "not a list"):
            raise raised
        assert str(caught.value) == f"a.txt: {said}"


def test_a_missing_library_is_not_taken_for_a_wrong_file():
    with pytest.raises(ImportError, match="not here"), reading("a.txt"):
        raise ImportError("not here")


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("wrong"), "wrong", "ValueError: wrong"),
        (RuntimeError("\nwrong\n\nTrust the file."), "wrong", "RuntimeError: wrong"),
        (NotImplementedError(), "NotImplementedError", "NotImplementedError"),
    ],
)
def test_of_an_error_its_first_line_is_told_or_else_its_type(error, line, typed):
    assert (first_line(error), first_line(error, typed=True)) == (line, typed)
