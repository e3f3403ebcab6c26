"""The choices as columns: costs in whole numbers, which ones to keep, and what links combine.

Whatever the limits, the columns are the same.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from limpq_ext.ilp.rows import Link, NoSolutionError

Item = TypeVar("Item")

MOST_TUPLES: Final = 2048
"""So many combinations of labels may a set of linked groups have; above that HiGHS takes over."""


LIMB: Final = 32
"""Bits of a part of what rounding leaves over: floats add up those of two million groups."""


class WholeTable:
    """A table of integers as floats, above the least of each group and in their largest unit.

    Floats count integers up to 2^53. Where the sums are larger the unit is raised and costs are
    rounded down. A limit rounded down in the same way then admits every answer that the true limit
    admits, and some more, which are recognised when they are counted exactly.

    Attributes:
        costs: The costs of all groups in one array.
        base: What the cheapest choices cost together.
        unit: The unit of ``costs``.
        exact: Whether nothing was rounded.
        above: The costs above the least of each group as integers.
        most: What the dearest choices cost together above the base.
    """

    def __init__(self, table: Sequence[Sequence[int]], starts: np.ndarray) -> None:
        flat = list(itertools.chain.from_iterable(table))
        small = min(flat) > -(2**62) and max(flat) < 2**62  # so that differences fit too
        costs = np.array(flat, dtype=np.int64 if small else object)
        least = np.minimum.reduceat(costs, starts[:-1])
        self.above = costs - np.repeat(least, np.diff(starts))
        self.base = sum(least.tolist())
        self._fine = int(np.gcd.reduce(self.above)) or 1
        self.most = sum(np.maximum.reduceat(self.above, starts[:-1]).tolist())
        self._excess = max(0, (self.most // self._fine).bit_length() - 53)
        self.unit = self._fine << self._excess
        self.exact = self._excess == 0
        self.costs = (self.above // self.unit).astype(float)

    @property
    def widths(self) -> list[int]:
        """Bits of the parts of what rounding leaves over, from the highest part to the lowest."""
        first = self._excess % LIMB
        return ([first] if first else []) + [LIMB] * (self._excess // LIMB)

    def limbs(self) -> list[np.ndarray]:
        """What rounding leaves of all costs, in the parts that `widths` describes.

        With them the costs are exact: two sums that agree in all parts are equal.
        """
        rest = self.above // self._fine
        parts = []
        for width in reversed(self.widths):
            parts.append((rest & ((1 << width) - 1)).astype(float))
            rest = rest >> width
        return parts[::-1]

    def room(self, limit: int) -> float:
        """A limit above the base, in the unit."""
        return float(min((limit - self.base) // self.unit, 2**53))

    @property
    def comparable(self) -> np.ndarray:
        """Numbers in the order of the costs, exactly."""
        return self.costs if self.exact else np.unique(self.above, return_inverse=True)[1]


@dataclass(frozen=True)
class Layout:
    """How columns make up cells, cells options, and options blocks.

    A block is a set of groups that are linked, or a group on its own. An option of a block is a
    combination of the links' labels; in it each group has a cell, with the columns (choices) that
    carry these labels. A block takes one option, and each of its groups a column of that cell. A
    group on its own has one option with one cell.

    Attributes:
        source: The column's index among all choices.
        cell: The column's cell.
        group: The cell's group.
        option: The cell's option.
        block: The option's block.
    """

    source: np.ndarray
    cell: np.ndarray
    group: np.ndarray
    option: np.ndarray
    block: np.ndarray

    def minima(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The least of every cell, option and block, of functions (rows) of the columns."""
        cells = np.minimum.reduceat(columns, firsts(self.cell), axis=-1)
        options = np.add.reduceat(cells, firsts(self.option), axis=-1)
        return cells, options, np.minimum.reduceat(options, firsts(self.block), axis=-1)

    def above(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By how much using a column raises the sum of the minima at least; that sum."""
        cells, options, blocks = self.minima(columns)
        options = options - blocks[..., self.block]
        above = columns - cells[..., self.cell] + options[..., self.option][..., self.cell]
        return above, blocks.sum(axis=-1)

    def cheapest(self, columns: np.ndarray) -> tuple[np.ndarray, float]:
        """The columns that make up the sum of the minima, one for each group; that sum."""
        cells, options, blocks = self.minima(columns)
        best = np.flatnonzero(options == blocks[self.block])
        taken = np.zeros(len(options), bool)
        taken[best[firsts(self.block[best])]] = True
        hits = np.flatnonzero((columns == cells[self.cell]) & taken[self.option][self.cell])
        return hits[firsts(self.cell[hits])], float(blocks.sum())

    def only(self, kept: np.ndarray) -> tuple[Layout | None, np.ndarray]:
        """Without the columns that are not kept, and without options that lack a cell then.

        Returns:
            The layout, None if a block has no option left; and the columns that are left.
        """
        whole = np.zeros(len(self.group), bool)
        whole[self.cell[kept]] = True
        whole = np.logical_and.reduceat(whole, firsts(self.option))
        if not np.logical_or.reduceat(whole, firsts(self.block)).all():
            return None, kept
        kept = np.flatnonzero(kept & whole[self.option][self.cell])
        cells = self.cell[kept[firsts(self.cell[kept])]]
        options = self.option[cells[firsts(self.option[cells])]]
        layout = Layout(
            self.source[kept],
            _numbered(self.cell[kept]),
            self.group[cells],
            _numbered(self.option[cells]),
            self.block[options],
        )
        return layout, kept


def in_time(items: Iterable[Item], deadline: float) -> Iterator[Item]:
    """The items, with a TimeoutError once a deadline of ``time.perf_counter()`` passed."""
    for item in items:
        if time.perf_counter() > deadline:
            raise TimeoutError("no policy was found within the time limit")
        yield item


def firsts(sorted_ids: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))


def _numbered(sorted_ids: np.ndarray) -> np.ndarray:
    """The runs of equal numbers, numbered from 0."""
    return np.cumsum(np.concatenate(([0], sorted_ids[1:] != sorted_ids[:-1])))


def by_group(sources: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Sorted indices among all choices, those of each group apart."""
    ends = np.searchsorted(sources, starts).tolist()
    return [sources[first:end] for first, end in itertools.pairwise(ends)]


def undominated(
    values: np.ndarray,
    rows: Sequence[WholeTable],
    tiebreaks: Sequence[WholeTable],
    links: Sequence[Link],
    starts: np.ndarray,
    deadline: float = math.inf,
) -> np.ndarray:
    """The choices that no other one of their group, with the same labels, beats.

    One beats another if it costs no more in any row and comes before it in the order of value,
    tiebreaks and index. Taking it instead is then always possible and better.
    """
    rank = np.empty(len(values), dtype=int)
    ties = [whole.comparable for whole in reversed(tiebreaks)]
    rank[np.lexsort((*ties, values))] = np.arange(len(values))
    costs = [whole.comparable for whole in rows]
    for link in links:
        for group, labels in link.labels.items():
            own = np.zeros(len(values))
            numbers = np.unique(np.array(labels, dtype=object), return_inverse=True)[1]
            own[starts[group] : starts[group + 1]] = numbers
            costs += [own, -own]
    kept = np.ones(len(values), bool)
    sizes = np.diff(starts)
    for size in np.unique(sizes).tolist():
        batch = max(1, 2**22 // size**2)
        groups = np.flatnonzero(sizes == size)
        for first in range(0, len(groups), batch):
            some = starts[groups[first : first + batch], None] + np.arange(size)
            beats = rank[some][:, :, None] < rank[some][:, None, :]
            for cost in in_time(costs, deadline):
                own = cost[some]
                if (own != own[:, :1]).any():  # of many links most are of other groups
                    beats &= own[:, :, None] <= own[:, None, :]
            kept[some] = ~beats.any(axis=1)
    return np.flatnonzero(kept)


def lay_out(kept: np.ndarray, starts: np.ndarray, links: Sequence[Link]) -> tuple[Layout, bool]:
    """The columns of the choices that are kept.

    Returns:
        The layout, and whether it does without some links, which have too many combinations.

    Raises:
        NoSolutionError: If the links cannot be kept together.
    """
    choices = by_group(kept, starts)
    alone, loose = set(range(len(choices))), False
    linked = []
    for groups, own in connected(links, lambda link: link.labels):
        combined = _combinations(groups, own, choices, starts)
        if combined is None:
            loose = True
            continue
        if not combined:
            raise NoSolutionError("the links cannot be kept together")
        linked.append(combined)
        alone.difference_update(groups)
    # (sources, group) of each cell, by option, by block
    blocks = [[[(choices[group], group)]] for group in sorted(alone)] + linked
    options = list(itertools.chain.from_iterable(blocks))
    cells = list(itertools.chain.from_iterable(options))
    layout = Layout(
        np.concatenate([sources for sources, _ in cells]),
        np.repeat(np.arange(len(cells)), [len(sources) for sources, _ in cells]),
        np.array([group for _, group in cells]),
        np.repeat(np.arange(len(options)), [len(option) for option in options]),
        np.repeat(np.arange(len(blocks)), [len(block) for block in blocks]),
    )
    return layout, loose


def _combinations(
    groups: Sequence[int],
    links: Sequence[Link],
    choices: Sequence[np.ndarray],
    starts: np.ndarray,
) -> list[list[tuple[np.ndarray, int]]] | None:
    """The combinations of labels that linked groups can have, None if there are too many.

    Returns:
        For each combination the choices of each group.
    """
    combined: list[dict[int, int]] = [{}]  # labels by the number of the link
    by_labels: list[tuple[int, list[int], dict[tuple[int, ...], list[int]]]] = []
    for group in groups:
        mine = [number for number, link in enumerate(links) if group in link.labels]
        members: dict[tuple[int, ...], list[int]] = {}
        for source in choices[group].tolist():
            choice = source - int(starts[group])
            labels = tuple(links[number].labels[group][choice] for number in mine)
            members.setdefault(labels, []).append(source)
        by_labels.append((group, mine, members))
        extended = []
        for known, labels in itertools.product(combined, members):
            asked = dict(zip(mine, labels, strict=True))
            if all(known.get(number, label) == label for number, label in asked.items()):
                extended.append(known | asked)
        combined = list({tuple(sorted(each.items())): each for each in extended}.values())
        if len(combined) > MOST_TUPLES:
            return None
    return [
        [
            (np.array(members[tuple(each[number] for number in mine)]), group)
            for group, mine, members in by_labels
        ]
        for each in combined
    ]


def connected(
    items: Sequence[Item], groups_of: Callable[[Item], Iterable[int]]
) -> list[tuple[list[int], list[Item]]]:
    """The sets of groups that items connect, with these items."""
    parts: list[tuple[set[int], list[Item]]] = []
    for item in items:
        groups, own = set(groups_of(item)), [item]
        rest = []
        for other_groups, others in parts:
            if groups & other_groups:
                groups, own = groups | other_groups, others + own
            else:
                rest.append((other_groups, others))
        parts = [*rest, (groups, own)]
    return [(sorted(groups), own) for groups, own in parts if groups]
