"""The costs of a network, counted in one forward on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from limpq_ext.graph.trace import split_layers, trace
from limpq_ext.nn.inputs import Inputs, example_arguments
from limpq_ext.values.costs import Costs


def profile(
    model: nn.Module,
    example_input: Inputs,
    *,
    fixed: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Costs:
    """Count the costs of a model's layers exactly, without computing anything.

    One sample is followed through the model on fake tensors; MACs come from the real shapes of what
    each layer puts out, for grouped, depthwise and transposed convolutions too. Products without a
    weight, as of queries and keys, are not counted. Attention is followed through its projections,
    under the names that :func:`limpq_ext.prepare` gives them.

    Args:
        model: Any module that :func:`limpq_ext.prepare` accepts; it is not changed.
        example_input: What its forward takes, with a batch axis; only shapes matter. A tuple or
            list: several inputs. A dict: inputs by keyword.
        fixed: Names or patterns of the fixed layers. None: the first and the last that run.
        exclude: Names or patterns of modules to leave out.

    Returns:
        The costs for one sample, layers in the order in which they first run.

    Raises:
        ValueError: The model cannot be followed or quantized, or a name fits no layer.
    """
    found = trace(model, example_input, exclude=exclude)
    _, fixed_names = split_layers(found, fixed)
    costs = {layer.name: layer for layer in found.layers}
    positional, keywords = example_arguments(example_input)
    inputs = (*positional, *keywords.values())
    return Costs(
        layers=tuple(costs[name] for name in costs if name not in fixed_names),
        fixed=tuple(costs[name] for name in fixed_names),
        meta={
            "model": type(model).__name__,
            "input_shapes": [list(value.shape[1:]) for value in inputs if hasattr(value, "shape")],
        },
        shared_inputs=found.shared_inputs,
        added_inputs=found.added_inputs,
        tensors=found.tensors,
        parameters=found.parameters,
        float_parameters=found.float_parameters,
    )
