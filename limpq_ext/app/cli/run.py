"""``limpq run`` and ``limpq recipes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    CheckpointMinutesOption,
    CheckpointStepsOption,
    DataFractionOption,
    DataOption,
    EpochsOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
)
from limpq_ext.app.cli.inputs import one_recipe, read_recipe
from limpq_ext.app.cli.output import is_first, make_reporter, print_report, say
from limpq_ext.values.optional import require

typer = require("typer", "cli")


def run(
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    data_fraction: DataFractionOption = None,
    epochs: EpochsOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="runs/ and the recipe's name"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Reuse no finished stage and no checkpoint.")
    ] = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
    log_steps: Annotated[
        int | None, typer.Option(help="Write metrics after so many steps, not epochs alone.")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Write TensorBoard events as well.")
    ] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Run the whole pipeline: float training, indicators, search, check, fine-tuning, evaluation.

    A second run into the same folder reuses every stage whose inputs did not change, and goes on
    with one that was interrupted. torchrun -m limpq_ext run ... runs it in several processes.
    """
    from limpq_ext.app.run import run as run_recipe
    from limpq_ext.app.session import choose_device
    from limpq_ext.training.distributed import process_group

    source = one_recipe(recipe, recipe_option)
    given = read_recipe(
        source,
        set_,
        allow_code=allow_code,
        data=data,
        data_fraction=data_fraction,
        epochs=epochs,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
        log_steps=log_steps,
        tensorboard=tensorboard,
    )
    out = out or Path("runs") / Path(source or "digits").stem
    with process_group(choose_device(given.device)):
        report = run_recipe(given, out, fresh=fresh, reporter=make_reporter())
    if is_first():
        print_report(report)


def recipes() -> None:
    """List the recipes that come with the package; `limpq run NAME` runs one."""
    from limpq_ext.app.recipe import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, what in shipped.items():
        say(f"{name:<{width}}  {what}")
