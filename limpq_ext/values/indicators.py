"""Importance indicators: the learned step size of every layer at every candidate bit-width."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, get_args

from limpq_ext.values.bits import check_bits
from limpq_ext.values.files import Document, Strict
from limpq_ext.values.reading import reading

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["weight", "activation"]
Rule = Literal["forbid", "isotonic", "keep"]
Action = Literal["forbidden", "changed", "kept"]

StepSizes = tuple[str, dict[int, float], dict[int, float]]
"""A layer's name, and for each bit-width the step size of its weights and of its activations."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
RULES: Final[tuple[Rule, ...]] = get_args(Rule)


@dataclass(frozen=True)
class LayerIndicators(Strict):
    """The indicators of one layer; checked as part of `Indicators`.

    Attributes:
        name: Name of the layer, as in ``named_modules()`` of the float model.
        weight: Indicator of the weights for each candidate bit-width, in units of the weights.
        activation: The same for the layer's input activations.
    """

    name: str
    weight: dict[int, float]
    activation: dict[int, float]

    def __post_init__(self) -> None:
        for kind in KINDS:  # plain numbers, also where numpy's or a tensor's were given
            values = {operator.index(b): float(v) for b, v in getattr(self, kind).items()}
            object.__setattr__(self, kind, dict(sorted(values.items())))


@dataclass(frozen=True)
class NonMonotone:
    """One indicator that is not above the next one, and what was done about it.

    Attributes:
        layer: Name of the layer.
        kind: Which of the layer's indicators.
        bits: The bit-width, in bits.
        action: ``"forbidden"`` as a choice, ``"changed"`` in value, or ``"kept"``.
        old: The indicator as it was learned.
        new: The indicator that counts now; None where the bit-width is forbidden.
    """

    layer: str
    kind: Kind
    bits: int
    action: Action
    old: float
    new: float | None


