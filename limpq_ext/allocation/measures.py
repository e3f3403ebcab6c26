"""How what budgets limit is counted in a network, in whole units: a function for each budget.

Each takes the costs of the network, and the table of a latency.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from limpq_ext.ilp.rows import Row
from limpq_ext.values.costs import FLOAT_BITS, Costs
from limpq_ext.values.latency import LatencyTable

Pair = tuple[int, int]
"""Weight bits and activation bits of one layer."""


@dataclass(frozen=True)
class Measure:
    """How the use of one budget is counted in a network, in whole units.

    What counts is the largest of some sums; all but the activation memory have only one.

    Attributes:
        name: Name of the budget.
        unit: What is counted.
        constants: For each sum, the part that is the same for every policy.
        costs: For each sum, the cost of (place of a searchable layer, its bits).
        per_unit: Whole units in one of the user's units.
        inverse: The user's value is ``per_unit`` divided by the use, and larger is stricter.
        places: For each sum, the places of the layers that it depends on; empty: of all in all.
    """

    name: str
    unit: str
    constants: tuple[int, ...]
    costs: tuple[Callable[[int, Pair], int], ...]
    per_unit: int = 1
    inverse: bool = False
    places: tuple[tuple[int, ...], ...] = ()

    def use(self, pairs: Sequence[Pair]) -> int:
        """What a policy uses, in whole units.

        Args:
            pairs: Weight and activation bits of the searchable layers, in the costs' order.
        """
        return max(
            constant + sum(cost(place, pairs[place]) for place in places)
            for constant, cost, places in self._sums(len(pairs))
        )

    def rows(self, columns: Sequence[Sequence[Pair]], limit: int | None) -> list[Row]:
        """The rows of the program that keep the use within a limit in whole units.

        A limit above all that can be used is lowered to that, so that it fits a float; None is
        such a limit.
        """
        rows = []
        nothing = [[0] * len(layer) for layer in columns]
        for constant, cost, places in self._sums(len(columns)):
            table = list(nothing)
            for place in places:
                table[place] = [cost(place, pair) for pair in columns[place]]
            most = sum(max(table[place]) for place in places)
            rows.append(Row(table, most if limit is None else min(limit - constant, most)))
        return rows

    def _sums(self, layers: int) -> Iterator[tuple[int, Callable[[int, Pair], int], Sequence[int]]]:
        """Each sum: its constant, its costs, and the places that it depends on."""
        places = self.places or (range(layers),) * len(self.costs)
        return zip(self.constants, self.costs, places, strict=True)

    def whole(self, value: Fraction) -> int:
        """The most whole units that a limit in the user's units allows."""
        return math.floor(self.per_unit / value if self.inverse else value * self.per_unit)

    def exact(self, use: int) -> Fraction:
        """A use in the user's units, exactly."""
        return Fraction(self.per_unit, use) if self.inverse else Fraction(use, self.per_unit)

    def shown(self, use: int) -> int | float:
        """A use in the user's units, rounded such that it can be asked for as a limit again."""
        exact = self.exact(use)
        if exact.denominator == 1:
            return int(exact)
        value = float(exact)
        if self.inverse:
            return value if Fraction(str(value)) <= exact else math.nextafter(value, -math.inf)
        return value if Fraction(str(value)) >= exact else math.nextafter(value, math.inf)


def bitops(costs: Costs, _: LatencyTable | None) -> Measure:
    """MACs * weight bits * activation bits, summed over the searchable layers."""
    layers = costs.layers
    return Measure(
        "bitops", "BitOps", (0,), (lambda place, pair: layers[place].macs * pair[0] * pair[1],)
    )


def _bits_of_weights(costs: Costs) -> tuple[int, Callable[[int, Pair], int]]:
    """The bits of the fixed layers' weights, and those of (place of a searchable layer, bits)."""
    layers = costs.layers
    fixed = costs.fixed_bits * sum(layer.weights for layer in costs.fixed)
    return fixed, lambda place, pair: layers[place].weights * pair[0]


def size(costs: Costs, _: LatencyTable | None) -> Measure:
    """Weights * weight bits, the fixed layers at their bits, in bytes."""
    fixed, cost = _bits_of_weights(costs)
    return Measure("size", "bits of all weights", (fixed,), (cost,), 8)


def total_size(costs: Costs, _: LatencyTable | None) -> Measure:
    """The same, and 32 bits for every parameter that stays in float."""
    fixed, cost = _bits_of_weights(costs)
    outside = FLOAT_BITS * costs.parameters_in_float()
    return Measure("total_size", "bits of all parameters", (fixed + outside,), (cost,), 8)


