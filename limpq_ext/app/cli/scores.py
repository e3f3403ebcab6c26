"""``limpq scores`` and ``limpq check-scores``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from limpq_ext.allocation.budgets import BUDGETS
from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    CostsOption,
    DataFractionOption,
    DataOption,
    ForceOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
)
from limpq_ext.app.cli.inputs import one_recipe, read_indicators, read_recipe
from limpq_ext.app.cli.output import check_outputs, is_first, make_reporter, say, write
from limpq_ext.app.cli.question import Question, takes_question
from limpq_ext.values.optional import require

typer = require("typer", "cli")


def scores(
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    data_fraction: DataFractionOption = None,
    set_: SetOption = None,
    method: Annotated[
        str | None,
        typer.Option(help="Which score, of --list, or auto; by default scores.method."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights of the float model.")
    ] = None,
    batches: Annotated[
        int | None, typer.Option(help="Batches of training images; by default scores.batches.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Indicator file to write.")] = Path("indicators.json"),
    list_: Annotated[
        bool, typer.Option("--list", help="Print the scores, what they need and what they cost.")
    ] = False,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Measure what bits are worth to each layer of a float model, without joint training.

    --method auto measures all of them, and takes the one whose optimum under the recipe's budgets
    loses least. The file is searched as that of `limpq indicators` is.
    """
    from limpq_ext.scores.methods import methods_text

    if list_:
        say(methods_text())
        return
    check_outputs({"--out": out}, force)
    given = read_recipe(
        one_recipe(recipe, recipe_option),
        set_,
        allow_code=allow_code,
        data=data,
        data_fraction=data_fraction,
        method=method,
        batches=batches,
    )
    from limpq_ext.app.recipe import LEARNED
    from limpq_ext.app.scoring import measure_scores
    from limpq_ext.app.session import Session, choose_device
    from limpq_ext.training.distributed import process_group

    if method is None and given.scores.method == LEARNED:
        raise ValueError(
            "--method is missing: one of `limpq scores --list`, or auto (learned indicators are"
            " trained by `limpq indicators`)"
        )
    if weights is None:
        raise ValueError("--weights is missing: scores are measured on a float model")
    with process_group(choose_device(given.device)):
        session = Session(given)
        model = session.float_model(weights)
        reporter = make_reporter()
        with reporter.stage(f"measuring the scores ({given.scores.method})"):
            found = measure_scores(session, model, reporter.say, session.profile())
        if is_first():
            write(out, force, found.save)
            name = found.meta["score"]
            say(f"{out}: {name} of {len(found.layers)} layers at {list(found.bits)} bits")


@takes_question
def check_scores(
    recipe: RecipeArgument = None,
    *,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    scores: Annotated[
        list[Path],
        typer.Option("--scores", help="Indicator file of any kind; more than once to compare."),
    ],
    weights: Annotated[Path, typer.Option("--weights", help="Weights of the float model.")],
    costs: CostsOption = None,
    random: Annotated[int, typer.Option(help="Random policies at the budget.")] = 20,
    neighbours: Annotated[
        int, typer.Option(help="Policies a swap away from each score's optimum.")
    ] = 10,
    batches: Annotated[
        int | None, typer.Option(help="Batches of validation images; by default check.batches.")
    ] = None,
    question: Question,
    out: Annotated[Path, typer.Option(help="File to write all numbers to.")] = Path("check.json"),
    plot: Annotated[
        Path | None, typer.Option(help="Scatter to draw, PNG: predicted and measured.")
    ] = None,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Measure whether scores predict what policies lose, and what their optima are worth.

    Measured is the divergence from the float network without training, of each score's optimum and
    its neighbours, of uniform and of random policies. Budgets, restrictions and options are those
    of `limpq search`; without a budget those of the recipe.
    """
    check_outputs({"--out": out, "--plot": plot}, force)
    if plot is not None:
        require("matplotlib", "fonts")
    files = {path.stem: read_indicators(path) for path in scores}
    if len(files) < len(scores):
        raise ValueError("two files of --scores have one name, by which they are told apart")
    given = read_recipe(
        one_recipe(recipe, recipe_option),
        set_,
        allow_code=allow_code,
        data=data,
        check_batches=batches,
    )
    asked: dict[str, Any] = question.asked()
    if not any(asked[name] is not None for name in BUDGETS):
        own = given.search.question()
        asked |= {name: own[name] for name in BUDGETS}  # type: ignore[literal-required]
        asked["latency_table"] = asked["latency_table"] or own.get("latency_table")
    from limpq_ext.app.scoring import checking, other_batches
    from limpq_ext.app.session import Session, choose_device
    from limpq_ext.scores.check import check_scores as check
    from limpq_ext.training.distributed import from_main, process_group
    from limpq_ext.values.costs import Costs

    with process_group(choose_device(given.device)):
        session = Session(given)
        model = session.float_model(weights)
        network = session.profile() if costs is None else Costs.load(costs)
        with make_reporter().stage("checking the scores") as on_step:
            found = from_main(
                lambda: check(
                    files,
                    model,
                    other_batches(session),
                    network,
                    random=random,
                    neighbours=neighbours,
                    seed=given.seed,
                    measuring=checking(session),
                    on_measured=on_step,
                    **asked,
                )
            )
        if not is_first():
            return
        write(out, force, found.save)
        if plot is not None:
            write(plot, force, found.plot)
    say(found.text())
    for warning in found.warnings():
        say(f"warning: {warning}")
    say(f"check: {out}" + ("" if plot is None else f", {plot}"))
