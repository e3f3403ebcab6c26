"""A quantized network as one file of packed safetensors, and back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from limpq_ext.export.codes import LayerCodes, Range, layer_codes
from limpq_ext.export.packing import pack_codes, unpack_codes
from limpq_ext.graph.proof import check_at_first_forward
from limpq_ext.kernels.ops import SCALE_MIN
from limpq_ext.nn.attention import ProjectedAttention, ProjectedWindows, copied, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.layers import QuantizedLayer, quantizable_base, quantized_twin
from limpq_ext.nn.named import create_model
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import ActivationQuantizer, LsqQuantizer, WeightQuantizer
from limpq_ext.nn.swapping import float_class, swap_modules
from limpq_ext.values.files import open_atomically, refuse_existing
from limpq_ext.values.names import listed
from limpq_ext.values.optional import require
from limpq_ext.values.packed_files import (
    KEY,
    MOST_WEIGHT_BITS,
    PackedHeader,
    PackedInput,
    PackedLayer,
    PackedNetwork,
    PackedWeight,
    best_packed_dim,
    joined,
    read_header,
)
from limpq_ext.values.policy import Policy
from limpq_ext.values.reading import reading
from limpq_ext.values.tensor_files import load_safetensors


@torch.no_grad()
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    policy: Policy | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a quantized network to one file: packed weights, step sizes, and all that is in float.

    The weights of a quantized layer are stored as codes of its bits, in the layout of
    compressed-tensors; everything else has its name in the state_dict and its dtype.

    Args:
        model: What :func:`limpq_ext.apply_policy` returned, calibrated or trained. Weights have at
            most 8 bits, activations at most 16. It is left as it is.
        path: The file, usually ``*.safetensors``.
        policy: The policy of the network, to be kept in the file as a whole.
        name: By which a recipe makes the network, to be shown.
        overwrite: Whether a file that exists is replaced.

    Raises:
        FileExistsError: The file exists, and is not to be replaced.
        OSError: The file cannot be written; what was there before is unharmed.
        ValueError: A layer cannot be stored, or a value is NaN or infinite, or the policy has other
            bits.
        ImportError: safetensors is not installed.
    """
    write = require("safetensors.torch", "train").save
    if not overwrite:
        refuse_existing(path)  # before the work is done; that nobody took it is seen to at the end
    model = _unwrapped(model)
    layers = quantized_layers(model)
    _check_layers(layers)
    if any(isinstance(module, SwitchableBatchNorm) for module in model.modules()):
        raise ValueError("the network was prepared for several bit-widths: give it a policy first")
    codes = layer_codes(model)
    tensors = _float_state(model)
    _check_finite(model, tensors)
    described = {}
    for layer, found in codes.items():
        described[layer] = _described(layers[layer], found)
        _check_restored(layers[layer], found)
        taken = _packed(found, described[layer].weight.packed_dim)
        tensors |= {joined(layer, what): value for what, value in taken.items()}
    network = PackedNetwork(float_class(model).__name__, described, name, _attention(model), policy)
    try:
        metadata = json.dumps(network.document(), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{os.fspath(path)}: not written: policy: {error}") from error
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with open_atomically(path, overwrite=overwrite) as file:
        file.write(write(plain, {KEY: metadata}))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network within what torch.compile and data-parallel training made of it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    return model


def _check_layers(layers: Mapping[str, QuantizedLayer]) -> None:
    wide = [name for name, layer in layers.items() if layer.weight_bits > MOST_WEIGHT_BITS]
    if wide:
        bits = layers[wide[0]].weight_bits
        raise ValueError(
            f"packed weights have at most {MOST_WEIGHT_BITS} bits, but {bits} are asked for in"
            f" {listed(wide)}"
        )
    for name, layer in layers.items():
        weight, input = layer.weight_quantizer, layer.input_quantizer
        if len(weight.bits) > 1 or len(input.bits) > 1:
            raise ValueError(
                f"layer '{name}' has several bit-widths, {weight.bits} and {input.bits}: give the"
                " network a policy first"
            )
        if "weight" not in layer._parameters:
            raise ValueError(
                f"layer '{name}' computes its weight from other tensors: remove the"
                " parametrization from the float network before it is quantized"
            )
        if not weight.signed or input.channel_axis is not None or input.relu_max is not None:
            raise ValueError(f"layer '{name}' has quantizers that apply_policy does not make")


def _described(layer: QuantizedLayer, codes: LayerCodes) -> PackedLayer:
    weight, input = layer.weight_quantizer, layer.input_quantizer
    shape = tuple(codes.weights.shape)
    axis = weight.channel_axis
    return PackedLayer(
        PackedWeight(
            codes.weight_range.bits,
            best_packed_dim(shape, codes.weight_range.bits),
            str(layer.weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            weight.symmetric,
            None if axis is None else axis % len(shape),
            **_guards(weight),
        ),
        PackedInput(
            codes.input_range.bits, codes.input_range.signed, input.symmetric, **_guards(input)
        ),
    )


def _guards(quantizer: LsqQuantizer) -> dict[str, float]:
    guards = {"scale_min": (quantizer.scale_min, SCALE_MIN)}
    guards["scale_max"] = (quantizer.scale_max, math.inf)
    return {name: value for name, (value, default) in guards.items() if value != default}


def _check_restored(layer: QuantizedLayer, codes: LayerCodes) -> None:
    """The quantizer has to make the same weights of what the file restores."""
    exact = codes.dequantized().to(layer.weight.dtype).to(layer.weight.device)
    if not torch.equal(layer.weight_quantizer(exact), layer.quantized_weight()):
        raise ValueError(
            f"layer '{codes.name}': its weights are not the same after they are restored from codes"
            f" in {exact.dtype}"
        )


def _packed(codes: LayerCodes, packed_dim: int) -> dict[str, Tensor]:
    bits = codes.weight_range.bits
    scale = codes.weight_range.scale
    return {
        "weight_packed": pack_codes(codes.weights, bits, packed_dim),
        "weight_scale": scale.reshape((1,) if scale.dim() == 0 else (-1, 1)),
        "weight_shape": torch.tensor(codes.weights.shape),
        "input_scale": codes.input_range.scale.reshape(1),
    }


def _attention(model: nn.Module) -> tuple[str, ...]:
    """The modules that :func:`with_layers` has to replace in the float network."""
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, ProjectedAttention | ProjectedWindows)
        or getattr(module, "qkv_bias_separate", False)
    )


