"""Budgets: what a policy may use, counted in exact integers.

A user says a budget in its own unit (BitOps, bytes, seconds, ...), as a number, as what a uniform
policy uses, or as a share of what 8 bits use. A limit that is given as a decimal is taken as that
decimal and rounded down to a whole bit, BitOp or fraction of a second, which loses nothing, because
all costs are integers in these units.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from limpq_ext.allocation import measures
from limpq_ext.allocation.measures import Measure, Pair
from limpq_ext.ilp.rows import Row
from limpq_ext.values.bits import check_bits
from limpq_ext.values.costs import Costs
from limpq_ext.values.latency import LatencyTable

Number = int | float | Fraction | Decimal


@dataclass(frozen=True)
class Kind:
    """What there is to say of a budget once and for all.

    Attributes:
        unit: The user's unit, as it stands behind an amount.
        help: What a limit of it means, a line.
        measure: How it is counted in a network; the table is that of a latency.
    """

    unit: str
    help: str
    measure: Callable[[Costs, LatencyTable | None], Measure]


BUDGETS: Final[Mapping[str, Kind]] = {
    "bitops": Kind("BitOps", "Most BitOps of the searchable layers, per image.", measures.bitops),
    "size": Kind(
        "bytes", "Most bytes of the weights of searchable and fixed layers.", measures.size
    ),
    "total_size": Kind(
        "bytes", "Most bytes of the whole network, what stays in float32 too.", measures.total_size
    ),
    "compression": Kind(
        "times smaller", "Least ratio of 32-bit weights to the policy's.", measures.compression
    ),
    "mean_weight_bits": Kind(
        "bits", "Highest mean of the weight bits over the layers.", measures.mean_weight_bits
    ),
    "mean_activation_bits": Kind(
        "bits",
        "Highest mean of the activation bits over the layers.",
        measures.mean_activation_bits,
    ),
    "bits_per_weight": Kind(
        "bits", "Highest mean of the bits over all searchable weights.", measures.bits_per_weight
    ),
    "bits_per_activation": Kind(
        "bits",
        "Highest mean of the bits over all inputs of the layers.",
        measures.bits_per_activation,
    ),
    "activation_memory": Kind(
        "bytes",
        "Most bytes of activations held at one moment, per image.",
        measures.activation_memory,
    ),
    "latency": Kind("s", "Most seconds, by --latency-table.", measures.latency),
}
"""All budgets by the names that `search`, recipes and the command line have for them.

What those take is made from this table, and a test holds `search` and its docstring to it.
"""


def find_budget(name: str) -> Kind:
    """A budget of the table.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in BUDGETS:
        raise ValueError(f"there is no budget {name!r}: it is one of {', '.join(BUDGETS)}")
    return BUDGETS[name]


_RANGE: Final = 300  # largest power of ten, up or down, that a number may have


@dataclass(frozen=True)
class UniformLevel:
    """A budget given as what the uniform policy of these bits uses; see `uniform`.

    Attributes:
        weight_bits: Bit-width of the weights of all searchable layers.
        activation_bits: Bit-width of their activations.

    Raises:
        TypeError: If a bit-width is not an integer.
        ValueError: If a bit-width is outside 2 to 16.
    """

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        check_bits("uniform level, weights", self.weight_bits)
        check_bits("uniform level, activations", self.activation_bits)


@dataclass(frozen=True)
class ShareOf8Bit:
    """A budget given as a share of what the uniform 8-bit policy uses; see `of_8bit`.

    Attributes:
        share: The share; 0.25 is a quarter.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not positive and finite.
    """

    share: Number

    def __post_init__(self) -> None:
        exact_number("share of 8 bits", self.share)


Asked = Number | UniformLevel | ShareOf8Bit | str
"""A limit; a string is read by `parse_budget`."""


def uniform(weight_bits: int, activation_bits: int) -> UniformLevel:
    """The budget that a uniform policy uses: ``search(..., bitops=uniform(3, 4))``.

    Args:
        weight_bits: Bit-width of the weights of all searchable layers.
        activation_bits: Bit-width of their activations; a size budget takes no notice of it.

    Returns:
        The level, for any budget.

    Raises:
        TypeError: If a bit-width is not an integer.
        ValueError: If a bit-width is outside 2 to 16.
    """
    return UniformLevel(weight_bits, activation_bits)


def of_8bit(share: Number) -> ShareOf8Bit:
    """A share of what the uniform 8-bit policy uses: ``search(..., latency=of_8bit(0.6))``.

    Args:
        share: The share, for example 0.25 for a quarter.

    Returns:
        The share, for any budget but the compression, which is a ratio already.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not positive and finite.
    """
    return ShareOf8Bit(share)


