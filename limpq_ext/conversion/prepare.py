"""Swap quantized layers of many bit-widths each into a float model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.graph.proof import check_quantized
from limpq_ext.graph.trace import split_layers, trace
from limpq_ext.nn.attention import copied, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import Inputs, arguments
from limpq_ext.nn.layers import quantize_layer
from limpq_ext.nn.network import select_bits
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.nn.swapping import swap_modules
from limpq_ext.values.bits import check_candidates
from limpq_ext.values.names import listed, matches


def prepare(
    model: nn.Module,
    bits: Sequence[int] = (2, 3, 4, 5, 6),
    *,
    example_input: Inputs,
    fixed: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    per_channel_weights: bool = False,
    symmetric_weights: bool = False,
    scale_max: float = math.inf,
    scale_start: ScaleStart = "mse",
) -> nn.Module:
    """A copy of ``model`` that joint training can run at any of ``bits``, layer by layer.

    Every convolution and linear layer but the fixed ones gets quantizers for its input and weight;
    a batch normalisation that such a layer feeds gets a row per bit-width. Names in the state_dict
    stay those of the float model. All layers start at the highest bit-width.

    Attention that multiplies by weights past their layers is replaced by one that goes through
    them. nn.MultiheadAttention then has layers, and names, where it had parameters:
    ``...self_attention.in_proj`` for ``in_proj_weight``, or ``q_proj``, ``k_proj`` and ``v_proj``
    where it attends to other tensors. A state_dict of the float model still loads.

    Args:
        model: The float model; it is left as it is.
        bits: Candidate bit-widths, each 2 to 16.
        example_input: What the model's forward takes, with a batch axis; only shapes matter. A
            tuple or list: several inputs. A dict: inputs by keyword.
        fixed: Names or patterns of the layers to leave in float here and at 8 bits later. None: the
            first and the last quantizable layer that runs.
        exclude: Names or patterns of modules to leave in float for good.
        per_channel_weights: One weight scale per output channel and bit-width; the importance
            indicator of a layer is then their mean.
        symmetric_weights: Leave out the lowest value of the weights' range.
        scale_max: Upper bound of all scales; LIMPQ's own code uses 1.0.
        scale_start: Where step sizes begin: "mse" at the least squared error, "lsq" as LSQ and
            LIMPQ do, "max" without clipping, "percentile" with one value in 10,000 clipped.

    Returns:
        The prepared copy, of the same class, on the same device and in the same mode.

    Raises:
        ValueError: Bit-widths or names are wrong, nothing is left to search, or a part of the model
            cannot be quantized truly and is not excluded.
    """
    candidates = check_candidates(bits)
    found = trace(model, example_input, exclude=exclude)
    searchable, _ = split_layers(found, fixed)
    if found.unused:
        warnings.warn(
            f"left in float, since the forward did not reach them: {listed(found.unused)}",
            stacklevel=2,
        )
    prepared = copied(with_layers(model, lambda name: not matches(name, exclude)))
    modules = dict(prepared.named_modules())
    swap: dict[nn.Module, nn.Module] = {}
    for name in searchable:
        swap[modules[name]] = quantize_layer(
            modules[name],
            candidates,
            candidates,
            per_channel_weights=per_channel_weights,
            symmetric_weights=symmetric_weights,
            scale_max=scale_max,
            scale_start=scale_start,
            name=name,
        )
    for name, source in found.norm_sources.items():
        if source in searchable and not matches(name, exclude):
            norm = modules[name]
            assert isinstance(norm, _BatchNorm)
            swap[norm] = SwitchableBatchNorm.from_float(norm, candidates, source)
    prepared = swap_modules(prepared, swap)
    select_bits(prepared, max(candidates))
    check_quantized(prepared, *arguments(example_input))
    return prepared