def _float_state(model: nn.Module) -> dict[str, Any]:
    """The state_dict without the weights and the quantizers of quantized layers.

    Its values are the parameters and buffers themselves.
    """
    inside: list[str] = []
    own: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            own.add(joined(name, "weight"))
            inside += [joined(name, "weight_quantizer."), joined(name, "input_quantizer.")]
    prefixes = tuple(inside)
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"'{name}' of the network's state is no tensor")
    return {
        name: value
        for name, value in state.items()
        if name not in own and not name.startswith(prefixes)
    }


def _check_finite(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse NaN, and infinities but in buffers, where masks have them."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        if value.isnan().any() or (name in parameters and value.isinf().any()):
            raise ValueError(f"'{name}' has values that are NaN or infinite")


# --------------------------------------------------------------------------------------------- load


@torch.no_grad()
def load(path: str | os.PathLike[str], float_model: nn.Module | str, **options: Any) -> nn.Module:
    """The quantized network that :func:`save` wrote, with the same outputs.

    The weights of its quantized layers are codes times step sizes, which their quantizers give back
    as they are. It can be trained further, from these weights: what training had kept between the
    steps is not in the file.

    Args:
        path: The file.
        float_model: The float network of the same architecture, whatever its weights; it is left as
            it is. The result has its device, its mode, its memory formats and whatever is not in
            the state_dict, and the dtypes of the file. A name: that of a recipe, as for
            :func:`limpq_ext.nn.named.create_model`. The name that the file tells is not used, for a
            name may run code.
        **options: With a name: arguments of the network's constructor, such as ``num_classes``.

    Returns:
        The quantized network: to its outputs, in evaluation mode, that which was saved, but for the
        sign of zeros.

    Raises:
        OSError: The file cannot be read (FileNotFoundError: there is none).
        FileFormatError: It is no such file, or not of this architecture; the message names the
            first layer or tensor that differs.
        ValueError: The float network is quantized, or has no values; or the name is unknown.
        TypeError: ``float_model`` is neither a network nor a name, or there are options without a
            name.
        ImportError: safetensors is not installed, or what has the network of the name.
    """
    header = read_header(path)
    if isinstance(float_model, str):
        float_model = create_model(float_model, **options)
    elif options:
        raise TypeError(f"options are for a network by name: {listed(list(options))}")
    _check_float(float_model)
    tensors = load_safetensors(path, "packed safetensors")
    replaced = header.network.attention
    float_model = _unwrapped(float_model)
    model = copied(with_layers(float_model, lambda name: name in replaced))
    with reading(path):
        layers = _quantized(model, header, tensors)
        model = swap_modules(model, layers)
        _restore(model, {name: tensors[name] for name in header.others()})
    check_at_first_forward(model)
    return model


def _check_float(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"float_model is a {type(model).__name__}, expected a network or a name")
    if quantized_layers(model):
        raise ValueError("float_model is quantized: give the float network")
    empty = [name for name, value in model.state_dict().items() if _is_empty(value)]
    if empty:
        raise ValueError(
            f"float_model has no memory for {listed(empty)}: give it some with"
            " to_empty(device='cpu')"
        )


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _quantized(
    model: nn.Module, header: PackedHeader, tensors: Mapping[str, Tensor]
) -> dict[nn.Module, nn.Module]:
    """The quantized layers of a network by those whose places they take."""
    modules = dict(model.named_modules())
    network = header.network
    found: dict[nn.Module, nn.Module] = {}
    for name, described in network.layers.items():
        module: Any = modules.get(name)
        where = f"is not of this {type(model).__name__}: "
        if module is None or quantizable_base(module) is None:
            what = "no layer" if module is None else type(module).__name__
            raise ValueError(f"{where}it has the quantized layer '{name}', the network {what}")
        if "weight" not in module._parameters:
            raise ValueError(f"{where}layer '{name}' computes its weight from other tensors")
        shape = header.shapes[name]
        if tuple(module.weight.shape) != shape:
            raise ValueError(
                f"{where}layer '{name}' has weights of shape {shape}, the network's has"
                f" {tuple(module.weight.shape)}"
            )
        found[module] = _quantized_layer(name, module, described, tensors)
    return found


def _quantized_layer(
    name: str, module: Any, described: PackedLayer, tensors: Mapping[str, Tensor]
) -> QuantizedLayer:
    told, shape = described.weight, tuple(module.weight.shape)
    weight_quantizer = WeightQuantizer(
        torch.empty(shape, device="meta"),
        (told.bits,),
        per_channel=told.channel_axis is not None,
        channel_axis=told.channel_axis or 0,
        symmetric=told.symmetric,
        name=f"layer '{name}': weight quantizer",
        **_given_guards(told),
    )
    input_quantizer = ActivationQuantizer(
        (described.input.bits,),
        signed=described.input.signed,
        symmetric=described.input.symmetric,
        name=f"layer '{name}': input quantizer",
        **_given_guards(described.input),
    )
    for what, quantizer in (("weight", weight_quantizer), ("input", input_quantizer)):
        scale = tensors[joined(name, f"{what}_scale")]
        _start(joined(name, f"{what}_scale"), quantizer, scale)
    codes = unpack_codes(tensors[joined(name, "weight_packed")], told.bits, shape, told.packed_dim)
    lowest, highest = weight_quantizer.thresholds(told.bits)
    if bool((codes < lowest).any()):
        raise ValueError(f"layer '{name}': a weight is below the symmetric range")
    scale = weight_quantizer.scale.detach()[0]
    grid = Range(told.bits, lowest, highest, scale, told.channel_axis)
    weight = (codes.to(scale.dtype) * grid.along(codes)).to(getattr(torch, told.dtype))
    layer = quantized_twin(
        module, weight_quantizer.to(module.weight.device), input_quantizer.to(module.weight.device)
    )
    # A parameter of its own: where the float one is tied, other modules go on with float values.
    layer.weight = nn.Parameter(_like(module.weight, weight), module.weight.requires_grad)
    return layer.train(module.training)


def _given_guards(told: PackedWeight | PackedInput) -> dict[str, float]:
    guards = {"scale_min": told.scale_min, "scale_max": told.scale_max}
    return {name: value for name, value in guards.items() if value is not None}


def _start(name: str, quantizer: LsqQuantizer, scale: Tensor) -> None:
    """Give a quantizer of one bit-width its step sizes."""
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError(f"'{name}' has step sizes that are not positive numbers")
    if not torch.equal(scale, scale.clamp(quantizer.scale_min, quantizer.scale_max)):
        raise ValueError(
            f"'{name}' has step sizes that are not from {quantizer.scale_min} to"
            f" {quantizer.scale_max}"
        )
    quantizer.load_state_dict(
        {
            "scale": scale.reshape(quantizer.scale.shape),
            "initialized": torch.ones(1, dtype=torch.bool),
            "signed_range": torch.tensor(int(bool(quantizer.signed)), dtype=torch.int8),
        },
        assign=True,
    )


def _restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give everything that is not quantized the values and the dtype of the file."""
    own = _float_state(model)
    where = f"is not of this {type(model).__name__}: "
    for name, tensor in own.items():
        if name not in state:
            raise ValueError(f"{where}it lacks '{name}'")
        value = state[name]
        if value.shape != tensor.shape:
            raise ValueError(
                f"{where}'{name}' has shape {tuple(value.shape)}, the network's has"
                f" {tuple(tensor.shape)}"
            )
        if value.is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{where}'{name}' is {value.dtype}, the network's is {tensor.dtype}")
    unexpected = sorted(state.keys() - own.keys())
    if unexpected:
        raise ValueError(f"{where}the network has no {listed(unexpected)}")
    _check_finite(model, state)
    for name, tensor in own.items():
        tensor.grad = None
        tensor.data = _like(tensor, state[name])


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """The value on the device and in the memory format of another tensor."""
    return torch.empty_like(tensor, dtype=value.dtype, requires_grad=False).copy_(value)
