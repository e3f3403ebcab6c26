"""``limpq measure``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from limpq_ext.app.cli.arguments import (
    AllowCodeOption,
    ForceOption,
    InputSizeOption,
    ModelOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
)
from limpq_ext.app.cli.inputs import network_to_measure, one_recipe
from limpq_ext.app.cli.output import check_outputs, make_reporter, print_table, say, write
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from limpq_ext.values.latency import LatencyTable

typer = require("typer", "cli")


def measure(
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    set_: SetOption = None,
    engine: Annotated[str, typer.Option(help="onnxruntime, openvino or torch.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(help="Threads of the engine.")] = 1,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help="Candidate bits, 2 to 8; more than once.", show_default="the recipe's, or 4 and 8"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a forward.")] = 1,
    rounds: Annotated[
        int, typer.Option(help="In each of the three times that the networks are loaded.")
    ] = 10,
    out: Annotated[Path, typer.Option(help="Latency table to write.")] = Path("latency.json"),
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Measure how long every layer takes at each pair of bits, on this machine.

    Whole networks with random weights run in an engine, in turn; the table is what --latency-table
    of `limpq search` takes. What it predicts of five mixed policies is measured beside it.
    """
    check_outputs({"--out": out}, force)
    from limpq_ext.export.latency import measure_latency

    network = network_to_measure(
        one_recipe(recipe, recipe_option),
        model,
        input_size,
        set_,
        batch=batch,
        allow_code=allow_code,
    )
    with make_reporter().stage(f"measuring in {engine}") as on_step:
        table = measure_latency(
            network.model,
            network.example,
            bits=bits or network.bits,
            costs=network.costs,
            engine=engine,
            threads=threads,
            rounds=rounds,
            on_step=on_step,
        )
    write(out, force, table.save)
    print_latency(table)
    say(f"latency table: {out}")


def print_latency(table: LatencyTable) -> None:
    """Print how a table was measured, what to know about it, and how well it predicts."""
    meta = table.meta
    layers = len({entry.layer for entry in table.entries})
    isa = f" ({', '.join(meta['isa'])})" if meta["isa"] else ""
    say(
        f"{layers} layers, {meta['engine']} {meta['engine_version']} on {meta['cpu']}{isa},"
        f" threads: {meta['threads']}, batch: {meta['batch']}"
    )
    say(f"measured is {meta['what']}")
    whole = [(pair, f"{1e3 * seconds:.3f}") for pair, seconds in meta["whole"].items()]
    print_table("Whole networks", ("bits", "ms per sample"), whole)
    for note in meta["notes"]:
        say(note)
    policies = []
    for number, own in enumerate(meta["predictions"], start=1):
        cells = [
            cell
            for of in (own, own["fastest"])
            for cell in (
                f"{1e3 * of['predicted']:.3f}",
                f"{1e3 * of['measured']:.3f}",
                f"{100 * of['error']:+.1f}",
            )
        ]
        policies.append((str(number), *cells))
    titles = ("predicted (ms)", "median (ms)", "error (%)", "predicted", "fastest", "error")
    print_table("Random mixed policies", ("policy", *titles), policies)
    say(
        f"median error of the prediction: {meta['median_error']:.1%}, of the fastest rounds"
        f" {meta['median_error_of_fastest']:.1%}"
    )