@dataclass(frozen=True)
class Indicators(Document):
    """What joint training learned and the search needs.

    Attributes:
        bits: Candidate bit-widths, ascending; the same for every layer, weights and activations.
        layers: The searchable layers in the network's order.
        meta: Where they come from; anything that JSON has a form for.

    Raises:
        ValueError: If there are no layers or no bits, a bit-width is outside 2 to 16 or stands
            twice, two layers have one name, a layer lacks a bit-width or has another, or an
            indicator is NaN, infinite or negative. The message names the layer and the bits.
    """

    bits: tuple[int, ...]
    layers: tuple[LayerIndicators, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-indicators"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        bits = sorted(check_bits("indicators", b) for b in self.bits)
        object.__setattr__(self, "bits", tuple(bits))
        object.__setattr__(self, "layers", tuple(self.layers))
        if not bits:
            raise ValueError("indicators: there are no candidate bits")
        if len(set(bits)) < len(bits):
            raise ValueError(f"indicators: a bit-width stands twice in {bits}")
        if not self.layers:
            raise ValueError("indicators: there are no layers")
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen:
                raise ValueError(f"layer {layer.name!r} stands twice in the indicators")
            seen.add(layer.name)
            for kind in KINDS:
                self._check_values(f"layer {layer.name!r}: {kind} indicator", getattr(layer, kind))

    def _check_values(self, what: str, values: Mapping[int, float]) -> None:
        for b in self.bits:
            if b not in values:
                raise ValueError(f"{what} at {b} bits is missing")
        for b, value in values.items():
            if b not in self.bits:
                raise ValueError(f"{what} at {b} bits: the candidates are {list(self.bits)}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{what} at {b} bits is {value}")

    @classmethod
    def from_limpq(cls, path: str | os.PathLike[str]) -> Indicators:
        """Read the pickle that LIMPQ's own indicator training writes.

        It holds ``{"weight": {layer: {"6": s, ...}}, "act": ..., "layer_name": [layer, ...]}``,
        with the ``module.`` of DataParallel before the names, which is taken off. Only containers,
        strings and numbers are read: a pickle that asks for any class or function is refused.

        Args:
            path: The file.

        Returns:
            The indicators, layers in the order of ``layer_name``, checked.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it is not such a pickle or its indicators are not valid.
        """
        from limpq_ext.values import limpq_files

        return cls._read(path, lambda: limpq_files.read_indicators(path), "LIMPQ")

    @classmethod
    def from_limpq_checkpoint(
        cls, path: str | os.PathLike[str], bits: Sequence[int] = (6, 5, 4, 3, 2)
    ) -> Indicators:
        """Take the step sizes out of a checkpoint of LIMPQ's own indicator training.

        Its ``state_dict`` holds ``LAYER.quan_w_fn.s`` and ``LAYER.quan_a_fn.s``, a step size for
        each candidate; a ``module.`` before the names is taken off. Only tensors, containers,
        strings and numbers are unpickled.

        Args:
            path: The file.
            bits: The candidates in the order of that training's configuration (``target_bits``).

        Returns:
            The indicators, layers in the order of the checkpoint, checked.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it is no such checkpoint or its step sizes are not valid.
        """
        from limpq_ext.values import limpq_files

        return cls._read(path, lambda: limpq_files.read_step_sizes(path, tuple(bits)), "LIMPQ")

    @classmethod
    def from_model(cls, model: nn.Module, meta: Mapping[str, Any] | None = None) -> Indicators:
        """The step sizes of a prepared model as they stand now.

        Args:
            model: What :func:`limpq_ext.prepare` returned; all layers with the same candidates.
            meta: Where they come from; anything that JSON has a form for.

        Returns:
            The indicators, layers in the order of ``named_modules()``.

        Raises:
            ValueError: If there are no quantized layers, their candidates differ, or a step size is
                NaN or infinite or was never given its start value by a batch in training mode; the
                message names its layer.
        """
        from limpq_ext.training.step_sizes import step_sizes

        layers = tuple(LayerIndicators(*layer) for layer in step_sizes(model))
        return cls(tuple(layers[0].weight) if layers else (), layers, dict(meta or {}))

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> Indicators:
        """Take the step sizes out of a checkpoint of a joint training, finished or not.

        Args:
            path: A `Checkpoint` of a run, or ``JointTrainer.state_dict()`` saved by ``torch.save``.

        Returns:
            The indicators as `JointTrainer.indicators` would have given them at that moment.

        Raises:
            OSError: If the file is missing (FileNotFoundError) or cannot be read.
            FileFormatError: If it holds no joint training, or its step sizes are not valid or have
                no start values yet.
        """
        from limpq_ext.training.step_sizes import read_step_sizes

        return cls._read(path, lambda: read_step_sizes(path), "checkpoint")

    @classmethod
    def from_table(
        cls,
        weight: Mapping[str, Mapping[int, float]] | None = None,
        activation: Mapping[str, Mapping[int, float]] | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> Indicators:
        """Search with any scores: what each layer costs at each bit-width.

        Args:
            weight: Name -> bits -> cost of the layer's weights, layers in the network's order; the
                smaller the better, not negative. None: weights cost nothing at any bit-width.
            activation: The same for the layer's input activations.
            meta: Where they come from; anything that JSON has a form for.

        Returns:
            The scores as indicators, checked.

        Raises:
            ValueError: If there is no table, the tables are of different layers, or a cost is
                missing, NaN, infinite or negative.
        """
        names = list(weight or activation or ())
        if not names:
            raise ValueError("indicators: the tables hold no layers")
        first = next(iter((weight or activation or {}).values()))
        nothing = {name: dict.fromkeys(first, 0.0) for name in names}
        tables = {"weight": weight or nothing, "activation": activation or nothing}
        for kind, table in tables.items():
            for name in {*names, *table}:
                if name not in table or name not in nothing:
                    raise ValueError(f"layer {name!r} is missing in one of the tables, see {kind}")
        layers = tuple(
            LayerIndicators(name, *(dict(table[name]) for table in tables.values()))
            for name in names
        )
        return cls(tuple(first), layers, dict(meta or {}))

    @classmethod
    def _read(
        cls, path: str | os.PathLike[str], read: Callable[[], Iterable[StepSizes]], source: str
    ) -> Indicators:
        """Indicators from what a reader finds in a file."""
        found = read()
        with reading(path):
            layers = tuple(LayerIndicators(*layer) for layer in found)
            bits = tuple(layers[0].weight) if layers else ()
            return cls(bits, layers, {"source": f"{source}, {Path(path).name}"})

    def normalised(self) -> Indicators:
        """The same with a mean of 1 for each kind, so that alpha weighs the kinds as equals.

        The mean is over all layers and bit-widths; a kind that is 0 everywhere stays so. Within a
        kind all ratios are kept.
        """
        layers = self.layers
        factors = {}
        for kind in KINDS:
            values = [value for layer in layers for value in getattr(layer, kind).values()]
            mean = math.fsum(value / len(values) for value in values)
            factors[kind] = 1 / mean if mean else 1.0
        scaled = tuple(
            LayerIndicators(
                layer.name,
                *(
                    {b: value * factors[kind] for b, value in getattr(layer, kind).items()}
                    for kind in KINDS
                ),
            )
            for layer in layers
        )
        return dataclasses.replace(self, layers=scaled)

    def monotone(self, rule: Rule) -> tuple[Indicators, tuple[NonMonotone, ...]]:
        """Deal with indicators that do not fall as bits grow, and say what was done.

        A pair of neighbouring candidates is out of order where the indicator at the lower
        bit-width is below the one at the higher. ``"forbid"`` takes the lower bit-width of such a
        pair out of the search, judged on the learned values only (LIMPQ's search.py does it with a
        huge cost); the highest candidate therefore always stays. ``"isotonic"`` replaces the
        values by the nearest ones, in least squares, that do not rise with bits (pool adjacent
        violators). ``"keep"`` leaves all as it is.

        Args:
            rule: ``"forbid"``, ``"isotonic"`` or ``"keep"``.

        Returns:
            The indicators to search with, which only ``"isotonic"`` changes, and one record for
            each bit-width that is forbidden, changed, or kept as the lower one of such a pair.

        Raises:
            ValueError: If there is no such rule.
        """
        if rule not in RULES:
            raise ValueError(f"non-monotone rule {rule!r}: not one of {', '.join(RULES)}")
        records: list[NonMonotone] = []
        layers = []
        for layer in self.layers:
            repaired = {}
            for kind in KINDS:
                old: dict[int, float] = getattr(layer, kind)
                repaired[kind] = _isotonic(old) if rule == "isotonic" else old
                if rule == "isotonic":
                    touched = [b for b in self.bits if repaired[kind][b] != old[b]]
                else:
                    pairs = itertools.pairwise(self.bits)
                    touched = [low for low, high in pairs if old[low] < old[high]]
                for b in touched:
                    action, new = _OUTCOMES[rule], repaired[kind][b]
                    records.append(
                        NonMonotone(
                            layer.name, kind, b, action, old[b], None if rule == "forbid" else new
                        )
                    )
            layers.append(LayerIndicators(layer.name, repaired["weight"], repaired["activation"]))
        return dataclasses.replace(self, layers=tuple(layers)), tuple(records)


_OUTCOMES: Final[dict[Rule, Action]] = {
    "forbid": "forbidden",
    "isotonic": "changed",
    "keep": "kept",
}


def _isotonic(values: Mapping[int, float]) -> dict[int, float]:
    """The nearest values in least squares that do not rise with bits (pool adjacent violators)."""
    pools: list[list[float]] = []  # neighbours that share one value, their mean
    for b in sorted(values):
        pools.append([values[b]])
        while len(pools) > 1 and _mean(pools[-2]) < _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    means = [_mean(pool) for pool in pools for _ in pool]
    return dict(zip(sorted(values), means, strict=True))


def _mean(values: list[float]) -> float:
    return values[0] if len(values) == 1 else math.fsum(values) / len(values)
