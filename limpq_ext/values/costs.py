"""What every layer of a network costs, counted exactly, and what a policy costs with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Final

from limpq_ext.values.bits import check_bits
from limpq_ext.values.files import Document, Strict
from limpq_ext.values.reading import shown

FIXED_BITS: Final = 8
"""Bit-width of the first and the last layer, weights and activations, which are not searched."""

MOST: Final = 2**63 - 1
"""The most that a count of one layer or tensor can be; what is added up of them stays exact."""

MOST_MOMENTS: Final = 100_000
"""The most moments of a forward: calls of quantizable layers."""

MOST_HELD: Final = 10**7
"""The most moments at which tensors are held, all tensors together."""

FLOAT_BITS: Final = 32
"""Bits per weight of the float model that compression ratios compare with."""


@dataclass(frozen=True)
class LayerCost(Strict):
    """The cost of one layer; checked as part of `Costs`.

    Attributes:
        name: Name of the layer, as in ``named_modules()`` of the float model.
        kind: What it is, for example ``"conv2d"`` or ``"linear"``.
        macs: Multiply-accumulate operations for one sample.
        weights: Number of elements of its weight; the bias is not counted.
        activations: Number of elements of its input for one sample.
    """

    name: str
    kind: str
    macs: int
    weights: int
    activations: int


@dataclass(frozen=True)
class LiveTensor(Strict):
    """A tensor between two layers, and how long it is needed; checked as part of `Costs`.

    Time is counted in layer calls: moment 0 is the first call of a quantizable layer in a forward.
    A layer's output and the normalisation and activation after it are one tensor;
    :mod:`limpq_ext.graph.liveness` has all the rules by which :func:`limpq_ext.profile` finds
    tensors.

    Attributes:
        elements: Number of its elements for one sample.
        layer: The layer with whose activation bits it is stored, the first that reads it; None:
            no layer does, and it is stored in float.
        first: The first moment at which it is held, that of the layer call that puts it out.
        last: The last moment at which it is held, that of the last layer call before its last use.
    """

    elements: int
    layer: str | None
    first: int
    last: int


@dataclass(frozen=True)
class Costs(Document):
    """The costs of a network.

    The methods take an assignment: for each searchable layer its name and (weight bits, activation
    bits), as `Policy.bits` gives it. It may name fixed layers too. They raise ValueError where it
    lacks a searchable layer or names one that is not in the network.

    Attributes:
        layers: The searchable layers in the network's order; at least one.
        fixed: The first and the last layer.
        meta: Where the numbers come from; anything that JSON has a form for.
        fixed_bits: Bit-width of the fixed layers where an assignment does not say.
        shared_inputs: Groups of two or more layers that read one and the same tensor, also in
            another shape; an element-wise function makes another tensor.
        added_inputs: Groups of two or more layers that read the operands of one addition, or what
            it puts out.
        tensors: What is held between the layers, for `activation_memory_bits`; empty: not known.
        parameters: Elements of all parameters of the float network, each counted once however many
            modules share it; None: not known.
        float_parameters: Elements of those that stay in float32: embeddings, normalisations,
            biases, excluded layers, each counted once; None: not known.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If there is no searchable layer, two layers have one name, or a count is
            negative or above ``MOST``, or ``fixed_bits`` is outside 2 to 16, or ``shared_inputs``,
            ``added_inputs`` or ``tensors`` name a layer that is not there, or tensors are held for
            more than ``MOST_MOMENTS``, or ``MOST_HELD`` all together.
    """

    layers: tuple[LayerCost, ...]
    fixed: tuple[LayerCost, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    fixed_bits: int = FIXED_BITS
    shared_inputs: tuple[tuple[str, ...], ...] = ()
    added_inputs: tuple[tuple[str, ...], ...] = ()
    tensors: tuple[LiveTensor, ...] = ()
    parameters: int | None = None
    float_parameters: int | None = None

    FORMAT: ClassVar[str] = "limpq-costs"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "fixed", tuple(self.fixed))
        check_bits("fixed layers", self.fixed_bits)
        if not self.layers:
            raise ValueError("costs: there are no searchable layers")
        seen: set[str] = set()
        for layer in (*self.layers, *self.fixed):
            if layer.name in seen:
                raise ValueError(f"layer {layer.name!r} stands twice in the costs")
            seen.add(layer.name)
            for what in ("macs", "weights", "activations"):
                count = getattr(layer, what)
                if type(count) is not int:
                    raise TypeError(f"layer {layer.name!r}: {what} must be an int, got {count!r}")
                if not 0 <= count <= MOST:
                    raise ValueError(
                        f"layer {layer.name!r}: {what} is {shown(count)}, expected 0 to {MOST}"
                    )
        for what in ("parameters", "float_parameters"):
            count = getattr(self, what)
            if count is not None and type(count) is not int:
                raise TypeError(f"costs: {what} must be an int, got {count!r}")
            if count is not None and not 0 <= count <= MOST:
                raise ValueError(f"costs: {what} is {shown(count)}, expected 0 to {MOST}")
        for what in ("shared_inputs", "added_inputs"):
            object.__setattr__(self, what, tuple(map(tuple, getattr(self, what))))
        object.__setattr__(self, "tensors", tuple(self.tensors))
        for what, groups in (("shared", self.shared_inputs), ("added", self.added_inputs)):
            for group in groups:
                if len(set(group)) < 2 or len(set(group)) < len(group):
                    raise ValueError(f"{what} input {list(group)}: needs two or more layers")
                for name in group:
                    if name not in seen:
                        raise ValueError(f"{what} input {list(group)}: there is no layer {name!r}")
        for tensor in self.tensors:
            if tensor.layer is not None and tensor.layer not in seen:
                raise ValueError(f"live tensor: there is no layer {tensor.layer!r}")
            if not 0 <= tensor.elements <= MOST or not 0 <= tensor.first <= tensor.last:
                raise ValueError(f"live tensor: elements or moments are wrong: {tensor}")
            if tensor.last >= MOST_MOMENTS:
                raise ValueError(
                    f"live tensor: last is {tensor.last}, expected below {MOST_MOMENTS}"
                )
        held = sum(tensor.last - tensor.first + 1 for tensor in self.tensors)
        if held > MOST_HELD:
            raise ValueError(f"live tensors: held at {held} moments, expected at most {MOST_HELD}")

    @property
    def all_weights(self) -> int:
        """Number of weights of the whole network, without biases and batch normalisation."""
        return sum(layer.weights for layer in (*self.layers, *self.fixed))

    def bitops(self, assignment: Mapping[str, tuple[int, int]]) -> int:
        """BitOps of an assignment for one sample: sum of MACs * weight bits * activation bits.

        Searchable layers only, as LIMPQ's search counts its budget: the fixed layers cost the same
        under every policy.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            The BitOps, exactly.
        """
        self._check_names(assignment)
        pairs = ((layer, *assignment[layer.name]) for layer in self.layers)
        return sum(layer.macs * weight * activation for layer, weight, activation in pairs)

    def size_bits(self, assignment: Mapping[str, tuple[int, int]]) -> int:
        """Size in bits of the weights of an assignment, the fixed layers' included.

        Biases, batch normalisation and the scales are not counted, as in LIMPQ.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            The size in bits, exactly; divided by 8 it is in bytes.
        """
        self._check_names(assignment)
        fixed = (self.fixed_bits, self.fixed_bits)
        return sum(
            layer.weights * assignment.get(layer.name, fixed)[0]
            for layer in (*self.layers, *self.fixed)
        )

    def compression(self, assignment: Mapping[str, tuple[int, int]]) -> Fraction:
        """How many times smaller than at 32 bits the weights are: 32 * all weights / size.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            The ratio, exactly; 1 where the network has no weights.
        """
        size = self.size_bits(assignment)
        return Fraction(FLOAT_BITS * self.all_weights, size) if size else Fraction(1)

    def parameters_in_float(self) -> int:
        """Elements of the parameters that stay in float32.

        Raises:
            ValueError: If the costs do not say.
        """
        if self.float_parameters is None:
            raise ValueError(
                "the costs do not say which parameters stay in float: profile the network again"
            )
        return self.float_parameters

    def total_size_bits(self, assignment: Mapping[str, tuple[int, int]]) -> int:
        """Size in bits of the whole network: `size_bits`, and all else in float32.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            The size in bits, exactly.

        Raises:
            ValueError: If the costs do not say which parameters stay in float.
        """
        return self.size_bits(assignment) + FLOAT_BITS * self.parameters_in_float()

    def sizes(self, assignment: Mapping[str, tuple[int, int]]) -> dict[str, float | None]:
        """Sizes in bytes and compression, of the quantized layers and of the whole network.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            ``size`` and ``compression`` as LIMPQ counts them, of the weights of searchable and
            fixed layers; ``total_size`` and ``total_compression`` of all parameters, None where the
            costs do not say. A ratio of nothing is None.
        """
        size = self.size_bits(assignment)
        found: dict[str, float | None] = {
            "size": size / 8,
            "compression": FLOAT_BITS * self.all_weights / size if size else None,
            "total_size": None,
            "total_compression": None,
        }
        if self.float_parameters is not None:
            total = self.total_size_bits(assignment)
            found["total_size"] = total / 8
            if self.parameters is not None and total:
                found["total_compression"] = FLOAT_BITS * self.parameters / total
        return found

    def mean_bits(self, assignment: Mapping[str, tuple[int, int]]) -> tuple[Fraction, Fraction]:
        """Mean bit-widths over the searchable layers, where every layer counts the same.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            Mean weight bits and mean activation bits, exactly.
        """
        self._check_names(assignment)
        pairs = [assignment[layer.name] for layer in self.layers]
        return (
            Fraction(sum(weight for weight, _ in pairs), len(pairs)),
            Fraction(sum(activation for _, activation in pairs), len(pairs)),
        )

    def activation_memory_bits(self, assignment: Mapping[str, tuple[int, int]]) -> int:
        """Peak of the activation memory for one sample: the most bits held at one moment.

        Every tensor between layers is held with the activation bits of the layer that reads it,
        in 32 bits where none does.

        Args:
            assignment: Name -> (weight bits, activation bits).

        Returns:
            The peak in bits, exactly.

        Raises:
            ValueError: If the costs do not say which tensors there are.
        """
        self._check_names(assignment)
        if not self.tensors:
            raise ValueError("the costs have no tensors: profile the network again")
        fixed = (self.fixed_bits, self.fixed_bits)

        def bits(tensor: LiveTensor) -> int:
            return FLOAT_BITS if tensor.layer is None else assignment.get(tensor.layer, fixed)[1]

        return max(sum(t.elements * bits(t) for t in tensors) for tensors in self.held())

    def held(self) -> tuple[tuple[LiveTensor, ...], ...]:
        """The tensors that are held together, at each moment at which no more are held next.

        Whatever their bits, the peak of the activation memory is at one of these moments. Time and
        memory depend on how many tensors there are, and not on how long they are held.
        """
        held: list[LiveTensor] = []
        found = []
        starting = sorted(self.tensors, key=lambda tensor: tensor.first)
        for place, tensor in enumerate(starting):
            held.append(tensor)
            later = starting[place + 1].first if place + 1 < len(starting) else math.inf
            if any(other.last < later for other in held):
                found.append(tuple(held))
                held = [other for other in held if other.last >= later]
        return tuple(found)

    def _check_names(self, assignment: Mapping[str, tuple[int, int]]) -> None:
        for layer in self.layers:
            if layer.name not in assignment:
                raise ValueError(f"layer {layer.name!r} has no bits in the assignment")
        known = {layer.name for layer in (*self.layers, *self.fixed)}
        for name in assignment:
            if name not in known:
                raise ValueError(f"layer {name!r} of the assignment is not in the costs")
