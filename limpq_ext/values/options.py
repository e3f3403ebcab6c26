"""Options of a function as one frozen dataclass: each with its bounds and a line of help.

The function takes the dataclass or its fields by keyword; recipes make their sections from the same
fields, so a default, a bound and a meaning stand once.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Final, TypeVar

Chosen = TypeVar("Chosen", bound="Options")

BOUNDS: Final[dict[str, tuple[str, Callable[[Any, Any], bool]]]] = {
    "ge": ("at least", operator.ge),
    "gt": ("more than", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("less than", operator.lt),
}
"""Kinds of bounds, by the names that pydantic has for them: in words, and what holds."""


def option(default: Any = dataclasses.MISSING, *, help: str = "", **bounds: float) -> Any:
    """A field of options.

    Args:
        default: Its value where none is given; without one it has to be.
        help: What it is, in a line.
        **bounds: ``ge``, ``gt``, ``le`` or ``lt``: a number has to be so.
    """
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options, their bounds checked.

    Raises:
        ValueError: A number is out of its bounds; the message names it.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for name, bound in field.metadata.get("bounds", {}).items():
                words, holds = BOUNDS[name]
                if value is not None and not holds(value, bound):
                    raise ValueError(f"{field.name} is {value}, expected {words} {bound}")

    @classmethod
    def chosen(cls: type[Chosen], options: Chosen | None, changes: dict[str, Any]) -> Chosen:
        """The options that a function was given, some of them perhaps by keyword.

        Raises:
            TypeError: A keyword is no option, or one that has no default is missing.
            ValueError: As for the class.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in changes:
            if name not in names:
                raise TypeError(f"there is no option {name!r}: it is one of {', '.join(names)}")
        if options is not None:
            return dataclasses.replace(options, **changes)
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in changes:
                raise TypeError(f"the option {field.name!r} is missing")
        return cls(**changes)
