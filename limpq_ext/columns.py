"""The choices as columns of floats that count whole numbers, and how links combine them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from limpq_ext.rows import Link


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
    """

    def __init__(self, table: Sequence[Sequence[int]], starts: np.ndarray) -> None:
        flat = list(itertools.chain.from_iterable(table))
        try:
            costs = np.array(flat, dtype=np.int64)
        except OverflowError:
            costs = np.array(flat, dtype=object)
        least = np.minimum.reduceat(costs, starts[:-1])
        self.above = costs - np.repeat(least, np.diff(starts))
        self.base = sum(least.tolist())
        self.unit = int(np.gcd.reduce(self.above)) or 1
        most = sum(np.maximum.reduceat(self.above, starts[:-1]).tolist())
        excess = max(0, (most // self.unit).bit_length() - 53)
        self.unit <<= excess
        self.exact = excess == 0
        self.costs = (self.above // self.unit).astype(float)

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
            numbered(self.cell[kept]),
            self.group[cells],
            numbered(self.option[cells]),
            self.block[options],
        )
        return layout, kept


def firsts(sorted_ids: np.ndarray) -> np.ndarray:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))


def numbered(sorted_ids: np.ndarray) -> np.ndarray:
    """The runs of equal numbers, numbered from 0."""
    return np.cumsum(np.concatenate(([0], sorted_ids[1:] != sorted_ids[:-1])))


def components(links: Sequence[Link]) -> list[tuple[list[int], list[Link]]]:
    """The sets of groups that links connect, with these links."""
    parts: list[tuple[set[int], list[Link]]] = []
    for link in links:
        groups, own = set(link.labels), [link]
        rest = []
        for other_groups, others in parts:
            if groups & other_groups:
                groups, own = groups | other_groups, others + own
            else:
                rest.append((other_groups, others))
        parts = [*rest, (groups, own)]
    return [(sorted(groups), own) for groups, own in parts if groups]
