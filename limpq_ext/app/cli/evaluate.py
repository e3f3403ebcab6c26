"""``limpq evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    CalibrateOption,
    DataOption,
    ForceOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
)
from limpq_ext.app.cli.inputs import one_recipe, read_recipe
from limpq_ext.app.cli.output import check_outputs, is_first, make_reporter, say, write
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from limpq_ext.app.results import Split

typer = require("typer", "cli")


def evaluate(
    weights: Annotated[
        Path, typer.Option("--weights", help="Weights: of the policy's model, or float.")
    ],
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file; without one, the float model.")
    ] = None,
    float_weights: Annotated[
        Path | None, typer.Option(help="Also compare with the float model of these weights.")
    ] = None,
    calibrate: CalibrateOption = None,
    split: Annotated[
        str, typer.Option(metavar="test|val", help="Compare and choose on val; report test.")
    ] = "test",
    out: Annotated[Path | None, typer.Option(help="JSON file to write all numbers to.")] = None,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Evaluate weights on the recipe's test set: top-1, top-5, loss, every class.

    With --float-weights: where the network decides otherwise than the float one.
    With --calibrate: --weights are the float model's; it is quantized by --policy, not trained.
    """
    from dataclasses import asdict

    from limpq_ext.app.results import evaluate_network
    from limpq_ext.app.session import Session, choose_device
    from limpq_ext.app.trainings import calibrated_network
    from limpq_ext.training.distributed import process_group
    from limpq_ext.values.files import write_json
    from limpq_ext.values.policy import Policy

    if split not in ("test", "val"):
        raise ValueError(f"--split is '{split}', expected test or val")
    if calibrate is not None and policy is None:
        raise ValueError("--calibrate needs --policy: a float model has nothing to calibrate")
    check_outputs({"--out": out}, force)
    part = cast("Split", split)
    chosen = None if policy is None else Policy.load(policy)
    given = read_recipe(one_recipe(recipe, recipe_option), set_, allow_code=allow_code, data=data)
    with process_group(choose_device(given.device)):
        session = Session(given)
        if calibrate is None or chosen is None:
            model = session.network(weights, chosen)
        else:
            model = calibrated_network(session, weights, chosen, calibrate)
        reference = None if float_weights is None else session.network(float_weights, None)
        with make_reporter().stage("evaluating") as on_step:
            result, confusion = evaluate_network(
                session, model, reference, split=part, on_step=on_step
            )
    if not is_first():
        return
    say(f"accuracy {_percent(result.accuracy)}, loss {result.loss:.4f}, {result.samples} samples")
    if result.top5 is not None:
        say(f"top-5 accuracy {_percent(result.top5)}")
    known = [
        (accuracy, index)
        for index, accuracy in enumerate(result.class_accuracy)
        if accuracy is not None
    ]
    worst = ", ".join(f"{index} ({_percent(accuracy)})" for accuracy, index in sorted(known)[:5])
    say(f"lowest accuracy: class {worst}")
    if confusion is not None:
        say(
            f"the same class as the float network: {_percent(confusion.agreement)};"
            f" right where that is wrong: {_percent(confusion.gained)},"
            f" wrong where that is right: {_percent(confusion.lost)}"
        )
    if out is not None:
        against = None if confusion is None else asdict(confusion)
        numbers = {"split": split, **asdict(result), "against_float": against}
        write(out, force, lambda path: write_json(path, numbers))
        say(f"numbers: {out}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
