"""Codes of 2 to 8 bits in words of 32, in the bit layout of compressed-tensors' ``pack-quantized``.

A row of codes is one string of bits: code i, to which ``2**(bits - 1)`` is added, has the bits from
``i * bits`` on, the lowest first, and may begin in one word and end in the next. Every row begins
with a word of its own. 32 codes of b bits fill b words, whatever b is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from limpq_ext.values.packed_files import WORD_BITS, matrix_shape, words_shape


def pack_codes(codes: Tensor, bits: int, packed_dim: int) -> Tensor:
    """Pack the codes of a weight.

    Args:
        codes: Whole numbers from ``-2**(bits - 1)`` to ``2**(bits - 1) - 1``, in the weight's
            shape; they are packed as a matrix of the first axis by all others.
        bits: 2 to 8.
        packed_dim: The axis of the matrix that words run along.

    Returns:
        The words, int32, of the shape that
        :func:`limpq_ext.values.packed_files.words_shape` gives.
    """
    rows = codes.reshape(matrix_shape(tuple(codes.shape)))
    rows = rows.T if packed_dim == 0 else rows
    length = -(-rows.shape[1] * bits // WORD_BITS)
    shifted = rows.to(torch.int32) + 2 ** (bits - 1)
    # What fills up the last word is 0.
    shifted = F.pad(shifted, (0, -rows.shape[1] % WORD_BITS)).unflatten(1, (-1, WORD_BITS))
    words = shifted.new_zeros(*shifted.shape[:2], bits)
    for place, word, first, inside in _places(bits):
        code = shifted[..., place]
        words[..., word] |= code << first
        if inside < bits:
            words[..., word + 1] |= code >> inside
    words = words.flatten(1)[:, :length]
    return (words.T if packed_dim == 0 else words).contiguous()


def unpack_codes(words: Tensor, bits: int, shape: tuple[int, ...], packed_dim: int) -> Tensor:
    """The codes that :func:`pack_codes` packed.

    Args:
        words: int32.
        bits: 2 to 8.
        shape: Of the weight.
        packed_dim: As for :func:`pack_codes`.

    Returns:
        The codes, int8, of that shape.

    Raises:
        ValueError: There are more words or fewer than the shape asks for.
    """
    expected = words_shape(shape, bits, packed_dim)
    if tuple(words.shape) != expected:
        raise ValueError(
            f"words have shape {tuple(words.shape)}, expected {expected} for {bits} bits of a"
            f" weight of shape {shape}"
        )
    rows, columns = matrix_shape(shape)
    words = words.T if packed_dim == 0 else words
    count = rows if packed_dim == 0 else columns
    groups = F.pad(words, (0, -words.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty((*groups.shape[:2], WORD_BITS), dtype=torch.int8, device=words.device)
    for place, word, first, inside in _places(bits):
        # The sign of a word is copied down by a shift; it is masked away.
        code = (groups[..., word] >> first) & (2**inside - 1)
        if inside < bits:
            code |= (groups[..., word + 1] & (2 ** (bits - inside) - 1)) << inside
        codes[..., place] = code - 2 ** (bits - 1)
    codes = codes.flatten(1)[:, :count]
    return (codes.T if packed_dim == 0 else codes).reshape(shape)


def _places(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each of 32 codes: its place, its word, its first bit there, and how many it has there."""
    for place in range(WORD_BITS):
        word, first = divmod(place * bits, WORD_BITS)
        yield place, word, first, min(bits, WORD_BITS - first)
