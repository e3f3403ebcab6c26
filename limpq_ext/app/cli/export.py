"""``limpq export``."""

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
from limpq_ext.app.cli.output import check_outputs, make_reporter, print_table, say
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from limpq_ext.app.exporting import Format
    from limpq_ext.export.files import ExportedFile

typer = require("typer", "cli")


def export(
    weights: Annotated[
        Path, typer.Option("--weights", help="Weights of the policy's model, fine-tuned.")
    ],
    policy: Annotated[Path, typer.Option(help="Policy file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="onnx|safetensors|qonnx|pt2|aoti",
            help="What to write.",
            show_default="by the name of the file",
        ),
    ] = None,
    calibrate: CalibrateOption = None,
    shift: Annotated[
        bool,
        typer.Option(help="Store codes of weights times powers of two: exact, and runs closer."),
    ] = True,
    residual_bits: Annotated[
        int | None,
        typer.Option(
            metavar="8", help="Quantize what enters additions too: faster, not what was trained."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Write only what engines compute as the network does.")
    ] = True,
    images: Annotated[int, typer.Option(min=1, help="Images to verify with.")] = 256,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime or openvino; more than once.", show_default="those that are installed"
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engines.")] = 1,
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Write a quantized network as a file to deploy.

    onnx is for engines that compute in integers, verified layer by layer with images of the recipe
    and timed beside the same network in float32; safetensors is packed, the smallest, for lq.load;
    qonnx for FINN and hls4ml; pt2 for torch.export, aoti the same, compiled for this processor.
    With --calibrate: --weights are the float model's; it is quantized, not trained.
    """
    from limpq_ext.app.exporting import NOT_TRAINED, export_network
    from limpq_ext.app.session import Session
    from limpq_ext.app.trainings import calibrated_network
    from limpq_ext.export.engines import check_engine
    from limpq_ext.values.policy import Policy

    form = _format(format_, out)
    engines = list(dict.fromkeys(engine)) if engine else None
    if form == "onnx" and verify:
        for name in engines or ["onnxruntime"]:
            check_engine(name)
    check_outputs({"--out": out}, force)
    chosen = Policy.load(policy)
    given = read_recipe(one_recipe(recipe, recipe_option), set_, allow_code=allow_code, data=data)
    session = Session(given)
    if calibrate is None:
        model = session.network(weights, chosen)
    else:
        model = calibrated_network(session, weights, chosen, calibrate)
    with make_reporter().stage("exporting"):
        made = export_network(
            session,
            model,
            out,
            form,
            shift=shift,
            residual_bits=residual_bits,
            images=images if verify else 0,
            engines=engines,
            threads=threads,
            policy=chosen,
            overwrite=force,
        )
    print_exported(made, out)
    if residual_bits is not None:
        say(NOT_TRAINED)


def _format(name: str | None, out: Path) -> Format:
    """The format that is asked for, or that the name of the file says."""
    from limpq_ext.app.exporting import FORMATS

    asked = out.suffix.removeprefix(".") if name is None else name
    if asked not in FORMATS:
        what = f"--format is '{name}'" if name is not None else f"'{out}' tells no format"
        raise ValueError(f"{what}, expected one of {', '.join(FORMATS)}")
    return cast("Format", asked)


def print_exported(made: ExportedFile, path: Path) -> None:
    """Print a file's size, and what engines make of it."""
    say(f"{path}: {made.bytes / 1e6:.3f} MB, {made.ratio:.3f} of float32")
    rows = [
        (
            own.engine,
            f"{own.integer_kernels} of {own.layers}" if own.layers else "",
            f"{own.differing:.1e}" if own.layers else "",
            "" if own.accuracy is None else f"{100 * own.accuracy:.2f}",
            "" if own.network_accuracy is None else f"{100 * own.network_accuracy:.2f}",
            f"{100 * own.agreement:.2f}",
            _milliseconds(own.seconds),
            _milliseconds(own.float_seconds),
        )
        for own in made.verified
    ]
    if rows:
        titles = (
            "engine",
            "layers in integers",
            "codes that differ",
            "accuracy (%)",
            "in PyTorch",
            "equal classes",
            "ms",
            "ms in float32",
        )
        print_table(f"On {made.verified[0].samples} images", titles, rows)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"
