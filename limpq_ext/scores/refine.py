"""A policy made better by measuring: swaps of bits within the budgets, kept where they help.

After the second step of LampQ (arXiv 2511.10004), which swaps bits between layers by what the loss
says. What is tried next is what promises most: scores say so at first, and every measurement
corrects them, so that a layer which disappointed is not tried over and over.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from limpq_ext.allocation.budgets import BUDGETS
from limpq_ext.allocation.measures import Pair
from limpq_ext.allocation.neighbours import Neighbours, Pairs, changed
from limpq_ext.allocation.problem import Problem, Question, make_problem
from limpq_ext.scores.measure import Measure, Measuring, PolicyLoss
from limpq_ext.training.batches import Batches
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.names import listed
from limpq_ext.values.policy import LayerBits, Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVER: Final = "measured swaps"
"""What ``meta["solver"]`` of a refined policy says."""


def refine(
    policy: Policy,
    model: nn.Module,
    batches: Batches,
    costs: Costs,
    *,
    indicators: Indicators | None = None,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    measure: Measure = "kl",
    held_out: Batches | None = None,
    deviations: float = 2.0,
    patience: int = 50,
    seconds: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    measuring: Measuring | None = None,
    on_measured: Callable[[int, float], None] | None = None,
    **question: Unpack[Question],
) -> Policy:
    """Swap bits between layers as long as the measured loss falls, within the budgets.

    A step raises the bits of a tensor and lowers those of one in another layer, exchanges bits
    between weights and input of a layer, or raises bits that still fit. Each keeps every budget in
    exact integers, and every restriction. It is accepted if the loss without training, calibrated
    as `calibrate` does with a reference, is lower than before, and by more than chance makes it on
    so few samples. A step takes a forward of the batches.

    Args:
        policy: Where to begin, such as what a search found.
        model: The float classifier; it is left as it is.
        batches: Some batches to calibrate and to measure with, on any device; their targets matter
            for "loss" alone. Several hundred images: on few, little is beyond chance.
        costs: Costs of the network.
        indicators: Scores that say what to try first; None: by chance.
        bits: Candidates where there are no scores, beside those that the policy has.
        measure: "kl": the divergence from the float network. "loss": the cross entropy.
        held_out: Other batches, on which the policy is measured before and after, and nothing is
            decided.
        deviations: By how many standard errors of its mean over the samples the change of the loss
            has to be below 0. 0: any lower loss is accepted, and steps follow the chance of the
            samples.
        patience: Stop after so many steps in a row that did not help.
        seconds: Stop after this time, what is prepared included. None: no such limit.
        steps: Stop after so many steps. None: no such limit.
        seed: Of the order of what promises the same.
        measuring: Options of :class:`limpq_ext.scores.measure.PolicyLoss`.
        on_measured: Called after every step with how many there were and the least loss.
        question: Budgets, restrictions and options as :func:`limpq_ext.search` takes them; without
            budgets those that the policy carries. Restrictions have to be given again. Bits that a
            search would forbid because scores do not fall are tried.

    Returns:
        The policy with the least loss, never a higher one than where it began. Its objective is the
        sum of the indicators, None without any; bound and gap are None, since it is not the optimum
        of a sum. Where no step helped, it is the one that was given, with its proof.
        ``meta["refined"]`` has the "measure", what was lost "before" and "after", on the
        "held_out" batches too, what "stopped_by" ("patience", "time", "steps", or "exhausted" where
        nothing is left to try) and the "record" of the steps: their new bits by layer, the loss
        before and after, and whether it was accepted.

    Raises:
        TypeError: As in `search`.
        ValueError: The policy is of other layers than the costs, has no budgets where none are
            given, or breaks budgets or restrictions; it was searched under restrictions that are
            not given; a number is too small; or as in `search` and `PolicyLoss`.
    """
    began = time.perf_counter()
    for name, number in (("patience", patience), ("seconds", seconds), ("steps", steps)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}, expected a positive number")
    if not deviations >= 0:
        raise ValueError(f"deviations is {deviations}, expected 0 or more")
    problem = _problem(policy, costs, indicators, bits, question)
    start = _pairs_of(policy, problem)
    options: Measuring = measuring or {}
    batches = list(batches)
    loss = PolicyLoss(model, batches, measure=measure, **options)
    walk = _Walk(
        problem,
        start,
        lambda pairs: loss.losses(_with_bits(policy, problem, pairs)).cpu().numpy(),
        deviations,
        np.random.default_rng(seed),
    )
    stopped_by = _walk_on(
        walk,
        patience,
        math.inf if steps is None else steps,
        math.inf if seconds is None else began + seconds,
        on_measured,
    )
    refined = _with_bits(policy, problem, walk.pairs)
    told: dict[str, Any] = {
        "measure": measure,
        "before": walk.first_loss,
        "after": walk.loss,
        "stopped_by": stopped_by,
        "deviations": deviations,
        "seed": seed,
        "record": walk.record,
    }
    if held_out is not None:
        if options.get("calibration") is None:
            options = {**options, "calibration": batches}
        other = PolicyLoss(model, held_out, measure=measure, **options)
        told["held_out"] = {"before": other(policy), "after": other(refined)}
    if walk.pairs == start:
        return dataclasses.replace(policy, meta={**policy.meta, "refined": told})
    told["from"] = {
        "objective": policy.objective,
        "bound": policy.bound,
        "stopped_by": policy.meta.get("stopped_by"),
    }
    return dataclasses.replace(
        refined,
        objective=None if indicators is None else problem.objective(walk.pairs),
        bound=None,
        gap=None,
        budgets=problem.plain_policy(walk.pairs).budgets,
        meta={
            **policy.meta,
            **problem.facts(walk.pairs),
            "solver": SOLVER,
            "stopped_by": stopped_by,
            "seconds": time.perf_counter() - began,
            "refined": told,
        },
    )


class _Walk:
    """From one policy to a better one, and what is known of the steps that could be taken.

    Attributes:
        pairs: The best policy so far.
        loss: Its loss.
        first_loss: That of the policy it began with.
        record: The steps that were measured.
    """

    def __init__(
        self,
        problem: Problem,
        start: Pairs,
        measure: Callable[[Pairs], NDArray[np.float64]],
        deviations: float,
        generator: np.random.Generator,
    ) -> None:
        self.pairs = start
        self._losses = measure(start)
        self.loss = self.first_loss = _mean(self._losses)
        self.record: list[dict[str, Any]] = []
        self._measure, self._deviations, self._generator = measure, deviations, generator
        self._names = list(problem.pairs)
        self._near = Neighbours(problem)
        self._measured = {start}
        self._expected = _Expectations(problem, start, self.loss)
        self._look_around()

    def propose(self) -> dict[int, Pair] | None:
        """The step that promises most, of those not measured yet; None where there is none."""
        while self._steps:
            place = self._expected.best()
            if place is None:
                return None
            if changed(self.pairs, self._steps[place]) not in self._measured:
                return self._steps[place]
            self._expected.leave_out(place)
        return None

    def step(self, bits: Mapping[int, Pair]) -> bool:
        """Measure a step, and take it if it helps."""
        pairs = changed(self.pairs, bits)
        losses = self._measure(pairs)
        loss = _mean(losses)
        accepted = loss < self.loss - self._deviations * _standard_error(losses - self._losses)
        self._measured.add(pairs)
        self.record.append(
            {
                "bits": {self._names[place]: list(pair) for place, pair in bits.items()},
                "before": self.loss,
                "after": loss,
                "accepted": accepted,
            }
        )
        self._expected.learn(self.pairs, bits, loss - self.loss)
        if accepted:
            self.pairs, self.loss, self._losses = pairs, loss, losses
            self._look_around()
        return accepted

    def _look_around(self) -> None:
        every = list(self._near.within(self.pairs))
        self._steps = [every[i] for i in self._generator.permutation(len(every)).tolist()]
        self._expected.about(self.pairs, self._steps)


def _mean(losses: NDArray[np.float64]) -> float:
    return max(0.0, float(losses.mean()))  # below 0 by rounding only


def _standard_error(changes: NDArray[np.float64]) -> float:
    """Of the mean; 0 of a single sample, of which nothing is known."""
    return float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else 0.0


class _Expectations:
    """What steps are expected to change the loss by: a term for each tensor at each bit-width.

    The terms begin as the indicators, in the unit of the loss: as if the loss at the start were
    their sum. What a step changed otherwise than expected is shared by the terms of its new bits.
    """

    def __init__(self, problem: Problem, start: Pairs, loss: float) -> None:
        objective = problem.objective(start)
        unit = loss / objective if objective > 0 else 1.0
        self._slots: dict[tuple[int, int, int], int] = {}
        terms: list[float] = []
        for place, own in enumerate(problem.pairs.items()):
            name, pairs = own
            for pair in pairs:
                of_input, of_weights = problem.terms[name][pair]
                for side, term in ((0, of_weights), (1, of_input)):
                    if (place, side, pair[side]) not in self._slots:
                        self._slots[place, side, pair[side]] = len(terms)
                        terms.append(unit * float(term))
        self._terms = np.array(terms)

    def about(self, pairs: Pairs, steps: Sequence[Mapping[int, Pair]]) -> None:
        """Look at the steps that can be taken from a policy."""
        moves = [self._moves(pairs, bits) for bits in steps]
        self._first = np.cumsum([0, *(len(new) for new, _ in moves)])[:-1]
        self._new = np.array([slot for new, _ in moves for slot in new], dtype=np.int64)
        self._old = np.array([slot for _, old in moves for slot in old], dtype=np.int64)
        self._out = np.zeros(len(steps))

    def best(self) -> int | None:
        """The place of the step of the least expected loss that is not left out."""
        change = self._terms[self._new] - self._terms[self._old]
        expected = np.add.reduceat(change, self._first) + self._out
        place = int(expected.argmin())
        return None if math.isinf(expected[place]) else place

    def leave_out(self, place: int) -> None:
        """Expect nothing any more of a step."""
        self._out[place] = math.inf

    def learn(self, pairs: Pairs, bits: Mapping[int, Pair], change: float) -> None:
        """Take in by how much a step changed the loss."""
        new, old = self._moves(pairs, bits)
        surprise = change - float(self._terms[new].sum() - self._terms[old].sum())
        self._terms[new] += surprise / len(new)

    def _moves(self, pairs: Pairs, bits: Mapping[int, Pair]) -> tuple[list[int], list[int]]:
        """The terms that a step brings, and those that it takes away."""
        sides = [
            (place, side, after[side], pairs[place][side])
            for place, after in bits.items()
            for side in (0, 1)
            if after[side] != pairs[place][side]
        ]
        return (
            [self._slots[place, side, after] for place, side, after, _ in sides],
            [self._slots[place, side, before] for place, side, _, before in sides],
        )


def _walk_on(
    walk: _Walk,
    patience: int,
    steps: float,
    deadline: float,
    on_measured: Callable[[int, float], None] | None,
) -> str:
    """Take steps, and say what ended them."""
    since = 0
    while (proposal := walk.propose()) is not None:
        if since >= patience:
            return "patience"
        if len(walk.record) >= steps:
            return "steps"
        if time.perf_counter() >= deadline:
            return "time"
        since = 0 if walk.step(proposal) else since + 1
        if on_measured is not None:
            on_measured(len(walk.record), walk.loss)
    return "exhausted"


def _problem(
    policy: Policy,
    costs: Costs,
    indicators: Indicators | None,
    bits: Sequence[int],
    question: Question,
) -> Problem:
    """The search whose budgets and restrictions are to be kept."""
    asked: dict[str, Any] = dict(question)
    if not any(asked.get(name) is not None for name in BUDGETS):
        asked |= {budget.name: budget.limit for budget in policy.budgets}
        if not policy.budgets:
            raise ValueError("the policy carries no budgets: give one, such as bitops=...")
    if indicators is None:
        own = [own for layer in policy.layers for own in (layer.weight_bits, layer.activation_bits)]
        nothing = dict.fromkeys([*bits, *own], 0.0)
        flat = {layer.name: nothing for layer in costs.layers}
        indicators = Indicators.from_table(flat, flat)
    if asked.get("non_monotone", "forbid") == "forbid":
        asked["non_monotone"] = "keep"
    problem = make_problem(indicators, costs, **asked)
    names = [rule.name for rule in problem.in_force]
    missing = [name for name in policy.meta.get("restrictions", []) if name not in names]
    if missing:
        raise ValueError(
            f"the policy was searched under {', '.join(missing)}: give the same restrictions"
        )
    return problem


def _pairs_of(policy: Policy, problem: Problem) -> Pairs:
    """The bits of the searchable layers, which have to keep everything."""
    chosen = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}
    names = [layer.name for layer in problem.costs.layers]
    odd = sorted(chosen.keys() ^ set(names))
    if odd:
        raise ValueError(f"policy and costs are of different layers: {listed(odd)}")
    pairs = tuple(chosen[name] for name in names)
    for budget in problem.budgets:
        if budget.measure.use(pairs) > budget.limit:
            raise ValueError(f"the policy does not keep {budget.words}")
    if not problem.allows(pairs):
        rules = ", ".join(rule.name for rule in problem.in_force) or "the bits of the indicators"
        raise ValueError(f"the policy does not keep {rules}")
    return pairs


def _with_bits(policy: Policy, problem: Problem, pairs: Pairs) -> Policy:
    """The policy with other bits in its searchable layers, which come in the costs' order."""
    layers = zip(problem.costs.layers, pairs, strict=True)
    return dataclasses.replace(
        policy, layers=tuple(LayerBits(layer.name, *pair) for layer, pair in layers)
    )
