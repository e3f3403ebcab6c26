"""What arguments name: recipes, networks, costs and indicators."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from limpq_ext.app.recipe import Recipe
    from limpq_ext.values.costs import Costs
    from limpq_ext.values.indicators import Indicators

_KEYS = {
    "data": "data.root",
    "data_fraction": "data.fraction",
    "epochs": "joint.epochs",
    "method": "scores.method",
    "batches": "scores.batches",
    "check_batches": "check.batches",
}
"""The key of the recipe that an option sets, where it is not the option's name."""


def one_recipe(argument: str | None, option: str | None) -> str | None:
    """The recipe that is given, as an argument or as an option."""
    if argument is not None and option is not None:
        raise ValueError(f"two recipes, '{argument}' and --recipe {option}: give one")
    return argument if option is None else option


def read_recipe(
    source: str | Path | None,
    assignments: Sequence[str] | None = None,
    *,
    allow_code: bool = False,
    **changes: Any,
) -> Recipe:
    """The recipe of a file or name, or the default one, with what the command line gives.

    Raises:
        ValueError: It is wrong, or would run code that the command line does not name.
    """
    from limpq_ext.app.recipe import Recipe, load_recipe, override, parse_assignment

    recipe = Recipe() if source is None else load_recipe(source)
    given = {
        _KEYS.get(option, option): str(value) if isinstance(value, Path) else value
        for option, value in changes.items()
        if value is not None
    }
    given |= dict(map(parse_assignment, assignments or ()))
    changed = override(recipe, given, source="command line") if given else recipe
    name = changed.model.name
    if ":" in name:
        named = name == given.get("model.name") or "model" in given
        if not (named or allow_code):
            raise ValueError(
                f"{source}: its model '{name}' imports a module, which runs code: if you trust it,"
                f" give --allow-code, or name it yourself with --set model.name={name}"
            )
        find_modules_here()
    return changed


def find_modules_here() -> None:
    """Let a model's module be one of the working directory, where a command does not look."""
    here = os.getcwd()  # noqa: PTH109  # sys.path holds strings
    if here not in sys.path:
        sys.path.insert(0, here)


def read_indicators(path: Path) -> Indicators:
    """Indicators from a file of any kind, told by its suffix."""
    from limpq_ext.values.indicators import Indicators

    readers = {
        ".pkl": Indicators.from_limpq,
        ".tar": Indicators.from_limpq_checkpoint,  # its checkpoints are called *.pth.tar
        ".checkpoint": Indicators.from_checkpoint,
    }
    return readers.get(path.suffix, Indicators.load)(path)


def read_costs(
    path: Path | None, model: str | None, input_size: tuple[int, int, int] | None
) -> Costs:
    """Costs from a file, or those of a model."""
    from limpq_ext.values.costs import Costs

    return Costs.load(path) if path is not None else count_costs(model, input_size, None)


def count_costs(
    model: str | None,
    input_size: tuple[int, int, int] | None,
    recipe: Path | None,
    *,
    allow_code: bool = False,
) -> Costs:
    """The costs of a model by its name and an image's shape, or of a recipe's model."""
    import torch

    from limpq_ext.graph.profile import profile as count
    from limpq_ext.nn.named import create_shapes

    if recipe is not None or model is None:
        if recipe is None:
            raise ValueError("nothing says which network: give --costs, --recipe or --model")
        from limpq_ext.app.session import Session

        return Session(read_recipe(recipe, allow_code=allow_code)).profile()
    size = _check_named(model, input_size)
    return count(create_shapes(model), torch.zeros(1, *size, device="meta"))


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network with random weights, to be timed.

    Attributes:
        model: The float model.
        example: A batch of noise.
        costs: Its costs.
        bits: The candidate bits where nobody gives others.
    """

    model: nn.Module
    example: torch.Tensor
    costs: Costs
    bits: Sequence[int]


def network_to_measure(
    recipe: str | None,
    model: str | None,
    input_size: tuple[int, int, int] | None,
    assignments: Sequence[str] | None,
    *,
    batch: int,
    allow_code: bool,
) -> MeasuredNetwork:
    """A recipe's network, or a model by its name and an image's shape.

    Raises:
        ValueError: Both are given, or an input is wrong.
    """
    import torch

    if model is not None and (recipe is not None or assignments):
        raise ValueError("--model and a recipe both say which network: give one")
    if model is None:
        from limpq_ext.app.session import Session

        given = read_recipe(recipe, assignments, allow_code=allow_code)
        session = Session(given)
        shape = session.example_input().shape[1:]
        example = _noise(batch, *shape)
        return MeasuredNetwork(session.create_model(), example, session.profile(), given.bits)
    from limpq_ext.graph.profile import profile
    from limpq_ext.nn.named import create_model

    size = _check_named(model, input_size)
    torch.manual_seed(0)
    made = create_model(model).eval()
    example = _noise(batch, *size)
    return MeasuredNetwork(made, example, profile(made, example), (4, 8))


def _noise(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _check_named(model: str, input_size: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """The shape of an image, if it is one; a module of one's own is found here."""
    if input_size is None:
        raise ValueError("--input-size is missing: --model needs the shape of an image")
    if min(input_size) < 1:
        raise ValueError(f"--input-size is {input_size}, expected positive numbers")
    if ":" in model:
        find_modules_here()
    return input_size
