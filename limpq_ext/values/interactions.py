"""Interactions: what two tensors cost together beyond what each of them costs alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from limpq_ext.values.bits import check_bits
from limpq_ext.values.files import Document, Strict
from limpq_ext.values.indicators import KINDS, Kind

Quantized = tuple[str, Kind]
"""A layer's name, and whether its weights or its input activations."""


@dataclass(frozen=True)
class PairInteraction(Strict):
    """The interactions of two tensors; checked as part of `Interactions`.

    Attributes:
        layers: Names of the two layers, as in ``named_modules()`` of the float model.
        kinds: Of each of them ``"weight"`` or ``"activation"``.
        values: Bits of the first -> bits of the second -> what both at these bits add to the sum of
            their indicators, in the indicators' units; it may be negative.
    """

    layers: tuple[str, str]
    kinds: tuple[Kind, Kind]
    values: dict[int, dict[int, float]]

    def __post_init__(self) -> None:
        for what in ("layers", "kinds"):
            object.__setattr__(self, what, tuple(getattr(self, what)))
        values = {  # plain numbers, also where numpy's or a tensor's were given
            operator.index(first): {operator.index(b): float(v) for b, v in sorted(row.items())}
            for first, row in sorted(self.values.items())
        }
        object.__setattr__(self, "values", values)

    @property
    def tensors(self) -> tuple[Quantized, Quantized]:
        """The two tensors."""
        (one, two), (kind, other) = self.layers, self.kinds
        return (one, kind), (two, other)


@dataclass(frozen=True)
class Interactions(Document):
    """Pairwise scores, which a search adds to the indicators.

    Attributes:
        bits: Candidate bit-widths, ascending; the same for every pair.
        pairs: The pairs of tensors that have some; all others have none.
        meta: Where they come from; anything that JSON has a form for.

    Raises:
        ValueError: If there are no pairs or no bits, a bit-width is outside 2 to 16 or stands
            twice, a tensor is paired with itself, two tensors are paired twice, a pair lacks a
            bit-width or has another, or a value is NaN or infinite. The message names the pair.
    """

    bits: tuple[int, ...]
    pairs: tuple[PairInteraction, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-interactions"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        bits = sorted(check_bits("interactions", b) for b in self.bits)
        object.__setattr__(self, "bits", tuple(bits))
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if not bits:
            raise ValueError("interactions: there are no candidate bits")
        if len(set(bits)) < len(bits):
            raise ValueError(f"interactions: a bit-width stands twice in {bits}")
        if not self.pairs:
            raise ValueError("interactions: there are no pairs")
        seen: set[frozenset[Quantized]] = set()
        for pair in self.pairs:
            for kind in pair.kinds:
                if kind not in KINDS:
                    raise ValueError(
                        f"interactions: kind {kind!r} is not one of {', '.join(KINDS)}"
                    )
            what = " and ".join(f"{kind} of {layer!r}" for layer, kind in pair.tensors)
            if len(set(pair.tensors)) == 1:
                raise ValueError(f"interaction of {what}: a tensor has none with itself")
            if frozenset(pair.tensors) in seen:
                raise ValueError(f"interaction of {what} stands twice")
            seen.add(frozenset(pair.tensors))
            self._check_bits(what, pair.values)
            for first, row in pair.values.items():
                self._check_bits(f"{what}, the first at {first} bits", row)
                for second, value in row.items():
                    if not math.isfinite(value):
                        at = f"{first} and {second} bits"
                        raise ValueError(f"interaction of {what} at {at} is {value}")

    def _check_bits(self, what: str, values: Mapping[int, object]) -> None:
        """A table has to have all bit-widths and no others."""
        for b in self.bits:
            if b not in values:
                raise ValueError(f"interaction of {what}: {b} bits are missing")
        for b in values:
            if b not in self.bits:
                raise ValueError(
                    f"interaction of {what}: {b} bits: the candidates are {list(self.bits)}"
                )

    @classmethod
    def from_table(
        cls,
        table: Mapping[tuple[Quantized, Quantized], Mapping[tuple[int, int], float]],
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> Interactions:
        """Search with any pairwise scores.

        Args:
            table: Two tensors, each a name and ``"weight"`` or ``"activation"`` -> bits of both ->
                what they cost together beyond what each costs alone, in the indicators' units.
            meta: Where they come from; anything that JSON has a form for.

        Returns:
            The scores as interactions, checked.

        Raises:
            ValueError: As for the class.
        """
        pairs, bits = [], set()
        for ((one, kind), (two, other)), values in table.items():
            rows: dict[int, dict[int, float]] = {}
            for (first, second), value in values.items():
                rows.setdefault(first, {})[second] = value
                bits |= {first, second}
            pairs.append(PairInteraction((one, two), (kind, other), rows))
        return cls(tuple(bits), tuple(pairs), dict(meta or {}))
