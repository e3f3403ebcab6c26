"""The sweep: all partial answers of a program, group by group, as far as they can still be best."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from limpq_ext.ilp.columns import Layout, firsts

MOST_BYTES: Final = 2**29
"""What the partial answers may take, about; where they would take more, fewer are held."""

FEW: Final = 500
"""Where no more choices are left HiGHS takes over after sweeps of `PROOF_WIDTH`."""

PROOF_WIDTH: Final = 16384
"""From here on a sweep through few choices is only of use as a proof: it ends if it drops any."""


def sweep(
    layout: Layout,
    table: np.ndarray,
    prices: np.ndarray,
    shifts: np.ndarray,
    room: np.ndarray,
    *,
    target: float,
    width: int,
    exact: bool,
    deadline: float,
    widths: Sequence[int] = (),
) -> tuple[PartialAnswers | None, float]:
    """Go through all answers of a value of up to ``target``, holding ``width`` partial ones.

    The widest ones give up as soon as there are more, where HiGHS does better.

    Args:
        layout: The columns.
        table: Value, costs, what rounding left of the value, and tiebreaks of every column.
        prices: Sets of prices at which the relaxation bounds a partial answer: first the best ones,
            last 0, which leaves the value itself.
        shifts: What makes the sum of each relaxation a bound of the value.
        room: The limits of the costs.
        target: The largest value.
        width: How many may be held.
        exact: Whether the costs are not rounded.
        deadline: ``time.perf_counter()`` at which to give up.
        widths: Bits of each part of what rounding left of the value, the highest first.

    Returns:
        The answers, None if there is none, and a bound of those that were dropped.

    Raises:
        TimeoutError: If the deadline passed.
    """
    costs = slice(1, 1 + len(room))
    # The tests of an answer: the relaxations, then the rows. The best prices alone drop most
    # columns, so that the others have few left to test.
    for some in (slice(0, 1), slice(None)):
        tests = np.concatenate((table[0] + prices[some] @ table[costs], table[costs]))
        bounds = np.concatenate(((target - shifts)[some], room))
        above, least = layout.above(tests)
        reduced, kept = layout.only((above <= (bounds - least)[:, None]).all(axis=0))
        if reduced is None:
            return None, math.inf
        layout = reduced
        table, tests = table[:, kept], tests[:, kept]
    partial = PartialAnswers(layout, tests, bounds, shifts, table[costs.stop :], widths)
    dropped = math.inf
    for level in partial.levels(prices[0]):
        if not partial.states.shape[1]:
            return None, dropped
        if time.perf_counter() > deadline:
            raise TimeoutError
        dropped = min(dropped, partial.extend(level, width, exact))
        if dropped < math.inf and width >= PROOF_WIDTH and len(layout.source) <= FEW:
            return None, -math.inf
    return partial, dropped


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
        shifts: What makes the sum of each relaxation a bound of the value. The first tests are the
            relaxations, the last of them the value itself; the others are the costs.
        ties: What rounding left of the value of every column, and its tiebreaks.
        widths: Bits of each part of what rounding left, the highest first.

    Attributes:
        states: Tests and tiebreaks (rows) of every partial answer (columns).
    """

    def __init__(
        self,
        layout: Layout,
        tests: np.ndarray,
        bounds: np.ndarray,
        shifts: np.ndarray,
        ties: np.ndarray,
        widths: Sequence[int] = (),
    ) -> None:
        self._layout, self._bounds, self._shifts = layout, bounds, shifts
        self._widths = widths
        self._table = np.concatenate((tests, ties))
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
        layout, tests = self._layout, len(self._bounds)
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
        room = MOST_BYTES // (8 * len(self._table))  # states that may be there at once
        width = max(1, min(width, room // 2))
        states, parents, which = self._none()
        dropped = math.inf
        waiting: list[int] = []
        for column in range(len(parts)):
            waiting.append(column)
            count = len(parents) + sum(len(parts[each]) for each in waiting)
            if column + 1 < len(parts) and count + len(parts[column + 1]) <= room:
                continue
            made = [
                self.states.take(parts[each], axis=1, mode="clip") + columns[:, each, None]
                for each in waiting
            ]
            states = np.concatenate([states, *made], axis=1)
            parents = np.concatenate([parents, *(parts[each] for each in waiting)])
            lengths = [len(parts[each]) for each in waiting]
            which = np.concatenate((which, np.repeat(waiting, lengths)))
            waiting = []
            kept = np.arange(len(parents))
            if len(kept) > width and exact:
                kept = self._different(states, level.options[which])
            if len(kept) > width:
                kept, least = self._best(states, level, which, kept, width)
                dropped = min(dropped, least)
            if len(kept) < len(parents):
                states, parents, which = states.take(kept, axis=1), parents[kept], which[kept]
        self.states, self._labels = states, level.options[which]
        self._trail.append((parents, level.columns[which]))
        return dropped

    def _none(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """No states, their parents, and their columns."""
        nothing = np.zeros(0, dtype=int)
        return np.empty((len(self._table), 0)), nothing, nothing

    def _best(
        self, states: np.ndarray, level: _Level, which: np.ndarray, kept: np.ndarray, width: int
    ) -> tuple[np.ndarray, float]:
        """The ``width`` most promising of those that are kept; the least bound of the others."""
        labels = level.options[which] if level.rest.shape[1] > 1 else np.zeros_like(which)
        bound = states[: len(self._shifts)] + self._shifts[:, None]
        bound = (bound + level.rest[: len(self._shifts)].take(labels, axis=1)).max(axis=0)
        order = np.argpartition(bound[kept], width)
        return np.sort(kept[order[:width]]), float(bound[kept[order[width]]])

    def _different(self, states: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The first by the tiebreaks of those that agree in value, costs and option."""
        rest = len(self._bounds) + len(self._widths)
        settled = states[len(self._shifts) - 1 : rest]  # the value, the costs, the value's rest
        ties = states[rest:]
        values = np.sort(settled[0])
        if (values[1:] != values[:-1]).all():
            return np.arange(len(values))
        order = np.lexsort((*ties[::-1], *settled, labels))
        keys = np.vstack((settled[:, order], labels[order]))
        new = np.concatenate(([True], (keys[:, 1:] != keys[:, :-1]).any(axis=0)))
        return np.sort(order[new])

    def answers(self) -> Iterator[np.ndarray]:
        """The columns' sources of every answer, the best by exact value and tiebreaks first."""
        tests = len(self._bounds)
        ties = self.states[tests + len(self._widths) :]
        for index in np.lexsort((*ties[::-1], *self._exact_values()[::-1])):
            columns, place = [self._fixed], index
            for parents, added in reversed(self._trail):
                columns.append(added[[place]])
                place = parents[place]
            yield self._layout.source[np.concatenate(columns)]

    def _exact_values(self) -> list[np.ndarray]:
        """The values as integers in parts, the highest first, after the carries between them."""
        first = len(self._bounds)
        parts = self.states[first : first + len(self._widths)].astype(np.int64)
        exact, carry = [], np.zeros(self.states.shape[1], dtype=np.int64)
        for part, width in zip(parts[::-1], self._widths[::-1], strict=True):
            carry = carry + part
            exact.append(carry & ((1 << width) - 1))
            carry = carry >> width
        return [self.states[len(self._shifts) - 1].astype(np.int64) + carry, *exact[::-1]]
