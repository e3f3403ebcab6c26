"""How a batch goes into a model: one input, several in their order, or several by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""The inputs of a batch: one, several by position, or several by keyword."""


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output for the inputs of a batch.

    Args:
        model: A module, or what runs in its place.
        inputs: A tuple or list: its positional arguments. A mapping: its keyword arguments. Else
            its only argument.
    """
    positional, keywords = arguments(inputs)
    return model(*positional, **keywords)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that the inputs of a batch are; see `call`."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def example_arguments(example_input: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a forward takes, for following it.

    Args:
        example_input: As the inputs of a batch are.

    Raises:
        ValueError: It holds no tensor, or a tensor without a batch.
    """
    given = arguments(example_input)
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(
            f"example_input is a {type(example_input).__name__} that holds no tensor, expected a"
            " batch of at least 1"
        )
    for value in tensors:
        if value.dim() == 0 or value.shape[0] == 0:
            raise ValueError(
                f"example_input has shape {tuple(value.shape)}, expected a batch of at least 1"
            )
    return given


def moved(value: Any, device: torch.device) -> Any:
    """The same with its tensors on a device; containers of other values are kept as they are."""
    if isinstance(value, Mapping):
        return {key: moved(part, device) for key, part in value.items()}
    return tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value
    )


def samples_in(inputs: Any) -> int:
    """How many samples the inputs of a batch hold: the first axis of their first tensor.

    Raises:
        ValueError: They hold no tensor with an axis.
    """
    leaves = tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"a batch of {type(inputs).__name__} holds no tensor with an axis of samples")
