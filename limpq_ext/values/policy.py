"""A policy: the bits of every layer, and how well they were proven."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from limpq_ext.values.bits import check_bits
from limpq_ext.values.costs import FIXED_BITS, Costs
from limpq_ext.values.files import Document, Strict


@dataclass(frozen=True)
class LayerBits(Strict):
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

    def __post_init__(self) -> None:
        for what in ("weight_bits", "activation_bits"):
            bits = check_bits(f"layer {self.name!r}: {what}", getattr(self, what))
            object.__setattr__(self, what, bits)


@dataclass(frozen=True)
class BudgetUse(Strict):
    """One budget of a search, in the user's units.

    Attributes:
        name: Name of the argument of `search`: ``"bitops"``, ``"size"``, ``"total_size"`` (bytes),
            ``"compression"`` (ratio to 32 bits), ``"latency"`` (seconds), ...
        limit: What was asked for: the most that may be used, or the least compression ratio.
        used: What the policy uses, or the compression ratio that it reaches.
    """

    name: str
    limit: int | float
    used: int | float

    @property
    def kept(self) -> bool:
        """Whether the budget is kept."""
        return self.used >= self.limit if self.name == "compression" else self.used <= self.limit


@dataclass(frozen=True)
class ChangedLayer:
    """A layer that two policies give different bits.

    Attributes:
        name: Name of the layer.
        weight_bits: Of the policy that was asked.
        activation_bits: Of the same.
        other_weight_bits: Of the policy that it was compared with.
        other_activation_bits: Of the same.
    """

    name: str
    weight_bits: int
    activation_bits: int
    other_weight_bits: int
    other_activation_bits: int


@dataclass(frozen=True)
class Comparison:
    """How one policy differs from another; printed, it is a table.

    Attributes:
        layers: How many layers both have, the fixed ones too.
        changed: Those with different bits, in the policy's order.
        mean_bits: Mean weight and activation bits of the policy that was asked.
        other_mean_bits: Those of the one that it was compared with.
        ratios: "bitops", "size" and, where the costs say what stays in float, "total_size" of the
            other over those of the policy, where costs were given.
    """

    layers: int
    changed: tuple[ChangedLayer, ...]
    mean_bits: tuple[float, float]
    other_mean_bits: tuple[float, float]
    ratios: dict[str, float]

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.changed), default=0)
        lines = [
            f"{layer.name:<{width}}  W{layer.weight_bits}A{layer.activation_bits}"
            f" -> W{layer.other_weight_bits}A{layer.other_activation_bits}"
            for layer in self.changed
        ]
        lines.append(f"{len(self.changed)} of {self.layers} layers differ")
        means = (
            f"W{weight:.2f}A{bits:.2f}" for weight, bits in (self.mean_bits, self.other_mean_bits)
        )
        lines.append(f"mean bits {' -> '.join(means)}")
        lines += [f"{name} x {ratio:.4f}" for name, ratio in self.ratios.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Policy(Document):
    """The bits of every layer, as the search found them or as somebody chose them.

    Attributes:
        layers: The searchable layers in the network's order; at least one.
        fixed: The layers that were not searched, usually the first and the last.
        objective: Sum of the chosen indicators and of what pairs of layers add; None where there
            was no search.
        bound: No policy within the budgets has a lower objective than this; None likewise.
        gap: (objective - bound) / |objective|; 0 means proven optimal; None likewise.
        budgets: The budgets of the search and what the policy uses of them.
        meta: How it was found; anything that JSON has a form for.

    Raises:
        ValueError: If there is no layer, two layers have one name, or objective, bound, gap or a
            number of a budget is NaN or infinite.
    """

    layers: tuple[LayerBits, ...]
    fixed: tuple[LayerBits, ...] = ()
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    budgets: tuple[BudgetUse, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-policy"
    VERSION: ClassVar[int] = 1

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
        for budget in self.budgets:
            if not (math.isfinite(budget.limit) and math.isfinite(budget.used)):
                raise ValueError(
                    f"budget {budget.name!r}: limit is {budget.limit}, used is {budget.used}"
                )

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

    def compare(self, other: Policy, costs: Costs | None = None) -> Comparison:
        """How another policy of the same layers differs from this one.

        Args:
            other: The other one.
            costs: Of the network; with them what both cost is compared as well.

        Returns:
            The differences; printed, it is a table.

        Raises:
            ValueError: If the policies, or the costs, are of different layers.
        """
        ours, theirs = self.bits(), other.bits()
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                raise ValueError(f"layer {name!r} is in one of the policies only")
        changed = tuple(
            ChangedLayer(name, *ours[name], *theirs[name])
            for name in ours
            if ours[name] != theirs[name]
        )
        ratios = {}
        if costs is not None:
            counts = {
                "bitops": (costs.bitops(ours), costs.bitops(theirs)),
                "size": (costs.size_bits(ours), costs.size_bits(theirs)),
            }
            if costs.float_parameters is not None:
                totals = (costs.total_size_bits(ours), costs.total_size_bits(theirs))
                counts["total_size"] = totals
            ratios = {name: there / here for name, (here, there) in counts.items() if here}
        return Comparison(len(ours), changed, self.mean_bits(), other.mean_bits(), ratios)

    @classmethod
    def from_limpq(cls, path: str | os.PathLike[str], layers: Iterable[str]) -> Policy:
        """Read the lists ``weight_bits`` and ``act_bits`` of a fine-tuning of LIMPQ's own code.

        Args:
            path: Its YAML configuration.
            layers: Names of the layers that the lists are about: those that are quantized and not
                excepted, in the order of ``named_modules()``.

        Returns:
            The policy, without fixed layers.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it has no such lists, or they do not fit the layers.
            ImportError: If PyYAML is not installed.
        """
        from limpq_ext.values.limpq_files import read_policy

        return read_policy(path, layers)

    def save_limpq(self, path: str | os.PathLike[str], layers: Iterable[str] | None = None) -> None:
        """Write the lists ``weight_bits`` and ``act_bits`` for LIMPQ's own fine-tuning.

        Args:
            path: The YAML file to write or to replace.
            layers: Names of the searchable layers in the order of ``named_modules()``, which that
                code counts by; by default the order of this policy.

        Raises:
            ValueError: If ``layers`` are not those of the policy.
            OSError: If the file cannot be written.
        """
        from limpq_ext.values.limpq_files import write_policy

        write_policy(self, path, layers)

    def mean_bits(self) -> tuple[float, float]:
        """Mean weight bits and mean activation bits over ``layers``, each counting the same."""
        count = len(self.layers)
        return (
            sum(layer.weight_bits for layer in self.layers) / count,
            sum(layer.activation_bits for layer in self.layers) / count,
        )
