"""Latency tables: the seconds that a user measured for each layer at each pair of bits."""

from __future__ import annotations

import csv
import functools
import io
import math
import numbers
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Final

from limpq_ext.values.bits import check_bits
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import Document, Strict
from limpq_ext.values.reading import FileFormatError, decode, read_bytes, reading, shown

HEADER: Final = ("layer", "weight_bits", "activation_bits", "seconds")
"""First line of a table in CSV."""

_SHORTEST: Final = 1e-15
_LONGEST: Final = 1e9
_SHOWN: Final = 5  # missing entries that an error lists


@dataclass(frozen=True)
class LatencyEntry(Strict):
    """How long one layer takes at one pair of bits.

    Attributes:
        layer: Name of the layer, as in the costs.
        weight_bits: Bit-width of its weights.
        activation_bits: Bit-width of its activations.
        seconds: Seconds for one sample (or one batch: the unit of the budget is that of the table).

    Raises:
        TypeError: If a bit-width is not an integer, or the time is not a number.
        ValueError: If a bit-width is outside 2 to 16, or the time is NaN, infinite, negative, or
            neither 0 nor between 1e-15 and 1e9 seconds.
    """

    layer: str
    weight_bits: int
    activation_bits: int
    seconds: float

    def __post_init__(self) -> None:
        for what in ("weight_bits", "activation_bits"):
            bits = check_bits(f"latency of layer {self.layer!r}: {what}", getattr(self, what))
            object.__setattr__(self, what, bits)
        where = f"latency of layer {self.layer!r} at W{self.weight_bits}A{self.activation_bits}"
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, numbers.Real):
            raise TypeError(f"{where} must be a number, got {self.seconds!r}")
        seconds = float(self.seconds)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"{where} is {seconds}")
        if seconds and not _SHORTEST <= seconds <= _LONGEST:
            raise ValueError(f"{where} is {seconds:g}: it is counted in seconds")
        object.__setattr__(self, "seconds", seconds)


@dataclass(frozen=True)
class LatencyTable(Document):
    """A measured latency table.

    Attributes:
        entries: The measurements, one for each layer and pair of bits.
        meta: How it was measured; anything that JSON has a form for.

    Raises:
        ValueError: If there is no entry, or one layer has two for one pair of bits.
    """

    entries: tuple[LatencyEntry, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-latency"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(self.entries))
        if not self.entries:
            raise ValueError("latency table: there are no entries")
        seen: set[tuple[str, int, int]] = set()
        for entry in self.entries:
            key = (entry.layer, entry.weight_bits, entry.activation_bits)
            if key in seen:
                where = f"layer {entry.layer!r} at W{entry.weight_bits}A{entry.activation_bits}"
                raise ValueError(f"latency table: {where} stands twice")
            seen.add(key)

    @functools.cached_property
    def seconds(self) -> dict[tuple[str, int, int], Fraction]:
        """(layer, weight bits, activation bits) -> seconds, as the decimals that were written."""
        return {
            (entry.layer, entry.weight_bits, entry.activation_bits): Fraction(str(entry.seconds))
            for entry in self.entries
        }

    @functools.cached_property
    def per_second(self) -> int:
        """The fewest equal parts of a second of which every entry is a whole number."""
        return math.lcm(*(seconds.denominator for seconds in self.seconds.values()))

    def has(self, layer: str, pair: tuple[int, int]) -> bool:
        """Whether there is an entry for a layer at (weight bits, activation bits)."""
        return (layer, *pair) in self.seconds

    def check(self, costs: Costs, columns: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Check that the table has all that a search will look up.

        Args:
            costs: Costs of the network. A fixed layer counts, at its fixed bits, if the table has
                it at any bits.
            columns: For each searchable layer the pairs of bits that it can have.

        Raises:
            ValueError: If entries are missing (the error lists the first of them and says how
                many there are), or the table has a layer that is not in the network.
        """
        measured = {entry.layer for entry in self.entries}
        unknown = measured - {layer.name for layer in (*costs.layers, *costs.fixed)}
        if unknown:
            raise ValueError(
                f"latency table: layer {min(unknown)!r} is not in the network"
                + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            )
        wanted = [
            (layer.name, *pair)
            for layer, pairs in zip(costs.layers, columns, strict=True)
            for pair in pairs
        ]
        fixed = (costs.fixed_bits, costs.fixed_bits)
        wanted += [(layer.name, *fixed) for layer in costs.fixed if layer.name in measured]
        missing = [key for key in wanted if key not in self.seconds]
        if missing:
            shown = ", ".join(f"{name!r} at W{bw}A{ba}" for name, bw, ba in missing[:_SHOWN])
            more = ", ..." if len(missing) > _SHOWN else ""
            raise ValueError(f"latency table: {len(missing)} entries are missing: {shown}{more}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read a table that `save` wrote, or one in CSV.

        Args:
            path: A JSON file; or, with the suffix ``.csv``, lines under the header
                ``layer,weight_bits,activation_bits,seconds``.

        Returns:
            The table, checked.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it does not hold a valid table; the message names the line.
        """
        if Path(path).suffix.lower() == ".csv":
            return _from_csv(path)
        return super().load(path)


def _from_csv(path: str | os.PathLike[str]) -> LatencyTable:
    data = read_bytes(path, LatencyTable.FORMAT)
    with reading(path):
        text = decode(data)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    entries = []
    try:
        header = next(lines, [])
        if tuple(field.strip() for field in header) != HEADER:
            raise ValueError(
                f"expected the header {','.join(HEADER)}, got {shown(','.join(header))}"
            )
        for line in lines:
            if not line:
                continue
            if len(line) != len(HEADER):
                raise ValueError(f"{len(line)} fields, expected {len(HEADER)}")
            layer, weight_bits, activation_bits, seconds = (field.strip() for field in line)
            entries.append(
                LatencyEntry(layer, _bits(weight_bits), _bits(activation_bits), _seconds(seconds))
            )
    except (csv.Error, ValueError) as error:
        raise FileFormatError(f"{os.fspath(path)}: line {lines.line_num}: {error}") from error
    with reading(path):
        return LatencyTable(tuple(entries), {"source": Path(path).name})


def _bits(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 3):
        raise ValueError(f"{shown(text)} is not a bit-width")
    return int(text)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a number of seconds") from None
