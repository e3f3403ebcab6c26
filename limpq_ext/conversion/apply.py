"""Give every layer of a model the bits of a policy."""

from __future__ import annotations

import math
import warnings

from torch import nn

from limpq_ext.graph.proof import check_at_first_forward, check_quantized
from limpq_ext.nn.attention import copied, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import Inputs, arguments
from limpq_ext.nn.layers import QuantizedLayer, quantizable_base, quantize_layer
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.nn.swapping import swap_modules
from limpq_ext.values.names import listed
from limpq_ext.values.policy import Policy


def apply_policy(
    model: nn.Module,
    policy: Policy,
    *,
    example_input: Inputs | None = None,
    per_channel_weights: bool = False,
    symmetric_weights: bool = False,
    scale_max: float = math.inf,
    scale_start: ScaleStart = "mse",
) -> nn.Module:
    """A copy of ``model`` with every layer at the bits that ``policy`` gives it.

    Of a float model the activation scales take their start value from the first batch in training
    mode. A model of :func:`limpq_ext.prepare` that was trained jointly gives its scales at these
    bits, and its batch normalisation at the weight bits of the layer that feeds it; its fixed
    layers begin as those of a float model.

    Args:
        model: The float model, or a prepared one; it is left as it is.
        policy: Bits for layers of this model by name, the fixed ones included. Projections of
            attention have the names that :func:`limpq_ext.prepare` gives them.
        example_input: What the model's forward takes, likewise. With it is proven here
            that every layer of the policy computes with what its quantizers put out. None: the
            first forward begins with that proof, and raises the same error.
        per_channel_weights: One weight scale per output channel, in layers that are float.
        symmetric_weights: Leave out the lowest value of the weights' range; likewise.
        scale_max: Upper bound of all scales; likewise.
        scale_start: Where step sizes begin, as for :func:`prepare`; likewise.

    Raises:
        ValueError: The policy names a layer that the model does not have, that cannot be
            quantized or that would compute in float all the same, or lacks a layer of a prepared
            model or has bits that it was not prepared for.
    """
    chosen = policy.bits()
    quantized = copied(
        with_layers(model, lambda name: any(layer.startswith(f"{name}.") for layer in chosen))
    )
    modules = dict(quantized.named_modules())
    swap: dict[nn.Module, nn.Module] = {}
    for name, (weight_bits, activation_bits) in chosen.items():
        module = modules.get(name)
        if module is None or quantizable_base(module) is None:
            what = (
                "no layer"
                if module is None
                else f"no quantizable layer, but {type(module).__name__},"
            )
            raise ValueError(f"policy: {type(model).__name__} has {what} '{name}'")
        if isinstance(module, QuantizedLayer):
            module.weight_quantizer.keep_only(weight_bits)
            module.input_quantizer.keep_only(activation_bits)
            continue
        swap[module] = quantize_layer(
            module,
            (weight_bits,),
            (activation_bits,),
            per_channel_weights=per_channel_weights,
            symmetric_weights=symmetric_weights,
            scale_max=scale_max,
            scale_start=scale_start,
            name=name,
        )
    lacking = [name for name in quantized_layers(quantized) if name not in chosen]
    if lacking:
        raise ValueError(f"policy: there are no bits for the quantized layer {listed(lacking)}")
    missing = []
    for name, module in modules.items():
        if isinstance(module, SwitchableBatchNorm):
            swap[module] = module.at(chosen[module.source][0])
        elif quantizable_base(module) is not None and name not in chosen:
            missing.append(name)
    if missing:
        warnings.warn(
            f"left in float, since the policy has no bits for them: {listed(missing)}", stacklevel=2
        )
    quantized = swap_modules(quantized, swap)
    if example_input is None:
        check_at_first_forward(quantized)
    else:
        check_quantized(quantized, *arguments(example_input))
    return quantized
