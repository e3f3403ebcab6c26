"""What pairs of layers add to the objective: interactions of tensors, and a penalty on steps.

    sum over pairs of tensors of interaction[t, u, b_t, b_u]
    + smoothness * sum over consecutive layers of (|bw_l - bw_(l+1)| + |ba_l - ba_(l+1)|)

The first is CLADO's (arXiv 2307.05657) and Mix-QViT's (arXiv 2501.06357) quadratic part; that the
matrix of the interactions is positive semi-definite is not needed, since `ilp.quadratic` makes
products of choices linear.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from limpq_ext.allocation.measures import Pair
from limpq_ext.ilp.program import exact_values
from limpq_ext.ilp.quadratic import Product
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import KINDS, Indicators
from limpq_ext.values.interactions import Interactions

INTERACTIONS: Final = "interactions"
SMOOTHNESS: Final = "smoothness"


@dataclass(frozen=True)
class PairTerm:
    """What two tensors add to the objective together.

    Attributes:
        name: `INTERACTIONS` or `SMOOTHNESS`.
        layers: The tensors' layers.
        sides: Of each of them 0 for its weights, 1 for its activations.
        values: Bits of both -> what they add, exactly; bits that have none add nothing.
    """

    name: str
    layers: tuple[str, str]
    sides: tuple[int, int]
    values: Mapping[tuple[int, int], Fraction]

    def value(self, bits: Mapping[str, Pair]) -> Fraction:
        """What it adds where the layers have some bits."""
        one, two = (bits[layer][side] for layer, side in zip(self.layers, self.sides, strict=True))
        return self.values.get((one, two), Fraction(0))


def interaction_terms(
    interactions: Interactions, indicators: Indicators, costs: Costs
) -> list[PairTerm]:
    """The terms of interactions, checked against the layers and bits of a search.

    Raises:
        ValueError: If they are of a layer that has no indicators, or lack a candidate.
    """
    known = {layer.name for layer in indicators.layers}
    fixed = {layer.name for layer in costs.fixed}
    for bits in indicators.bits:
        if bits not in interactions.bits:
            raise ValueError(
                f"the indicators have {bits} bits, the interactions {list(interactions.bits)}"
            )
    terms = []
    for pair in interactions.pairs:
        for layer in pair.layers:
            if layer not in known:
                why = "is fixed by the costs" if layer in fixed else "has no indicators"
                raise ValueError(f"interactions: layer {layer!r} {why}")
        values = {
            (first, second): value
            for first, row in pair.values.items()
            for second, value in zip(row, exact_values([list(row.values())])[0], strict=True)
            if value
        }
        sides = (KINDS.index(pair.kinds[0]), KINDS.index(pair.kinds[1]))
        if values:
            terms.append(PairTerm(INTERACTIONS, pair.layers, sides, values))
    return terms


def smoothness_terms(
    per_bit: Fraction, indicators: Indicators, widths: Sequence[int]
) -> list[PairTerm]:
    """The terms of steps between the bits of layers that follow each other in the indicators.

    Args:
        per_bit: What one bit of difference costs.
        indicators: Their order is the layers'.
        widths: All bit-widths that a layer may have.
    """
    if not per_bit:
        return []
    steps = {
        (one, two): per_bit * abs(one - two)
        for one, two in itertools.permutations(sorted(set(widths)), 2)
    }
    names = [layer.name for layer in indicators.layers]
    return [
        PairTerm(SMOOTHNESS, both, (side, side), steps)
        for both in itertools.pairwise(names)
        for side in range(len(KINDS))
    ]


def make_products(
    terms: Sequence[PairTerm], columns: Mapping[str, Sequence[Pair]]
) -> list[Product]:
    """The terms for the integer program; terms of the same two tensors are one product.

    Args:
        terms: The terms.
        columns: Layer -> pairs, layers in the order of the program's groups.
    """
    places = {name: place for place, name in enumerate(columns)}
    merged: dict[tuple[tuple[int, int], tuple[int, int]], dict[tuple[int, int], Fraction]] = {}
    for term in terms:
        one, two = zip([places[layer] for layer in term.layers], term.sides, strict=True)
        turned = one > two
        values = merged.setdefault((two, one) if turned else (one, two), {})
        for (first, second), value in term.values.items():
            bits = (second, first) if turned else (first, second)
            values[bits] = values.get(bits, Fraction(0)) + value
    own = list(columns.values())

    def labels(tensor: tuple[int, int]) -> list[int]:
        place, side = tensor
        return [pair[side] for pair in own[place]]

    return [
        Product((one[0], two[0]), (labels(one), labels(two)), values)
        for (one, two), values in merged.items()
    ]
