"""``limpq search`` and ``limpq pareto``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

from limpq_ext.allocation.budgets import parse_budget
from limpq_ext.app.cli.arguments import (
    CostsOption,
    ForceOption,
    IndicatorsOption,
    InputSizeOption,
    ModelOption,
)
from limpq_ext.app.cli.inputs import read_costs, read_indicators
from limpq_ext.app.cli.output import check_outputs, print_policy, say, write
from limpq_ext.app.cli.question import Question, takes_question
from limpq_ext.values.optional import require

typer = require("typer", "cli")

MOST_POINTS: Final = 100_000
"""Points of a curve; more would be found for days and fill the memory."""


@takes_question
def search(
    indicators: IndicatorsOption,
    *,
    costs: CostsOption = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    weight_bits_level: Annotated[
        int | None,
        typer.Option(help="With --activation-bits-level: the same as --bitops w3a4."),
    ] = None,
    activation_bits_level: Annotated[int | None, typer.Option(help="See above.")] = None,
    question: Question,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Say why this layer got its bits, and what other limits would change.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Policy file to write.")] = Path("policy.json"),
    force: ForceOption = False,
) -> None:
    """Find the bits of every layer within the budgets, proven optimal by integer programming.

    The costs come from --costs, or from --model and --input-size. A budget is a number in its unit
    (1.2e9), the level of a uniform policy (w3a4), or a share of what 8 bits use (25%).
    """
    from limpq_ext.allocation.explain import check_layer
    from limpq_ext.allocation.explain import explain as find_reasons
    from limpq_ext.allocation.search import search as find_policy

    check_outputs({"--out": out}, force)
    if (weight_bits_level is None) != (activation_bits_level is None):
        raise ValueError("--weight-bits-level and --activation-bits-level go together")
    if weight_bits_level is not None:
        if question.limits["bitops"] is not None:
            raise ValueError("--bitops and --weight-bits-level both set the BitOps: give one")
        level = f"w{weight_bits_level}a{activation_bits_level}"
        question = replace(question, limits={**question.limits, "bitops": level})
    asked = question.asked()
    learned = read_indicators(indicators)
    network = read_costs(costs, model, input_size)
    if explain is not None:
        check_layer(network, explain)
    policy = find_policy(learned, network, **asked)
    reasons = None if explain is None else find_reasons(learned, network, explain, **asked)
    write(out, force, policy.save)
    print_policy(policy, network)
    if reasons is not None:
        say(reasons.text())
    say(f"policy: {out}")


@takes_question
def pareto(
    indicators: IndicatorsOption,
    *,
    costs: CostsOption = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    over: Annotated[str, typer.Option(help="The budget that moves, such as bitops.")] = "bitops",
    points: Annotated[int, typer.Option(help="How many limits.")] = 100,
    start: Annotated[
        str | None, typer.Option(help="Strictest limit; by default the smallest that can be kept.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option(help="Loosest limit; by default what no limit would use.")
    ] = None,
    question: Question,
    out: Annotated[Path, typer.Option(help="Curve file to write.")] = Path("curve.json"),
    table: Annotated[
        Path | None,
        typer.Option("--csv", help="Table to write.", show_default="OUT with the suffix .csv"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Find the best policies for a whole range of one budget, the others kept.

    The knee is marked and uniform policies stand beside the curve. Budgets, restrictions and
    options are those of `limpq search`.
    """
    from limpq_ext.allocation.pareto import pareto as find_curve

    table = out.with_suffix(".csv") if table is None else table
    check_outputs({"--out": out, "--csv": table}, force)
    if points > MOST_POINTS:
        raise ValueError(f"--points is {points:,}, at most {MOST_POINTS:,} are found")
    asked = question.asked()
    curve = find_curve(
        read_indicators(indicators),
        read_costs(costs, model, input_size),
        over=over,
        points=points,
        start=None if start is None else parse_budget("--start", start),
        stop=None if stop is None else parse_budget("--stop", stop),
        **asked,
    )
    write(out, force, curve.save)
    write(table, force, curve.save_csv)
    say(curve.text())
    say(f"curve: {out}, {table}")
