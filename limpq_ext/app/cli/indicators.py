"""``limpq indicators``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    CalibrateOption,
    CheckpointMinutesOption,
    CheckpointStepsOption,
    DataFractionOption,
    DataOption,
    EpochsOption,
    ForceOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
)
from limpq_ext.app.cli.inputs import one_recipe, read_indicators, read_recipe
from limpq_ext.app.cli.output import (
    check_outputs,
    is_first,
    locked,
    make_reporter,
    recording_beside,
    remove_checkpoint,
    say,
    write,
)
from limpq_ext.values.optional import require

typer = require("typer", "cli")


def indicators(
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    data_fraction: DataFractionOption = None,
    epochs: EpochsOption = None,
    set_: SetOption = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights of the float model to start from.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Indicator file to write.")] = Path("indicators.json"),
    joint_weights: Annotated[
        Path | None,
        typer.Option(help="Write the trained model here, for `limpq finetune --joint-weights`."),
    ] = None,
    calibrate: CalibrateOption = None,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Take them from this file instead: a .checkpoint, or of LIMPQ's own code the"
            " indicators (.pkl) or a checkpoint (.tar).",
        ),
    ] = None,
    force: ForceOption = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Train the importance indicators of a float model jointly for all candidate bits.

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    With --calibrate nothing is trained: the indicators are the start values of the step sizes.
    """
    outputs = {"--out": out, "--joint-weights": joint_weights}
    check_outputs(outputs, force, checkpoint=True)
    if from_file is not None:
        result = read_indicators(from_file)
        if is_first():
            write(out, force, result.save)
    else:
        if weights is None:
            raise ValueError("--weights is missing: indicators are trained from a float model")
        from limpq_ext.app.session import Session, choose_device
        from limpq_ext.app.trainings import calibrated_indicators, train_indicators
        from limpq_ext.training.distributed import process_group

        given = read_recipe(
            one_recipe(recipe, recipe_option),
            set_,
            allow_code=allow_code,
            data=data,
            data_fraction=data_fraction,
            epochs=epochs,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
        )
        with process_group(choose_device(given.device)), locked(out):
            session = Session(given)
            model = session.float_model(weights)
            part = given.model_dump(mode="json", include={"quantization", "bits", "joint"})
            settings = [part, session.common_key(), session.fraction_key()]
            if calibrate is not None:
                result, prepared = calibrated_indicators(session, model, calibrate)
                recording = None
            else:
                recording = recording_beside(out, given, settings, weights=weights)
                with make_reporter().stage("joint training of the indicators") as on_step:
                    result, prepared = train_indicators(
                        session, model, on_step=on_step, recording=recording
                    )
            if is_first():
                if joint_weights is not None:
                    write(joint_weights, force, partial(session.save, prepared))
                write(out, force, result.save)
            remove_checkpoint(recording)
    if is_first():
        say(f"{out}: indicators of {len(result.layers)} layers at {list(result.bits)} bits")
