"""A look at all image files before a training, and what is remembered of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

from limpq_ext.data.images import UnreadableImageError, decoding, read_image
from limpq_ext.values.files import write_json
from limpq_ext.values.optional import require
from limpq_ext.values.reading import FileFormatError, read_object

PIECE: Final = 500
"""Files that a scan remembers together, and that one thread looks at."""

Scan = Literal["off", "open", "decode"]


def scan_images(
    names: Sequence[str], root: Path, how: Scan, cache: Path | None = None
) -> dict[str, str]:
    """Find the files that cannot be read, before a training does.

    Args:
        names: Files, relative to the root.
        root: Their folder.
        how: "open" reads the header and end of a JPEG, the checksums of a PNG, and all of what is
            neither or looks cut short; "decode" reads every pixel; "off" nothing.
        cache: A file that remembers, for a few hundred files at a time, what was found; those of
            which no size and no time of change differs are not looked at again.

    Returns:
        The reason by file.

    Raises:
        OSError: The cache cannot be written.
    """
    if how == "off":
        return {}
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), []).append(name)  # noqa: PTH120
    pieces = {
        f"{folder}:{start}": files[start : start + PIECE]
        for folder, files in folders.items()
        for start in range(0, len(files), PIECE)
    }
    known = _read_cache(cache)

    def look_at(piece: str) -> dict[str, Any]:
        files = pieces[piece]
        key = _digest(how, os.fspath(root), *files, *(_stamp(root / name) for name in files))
        if known.get(piece, {}).get("key") == key:
            return known[piece]
        reasons = {name: _broken(root / name, how) for name in files}
        return {"key": key, "broken": {n: why for n, why in reasons.items() if why}}

    # Threads: Pillow decodes, and files are read, without the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        found = dict(zip(pieces, pool.map(look_at, pieces), strict=True))
    if cache is not None and any(known.get(piece) is not entry for piece, entry in found.items()):
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, {**known, **found})
    return {name: why for entry in found.values() for name, why in entry["broken"].items()}


def _stamp(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"


def _digest(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()


def _broken(path: Path, how: Scan) -> str:
    """Why a file cannot be read, or nothing."""
    try:
        with decoding(path):
            if how == "decode" or not _ends_well(path):
                read_image(path, 3)
    except UnreadableImageError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def _ends_well(path: Path) -> bool:
    """Whether header and end of a PNG or JPEG file say that it is whole."""
    with require("PIL.Image", "train").open(path) as file:
        kind = file.format
        if kind == "PNG":
            file.verify()  # all checksums
            return True
    if kind != "JPEG":
        return False
    with path.open("rb") as raw:
        raw.seek(-2, os.SEEK_END)
        return raw.read() == b"\xff\xd9"


def _read_cache(path: Path | None) -> dict[str, Any]:
    """What an earlier scan found; nothing, where its file is missing or damaged."""
    try:
        content = read_object(path, "scan") if path is not None else {}
    except (OSError, FileFormatError):
        return {}
    valid = all(
        isinstance(entry, dict)
        and set(entry) == {"key", "broken"}
        and isinstance(entry["broken"], dict)
        and all(isinstance(why, str) for why in entry["broken"].values())
        for entry in content.values()
    )
    return content if valid else {}
