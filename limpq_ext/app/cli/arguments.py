"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from limpq_ext.values.optional import require

typer = require("typer", "cli")

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="File or name (see `limpq recipes`); without one, the demonstration on digits.",
    ),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="The same as an option.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the data.")]
DataFractionOption = Annotated[
    float | None, typer.Option(help="Part of the training data that indicators are trained on.")
]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs that indicators are trained.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe; more than once."),
]
CalibrateOption = Annotated[
    int | None,
    typer.Option(metavar="BATCHES", min=1, help="For a first look: no training, these batches."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="cifar_resnet, a torchvision classifier, timm/NAME or module:function."
    ),
]
InputSizeOption = Annotated[
    tuple[int, int, int] | None,
    typer.Option("--input-size", help="Shape of one image: CHANNELS HEIGHT WIDTH."),
]
IndicatorsOption = Annotated[
    Path, typer.Option(help="Indicator file (.json, or LIMPQ's .pkl).", show_default=False)
]
CostsOption = Annotated[Path | None, typer.Option(help="Cost file of `limpq profile`.")]
WeightsOption = Annotated[
    Path, typer.Option("--weights", help="Weights of the float model (.safetensors, .pt).")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Let the recipe import the module of its model, which runs its code."
    ),
]
CheckpointStepsOption = Annotated[
    int | None, typer.Option(help="Write a checkpoint after so many steps; 0: not by steps.")
]
CheckpointMinutesOption = Annotated[
    float | None, typer.Option(help="Write one when so many minutes have passed; 0: not by time.")
]
