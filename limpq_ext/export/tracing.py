"""What PyTorch's exporters are given of a network, and what they refuse in one sentence."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from limpq_ext.nn.attention import copied
from limpq_ext.nn.inputs import Inputs, arguments, example_arguments
from limpq_ext.nn.network import quantized_layers
from limpq_ext.values.reading import first_line

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a forward."""


def with_quantizers(
    model: nn.Module,
    of_input: Callable[[str], nn.Module],
    of_weights: Callable[[str], nn.Module],
) -> nn.Module:
    """A copy of a quantized network in float32, on the CPU, for evaluation, with other quantizers.

    Args:
        model: Is left as it is.
        of_input: What quantizes the input of a layer, by the layer's name.
        of_weights: What quantizes its weights, likewise.
    """
    network = copied(model).cpu().float().eval()
    for name, layer in quantized_layers(network).items():
        layer.input_quantizer = of_input(name)  # type: ignore[assignment]
        layer.weight_quantizer = of_weights(name)  # type: ignore[assignment]
    return network


def two_samples(example_input: Inputs) -> Arguments:
    """An example of a batch of any size: an exporter takes one of 1 for a batch of always 1."""
    given: Arguments = tree_map(_doubled, example_arguments(example_input))
    return given


def one_sample(example_input: Inputs) -> Arguments:
    """The example's first sample."""
    given: Arguments = tree_map(
        lambda value: value[:1] if isinstance(value, Tensor) else value,
        example_arguments(example_input),
    )
    return given


def first_axis(network: nn.Module, given: Arguments, size: Any) -> dict[str, Any]:
    """The shapes that an exporter is to take for free: the first axis of every tensor.

    Args:
        network: What is exported.
        given: Its arguments.
        size: What the exporter calls a free size.
    """
    args, kwargs = tree_map(lambda value: {0: size} if isinstance(value, Tensor) else None, given)
    return dict(inspect.signature(network.forward).bind(*args, **kwargs).arguments)


def input_arrays(network: nn.Module, inputs: Inputs) -> list[np.ndarray[Any, Any]]:
    """The tensors that a forward takes, in the order of the graph's inputs."""
    args, kwargs = arguments(inputs)
    bound = inspect.signature(network.forward).bind(*args, **kwargs).arguments
    return [leaf.cpu().numpy() for leaf in tree_leaves(dict(bound)) if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Run an exporter, without gradients and without what it says of its own steps.

    Raises:
        ValueError: It cannot export the model: its first reason.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        except Exception as error:  # whatever torch or the model raise
            raise ValueError(
                f"{type(model).__name__} cannot be exported: {_first_reason(error)}"
            ) from error
        finally:
            logging.disable(before)


def _doubled(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and len(value) == 1 else value


def _first_reason(error: Exception) -> str:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return first_line(error)
