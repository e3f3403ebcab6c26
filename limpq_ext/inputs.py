"""How a batch goes into a model: one input, several in their order, or several by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """The model's output for the inputs of a batch.

    Args:
        model: A module, or what runs in its place.
        inputs: A tuple or list: its positional arguments. A mapping: its keyword arguments. Else
            its only argument.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


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
