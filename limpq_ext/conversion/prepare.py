"""Swap quantized layers into a float model, with many bit-widths each or those of a policy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.graph.proof import check_at_first_forward, check_quantized, in_float
from limpq_ext.graph.trace import split_layers, trace
from limpq_ext.nn.attention import copied, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import Inputs, arguments
from limpq_ext.nn.layers import QuantizedLayer, quantizable_base, quantize_layer
from limpq_ext.nn.quantizers import check_candidates
from limpq_ext.nn.swapping import swap_modules
from limpq_ext.values.names import matches
from limpq_ext.values.policy import Policy


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
            f"left in float, since the forward did not reach them: {_some(found.unused)}",
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
            name=name,
        )
    for name, source in found.norm_sources.items():
        if source in searchable and not matches(name, exclude):
            norm = modules[name]
            assert isinstance(norm, _BatchNorm)
            swap[norm] = SwitchableBatchNorm.from_float(norm, candidates, source)
    prepared = swap_modules(prepared, swap)
    select_bits(prepared, max(candidates))
    _check_quantized(prepared, example_input)
    return prepared


def apply_policy(
    model: nn.Module,
    policy: Policy,
    *,
    example_input: Inputs | None = None,
    per_channel_weights: bool = False,
    symmetric_weights: bool = False,
    scale_max: float = math.inf,
) -> nn.Module:
    """A copy of ``model`` with every layer at the bits that ``policy`` gives it.

    Of a float model the activation scales take their start value from the first batch in training
    mode. A model of :func:`prepare` that was trained jointly gives its scales at these bits, and
    its batch normalisation at the weight bits of the layer that feeds it; its fixed layers begin as
    those of a float model.

    Args:
        model: The float model, or a prepared one; it is left as it is.
        policy: Bits for layers of this model by name, the fixed ones included. Projections of
            attention have the names that :func:`prepare` gives them.
        example_input: What the model's forward takes, likewise. With it is proven here
            that every layer of the policy computes with what its quantizers put out. None: the
            first forward begins with that proof, and raises the same error.
        per_channel_weights: One weight scale per output channel, in layers that are float.
        symmetric_weights: Leave out the lowest value of the weights' range; likewise.
        scale_max: Upper bound of all scales; likewise.

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
            name=name,
        )
    lacking = [name for name in quantized_layers(quantized) if name not in chosen]
    if lacking:
        raise ValueError(f"policy: there are no bits for the quantized layer {_some(lacking)}")
    missing = []
    for name, module in modules.items():
        if isinstance(module, SwitchableBatchNorm):
            swap[module] = module.at(chosen[module.source][0])
        elif quantizable_base(module) is not None and name not in chosen:
            missing.append(name)
    if missing:
        warnings.warn(
            f"left in float, since the policy has no bits for them: {_some(missing)}", stacklevel=2
        )
    quantized = swap_modules(quantized, swap)
    if example_input is None:
        check_at_first_forward(quantized)
    else:
        _check_quantized(quantized, example_input)
    return quantized


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a prepared model by name, in the order of ``named_modules()``."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)
    }


def select_bits(model: nn.Module, bits: int | Mapping[str, tuple[int, int]]) -> None:
    """Run a prepared model at these bits from now on, batch normalisation included.

    Args:
        model: What :func:`prepare` returned.
        bits: One bit-width for all, or (weight bits, activation bits) of every layer by name.

    Raises:
        ValueError: A layer is missing or unknown, or a bit-width is not a candidate.
    """
    layers = quantized_layers(model)
    if isinstance(bits, Mapping):
        unknown = [name for name in bits if name not in layers]
        if unknown:
            raise ValueError(f"bits: the model has no quantized layer {_some(unknown)}")
        missing = [name for name in layers if name not in bits]
        if missing:
            raise ValueError(f"bits: nothing is given for {_some(missing)}")
        chosen = dict(bits)
    else:
        chosen = dict.fromkeys(layers, (bits, bits))
    for name, layer in layers.items():
        layer.select(*chosen[name])
    for module in model.modules():
        if isinstance(module, SwitchableBatchNorm):
            module.select(chosen[module.source][0])


def _check_quantized(model: nn.Module, example_input: Inputs) -> None:
    bypassed = check_quantized(model, *arguments(example_input))
    if bypassed:
        raise ValueError(in_float(dict(model.named_modules()), bypassed))


def _some(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