def parse_budget(name: str, text: str) -> Asked:
    """Read a budget as the command line and recipes have it.

    Args:
        name: The budget, for the error.
        text: A number (``1.2e9``), a level (``w3a4``) or a share of 8 bits (``25%``).

    Returns:
        The budget.

    Raises:
        ValueError: If it is none of these, or its bits are outside 2 to 16.
    """
    level = re.fullmatch(r"[wW](\d{1,3})[aA](\d{1,3})", text.strip())
    if level:
        return UniformLevel(int(level[1]), int(level[2]))
    try:
        number = Decimal(text.strip().removesuffix("%"))
    except InvalidOperation:
        kinds = "a number, a level such as w3a4 or a share of 8 bits such as 25%"
        raise ValueError(f"{name}: {text!r} is not {kinds}") from None
    if text.strip().endswith("%"):
        return ShareOf8Bit(exact_number(name, number) / 100)
    return number


def exact_number(name: str, value: Any, *, zero: bool = False) -> Fraction:
    """The number that the user typed, exactly: 12.2 is 122/10, not the nearest binary fraction.

    Args:
        name: What the error calls it.
        value: The number.
        zero: Whether it may be 0.

    Returns:
        The number.

    Raises:
        TypeError: If it is not a real number.
        ValueError: If it is negative, 0 unasked, infinite, NaN, or beyond 1e300 or 1e-300.
    """
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, Decimal)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    finite = isinstance(value, numbers.Rational) or math.isfinite(value)
    if not finite or value < 0 or (value == 0 and not zero):
        wanted = "finite and not negative" if zero else "positive and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    if isinstance(value, Decimal) and value and abs(value.adjusted()) > _RANGE:
        exact = None  # a fraction of it would have too many digits to be held
    else:
        exact = Fraction(str(value))
    if exact is None or (exact and not Fraction(1, 10**_RANGE) <= exact <= 10**_RANGE):
        raise ValueError(f"{name} must be between 1e-{_RANGE} and 1e{_RANGE}, got {value}")
    return exact


@dataclass(frozen=True)
class Budget:
    """A measure with its limit.

    Attributes:
        measure: How its use is counted.
        asked: The limit in the user's units.
        limit: The limit in whole units.
    """

    measure: Measure
    asked: int | float
    limit: int

    @property
    def name(self) -> str:
        """The name of the budget."""
        return self.measure.name

    @property
    def words(self) -> str:
        """The budget as a sentence has it, such as ``size <= 20 bytes``."""
        limit = in_exact_words(self.name, self.asked)
        return f"{self.name} {'>=' if self.measure.inverse else '<='} {limit}"

    def rows(self, columns: Sequence[Sequence[Pair]]) -> list[Row]:
        """The rows of the program that keep it."""
        return self.measure.rows(columns, self.limit)


def make_budgets(
    costs: Costs,
    columns: Sequence[Sequence[Pair]],
    asked: Mapping[str, Asked | None],
    latency_table: LatencyTable | None,
) -> tuple[Budget, ...]:
    """The budgets that a user asked for.

    Args:
        costs: Costs of the network.
        columns: Pairs of bits that each searchable layer can have.
        asked: Name -> limit, None where there is none.
        latency_table: The table of a latency budget.

    Returns:
        One budget for each name that has a limit, in the order of `BUDGETS`.

    Raises:
        TypeError: If a limit is not a number, level or share.
        ValueError: If a limit is not positive and finite, or the network has nothing of what it
            limits, or the latency table is not there, not asked for or has holes.
    """
    asked = {
        name: parse_budget(name, value) if isinstance(value, str) else value
        for name, value in asked.items()
    }
    for name, value in asked.items():
        if value is not None and not isinstance(value, (UniformLevel, ShareOf8Bit)):
            exact_number(name, value)
    if (asked.get("latency") is None) != (latency_table is None):
        missing = "latency_table" if latency_table is None else "latency"
        raise ValueError(f"latency and latency_table go together: {missing} is missing")
    if latency_table is not None:
        latency_table.check(costs, columns)
    budgets = []
    for name in BUDGETS:
        value = asked.get(name)
        if value is None:
            continue
        measure = make_measure(name, costs, latency_table)
        limit = exact_limit(measure, value, costs, latency_table)
        whole = measure.whole(limit)
        if isinstance(value, (UniformLevel, ShareOf8Bit)):
            if not whole:
                raise ValueError(f"{name}: {value} is less than one unit of it")
            shown = measure.shown(whole)
        else:
            shown = int(limit) if limit.denominator == 1 else float(limit)
        budgets.append(Budget(measure, shown, whole))
    return tuple(budgets)


