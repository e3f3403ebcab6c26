"""``limpq profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from limpq_ext.app.cli.arguments import AllowCodeOption, ForceOption, InputSizeOption, ModelOption
from limpq_ext.app.cli.inputs import count_costs
from limpq_ext.app.cli.output import check_outputs, say, write
from limpq_ext.values.optional import require

typer = require("typer", "cli")


def profile(
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Take the model from this recipe instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Cost file to write.")] = Path("costs.json"),
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Count MACs, weights and activations of every layer; nothing is computed."""
    check_outputs({"--out": out}, force)
    costs = count_costs(model, input_size, recipe, allow_code=allow_code)
    write(out, force, costs.save)
    macs = sum(layer.macs for layer in (*costs.layers, *costs.fixed))
    say(
        f"{out}: {len(costs.layers)} searchable and {len(costs.fixed)} fixed layers,"
        f" {macs / 1e9:.3f} GMACs, {costs.all_weights:,} weights"
    )
