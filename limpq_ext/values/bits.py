"""The bit-widths that exist here, stated once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final

MIN_BITS: Final = 2
MAX_BITS: Final = 16


def check_bits(what: str, bits: int) -> int:
    """Return ``bits`` as a plain int if it is a bit-width that can be quantized to.

    Args:
        what: What has these bits, in the user's words; it starts the error message.
        bits: Bit-width, in bits.

    Returns:
        The bit-width as an ``int``.

    Raises:
        TypeError: If ``bits`` is not an integer.
        ValueError: If ``bits`` is outside ``MIN_BITS`` .. ``MAX_BITS``.
    """
    if isinstance(bits, bool):
        raise TypeError(f"{what}: bits must be an integer, got {bits!r}")
    try:
        width = operator.index(bits)
    except TypeError:
        raise TypeError(f"{what}: bits must be an integer, got {bits!r}") from None
    if not MIN_BITS <= width <= MAX_BITS:
        raise ValueError(f"{what}: {width} bits is outside {MIN_BITS} to {MAX_BITS}")
    return width


def check_candidates(bits: Sequence[int]) -> tuple[int, ...]:
    """The candidate bit-widths as a tuple.

    Raises:
        TypeError: One is not an integer.
        ValueError: There is none, one is outside 2 to 16, or one stands twice.
    """
    candidates = tuple(check_bits("candidate", width) for width in bits)
    if not candidates:
        raise ValueError("bits is empty, expected at least one bit-width")
    if len(set(candidates)) != len(candidates):
        raise ValueError(f"bits is {candidates}, expected no bit-width twice")
    return candidates
