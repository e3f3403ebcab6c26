"""The sweep: all partial answers of a program, group by group, as far as they can still be best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from limpq_ext.columns import Layout, firsts


@dataclass(frozen=True)
class _Level:
    """A group to go through.

    Attributes:
        columns: Its columns.
        options: Their options, counted within the block.
        first: Whether the group is the first of its block, and so picks the option.
        rest: For every test and option the least that the groups still to come add.
    """

    columns: np.ndarray
    options: np.ndarray
    first: bool
    rest: np.ndarray


class PartialAnswers:
    """Answers for some of the groups, all at once.

    What an answer has to pass are tests: linear functions of its value and costs that may not
    exceed a bound. Those of a partial answer are known but for the groups still to come, which add
    a known least.

    Args:
        layout: The columns that are left.
        tests: The tests of every column.
        bounds: Their bounds.
        relaxations: How many of the tests, the first ones, are relaxations of the whole program.
        shifts: What makes the sum of a relaxation a bound of the value.
        ties: The tiebreaks of every column.

    Attributes:
        layout: The columns that are left.
        states: Tests and tiebreaks (rows) of every partial answer (columns).
    """

    def __init__(
        self,
        layout: Layout,
        tests: np.ndarray,
        bounds: np.ndarray,
        relaxations: int,
        shifts: np.ndarray,
        ties: np.ndarray,
    ) -> None:
        self.layout = layout
        self._table, self._bounds = np.concatenate((tests, ties)), bounds
        self._relaxations, self._shifts = relaxations, shifts
        self._cells, _, self._blocks = layout.minima(tests)
        cell_blocks = layout.block[layout.option]
        counts = np.bincount(cell_blocks[layout.cell])
        self._single = (counts == np.bincount(cell_blocks)) & (np.bincount(layout.block) == 1)
        self._fixed = np.flatnonzero(self._single[cell_blocks[layout.cell]])
        possible = bool((self._blocks.sum(axis=1) <= bounds).all())
        self.states = self._table[:, self._fixed].sum(axis=1, keepdims=True)[:, :possible]
        self._labels = np.zeros(self.states.shape[1], dtype=int)
        self._trail: list[tuple[np.ndarray, np.ndarray]] = []

    def levels(self, prices: np.ndarray) -> Iterator[_Level]:
        """The groups with columns to choose from, those of a block together.

        Blocks whose choice matters most for the rows come first: what is open is then soon so
        small that the bounds are tight.

        Args:
            prices: Prices of the rows, whose costs are the last tests.
        """
        layout, tests = self.layout, len(self._bounds)
        cell_blocks = layout.block[layout.option]
        cell_firsts = firsts(layout.cell)
        costs = self._table[tests - len(prices) : tests]
        ranges = np.maximum.reduceat(costs, cell_firsts, axis=1)
        ranges -= np.minimum.reduceat(costs, cell_firsts, axis=1)
        ranges *= prices[:, None]
        weights = np.maximum.reduceat(ranges.max(axis=0, initial=0.0), firsts(cell_blocks))
        order = np.argsort(-weights, kind="stable")
        order = order[~self._single[order]]
        rests = np.cumsum(self._blocks[:, order[::-1]], axis=1)[:, ::-1]
        rests = np.concatenate((rests[:, 1:], np.zeros((len(rests), 1))), axis=1)
        block_cells = np.append(firsts(cell_blocks), len(cell_blocks))
        cell_columns = np.append(cell_firsts, len(layout.cell))
        options = np.bincount(layout.block)
        for place, block in enumerate(order.tolist()):
            begin, end = block_cells[block], block_cells[block + 1]
            columns = np.arange(cell_columns[begin], cell_columns[end])
            rest = rests[:, place, None]
            if end - begin == 1:
                yield _Level(columns, np.zeros(len(columns), dtype=int), True, rest)
                continue
            groups = (end - begin) // options[block]
            cells = layout.cell[columns] - begin
            minima = self._cells[:, begin:end].reshape(len(rest), -1, groups)
            for which in range(groups):
                mine = cells % groups == which
                later = rest + minima[:, :, which + 1 :].sum(axis=2)
                yield _Level(columns[mine], cells[mine] // groups, which == 0, later)

    def extend(self, level: _Level, width: int, exact: bool) -> float:
        """Add every column of a group to every partial answer, and drop what fails a test.

        Args:
            level: The group.
            width: How many may be held.
            exact: Whether equal states are equal answers, so that one of them is enough.

        Returns:
            The least bound of those that were dropped because there were too many, or infinity.
        """
        tests = len(self._bounds)
        columns = self._table[:, level.columns]
        rest = level.rest[:, level.options] if level.rest.shape[1] > 1 else level.rest
        most = self._bounds[:, None] - rest - columns[:tests]
        passed = np.ones((len(level.columns), self.states.shape[1]), dtype=bool)
        if not level.first:
            passed &= self._labels == level.options[:, None]
        for some in (slice(first, first + 16) for first in range(0, tests, 16)):
            passed &= (self.states[:tests][some, None] <= most[some, :, None]).all(axis=0)
        # column by column: one index into all rows of a large array at once takes ten times as long
        parts = [np.flatnonzero(each) for each in passed]
        states = np.concatenate(
            [
                self.states.take(part, axis=1, mode="clip") + columns[:, which, None]
                for which, part in enumerate(parts)
            ],
            axis=1,
        )
        parents = np.concatenate(parts)
        which = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        dropped, kept = math.inf, None
        if len(parents) > width and exact:
            kept = self._different(states, level.options[which])
        if len(parents if kept is None else kept) > width:
            labels = level.options[which] if level.rest.shape[1] > 1 else np.zeros_like(which)
            bound = states[: self._relaxations] + self._shifts[:, None]
            bound = (bound + level.rest[: self._relaxations].take(labels, axis=1)).max(axis=0)
            kept = np.arange(len(parents)) if kept is None else kept
            order = np.argpartition(bound[kept], width)
            dropped = float(bound[kept[order[width]]])
            kept = np.sort(kept[order[:width]])
        if kept is not None:
            states, parents, which = states.take(kept, axis=1), parents[kept], which[kept]
        labels = level.options[which]
        self.states, self._labels = states, labels
        self._trail.append((parents, level.columns[which]))
        return dropped

    def _different(self, states: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The first by the tiebreaks of those that agree in value, costs and option."""
        settled = states[self._relaxations - 1 : len(self._bounds)]  # the value and the costs
        ties = states[len(self._bounds) :]
        values = np.sort(settled[0])
        if (values[1:] != values[:-1]).all():
            return np.arange(len(values))
        order = np.lexsort((*ties[::-1], *settled, labels))
        keys = np.vstack((settled[:, order], labels[order]))
        new = np.concatenate(([True], (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
        return np.sort(order[new])

    def columns(self, index: int) -> np.ndarray:
        """The columns of one of the answers."""
        taken = []
        for parents, columns in reversed(self._trail):
            taken.append(columns[index])
            index = parents[index]
        return np.concatenate((self._fixed, np.array(taken[::-1], dtype=int)))
