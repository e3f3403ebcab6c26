"""How the package's files are read and written.

A `Document` is a JSON object with ``"format"`` and ``"version"`` beside the fields of one frozen
dataclass; a `Formatted` is one within another file. Reading checks all of it and names the file,
the field and the reason; writing goes to a temporary name first, so that a killed run leaves the
old file or the new one and nothing between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from limpq_ext.values.optional import require
from limpq_ext.values.reading import (
    FileFormatError,
    as_json,
    first_problem,
    read_object,
    reading,
)

if TYPE_CHECKING:
    from typing_extensions import Self


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only once it is complete.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed
    when the block ends. If the block raises, it is removed and ``path`` stays as it was. Where
    ``path`` is a symbolic link, the file that it points to is replaced.

    Args:
        path: Name of the file in the end; its folder has to exist.
        overwrite: Whether a file of that name is replaced, also one that appears meanwhile.

    Yields:
        The temporary file, open for writing in binary mode.

    Raises:
        FileExistsError: If there is such a file, and it is not to be replaced.
        OSError: If the folder is missing or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if not overwrite:
        refuse_existing(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(target)
        else:
            _take_name(temporary, target, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _take_name(temporary: Path, target: Path, path: str | os.PathLike[str]) -> None:
    try:
        os.link(temporary, target)  # unlike a rename, this fails where the name is taken
    except OSError:
        refuse_existing(path)
        temporary.rename(target)  # a file system without links
    else:
        temporary.unlink()


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError if there is a file of this name."""
    if Path(path).exists():
        raise FileExistsError(
            f"'{os.fspath(path)}' exists and is not replaced: overwrite=True replaces it"
        )


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers of a file left beside it.

    Args:
        path: The file; nobody may be writing it.
    """
    target = Path(os.path.realpath(path))
    name = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{32}\.tmp")
    if target.parent.is_dir():
        for found in target.parent.iterdir():
            if name.fullmatch(found.name):
                found.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write a value as an indented JSON file, atomically.

    Args:
        path: The file to write or to replace.
        value: Anything that JSON has a form for; integer keys become strings.

    Raises:
        TypeError: If JSON has no form for the value.
        ValueError: If the value holds a NaN or an infinity, which JSON does not have.
        OSError: If the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{os.fspath(path)}: not written: {error}") from error
    with open_atomically(path) as file:
        file.write(text.encode() + b"\n")


class Strict:
    """Base of every dataclass that is read from a file.

    Unknown fields are refused, and nothing is converted, such as "4" or 4.0 to 4.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid", "strict": True}


class Formatted(Strict):
    """Base of a frozen dataclass that says its format; the dataclasses in it are `Strict`.

    Attributes:
        FORMAT: What the file says it is.
        VERSION: The version of that format that is written and can be read.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]

    def document(self) -> dict[str, Any]:
        """The JSON object that it is in a file."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]  # subclasses are dataclasses
        return {"format": self.FORMAT, "version": self.VERSION, **fields}

    @classmethod
    def from_document(cls, document: dict[str, Any], path: str | os.PathLike[str]) -> Self:
        """What the JSON object of a file holds, checked.

        Args:
            document: The object.
            path: The file, for the errors.

        Raises:
            FileFormatError: If it is no such object; the message names file, field and reason.
        """
        document = dict(document)
        for field, expected in (("format", cls.FORMAT), ("version", cls.VERSION)):
            where = f"{os.fspath(path)}: {field}"
            if field not in document:
                raise FileFormatError(f"{where}: is missing, not a {cls.FORMAT} file")
            value = document.pop(field)
            if type(value) is not type(expected) or value != expected:
                known = f"this limpq_ext reads {field} {as_json(expected)}"
                raise FileFormatError(f"{where}: is {as_json(value)}; {known}")
        pydantic = require("pydantic", "search")
        with reading(path):
            try:
                value = pydantic.TypeAdapter(cls).validate_json(json.dumps(document))
            except pydantic.ValidationError as error:
                raise FileFormatError(first_problem(error, document)) from error
            _check_finite(document, "")
            return value


class Document(Formatted):
    """Base of a frozen dataclass that is a JSON file of its own."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a JSON file, atomically.

        Args:
            path: The file to write or to replace.

        Raises:
            TypeError: If JSON has no form for a value in it.
            ValueError: If it holds a NaN or an infinity.
            OSError: If the file cannot be written.
        """
        write_json(path, self.document())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file that `save` wrote.

        Args:
            path: The file.

        Returns:
            What it holds, checked.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read: a folder, no
                permission.
            FileFormatError: If it is not such a file; the message names file, field and reason.
        """
        return cls.from_document(read_object(path, cls.FORMAT), path)


def _check_finite(value: Any, field: str) -> None:
    """Refuse the NaN and infinities that no field refused, which could not be written again."""
    if isinstance(value, float) and not math.isfinite(value):
        raise FileFormatError(f"{field}: is {value}")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_finite(inner, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _check_finite(inner, f"{field}[{place}]")