def exact_limit(
    measure: Measure, value: Asked, costs: Costs, latency_table: LatencyTable | None = None
) -> Fraction:
    """A limit in the user's units.

    Args:
        measure: What it limits.
        value: A number, level or share.
        costs: Costs of the network.
        latency_table: The table of a latency.

    Raises:
        TypeError: If the value is none of these.
        ValueError: If it is not positive and finite, or cannot be counted.
    """
    if isinstance(value, str):
        value = parse_budget(measure.name, value)
    if isinstance(value, ShareOf8Bit):
        if measure.inverse:
            raise ValueError(
                f"{measure.name} is a ratio and takes no share of 8 bits: give size a share"
            )
        pair, share = (8, 8), exact_number(measure.name, value.share)
    elif isinstance(value, UniformLevel):
        pair, share = (value.weight_bits, value.activation_bits), Fraction(1)
    else:
        return exact_number(measure.name, value)
    pairs = [pair] * len(costs.layers)
    if measure.name == "latency" and latency_table is not None:
        latency_table.check(costs, [[pair] for pair in pairs])
    used = measure.use(pairs)
    if not used:
        raise ValueError(f"{measure.name}: nothing is used at W{pair[0]}A{pair[1]}: give a number")
    return share * measure.exact(used)


def make_measure(name: str, costs: Costs, latency_table: LatencyTable | None = None) -> Measure:
    """How one budget is counted in a network.

    Args:
        name: One of `BUDGETS`.
        costs: Costs of the network.
        latency_table: The table of ``latency``, with all that will be looked up.

    Returns:
        The measure.

    Raises:
        ValueError: If there is no such budget, or the costs hold nothing of what it counts.
    """
    return find_budget(name).measure(costs, latency_table)


_TIMES: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_BYTES: Final = ((10**9, "GB"), (10**6, "MB"), (10**3, "KB"))
_BITOPS: Final = ((10**9, "GBitOps"), (10**6, "MBitOps"), (10**3, "KBitOps"), (1, "BitOps"))


def in_words(name: str, value: int | float) -> str:
    """A limit or use with its unit, times in the unit that suits them.

    Args:
        name: Name of the budget.
        value: The limit or the use, in the budget's unit (seconds for a latency).

    Returns:
        For example ``1,234 bytes (1.234 KB)``, where 1 KB is 1000 bytes, or ``2.5 ms``.
    """
    if name == "latency":
        scale, unit = _scale(_TIMES, value or 1)
        return f"{value / scale:,.6g} {unit}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return f"{text} {_unit(name)}{_in_large(name, value)}"


def in_exact_words(name: str, value: int | float) -> str:
    """A limit with its unit and with every digit, so that it can be asked for again.

    Args:
        name: Name of the budget.
        value: The limit, in the budget's unit (seconds for a latency).

    Returns:
        For example ``1,234 bytes (1.234 KB)`` or ``0.0025 s (2.5 ms)``.
    """
    if name == "latency":
        return f"{value:,} s ({in_words(name, value)})"
    return f"{value:,} {_unit(name)}{_in_large(name, value)}"


def in_short_words(name: str, value: int | float) -> str:
    """A limit or use with its unit, as short as a table wants it, such as ``1.234 MB``."""
    unit = _unit(name)
    if name == "latency":
        scale, unit = _scale(_TIMES, value or 1)
    elif unit == "bytes":
        scale, unit = _scale((*_BYTES, (1, "bytes")), value)
    elif unit == "BitOps":
        scale, unit = _scale(_BITOPS, value)
    else:
        scale = 1
    return f"{value / scale:,.8g} {unit}"


def _unit(name: str) -> str:
    """The user's unit; what a file calls a budget may be none."""
    return BUDGETS[name].unit if name in BUDGETS else "bits"


def _in_large(name: str, value: int | float) -> str:
    if _unit(name) != "bytes" or value < _BYTES[-1][0]:
        return ""
    scale, unit = _scale(_BYTES, value)
    return f" ({value / scale:,.4g} {unit})"


def _scale(scales: Sequence[tuple[float, str]], value: float) -> tuple[float, str]:
    """The largest unit of which the value has one; the smallest where it has none of any."""
    return next((scale for scale in scales if abs(value) >= scale[0]), scales[-1])
