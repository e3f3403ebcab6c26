"""Names of layers: which of them fit a pattern, and how several stand in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's name, or that of a module around it, fits one of the patterns."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(parent, pattern) for parent in parents for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Iterable[str], argument: str) -> None:
    """Raise ValueError for a pattern that fits no name."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{argument}: the model has no module '{pattern}'")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first names in quotes, and how many more there are."""
    first = ", ".join(f"'{name}'" for name in names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"
