"""Do scores predict what policies lose? Their sums beside losses that are measured.

A rank correlation over random policies is not enough: an optimum lies in the tail, where the errors
of a score are sought out. So what each score's optimum loses is measured too, beside neighbours of
it, uniform policies and random ones at the same budget, all under one calibration.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import numpy as np
from torch import nn

from limpq_ext.allocation.neighbours import Neighbours, Pairs, changed, largest_uniform
from limpq_ext.allocation.problem import Problem, Question, make_problem
from limpq_ext.allocation.search import search
from limpq_ext.scores.measure import Measure, Measurement, Measuring, PolicyLoss
from limpq_ext.scores.ranks import interval, rank_correlation
from limpq_ext.training.batches import Batches
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import Document, Strict, open_atomically
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from typing_extensions import Unpack

PolicyKind = Literal["optimum", "neighbour", "uniform", "random"]

LEAST_RANDOM: Final = 3
"""Random policies without which a rank correlation says nothing."""

_SAME: Final = 50
"""Draws in a row that bring no new policy, after which no more are made."""


@dataclass(frozen=True)
class CheckedPolicy(Strict):
    """A policy, what scores predict of it and what it loses.

    Attributes:
        kind: "optimum" of a score, "neighbour" of one by a swap, "uniform" or "random".
        score: Whose optimum or neighbour it is; None for the others.
        weight_bits: Bit-widths of the weights, in the order of `ScoreCheck.layers`.
        activation_bits: Those of the activations.
        predicted: For each score its sum, as the search would add it up.
        loss: What was measured, in nats.
        agreement: Share of the samples with the class that the float network gives them, 0 to 1.
    """

    kind: PolicyKind
    score: str | None
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    predicted: dict[str, float]
    loss: float
    agreement: float

    @property
    def level(self) -> str:
        """The bits that most layers have, such as ``W3A4``."""
        pairs = Counter(zip(self.weight_bits, self.activation_bits, strict=True))
        (weight, activation), _ = pairs.most_common(1)[0]
        return f"W{weight}A{activation}"


@dataclass(frozen=True)
class Correlation(Strict):
    """Spearman's rank correlation of predicted sums and measured losses.

    Attributes:
        value: The correlation, -1 to 1; None where all predictions or all losses are equal.
        low: Lower end of its interval of 95 %, by bootstrap over the policies; None likewise.
        high: Upper end.
        policies: How many policies it is of.
    """

    value: float | None
    low: float | None
    high: float | None
    policies: int

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "none"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class CheckedScore(Strict):
    """How well a score ranks policies.

    Attributes:
        name: Of the score.
        random: Over the random policies.
        near: Over its optimum and the neighbours of that.
    """

    name: str
    random: Correlation
    near: Correlation


@dataclass(frozen=True)
class ScoreCheck(Document):
    """What `check_scores` found; printed, it is a table.

    Attributes:
        measure: What the losses are: "kl" from the float network or the cross "loss".
        layers: The searchable layers.
        scores: The scores, in the order in which they were given.
        policies: Every policy that was measured, for a scatter.
        meta: The question; anything that JSON has a form for.

    Raises:
        ValueError: There is no score, a score has no optimum or two, or a policy is of other layers
            or lacks a prediction.
    """

    measure: Measure
    layers: tuple[str, ...]
    scores: tuple[CheckedScore, ...]
    policies: tuple[CheckedPolicy, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-score-check"
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for what in ("layers", "scores", "policies"):
            object.__setattr__(self, what, tuple(getattr(self, what)))
        names: list[str | None] = [score.name for score in self.scores]
        if not names:
            raise ValueError("score check: there are no scores")
        optima = [policy.score for policy in self.policies if policy.kind == "optimum"]
        for name in dict.fromkeys([*names, *optima]):
            if (names.count(name), optima.count(name)) != (1, 1):
                raise ValueError(f"score {name!r} is not there once, with one optimum")
        for policy in self.policies:
            for bits in (policy.weight_bits, policy.activation_bits):
                if len(bits) != len(self.layers):
                    raise ValueError(
                        f"a policy has bits for {len(bits)} layers, expected {len(self.layers)}"
                    )
            if policy.predicted.keys() != set(names):
                raise ValueError(
                    f"a policy has predictions of {', '.join(policy.predicted)}, expected"
                    f" {', '.join(map(str, names))}"
                )

    @property
    def best(self) -> str:
        """The score whose optimum loses least, of equal ones the first."""
        return min((score.name for score in self.scores), key=lambda name: self.optimum(name).loss)

    @property
    def random(self) -> tuple[CheckedPolicy, ...]:
        """The random policies."""
        return tuple(policy for policy in self.policies if policy.kind == "random")

    @property
    def uniform(self) -> CheckedPolicy | None:
        """The uniform policy that loses least; None where none is within the budgets."""
        uniform = [policy for policy in self.policies if policy.kind == "uniform"]
        return min(uniform, key=lambda policy: policy.loss, default=None)

    def optimum(self, name: str) -> CheckedPolicy:
        """The policy that a search with a score finds.

        Raises:
            ValueError: There is no such score.
        """
        for policy in self.policies:
            if policy.kind == "optimum" and policy.score == name:
                return policy
        raise ValueError(
            f"there is no score {name!r}, those are {', '.join(own.name for own in self.scores)}"
        )

    def regret(self, name: str) -> float:
        """By how much the optimum of a score loses more than the best policy that was measured.

        Raises:
            ValueError: There is no such score.
        """
        return self.optimum(name).loss - min(policy.loss for policy in self.policies)

    def warning(self, name: str) -> str | None:
        """A sentence where the optimum of a score is not better than others; None where it is.

        Raises:
            ValueError: There is no such score.
        """
        own = self.optimum(name).loss
        better = []
        if self.uniform is not None and self.uniform.loss <= own:
            better.append(f"than uniform {self.uniform.level} ({self.uniform.loss:.4g})")
        as_good = [policy.loss for policy in self.random if policy.loss <= own]
        if as_good:
            better.append(
                f"than {len(as_good)} of {len(self.random)} random policies"
                f" (the best {min(as_good):.4g})"
            )
        if not better:
            return None
        return f"the policy of {name} ({own:.4g}) is not better {' and '.join(better)}"

    def warnings(self) -> tuple[str, ...]:
        """The sentences of all scores that have one."""
        told = (self.warning(score.name) for score in self.scores)
        return tuple(sentence for sentence in told if sentence is not None)

    def text(self) -> str:
        """A table: what each score's optimum loses, how it ranks policies, what others lose."""
        ranked = ("correlation, random", "near the optimum")
        lines = [("policy", _WORDS[self.measure], "same class", "regret", *ranked)]
        for score in self.scores:
            own = self.optimum(score.name)
            lines.append(
                (
                    score.name,
                    f"{own.loss:.4g}",
                    f"{own.agreement:.1%}",
                    f"{self.regret(score.name):.4g}",
                    str(score.random),
                    str(score.near),
                )
            )
        others = [] if self.uniform is None else [(f"uniform {self.uniform.level}", self.uniform)]
        drawn = sorted(self.random, key=lambda policy: policy.loss)
        if drawn:
            others.append((f"random, best of {len(drawn)}", drawn[0]))
            others.append(("random, median", drawn[len(drawn) // 2]))
        for name, policy in others:
            lines.append((name, f"{policy.loss:.4g}", f"{policy.agreement:.1%}", "", "", ""))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place == 0 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def __str__(self) -> str:
        return self.text()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a PNG: for each score what it predicts of every policy, beside what that loses.

        Args:
            path: The file to write or to replace, atomically.

        Raises:
            ImportError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        figure = require("matplotlib.figure", "plot").Figure(
            figsize=(4.5 * len(self.scores), 4), layout="constrained"
        )
        axes = figure.subplots(1, len(self.scores), squeeze=False)[0]
        for score, axis in zip(self.scores, axes, strict=True):
            shown = [p for p in self.policies if p.score in (None, score.name)]
            for kind, (marker, size) in _MARKERS.items():
                own = [policy for policy in shown if policy.kind == kind]
                x = [policy.predicted[score.name] for policy in own]
                y = [policy.loss for policy in own]
                axis.plot(x, y, marker, markersize=size, label=kind)
            if all(policy.loss > 0 for policy in shown):
                axis.set_yscale("log")
            if all(policy.predicted[score.name] > 0 for policy in shown):
                axis.set_xscale("log")
            axis.set_title(f"{score.name}: {score.random}")
            axis.set_xlabel("predicted sum")
            axis.set_ylabel(f"measured {_WORDS[self.measure]}")
            axis.legend()
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
        with open_atomically(path) as file:
            file.write(png.getvalue())


_WORDS: Final[dict[Measure, str]] = {"kl": "KL, nats", "loss": "loss, nats"}
_MARKERS: Final[dict[PolicyKind, tuple[str, int]]] = {
    "random": ("o", 5),
    "neighbour": (".", 6),
    "uniform": ("s", 7),
    "optimum": ("*", 14),
}


def check_scores(
    scores: Mapping[str, Indicators],
    model: nn.Module,
    batches: Batches,
    costs: Costs,
    *,
    random: int = 20,
    neighbours: int = 10,
    measure: Measure = "kl",
    seed: int = 0,
    measuring: Measuring | None = None,
    on_measured: Callable[[int, int], None] | None = None,
    **question: Unpack[Question],
) -> ScoreCheck:
    """Measure whether scores predict what policies lose, and what their optima are worth.

    Measured is what a policy loses without training, calibrated as `calibrate` does with a
    reference: of each score's optimum, of neighbours of it by swaps of bits, of the largest uniform
    policies and of random ones, which use at least 99 % of a budget. It takes a forward of the
    batches for each policy, of which there are about ``random + len(scores) * (1 + neighbours)``.

    Args:
        scores: Name -> scores of the searchable layers, all of the same bits.
        model: The float classifier; it is left as it is.
        batches: Some batches to calibrate and to measure with, on any device; their targets matter
            for "loss" alone. Scores are checked best on others than they come from.
        costs: Costs of the network.
        random: How many random policies, 3 or more. Fewer, where there are not as many.
        neighbours: How many random neighbours of each optimum.
        measure: "kl": the divergence from the float network. "loss": the cross entropy.
        seed: Of the draws.
        measuring: Options of :class:`limpq_ext.scores.measure.PolicyLoss`.
        on_measured: Called after every measurement with how many there are by now and in all.
        question: Budgets, restrictions and options as :func:`limpq_ext.search` takes them; one
            budget at least.

    Returns:
        The check.

    Raises:
        TypeError: A score is no `Indicators`, or as in `search`.
        ValueError: There are no scores, they are of different bits or of other layers than the
            costs, there is no budget or one that random policies cannot spread under, a number is
            too small, or as in `search` and `PolicyLoss`.
        InfeasibleError: No policy keeps budgets and restrictions.
    """
    for name, number, least in (("random", random, LEAST_RANDOM), ("neighbours", neighbours, 0)):
        if number < least:
            raise ValueError(f"{name} is {number}, expected {least} or more")
    bits = _common_bits(scores)
    flat = dict.fromkeys((layer.name for layer in costs.layers), dict.fromkeys(bits, 0.0))
    problem = make_problem(Indicators.from_table(flat, flat), costs, **question)
    if not problem.budgets:
        raise ValueError("there is no budget: give one, such as bitops=uniform(4, 4)")
    predicting = {name: _predicting(name, own, costs, question) for name, own in scores.items()}
    chosen = _choose(scores, problem, question, random, neighbours, seed)
    loss = PolicyLoss(model, batches, measure=measure, **(measuring or {}))
    measured: dict[Pairs, Measurement] = {}
    distinct = {pairs for _, _, pairs in chosen}
    found = []
    for kind, score, pairs in chosen:
        if pairs not in measured:
            measured[pairs] = loss.measured(problem.plain_policy(pairs))
            if on_measured is not None:
                on_measured(len(measured), len(distinct))
        found.append(
            CheckedPolicy(
                kind,
                score,
                tuple(weight for weight, _ in pairs),
                tuple(activation for _, activation in pairs),
                {name: own.objective(pairs) for name, own in predicting.items()},
                measured[pairs].loss,
                measured[pairs].agreement,
            )
        )
    generator = np.random.default_rng([seed, 2])
    return ScoreCheck(
        measure,
        tuple(layer.name for layer in costs.layers),
        tuple(
            CheckedScore(
                name,
                _correlation(name, (own for own in found if own.kind == "random"), generator),
                _correlation(name, (own for own in found if own.score == name), generator),
            )
            for name in scores
        ),
        tuple(found),
        {
            "budgets": {budget.name: budget.asked for budget in problem.budgets},
            "restrictions": [rule.name for rule in problem.in_force],
            "alpha": problem.alpha,
            "seed": seed,
        },
    )


def _common_bits(scores: Mapping[str, Indicators]) -> tuple[int, ...]:
    """The bits of all scores."""
    if not scores:
        raise ValueError("there are no scores to check")
    for name, own in scores.items():
        if not isinstance(own, Indicators):
            raise TypeError(f"score {name!r} is {type(own).__name__}, expected Indicators")
    first, *others = scores
    for name in others:
        if scores[name].bits != scores[first].bits:
            raise ValueError(
                f"score {name!r} is of {list(scores[name].bits)} bits, {first!r} of"
                f" {list(scores[first].bits)}"
            )
    return scores[first].bits


def _predicting(name: str, indicators: Indicators, costs: Costs, question: Question) -> Problem:
    """The search with a score, in which bits that it would forbid have their values."""
    rule = question.get("non_monotone", "forbid")
    asked: Question = {**question, "non_monotone": "keep" if rule == "forbid" else rule}
    try:
        return make_problem(indicators, costs, **asked)
    except ValueError as error:
        raise ValueError(f"score {name!r}: {error}") from None


def _choose(
    scores: Mapping[str, Indicators],
    problem: Problem,
    question: Question,
    random: int,
    neighbours: int,
    seed: int,
) -> list[tuple[PolicyKind, str | None, Pairs]]:
    """What to measure."""
    near = Neighbours(problem)
    chosen: list[tuple[PolicyKind, str | None, Pairs]] = []
    for place, (name, indicators) in enumerate(scores.items()):
        policy = search(indicators, problem.costs, **question)
        optimum = tuple((layer.weight_bits, layer.activation_bits) for layer in policy.layers)
        chosen.append(("optimum", name, optimum))
        generator = np.random.default_rng([seed, 1, place])
        chosen += [
            ("neighbour", name, pairs) for pairs in _some(near, optimum, neighbours, generator)
        ]
    chosen += [("uniform", None, pairs) for pairs in largest_uniform(problem)]
    start = chosen[0][2]
    drawn = _draw(near, start, random, np.random.default_rng([seed, 0]))
    if len(drawn) < LEAST_RANDOM:
        words = " and ".join(budget.words for budget in problem.budgets)
        raise ValueError(
            f"random policies cannot spread under {words}: {len(drawn)} of {random} came to be at"
            " the budget and different"
        )
    return [*chosen, *(("random", None, pairs) for pairs in drawn)]


def _some(
    near: Neighbours, optimum: Pairs, count: int, generator: np.random.Generator
) -> list[Pairs]:
    """Random neighbours of a policy, those at the budget first."""
    every = [changed(optimum, bits) for bits in near.within(optimum)]
    order = generator.permutation(len(every)).tolist()
    at_budget: list[Pairs] = []
    below: list[Pairs] = []
    for index in order:
        if len(at_budget) == count:
            break
        (at_budget if near.is_at_budget(every[index]) else below).append(every[index])
    return [*at_budget, *below][:count]


def _draw(
    near: Neighbours, start: Pairs, count: int, generator: np.random.Generator
) -> list[Pairs]:
    """Different random policies at the budget."""
    drawn: dict[Pairs, None] = {}
    since = 0
    while len(drawn) < count and since < _SAME:
        pairs = near.random(start, generator)
        if pairs is None:
            break
        since = since + 1 if pairs in drawn else 0
        drawn[pairs] = None
    return list(drawn)


def _correlation(
    name: str, policies: Iterable[CheckedPolicy], generator: np.random.Generator
) -> Correlation:
    own = list(policies)
    predicted: Sequence[float] = [policy.predicted[name] for policy in own]
    losses = [policy.loss for policy in own]
    value = rank_correlation(predicted, losses) if len(own) >= LEAST_RANDOM else None
    ends = interval(predicted, losses, generator) if value is not None else None
    low, high = ends or (None, None)
    return Correlation(value, low, high, len(own))
