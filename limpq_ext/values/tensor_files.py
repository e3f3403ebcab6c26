"""Tensors out of files: what torch.save wrote, and safetensors.

Only plain data comes out: containers, strings, numbers, and dense tensors on the CPU that show no
more elements than the file holds. Reading does not depend on what a file says about sizes: see
:mod:`limpq_ext.values.reading`.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from limpq_ext.values.optional import require
from limpq_ext.values.pickles import check_pickle
from limpq_ext.values.reading import (
    DEPTH,
    first_line,
    open_regular,
    reading,
    shown,
)

_LEGACY_PICKLES: Final = 5  # magic number, version, system, content, names of storages
_SIZED: Final = re.compile(
    r"(builtins|__builtin__) bytearray|torch(\.\w+)* (\w*Tensor|UntypedStorage|TypedStorage)"
)
"""What torch.load calls with a size and without any values."""

_SPREAD: Final = 2**20  # bytes that an expanded tensor may show of a smaller storage


def load_saved(path: str | os.PathLike[str], what: str) -> Any:
    """The tensors, containers, strings and numbers that ``torch.save`` wrote, on the CPU.

    Args:
        path: The file.
        what: What it should be, for the error message.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is no such file, asks for a class, or holds another kind of tensor.
    """
    with open_regular(path, what) as file:
        return read_saved(file, path)


def read_saved(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    """The same from an open file; the path is for the errors."""
    with reading(path, "not a readable checkpoint"):
        _check_archive(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        with warnings.catch_warnings():
            # A file cannot make torch say something about the code of whoever reads it.
            warnings.simplefilter("ignore")
            content = _loaded(file)
    with reading(path):
        check_tensors(content)
    return content


def _loaded(file: BinaryIO) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # The first line says why, those after it advise to trust the file.
        raise ValueError(first_line(error)) from error


def _check_archive(file: BinaryIO, size: int) -> None:
    """Bound what loading a file of torch.save, zip or older, can take.

    Raises:
        Exception: Of almost any kind, if it is none.
    """
    if file.read(4) != b"PK\x03\x04":
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            check_pickle(file, size, _SIZED)
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise ValueError("its records are compressed, which torch.save does not do")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records overlap")
        for record in records:
            if record.filename.endswith("data.pkl"):
                # torch can be told to write no checksums, and then writes wrong ones.
                record.CRC = None  # type: ignore[assignment]
                with archive.open(record) as pickled:
                    check_pickle(pickled, record.file_size, _SIZED)  # type: ignore[arg-type]


def load_safetensors(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: The file.
        what: What it should be, for the error message.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is no such file.
        ImportError: If safetensors is not installed.
    """
    load_file = require("safetensors.torch", "train").load_file
    open_regular(path, what).close()
    with reading(path, "not a safetensors file"):
        state = load_file(path)
    with reading(path):
        check_tensors(state)
    return state


def check_tensors(content: Any) -> None:
    """Make sure that all tensors in containers are plain: dense, real, on the CPU, in memory.

    Raises:
        ValueError: One is not; the message says where it is.
    """
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(DEPTH):
        inner: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, Tensor):
                _check_tensor(place, value)
            elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
                seen.add(id(value))
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                inner += [(_inside(place, key), part) for key, part in pairs]
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {DEPTH} deep")


def _inside(place: str, key: Any) -> str:
    name = key if isinstance(key, str) and len(key) < 200 else shown(key)
    return f"{place}.{name}" if place else name


def _check_tensor(place: str, value: Tensor) -> None:
    where = f"tensor '{place}'"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(f"{where} is sparse, nested or quantized, not a dense one")
    if value.device.type != "cpu":
        raise ValueError(f"{where} is on the device '{value.device}' and holds no values")
    if value.is_complex():
        raise ValueError(f"{where} is complex, expected real numbers")
    shows = value.numel() * value.element_size()
    if shows > max(_SPREAD, value.untyped_storage().nbytes()):
        raise ValueError(
            f"{where} shows {value.numel()} elements of a storage of"
            f" {value.untyped_storage().nbytes()} bytes"
        )
