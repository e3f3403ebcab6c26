"""What ``limpq search`` and ``limpq pareto`` are asked: budgets, restrictions and options.

The options of the budgets are made from their table, `limpq_ext.allocation.budgets.BUDGETS`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from limpq_ext.allocation.budgets import BUDGETS, find_budget, parse_budget
from limpq_ext.allocation.target import load_target
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.latency import LatencyTable
from limpq_ext.values.optional import require

typer = require("typer", "cli")


@dataclass(frozen=True)
class Question:
    """The options of a search, each as the command line has it, and the limits of the budgets."""

    limits: dict[str, str | None]
    budget: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any of the budgets above; more than once."),
    ] = None
    latency_table: Annotated[
        Path | None,
        typer.Option(
            help="Measured seconds: .json, or .csv of layer,weight_bits,activation_bits,..."
        ),
    ] = None
    restrictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Restrictions by layer or pattern: pairs, fixed, tied, min_bits, ...",
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE.yaml",
            help="Only what it has kernels for: onnxruntime, openvino, tensorrt, finn or a file.",
        ),
    ] = None
    tie_shared_inputs: Annotated[
        bool,
        typer.Option(
            "--tie-shared-inputs", help="Equal activation bits where layers read the same tensor."
        ),
    ] = False
    tie_added_inputs: Annotated[
        bool,
        typer.Option(
            "--tie-added-inputs",
            help="Equal activation bits where layers read operands or sum of one addition.",
        ),
    ] = False
    weight_bits: Annotated[
        int | None, typer.Option(help="Bits of all weights: only activations are searched.")
    ] = None
    activation_bits: Annotated[
        int | None, typer.Option(help="Bits of all activations: only weights are searched.")
    ] = None
    alpha: Annotated[
        float, typer.Option(help="Weight of the weight indicators against the activations'.")
    ] = 1.0
    normalise: Annotated[
        bool,
        typer.Option("--normalise", help="Normalised indicators instead of LIMPQ's plain sum."),
    ] = False
    non_monotone: Annotated[
        str,
        typer.Option(
            metavar="forbid|isotonic|keep",
            help="What to do with indicators that do not fall as bits grow.",
        ),
    ] = "forbid"
    interactions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Pairwise scores to add: what two tensors cost together."
        ),
    ] = None
    smoothness: Annotated[
        float,
        typer.Option(help="What a bit of difference between a layer and the next one costs."),
    ] = 0.0
    time_limit: Annotated[float | None, typer.Option(help="Most seconds to solve.")] = None
    gap: Annotated[
        float | None,
        typer.Option(
            help="Relative gap at which to stop; 0 proves.", show_default="0, above 200 layers 1e-6"
        ),
    ] = None

    def asked(self) -> dict[str, Any]:
        """The same as `search` takes it; options go over the file of restrictions.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not what it should be, or a budget is none, or has two limits.
        """
        from limpq_ext.app.recipe import load_restrictions

        asked: dict[str, Any] = {}
        if self.restrictions is not None:
            asked = load_restrictions(self.restrictions)
        in_file = {name for name, value in asked.items() if value}
        for name in _OPTIONS:
            value = getattr(self, name)
            if value or name not in in_file:
                asked[name] = value
        for name, text in self._all_limits().items():
            asked[name] = None if text is None else parse_budget(name, text)
        table = self.latency_table
        asked["latency_table"] = None if table is None else LatencyTable.load(table)
        asked["target"] = None if self.target is None else load_target(self.target)
        pairwise = self.interactions
        asked["interactions"] = None if pairwise is None else Interactions.load(pairwise)
        return asked

    def _all_limits(self) -> dict[str, str | None]:
        """The limits, with those of --budget."""
        limits = dict(self.limits)
        for text in self.budget or ():
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"--budget {text}: expected NAME=VALUE, such as bitops=w3a4")
            find_budget(name)
            if limits[name] is not None:
                raise ValueError(f"--budget {text}: {name} is {limits[name]} already: give one")
            limits[name] = value
        return limits


_OPTIONS = (
    "tie_shared_inputs",
    "tie_added_inputs",
    "weight_bits",
    "activation_bits",
    "alpha",
    "normalise",
    "non_monotone",
    "smoothness",
    "time_limit",
    "gap",
)
"""The fields of a question that `search` takes as they are."""


def takes_question(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of a question in the place of its argument ``question``."""
    types = get_type_hints(Question, include_extras=True)
    defaults = {name: getattr(Question, name) for name in types if name != "limits"}
    keyword = inspect.Parameter.KEYWORD_ONLY
    asking = [
        inspect.Parameter(
            name,
            keyword,
            default=None,
            annotation=Annotated[str | None, typer.Option(help=kind.help)],
        )
        for name, kind in BUDGETS.items()
    ] + [
        inspect.Parameter(name, keyword, default=default, annotation=types[name])
        for name, default in defaults.items()
    ]
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [
        parameter.replace(kind=keyword)
        for given in own
        for parameter in (asking if given.name == "question" else [given])
    ]

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        limits = {name: given.pop(name) for name in BUDGETS}
        question = Question(limits, **{name: given.pop(name) for name in defaults})
        command(**given, question=question)

    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options
