"""The Lagrangian relaxation of the rows: its best prices, and a first answer from them."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, Final

import numpy as np

from limpq_ext.ilp.columns import Layout, firsts
from limpq_ext.ilp.mip import silent_highs

EXCHANGED: Final = 200
"""Choices among which the best exchange of two is looked for."""

VARIED: Final = 12
"""Prices that are varied at most."""


class CuttingPlanes:
    """Maximises L of `limpq_ext.ilp.program`.

    The choices that are cheapest at some prices give a plane that L lies below, at every limit: an
    answer for one limit begins with the planes of those before it.

    Attributes:
        most_costs: What each row's dearest choices cost together.
    """

    def __init__(self, highspy: Any, layout: Layout, table: np.ndarray) -> None:
        self._highspy, self._layout = highspy, layout
        self._units = np.maximum(table.max(axis=1), 1.0)
        self._table = table / self._units[:, None]
        dearest = np.maximum.reduceat(table, firsts(layout.cell), axis=1)
        self.most_costs = dearest.sum(axis=1)[1:]
        self._master: Any = None

    def maximise(self, room: np.ndarray, deadline: float) -> tuple[float, np.ndarray]:
        """The largest L and its prices, nearly: any prices give a valid L."""
        room = room / self._units[1:]
        best, at = -math.inf, np.zeros(len(room))
        if len(room) == 0:
            return self._cut(at)[0] * self._units[0], at
        if self._master is None or self._master.getNumRow() > 300:
            self._begin()
            trial = at
        else:
            trial = self._peak(room)[1]
        for _ in range(200):
            if time.perf_counter() > deadline:
                raise TimeoutError
            value, use = self._cut(trial)
            floor = value + trial @ (use - room)
            if floor > best:
                best, at = floor, trial
            ones = np.arange(1 + len(room), dtype=np.int32)
            self._master.addRow(-math.inf, value, len(ones), ones, np.concatenate(([1.0], -use)))
            upper, peak = self._peak(room)
            if (peak >= 0.999 * self._box).any() and self._box < 1e9:
                self._widen()
                trial = peak
                continue
            if upper - best <= 1e-8 * abs(upper):
                break
            # halfway first: the peak of few planes is far off
            trial = peak if upper - best < 1e-3 * abs(upper) else (peak + at) / 2
        return best * self._units[0], at * self._units[0] / self._units[1:]

    def _cut(self, prices: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and use of the cheapest choices."""
        columns, _ = self._layout.cheapest(self._table[0] + prices @ self._table[1:])
        sums = self._table[:, columns].sum(axis=1)
        return float(sums[0]), sums[1:]

    def _begin(self) -> None:
        """The program of the planes: the height above all of them, and the prices."""
        self._box = 1.0
        self._master = silent_highs(self._highspy)
        self._master.changeObjectiveSense(self._highspy.ObjSense.kMaximize)
        self._master.addVar(-math.inf, math.inf)
        self._master.changeColCost(0, 1.0)
        for _ in range(len(self._units) - 1):
            self._master.addVar(0.0, self._box)

    def _widen(self) -> None:
        self._box *= 8
        for column in range(1, len(self._units)):
            self._master.changeColBounds(column, 0.0, self._box)

    def _peak(self, room: np.ndarray) -> tuple[float, np.ndarray]:
        """The highest point below all planes, an upper bound of L, and where it is."""
        for column, most in enumerate(room.tolist(), 1):
            self._master.changeColCost(column, -most)
        self._master.run()
        if self._master.getModelStatus() != self._highspy.HighsModelStatus.kOptimal:
            return -math.inf, np.zeros(len(room))
        solution = np.array(self._master.getSolution().col_value)
        return float(solution[0] - solution[1:] @ room), np.maximum(solution[1:], 0.0)


def around(prices: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The best prices, which come first, and some around them.

    The best prices bound the whole, others are better for what is still open in a partial answer.

    Args:
        prices: The best prices.
        costs: What each row's dearest choices cost together: of many rows those that weigh most
            are varied.
    """
    worth = prices * costs
    which = np.flatnonzero(prices > 0)
    if len(which) > VARIED:
        which = np.sort(which[np.argsort(-worth[which], kind="stable")[:VARIED]])
    binding = len(which)
    if binding > 3:  # all combinations would be too many
        one_each = [
            np.where(np.eye(binding)[k], f, 1.0) for k in range(binding) for f in (0.8, 1.25)
        ]
        factors = np.array([np.ones(binding), *one_each, *np.full((2, binding), [[0.8], [1.25]])])
    else:
        factors = np.array(list(itertools.product((1.0, 0.8, 1.25), repeat=binding)))
    spread = np.ones((len(factors), len(prices)))
    spread[:, which] = factors
    return prices * spread


def rounded(
    layout: Layout,
    table: np.ndarray,
    prices: np.ndarray,
    room: np.ndarray,
    penalties: np.ndarray,
    deadline: float,
) -> np.ndarray:
    """Round the relaxed answer, and exchange the choices of up to two groups at a time.

    Of all choices, and pairs of them, that are nearest to the relaxed answer and not taken the best
    one is made, until none is better. Breaking a row counts so much that it soon ends.

    Args:
        layout: The columns.
        table: Value and costs of every column.
        prices: The best prices.
        room: The limits of the costs.
        penalties: What a unit above each limit counts.
        deadline: ``time.perf_counter()`` at which to return what is there.

    Returns:
        The sources of the columns that are taken. They may break rows.
    """
    columns = table[0] + prices @ table[1:]
    cheapest, _ = layout.cheapest(columns)
    taken = np.empty_like(cheapest)
    taken[layout.group[layout.cell[cheapest]]] = cheapest
    above, _ = layout.above(columns)
    options = layout.option[layout.cell]
    own = np.isin(options, options[taken])  # the options of linked groups are not exchanged
    nearness = np.argsort(np.where(own, above, math.inf), kind="stable")[: own.sum()]

    while time.perf_counter() < deadline:
        near = nearness[~np.isin(nearness, taken)][: min(EXCHANGED, 4 * len(taken))]
        groups = layout.group[layout.cell[near]]
        # the last candidate leaves everything, so that one group alone may change
        change = np.zeros((len(table), len(near) + 1))
        change[:, :-1] = table[:, near] - table[:, taken[groups]]
        merits = change[0][:, None] + change[0]
        sums = table[1:, taken].sum(axis=1)
        now = 0.0
        for row, (used, limit, penalty) in enumerate(zip(sums, room, penalties, strict=True), 1):
            now += penalty * max(used - limit, 0.0)
            if used + 2 * change[row].max() > limit:  # one matrix at a time, however many rows
                excess = change[row][:, None] + change[row]
                excess += used - limit
                merits += penalty * np.maximum(excess, 0.0, out=excess)
        which = np.append(groups, -1)
        merits[which[:, None] == which] = math.inf
        best = np.argmin(merits)
        if not merits.flat[best] < now:
            break
        for place in np.unravel_index(best, merits.shape):
            if place < len(near):
                taken[groups[place]] = near[place]
    return layout.source[taken]
