"""A policy: the bits of every layer, and how well they were proven."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from limpq_ext.bits import check_bits
from limpq_ext.costs import FIXED_BITS, Costs
from limpq_ext.files import STRICT, load_document, save_document

FORMAT: Final = "limpq-policy"
VERSION: Final = 1


@dataclass(frozen=True)
class LayerBits:
    """The bits of one layer.

    Attributes:
        name: Name of the layer, as in ``named_modules()`` of the float model.
        weight_bits: Bit-width of its weights.
        activation_bits: Bit-width of its input activations.

    Raises:
        TypeError: If a bit-width is not an integer.
        ValueError: If a bit-width is outside 2 to 16.
    """

    name: str
    weight_bits: int
    activation_bits: int

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT

    def __post_init__(self) -> None:
        for what in ("weight_bits", "activation_bits"):
            bits = check_bits(f"layer {self.name!r}: {what}", getattr(self, what))
            object.__setattr__(self, what, bits)


@dataclass(frozen=True)
class BudgetUse:
    """One budget of a search, in the user's units.

    Attributes:
        name: ``"bitops"``, ``"size"`` (bytes), ``"compression"`` (ratio to 32 bits),
            ``"mean_weight_bits"`` or ``"mean_activation_bits"``.
        limit: What was asked for: the most that may be used, or the least compression ratio.
        used: What the policy uses, or the compression ratio that it reaches.
    """

    name: str
    limit: int | float
    used: int | float

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT

    @property
    def kept(self) -> bool:
        """Whether the budget is kept."""
        return self.used >= self.limit if self.name == "compression" else self.used <= self.limit


@dataclass(frozen=True)
class Policy:
    """The bits of every layer, as the search found them or as somebody chose them.

    Attributes:
        layers: The searchable layers in the network's order; at least one.
        fixed: The layers that were not searched, usually the first and the last.
        objective: Sum of the chosen indicators; None where there was no search.
        bound: No policy within the budgets has a lower objective than this; None likewise.
        gap: (objective - bound) / objective; 0 means proven optimal; None likewise.
        budgets: The budgets of the search and what the policy uses of them.
        meta: How it was found; anything that JSON has a form for.

    Raises:
        ValueError: If there is no layer, two layers have one name, or objective, bound or gap is
            NaN or infinite.
    """

    layers: tuple[LayerBits, ...]
    fixed: tuple[LayerBits, ...] = ()
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    budgets: tuple[BudgetUse, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    __pydantic_config__: ClassVar[Mapping[str, Any]] = STRICT

    def __post_init__(self) -> None:
        for what in ("layers", "fixed", "budgets"):
            object.__setattr__(self, what, tuple(getattr(self, what)))
        if not self.layers:
            raise ValueError("policy: there are no layers")
        seen: set[str] = set()
        for layer in (*self.layers, *self.fixed):
            if layer.name in seen:
                raise ValueError(f"layer {layer.name!r} stands twice in the policy")
            seen.add(layer.name)
        for what in ("objective", "bound", "gap"):
            value = getattr(self, what)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"policy: {what} is {value}")

    @classmethod
    def uniform(
        cls,
        network: Costs | Iterable[str],
        weight_bits: int,
        activation_bits: int,
        fixed: Iterable[str] | None = None,
    ) -> Policy:
        """The same bits in every searchable layer: the baseline of a search.

        Args:
            network: The costs of the network, or the names of its searchable layers.
            weight_bits: Bit-width of the weights.
            activation_bits: Bit-width of the activations.
            fixed: Names of the layers at 8 bits; by default those of the costs, or none.

        Returns:
            The policy, without objective and budgets.

        Raises:
            TypeError: If a bit-width is not an integer.
            ValueError: If a bit-width is outside 2 to 16, or a name stands twice.
        """
        if isinstance(network, Costs):
            names = [layer.name for layer in network.layers]
            fixed_names = [layer.name for layer in network.fixed] if fixed is None else fixed
            fixed_bits = network.fixed_bits
        else:
            names, fixed_names, fixed_bits = list(network), fixed or (), FIXED_BITS
        return cls(
            layers=tuple(LayerBits(name, weight_bits, activation_bits) for name in names),
            fixed=tuple(LayerBits(name, fixed_bits, fixed_bits) for name in fixed_names),
        )

    def bits(self) -> dict[str, tuple[int, int]]:
        """Name -> (weight bits, activation bits) of all layers, the fixed ones last."""
        layers = (*self.layers, *self.fixed)
        return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in layers}

    def mean_bits(self) -> tuple[float, float]:
        """Mean weight bits and mean activation bits over ``layers``, each counting the same."""
        count = len(self.layers)
        return (
            sum(layer.weight_bits for layer in self.layers) / count,
            sum(layer.activation_bits for layer in self.layers) / count,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a JSON file, atomically.

        Args:
            path: The file to write or to replace.

        Raises:
            TypeError: If JSON has no form for something in ``meta``.
            ValueError: If ``meta`` or a budget holds a NaN or an infinity.
            OSError: If the file cannot be written.
        """
        save_document(path, self, format=FORMAT, version=VERSION)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy from a JSON file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The policy, checked.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it does not hold a valid policy.
        """
        return load_document(path, cls, format=FORMAT, version=VERSION)
