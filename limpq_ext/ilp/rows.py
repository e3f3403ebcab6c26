"""What an integer program is made of: rows, links, and the solution that comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Stop = Literal["optimal", "tolerance", "gap", "time"]
"""Why a search ended; `Solution` says what each means."""


class NoSolutionError(ValueError):
    """The rows and links cannot be kept together, which was proven."""


@dataclass(frozen=True)
class Row:
    """A limit on the sum of the chosen costs.

    Attributes:
        costs: Cost of every choice of every group, not negative.
        limit: The largest sum that is allowed.
    """

    costs: list[list[int]]
    limit: int

    def use(self, chosen: Sequence[int]) -> int:
        """The sum of the costs of the chosen ones, exactly."""
        return total(self.costs, chosen)

    @property
    def smallest(self) -> int:
        """The sum of the cheapest ones, exactly."""
        return sum(map(min, self.costs))


@dataclass(frozen=True)
class Link:
    """Groups that have to agree.

    Attributes:
        labels: For each of the groups, by its index, a label of every choice. The labels of the
            chosen ones are the same in all groups of the link.
    """

    labels: dict[int, list[int]]

    def kept(self, chosen: Sequence[int]) -> bool:
        """Whether the chosen ones agree."""
        return len({labels[chosen[group]] for group, labels in self.labels.items()}) < 2


@dataclass(frozen=True)
class Solution:
    """What was found.

    Attributes:
        chosen: Index of the choice in each group.
        bound: No choice within the limits has a smaller sum of values, as was proven.
        solver: Name and version of the solver.
        stopped_by: Why the search ended: ``"optimal"``, the answer is proven in integers;
            ``"tolerance"``, HiGHS says that it is optimal, which holds up to HiGHS's tolerance;
            ``"gap"``, it is within the gap that was asked for; ``"time"``, the deadline passed.
        prices: Shadow price of each row in the relaxed program: by how much the sum of values
            falls for one unit more of the limit. 0 where the limit does not bind.
    """

    chosen: tuple[int, ...]
    bound: float
    solver: str
    stopped_by: Stop
    prices: tuple[float, ...]


def total(table: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    """The sum of the chosen ones of a table, exactly."""
    return sum(group[i] for group, i in zip(table, chosen, strict=True))
