"""Pickles from elsewhere: plain data alone comes out, and what reading them takes is bounded."""

from __future__ import annotations

import pickle
import pickletools
import re
from io import BytesIO
from typing import Any, BinaryIO, Final

from limpq_ext.values.reading import DEPTH

OPCODES: Final = 5_000_000
"""The most instructions of a pickle."""


def load_pickle(data: bytes) -> Any:
    """The containers, strings and numbers that a pickle holds.

    Raises:
        Exception: Of almost any kind, if it is no such pickle; see
            :func:`limpq_ext.values.reading.reading`.
    """
    check_pickle(BytesIO(data), len(data))
    return _PlainUnpickler(BytesIO(data)).load()


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_CHANGES: Final = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


def check_pickle(file: BinaryIO, size: int, refused: re.Pattern[str] | None = None) -> None:
    """Follow a pickle without building anything, up to its end; the file stands behind it then.

    Python's unpickler allocates what a pickle merely names: a place in the memo, the length of a
    bytearray. And a few bytes can refer to each other so that looking at all of their values, as
    the hash of a tuple does, takes for ever.

    Args:
        file: Stands where the pickle begins.
        size: Bytes of the file.
        refused: What it may not ask for, a pattern of "module name".

    Raises:
        ValueError: If it is no pickle, or passes a limit.
    """
    # For every object how many values it holds, all told, and how deeply they are nested.
    stack: list[list[int] | None] = []  # None: a mark
    memo: dict[int, list[int] | None] = {}
    work, most = 0, max(10**6, DEPTH * size)

    def popped(count: int | None) -> list[list[int]]:
        """The topmost objects; None: those above the topmost mark, which goes too."""
        found: list[list[int]] = []
        while count is None or len(found) < count:
            if not stack:
                raise ValueError("not a pickle, or cut short: it takes what was never put")
            top = stack.pop()
            if top is None:
                if count is None:
                    break
                raise ValueError("not a pickle: it takes a mark for a value")
            found.append(top)
        return found

    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if number > OPCODES:
            raise ValueError(f"a pickle of more than {OPCODES} instructions")
        if refused is not None and name == "GLOBAL" and refused.fullmatch(str(argument)):
            asked = str(argument).replace(" ", ".")
            raise ValueError(f"it asks for {asked}, which is not plain data")
        if name in _GETS:
            if argument not in memo:
                raise ValueError(f"not a pickle: it refers to {argument}, which was never put")
            stack.append(memo[argument])
        elif name in _PUTS or name == "MEMOIZE":
            place = len(memo) if name == "MEMOIZE" else int(argument or 0)
            if place > size:
                raise ValueError(f"a pickle of {size} bytes that puts a value in place {place}")
            if not stack or stack[-1] is None:
                raise ValueError("not a pickle: it puts away what is not there")
            memo[place] = stack[-1]
        elif name == "DUP":
            (top,) = popped(1)
            stack += [top, top]
        elif name == "MARK":
            stack.append(None)
        else:
            before = [kind.name for kind in opcode.stack_before]
            parts: list[list[int]] = []
            if "mark" in before:
                parts = popped(None)
                before = before[: before.index("mark")]
            kept: list[list[int]] = []
            if name in _CHANGES:
                parts += popped(len(before) - 1)
                kept = popped(1)
            else:
                parts += popped(len(before))
            values = sum(part[0] for part in parts)
            depth = max((part[1] for part in parts), default=0) + 1
            work += values + 1
            if depth > DEPTH:
                raise ValueError(f"nested more than {DEPTH} deep")
            if work > most:
                raise ValueError(
                    f"a pickle of {size} bytes that unfolds to more than {most} values"
                )
            for container in kept:
                container[0] += values
                container[1] = max(container[1], depth)
                stack.append(container)
            if not kept:
                stack += [[values + 1, depth] for _ in opcode.stack_after]
