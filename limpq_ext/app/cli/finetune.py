"""``limpq finetune``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    CheckpointMinutesOption,
    CheckpointStepsOption,
    DataOption,
    ForceOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
    WeightsOption,
)
from limpq_ext.app.cli.inputs import one_recipe, read_recipe
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


def finetune(
    policy: Annotated[Path, typer.Option(help="Policy file.", show_default=False)],
    weights: WeightsOption,
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    joint_weights: Annotated[
        Path | None,
        typer.Option(help="Start from this model of `limpq indicators --joint-weights`."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Weights to write.")] = Path("finetuned.safetensors"),
    force: ForceOption = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Fine-tune a float model at the bits of a policy (LSQ).

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    """
    from limpq_ext.app.session import Session, choose_device
    from limpq_ext.app.trainings import finetune_policy
    from limpq_ext.training.distributed import process_group
    from limpq_ext.values.policy import Policy

    check_outputs({"--out": out}, force, checkpoint=True)
    chosen = Policy.load(policy)
    given = read_recipe(
        one_recipe(recipe, recipe_option),
        set_,
        allow_code=allow_code,
        data=data,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
    )
    if given.finetune.init == "joint" and joint_weights is None:
        raise ValueError("finetune.init is joint, but --joint-weights is missing")
    with process_group(choose_device(given.device)), locked(out):
        session = Session(given)
        model = session.float_model(weights)
        part = given.model_dump(mode="json", include={"quantization", "finetune"})
        inputs = {"weights": weights, "policy": policy}
        if joint_weights is not None:
            part["bits"] = list(given.bits)
            inputs["joint_weights"] = joint_weights
        recording = recording_beside(out, given, [part, session.common_key()], **inputs)
        with make_reporter().stage("fine-tuning the policy") as on_step:
            tuned = finetune_policy(
                session,
                model,
                chosen,
                on_step=on_step,
                recording=recording,
                joint_weights=joint_weights,
            )
        if is_first():
            write(out, force, partial(session.save, tuned))
        remove_checkpoint(recording)
    if is_first():
        say(f"weights: {out}")
