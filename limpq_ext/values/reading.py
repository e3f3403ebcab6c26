"""Files from elsewhere: how much they may hold, and how reading them ends.

Reading ends with a value, with an OSError where the file cannot be read at all, or with a
:class:`FileFormatError`; whatever else a parser raises becomes one in :func:`reading`. What a file
can make the process do is bounded before it is parsed: bytes, depth, and how many values there are
once everything that a file refers to repeatedly is counted as often as it is referred to.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

from limpq_ext.values.optional import require

TEXT_BYTES: Final = 32 * 2**20
"""The most bytes of a JSON or CSV file, or of a pickle without tensors."""

YAML_BYTES: Final = 2**20
YAML_VALUES: Final = 100_000
"""The most values of a YAML file, what an alias stands for counted each time."""

YAML_SCALAR: Final = 10_000
"""The most characters of a single value in YAML; its numbers are read in quadratic time."""

DEPTH: Final = 64
"""How deeply values may be nested."""

DIGITS: Final = 100
"""The most digits of an integer in JSON."""

SHOWN: Final = 1000
"""The most characters of an error."""


class FileFormatError(ValueError):
    """A file does not hold what it should; one printable line that names file, field and reason."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.splitlines())
        if not line.isprintable():
            line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        super().__init__(line if len(line) <= SHOWN else line[: SHOWN - 3] + "...")


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Turn whatever parsing raises into a FileFormatError that begins with the file's name.

    Args:
        path: The file, for the error.
        what: What comes between its name and the reason, as in ``"not JSON"``.

    Raises:
        FileFormatError: Something was raised within the block.
        ImportError: A library is missing, which is not the file's fault.
    """
    name = os.fspath(path)
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # a broken file raises almost anything
        reason = _reason(error)
        if reason.startswith(f"{name}: "):
            reason = reason.removeprefix(f"{name}: ")
        elif what and not isinstance(error, FileFormatError):
            reason = f"{what}: {reason}"
        raise FileFormatError(f"{name}: {reason}") from error


def _reason(error: Exception) -> str:
    """An error as a part of a sentence."""
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    text = str(error).strip()
    if isinstance(error, ValueError | pickle.UnpicklingError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(error: Exception, *, typed: bool = False) -> str:
    """What an error says, in one line: whatever raised it may add a page of advice.

    Args:
        error: From code that is not ours.
        typed: Put the name of its type in front. Where it says nothing, that stands alone anyway.
    """
    name = type(error).__name__
    line = (str(error).strip().splitlines() or [""])[0]
    return (f"{name}: {line}" if typed else line) if line else name


def first_problem(error: Any, document: Any) -> str:
    """'field: reason' of the first thing that pydantic found, and how many more there are.

    Args:
        error: Its ValidationError.
        document: What it checked: containers, strings and numbers.
    """
    errors = error.errors(include_url=False)
    first = errors[0]
    field = ""
    value = document
    for part in first["loc"]:  # it ends in type names and the like, which are no part of the file
        if isinstance(value, list | tuple) and isinstance(part, int):
            value = value[part] if part < len(value) else None
            field += f"[{part}]"
        elif isinstance(value, dict) and (part in value or first["type"] == "missing"):
            value = value.get(part)
            field += f".{part}" if field else f"{part}"
        else:
            break
    if first["type"] == "missing":
        reason = "is missing"
    elif first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        reason = "unknown key"
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
    else:
        reason = f"{first['msg']}, got {as_json(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (f"{field}: " if field else "") + reason + more


def as_json(value: object) -> str:
    """A value as a file has it, cut to a length that fits a message."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # of YAML: a date, an integer that Python does not write
        return shown(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shown(value: object) -> str:
    """A value of any size and shape in a few characters."""
    return _Short().repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 100  # names of layers are shown whole
        self.maxother = 60

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long integers.
        return str(x) if abs(x) < 10**30 else f"an integer of {x.bit_length()} bits"


# ------------------------------------------------------------------------------------------- bytes


def open_regular(path: str | os.PathLike[str], what: str) -> BinaryIO:
    """Open a file for reading, if it is one: no pipe, no device, which may have no end.

    Args:
        path: The file.
        what: What it should be, for the error message.

    Raises:
        OSError: If it cannot be read; the subclass and ``errno`` are those of the cause
            (``FileNotFoundError`` where there is no such file).
        FileFormatError: If it is a pipe, a device or a socket.
    """
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return Path(path).open("rb")
    except ValueError as error:  # a name with a zero in it
        raise FileFormatError(f"{os.fspath(path)}: {error}") from error
    except OSError as error:
        reason = f"cannot read the {what} file: {error.strerror}"
        raise OSError(error.errno, reason, os.fspath(path)) from error
    raise FileFormatError(f"{os.fspath(path)}: a pipe or a device, not a {what} file")


def read_bytes(path: str | os.PathLike[str], what: str, most: int = TEXT_BYTES) -> bytes:
    """Read a whole file.

    Args:
        path: The file.
        what: What it should be, for the error message.
        most: How many bytes it may have.

    Returns:
        Its bytes.

    Raises:
        OSError: If it cannot be read; the subclass and ``errno`` are those of the cause
            (``FileNotFoundError`` where there is no such file).
        FileFormatError: If it is no regular file, or too large.
    """
    data = bytearray()
    with open_regular(path, what) as file:
        while chunk := file.read(2**20):
            data += chunk
            if len(data) > most:
                raise FileFormatError(
                    f"{os.fspath(path)}: larger than a {what} file may be, {most / 2**20:g} MiB"
                )
    return bytes(data)


def decode(data: bytes) -> str:
    """Text in UTF-8, with or without the mark that some programs put in front.

    Raises:
        ValueError: If it is not.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start}: {error.reason})") from error


# -------------------------------------------------------------------------------------------- JSON


def parse_json(text: str) -> Any:
    """The value that a JSON text holds; NaN and Infinity pass, for the fields to judge.

    Raises:
        ValueError: If it is not JSON, a field stands twice, or a limit is passed.
        RecursionError: If it is nested very deeply.
    """
    value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {DEPTH} deep")


def read_object(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        what: What it should be, for the error message.

    Raises:
        OSError: If it cannot be read.
        FileFormatError: If it holds no JSON object.
    """
    data = read_bytes(path, what)
    with reading(path):
        text = decode(data)
    with reading(path, "not JSON, or cut short"):
        document = parse_json(text)
    if not isinstance(document, dict):
        raise FileFormatError(f"{os.fspath(path)}: holds {shown(document)}, not a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no field stands twice (json itself keeps the last one silently)."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"field {shown(name)} stands twice in one object")
    return fields


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


# -------------------------------------------------------------------------------------------- YAML


def parse_yaml(text: str) -> Any:
    """The value that a YAML text holds, of plain types; "off" is a word, as in YAML 1.2.

    Raises:
        ValueError: If it is not YAML, a key stands twice in one mapping, or a limit is passed.
        ImportError: If PyYAML is not installed.
    """
    yaml = require("yaml", "cli")
    if len(text) > YAML_BYTES:
        raise ValueError(f"{len(text)} characters of YAML, more than {YAML_BYTES}")
    try:
        return yaml.load(text, _yaml_loader())
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ValueError(reason) from error
    except (KeyError, AttributeError, TypeError) as error:  # of constructors: `!!bool x`
        raise ValueError("a value is not of the type that its tag says") from error


@cache
def _yaml_loader() -> type[Any]:
    """The loader of plain types, within limits."""
    yaml = require("yaml", "cli")
    boolean = "tag:yaml.org,2002:bool"

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]  # imported by require
        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [(tag, pattern) for tag, pattern in pairs if tag != boolean]
            for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self._depth = 0
            self._values = 0
            self._sizes: dict[int, int] = {}  # of nodes that are complete

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.peek_event().start_mark
            aliased = self.check_event(yaml.AliasEvent)
            before = self._values
            self._values += 1
            self._depth += 1
            if self._depth > DEPTH:
                raise yaml.MarkedYAMLError(None, None, f"nested more than {DEPTH} deep", mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            if aliased:
                if id(node) not in self._sizes:
                    raise yaml.MarkedYAMLError(None, None, "a value that holds itself", mark)
                self._values += self._sizes[id(node)]
            else:
                self._sizes[id(node)] = self._values - before
            if self._values > YAML_VALUES:
                raise yaml.MarkedYAMLError(None, None, f"more than {YAML_VALUES} values", mark)
            return node

        def compose_scalar_node(self, anchor: Any) -> Any:
            node = super().compose_scalar_node(anchor)
            if len(node.value) > YAML_SCALAR:
                problem = f"a value of more than {YAML_SCALAR} characters"
                raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    value = self.construct_object(key)
                    if value in seen:
                        problem = f"key {shown(value)} stands twice"
                        raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
                    seen.add(value)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(boolean, re.compile("^(true|True|false|False)$"), list("tTfF"))
    return Loader
