"""The scores of a recipe that need no joint training, what its policy is worth, and refinement.

Process 0 does all of it, as if it were the only one, with whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from limpq_ext.app.recipe import AUTO
from limpq_ext.app.session import Session
from limpq_ext.app.trainings import first_batches, validation_batches
from limpq_ext.scores.check import ScoreCheck, check_scores
from limpq_ext.scores.measure import Measuring
from limpq_ext.scores.methods import METHODS, method_named
from limpq_ext.scores.refine import refine
from limpq_ext.training.distributed import from_main
from limpq_ext.training.loop import StepDone
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy


def measure_scores(
    session: Session, model: nn.Module, say: Callable[[str], None], costs: Costs
) -> Indicators:
    """The scores that the recipe asks for; "auto" are those whose optimum loses least.

    Args:
        session: The recipe.
        model: The float model.
        say: Gets a line for every score that "auto" tries.
        costs: Of the network, for "auto".

    Raises:
        ValueError: The score is not for this network or these data; of "auto", none is.
    """
    method = session.recipe.scores.method
    if method != AUTO:
        return from_main(lambda: _scores(session, model, method))
    return from_main(lambda: _best_scores(session, model, say, costs))


def _best_scores(
    session: Session, model: nn.Module, say: Callable[[str], None], costs: Costs
) -> Indicators:
    found: dict[str, Indicators] = {}
    refused = ""
    for name in session.recipe.scores.candidates or METHODS:
        try:
            found[name] = _scores(session, model, name)
        except ValueError as error:
            refused = f"scores: {name} is left out: {error}"
            say(refused)
    if not found:
        raise ValueError(refused)
    check = _check(session, model, found, costs, None)
    losses = {name: check.optimum(name).loss for name in found}
    for name, loss in losses.items():
        chosen = " (chosen)" if name == check.best else ""
        say(f"scores: the optimum of {name} is {loss:.4g} nats from the float network{chosen}")
    best = found[check.best]
    return replace(best, meta={**best.meta, "chosen_from": losses})


def _scores(session: Session, model: nn.Module, name: str) -> Indicators:
    recipe = session.recipe
    return method_named(name).function(
        model,
        first_batches(session, recipe.scores.batch_size, recipe.scores.batches),
        recipe.bits,
        fixed=recipe.quantization.fixed,
        **measuring(session),
    )


def check_policy(
    session: Session, model: nn.Module, indicators: Indicators, costs: Costs, on_step: StepDone
) -> ScoreCheck | str:
    """What the policy of a recipe's search is worth without training, beside others.

    Returns:
        The check, or why there is none.
    """

    def check() -> ScoreCheck | str:
        name = str(indicators.meta.get("score", "learned"))
        try:
            return _check(session, model, {name: indicators}, costs, on_step)
        except ValueError as error:
            return str(error)

    return from_main(check)


def _check(
    session: Session,
    model: nn.Module,
    scores: Mapping[str, Indicators],
    costs: Costs,
    on_step: StepDone | None,
) -> ScoreCheck:
    options = session.recipe.check
    return check_scores(
        scores,
        model,
        other_batches(session),
        costs,
        random=options.random or type(options)().random,
        neighbours=options.neighbours,
        seed=session.recipe.seed,
        measuring=checking(session),
        on_measured=on_step,
        **session.recipe.search.question(),
    )


def refine_policy(
    session: Session,
    model: nn.Module,
    policy: Policy,
    indicators: Indicators,
    costs: Costs,
    on_step: StepDone,
) -> Policy:
    """A policy after swaps of bits that lower what it loses without training."""
    options = session.recipe.refine

    def refined() -> Policy:
        return refine(
            policy,
            model,
            refining_batches(session),
            costs,
            indicators=indicators,
            held_out=other_batches(session),
            deviations=options.deviations,
            patience=options.patience,
            seconds=options.seconds,
            steps=options.steps,
            seed=session.recipe.seed,
            measuring=checking(session),
            on_measured=lambda steps, _: on_step(steps, options.steps or steps + options.patience),
            **session.recipe.search.question(),
        )

    return from_main(refined)


def other_batches(session: Session) -> list[Any]:
    """Batches of validation images; without any, training batches after those of the scores.

    A network that was trained here often makes no error at all on its training images.
    """
    check, scores = session.recipe.check, session.recipe.scores
    if len(session.data.val):
        return validation_batches(session, scores.batch_size, check.batches, 0)
    return first_batches(session, scores.batch_size, check.batches, scores.batches)


def refining_batches(session: Session) -> list[Any]:
    """Validation batches after those of the check; without any, those of the scores."""
    check, scores = session.recipe.check, session.recipe.scores
    found: list[Any] = []
    if len(session.data.val):
        found = validation_batches(session, scores.batch_size, scores.batches, check.batches)
    return found or first_batches(session, scores.batch_size, scores.batches)


def measuring(session: Session) -> Measuring:
    """How networks that are not trained are quantized: LSQ's start, which needs it, is mse here."""
    options = session.recipe.quantization
    start = options.scale_start
    return Measuring(
        scale_start="mse" if start == "lsq" else start,
        per_channel_weights=options.per_channel_weights,
        symmetric_weights=options.symmetric_weights,
        scale_max=session.quantizers()["scale_max"],
        exclude=options.exclude,
    )


def checking(session: Session) -> Measuring:
    """How policies are compared: as `measuring` has it, calibrated on the images of the scores."""
    options = session.recipe.scores
    batches = first_batches(session, options.batch_size, options.batches)
    return Measuring(**measuring(session), calibration=batches)
