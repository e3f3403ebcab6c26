"""How the package's files are read and written.

A document is a JSON object with ``"format"`` and ``"version"`` beside the fields of one frozen
dataclass. Reading checks all of it and names the file, the field and the reason; writing goes to a
temporary name first, so that a killed run leaves the old file or the new one and nothing between.
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
from typing import Any, BinaryIO, Final, TypeVar

from limpq_ext.values.optional import require
from limpq_ext.values.reading import FileFormatError, read_object, reading

Document = TypeVar("Document")

STRICT: Final[Mapping[str, Any]] = {"extra": "forbid", "strict": True}
"""``__pydantic_config__`` of every dataclass that is read from a file: no unknown fields, and no
conversions such as "4" or 4.0 to 4."""


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only once it is complete.

    The bytes go to a temporary file in the same folder, which is flushed to the disk and renamed
    when the block ends. If the block raises, it is removed and ``path`` stays as it was. Where
    ``path`` is a symbolic link, the file that it points to is replaced.

    Args:
        path: Name of the file in the end; its folder has to exist.

    Yields:
        The temporary file, open for writing in binary mode.

    Raises:
        OSError: If the folder is missing or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


def save_document(path: str | os.PathLike[str], value: Any, *, format: str, version: int) -> None:
    """Write a dataclass as a JSON document, atomically.

    Args:
        path: The file to write or to replace.
        value: A dataclass instance.
        format: What the document says it is, for example ``"limpq-policy"``.
        version: Version of that format.

    Raises:
        TypeError: If JSON has no form for a value in it.
        ValueError: If it holds a NaN or an infinity.
        OSError: If the file cannot be written.
    """
    write_json(path, {"format": format, "version": version, **dataclasses.asdict(value)})


def load_document(
    path: str | os.PathLike[str], kind: type[Document], *, format: str, version: int
) -> Document:
    """Read a JSON document into a dataclass, checking every field.

    Args:
        path: The file.
        kind: The dataclass; it and the dataclasses in it set ``__pydantic_config__ = STRICT``.
        format: What the document must say it is.
        version: The version of that format that can be read.

    Returns:
        An instance of ``kind``.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read: a folder, no permission.
        FileFormatError: If it is not such a document; the message names file, field and reason.
    """
    document = read_object(path, format)
    for field, expected in (("format", format), ("version", version)):
        if field not in document:
            raise FileFormatError(f"{os.fspath(path)}: {field}: is missing, not a {format} file")
        value = document.pop(field)
        if type(value) is not type(expected) or value != expected:
            known = f"this limpq_ext reads {field} {json.dumps(expected)}"
            raise FileFormatError(f"{os.fspath(path)}: {field}: is {_shown(value)}; {known}")
    pydantic = require("pydantic", "search")
    with reading(path):
        try:
            value = pydantic.TypeAdapter(kind).validate_json(json.dumps(document))
        except pydantic.ValidationError as error:
            raise FileFormatError(_first(error, document)) from error
        _check_finite(document, "")
        return value


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


def _first(error: Any, document: Any) -> str:
    """'field: reason' of the first thing that pydantic found, and how many more there are."""
    errors = error.errors(include_url=False)
    first = errors[0]
    field = ""
    value = document
    for part in first["loc"]:  # it ends in type names and the like, which are no part of the file
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
            field += f"[{part}]"
        elif isinstance(value, dict) and (part in value or first["type"] == "missing"):
            value = value.get(part)
            field += f".{part}" if field else f"{part}"
        else:
            break
    if first["type"] == "missing":
        reason = "is missing"
    elif first["type"] == "unexpected_keyword_argument":
        reason = "is not a field of this format"
    elif first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
    else:
        reason = f"{first['msg']}, got {_shown(first['input'])}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (f"{field}: " if field else "") + reason + more


def _shown(value: object) -> str:
    """A value as JSON, cut to a length that fits a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