def compression(costs: Costs, _: LatencyTable | None) -> Measure:
    """32 bits for every weight, divided by what `size` counts."""
    fixed, cost = _bits_of_weights(costs)
    everything = FLOAT_BITS * costs.all_weights
    if not everything:
        raise ValueError("compression: the costs hold no weights")
    return Measure("compression", "bits of all weights", (fixed,), (cost,), everything, True)


def mean_weight_bits(costs: Costs, _: LatencyTable | None) -> Measure:
    """Weight bits, summed over the searchable layers, by their number."""
    unit, count = "bits, summed over layers", len(costs.layers)
    return Measure("mean_weight_bits", unit, (0,), (lambda _, pair: pair[0],), count)


def mean_activation_bits(costs: Costs, _: LatencyTable | None) -> Measure:
    """Activation bits, summed over the searchable layers, by their number."""
    unit, count = "bits, summed over layers", len(costs.layers)
    return Measure("mean_activation_bits", unit, (0,), (lambda _, pair: pair[1],), count)


def bits_per_weight(costs: Costs, _: LatencyTable | None) -> Measure:
    """Weights * weight bits of the searchable layers, by their weights."""
    weights = sum(layer.weights for layer in costs.layers)
    if not weights:
        raise ValueError("bits_per_weight: the searchable layers have no weights")
    cost = _bits_of_weights(costs)[1]
    return Measure("bits_per_weight", "bits of searchable weights", (0,), (cost,), weights)


def bits_per_activation(costs: Costs, _: LatencyTable | None) -> Measure:
    """Inputs * activation bits of the searchable layers, by their inputs."""
    layers = costs.layers
    activations = sum(layer.activations for layer in layers)
    if not activations:
        raise ValueError("bits_per_activation: the searchable layers have no activations")
    return Measure(
        "bits_per_activation",
        "bits of inputs of searchable layers",
        (0,),
        (lambda place, pair: layers[place].activations * pair[1],),
        activations,
    )


def activation_memory(costs: Costs, _: LatencyTable | None) -> Measure:
    """One sum for every moment at which not less is held than at another one, at any bits."""
    if not costs.tensors:
        raise ValueError("activation_memory: the costs have no tensors: profile the network again")
    places = {layer.name: place for place, layer in enumerate(costs.layers)}
    peaks: list[dict[int | None, int]] = []
    for tensors in costs.held():
        peak: dict[int | None, int] = {}
        for tensor in tensors:
            place = None if tensor.layer is None else places.get(tensor.layer)  # None: constant
            bits = 1
            if place is None:
                bits = FLOAT_BITS if tensor.layer is None else costs.fixed_bits
            peak[place] = peak.get(place, 0) + tensor.elements * bits
        if not any(_within(peak, other) for other in peaks):
            peaks = [other for other in peaks if not _within(other, peak)] + [peak]

    def cost_at(peak: dict[int | None, int]) -> Callable[[int, Pair], int]:
        return lambda place, pair: peak.get(place, 0) * pair[1]

    return Measure(
        "activation_memory",
        "bits held at once",
        tuple(peak.get(None, 0) for peak in peaks),
        tuple(map(cost_at, peaks)),
        8,
        places=tuple(tuple(place for place in peak if place is not None) for peak in peaks),
    )


def _within(one: Mapping[int | None, int], other: Mapping[int | None, int]) -> bool:
    return one.keys() <= other.keys() and all(count <= other[at] for at, count in one.items())


def latency(costs: Costs, table: LatencyTable | None) -> Measure:
    """Seconds as integers, in the largest of ms, µs, ns, ... in which all entries are whole."""
    if table is None:
        raise ValueError("latency and latency_table go together: latency_table is missing")
    power = next(k for k in itertools.count(0, 3) if 10**k % table.per_second == 0)
    per_second = 10**power
    searchable = [layer.name for layer in costs.layers]
    fixed = (costs.fixed_bits, costs.fixed_bits)

    def cost(place: int, pair: Pair) -> int:
        return int(table.seconds[searchable[place], pair[0], pair[1]] * per_second)

    known = (table.seconds.get((layer.name, *fixed), Fraction(0)) for layer in costs.fixed)
    return Measure(
        "latency",
        dict(enumerate(("s", "ms", "µs", "ns", "ps", "fs"))).get(power // 3, f"1e-{power} s"),
        (int(sum(known, Fraction(0)) * per_second),),
        (cost,),
        per_second,
    )
