"""Programs in which pairs of choices count too: a quadratic objective, made linear exactly.

Beside the value of every choice there is one for every pair of choices of some pairs of groups:
products of one-hot choices. Each product gets a variable of its own, and these are choices of one
more group: a choice of it stands for a combination of what the others choose, has the value of that
combination, and is linked to each of them. With x the choices of two groups and y those of the
group of their combinations,

    sum over b of y[a, b] = x_1[a],    sum over a of y[a, b] = x_2[b],

which is the tight form of y[a, b] = x_1[a] * x_2[b] (Adams and Sherali's): with x one-hot nothing
else is possible. So the objective may be any, convex or not, and the matrix of the pairs need not
be made positive semi-definite, as CLADO (arXiv 2307.05657) does for its solver.

Where few groups are connected, such as the layers of a block, one group stands for all of their
combinations, which is tighter still. The relaxation of the rows in `limpq_ext.ilp.program` then
keeps the products, and its sweeps prove the answer in whole numbers. Where more are connected, as
in a chain, each product has a group of its own, and HiGHS proves the answer up to its tolerance.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from limpq_ext.ilp.columns import MOST_TUPLES, connected
from limpq_ext.ilp.program import Program, Value, exact_values
from limpq_ext.ilp.rows import Link, Row, Solution

START_GAP: Final = 1e-3
"""Gap of the answer without products that HiGHS begins with."""


@dataclass(frozen=True)
class Product:
    """Values of pairs of choices.

    Attributes:
        groups: The two groups; they may be the same one.
        labels: For each of them a label of every choice.
        values: (label in the first, label in the second) -> value; what is missing counts 0.
    """

    groups: tuple[int, int]
    labels: tuple[list[int], list[int]]
    values: Mapping[tuple[int, int], Fraction]


class QuadraticProgram:
    """A `Program` with products, built once and solved for as many limits as one likes.

    Args:
        values: Value of every choice of every group, finite.
        rows: The limits.
        products: What pairs of choices add to the sum of values, of either sign.
        links: Groups that have to agree.
        tiebreaks: See `Program`.
        deadline: ``time.perf_counter()`` at which to give up what is not built yet.

    Raises:
        TimeoutError: If the deadline passed.
        ValueError: As for `Program`, or if a product has other groups or choices than the values.
        NoSolutionError: If the links cannot be kept together.
        ImportError: If highspy is not installed.
    """

    def __init__(
        self,
        values: Sequence[Sequence[Value]],
        rows: Sequence[Row],
        products: Sequence[Product],
        *,
        links: Sequence[Link] = (),
        tiebreaks: Sequence[list[list[int]]] = (),
        deadline: float = math.inf,
    ) -> None:
        for index, product in enumerate(products):
            for group, labels in zip(product.groups, product.labels, strict=True):
                if not 0 <= group < len(values) or len(labels) != len(values[group]):
                    raise ValueError(f"product {index} has other groups or choices than the values")
        own = exact_values(values)
        for product in products:
            group, other = product.groups
            if group == other:
                for choice, (one, two) in enumerate(zip(*product.labels, strict=True)):
                    own[group][choice] += product.values.get((one, two), Fraction(0))
        pairs = [product for product in products if len(set(product.groups)) == 2]
        self._combined: list[_Combined] = []
        self._split = False
        for _, some in connected(pairs, lambda product: product.groups):
            if _combinations(some) <= MOST_TUPLES:
                self._combined.append(_Combined(some))
            else:
                self._split = True
                self._combined += [_Combined([product]) for product in some]
        self._values, self._rows, self._links, self._ties = own, list(rows), links, tiebreaks
        first = len(self._combined)  # in front, where few combinations are left for the others
        self._program = Program(
            [*(combined.values for combined in self._combined), *own],
            [Row(self._wider(row.costs), row.limit) for row in rows],
            links=[
                *(
                    link
                    for own, each in enumerate(self._combined)
                    for link in each.links(own, first)
                ),
                *(Link({first + g: own for g, own in link.labels.items()}) for link in links),
            ],
            tiebreaks=[self._wider(table) for table in tiebreaks],
            deadline=deadline,
        )

    def solve(
        self,
        limits: Sequence[int] | None = None,
        *,
        gap: float,
        deadline: float,
        start: Sequence[int] | None = None,
    ) -> Solution:
        """Make one choice in each group with the smallest sum within the limits.

        Arguments, result and errors are those of `Program.solve`. Where products connect so many
        groups that HiGHS has to prove the answer, the shadow prices are those without products.
        """
        if start is None and self._split:
            start = self._without_products.solve(
                limits, gap=max(gap, START_GAP), deadline=deadline
            ).chosen
        solution = self._program.solve(
            limits, gap=gap, deadline=deadline, start=None if start is None else self._longer(start)
        )
        chosen = solution.chosen[len(self._combined) :]
        if self._longer(chosen) != list(solution.chosen):
            raise RuntimeError("the solver's answer does not pass the check of its products")
        return dataclasses.replace(solution, chosen=chosen)

    def objective(self, chosen: Sequence[int]) -> Fraction:
        """The sum of values and products of a choice, exactly."""
        return self._program.objective(self._longer(chosen))

    @functools.cached_property
    def _without_products(self) -> Program:
        return Program(self._values, self._rows, links=self._links, tiebreaks=self._ties)

    def _wider(self, table: Sequence[list[int]]) -> list[list[int]]:
        """A table of costs with those of the combinations, which cost nothing."""
        return [*([0] * len(combined.values) for combined in self._combined), *table]

    def _longer(self, chosen: Sequence[int]) -> list[int]:
        """A choice with the combinations that it makes."""
        return [*(combined.choice(chosen) for combined in self._combined), *chosen]


class _Combined:
    """A group whose choices are the combinations of what connected groups choose.

    Args:
        products: What connects them.

    Attributes:
        values: What the products add in each combination.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        labels = _labels(products)
        distinct = {group: list(dict.fromkeys(own)) for group, own in labels.items()}
        self._labels = {
            group: list(map(distinct[group].index, own)) for group, own in labels.items()
        }
        self._combinations = list(
            itertools.product(*(range(len(own)) for own in distinct.values()))
        )
        self._places = {each: place for place, each in enumerate(self._combinations)}
        self.values = [Fraction(0)] * len(self._combinations)
        places = {group: place for place, group in enumerate(labels)}
        counts = dict.fromkeys(labels, 0)
        for product in products:
            sides = []
            for group in product.groups:
                sides.append((places[group], [own[counts[group]] for own in distinct[group]]))
                counts[group] += 1
            (first, ones), (second, others) = sides
            for place, each in enumerate(self._combinations):
                value = product.values.get((ones[each[first]], others[each[second]]))
                if value:
                    self.values[place] += value

    def choice(self, chosen: Sequence[int]) -> int:
        """The combination that the chosen ones make."""
        return self._places[tuple(own[chosen[group]] for group, own in self._labels.items())]

    def links(self, own: int, first: int) -> list[Link]:
        """What links a combination to the choices that make it.

        Args:
            own: The index of the group of combinations.
            first: The index of the first of the other groups.
        """
        return [
            Link({own: [each[place] for each in self._combinations], first + group: labels})
            for place, (group, labels) in enumerate(self._labels.items())
        ]


def _labels(products: Sequence[Product]) -> dict[int, list[tuple[int, ...]]]:
    """Group -> for each of its choices the labels that the products with it give, in order."""
    found: dict[int, list[list[int]]] = {}
    for product in products:
        for group, labels in zip(product.groups, product.labels, strict=True):
            found.setdefault(group, []).append(labels)
    return {group: list(zip(*own, strict=True)) for group, own in found.items()}


def _combinations(products: Sequence[Product]) -> int:
    """How many combinations of labels connected groups have."""
    return math.prod(len(set(own)) for own in _labels(products).values())
