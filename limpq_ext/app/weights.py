"""Weights of networks in files."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from limpq_ext.nn.layers import QuantizedLayer
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.values.files import open_atomically
from limpq_ext.values.names import listed
from limpq_ext.values.optional import require
from limpq_ext.values.reading import FileFormatError, reading
from limpq_ext.values.tensor_files import load_safetensors, load_saved


def save_weights(
    model: nn.Module, path: str | os.PathLike[str], *, network: Mapping[str, Any] | None = None
) -> None:
    """Write a model's state_dict to a safetensors file, which is replaced once it is whole.

    Its metadata say at which bits, and of which network, the weights are.

    Args:
        model: Float, prepared, or at the bits of a policy.
        path: The file.
        network: What the network is, by name, for :func:`load_weights` to compare.
    """
    save = require("safetensors.torch", "train").save
    # Tied tensors are written once per name: safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    origin = {"layers": _quantization(model), "network": dict(network or {})}
    with open_atomically(path) as file:
        file.write(save(tensors, {_ORIGIN: json.dumps(origin, sort_keys=True)}))


_ORIGIN = "limpq"
"""The entry of a safetensors file's metadata that says what the weights are of."""


def _quantization(model: nn.Module) -> dict[str, str]:
    """How every quantized layer rounds, in words."""
    return {
        name: f"W{_range(layer.weight_quantizer)} A{_range(layer.input_quantizer)}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer)
    }


def _range(quantizer: LsqQuantizer) -> str:
    capped = "" if math.isinf(quantizer.scale_max) else f" up to {quantizer.scale_max}"
    symmetric = " symmetric" if quantizer.symmetric else ""
    return "/".join(map(str, quantizer.bits)) + symmetric + capped


def _check_origin(
    model: nn.Module, path: str | os.PathLike[str], network: Mapping[str, Any] | None
) -> None:
    """Refuse weights that fit by name and shape, but were trained at other bits or elsewhere."""
    with require("safetensors", "train").safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_ORIGIN)
    if text is None:
        return
    try:
        origin = json.loads(text)
        theirs, trained_in = dict(origin["layers"]), dict(origin["network"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(f"{os.fspath(path)}: its metadata cannot be read") from error
    ours = _quantization(model)
    both = [name for name in ours if name in theirs]
    other = [name for name in both if ours[name] != theirs[name]]
    if other:
        first = other[0]
        more = f" (and {len(other) - 1} more layers)" if len(other) > 1 else ""
        raise FileFormatError(
            f"{os.fspath(path)}: the weights were trained at other bits: layer '{first}' at"
            f" {theirs[first]}, not {ours[first]}{more}"
        )
    expected = dict(network or {})
    comparable = all(
        key in trained_in and key in expected for key in ("graph", "input_shape")
    ) and list(trained_in["input_shape"]) == list(expected["input_shape"])
    if comparable and trained_in["graph"] != expected["graph"]:
        raise FileFormatError(
            f"{os.fspath(path)}: the weights were trained in another network: its tensors have the"
            " same names and shapes, but its forward computed something else"
        )


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, network: Mapping[str, Any] | None = None
) -> None:
    """Load a state_dict into a model: a safetensors file, or a checkpoint without foreign classes.

    Args:
        model: Gets the weights, in place.
        path: ``*.safetensors``, or a file of ``torch.save`` that ``weights_only`` can read: a
            state_dict, alone or under "state_dict", "model" or "model_state_dict". What
            DistributedDataParallel and torch.compile put in front of every name is dropped.
        network: What :func:`save_weights` was given for this network; weights of a file that says
            that its network computed something else of the same input are refused.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is no such file, or its names or shapes are not the model's, or its
            weights were trained at other bits, or a value is NaN or infinite.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"weights '{os.fspath(path)}' do not exist")
    own = model.state_dict()
    state = _without_prefixes(_read_state(path), own)
    if Path(path).suffix == ".safetensors":
        _check_origin(model, path, network)
    _check_finite(model, state, path)
    # A safetensors file does not tell the versions of the modules, which are those of today.
    versions = getattr(own, "_metadata")  # noqa: B009  # of OrderedDict, unknown to its stub
    if not hasattr(state, "_metadata"):
        state = OrderedDict(state)
        setattr(state, "_metadata", versions)  # noqa: B010
    for name in own.keys() & state.keys():
        if state[name].is_floating_point() != own[name].is_floating_point():
            raise FileFormatError(
                f"{os.fspath(path)}: '{name}' is {state[name].dtype}, the model's {own[name].dtype}"
            )
    with reading(path):
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(str(error).splitlines()[-1].strip()) from error
    problems = [
        f"{problem} {listed(names)}"
        for problem, names in (("lacks", missing), ("has, unlike the model,", unexpected))
        if names
    ]
    if problems:
        raise FileFormatError(
            f"{os.fspath(path)}: is not of this {type(model).__name__}: {'; '.join(problems)}"
        )


def _check_finite(
    model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Refuse NaN, and infinities but in buffers, where masks have them."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, value in state.items():
        if not (value.is_floating_point() or value.is_complex()):
            continue
        if value.isnan().any() or (name in parameters and value.isinf().any()):
            raise FileFormatError(
                f"{os.fspath(path)}: '{name}' has values that are NaN or infinite"
            )


def _without_prefixes(state: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    own = list(own)
    for prefix in ("module.", "_orig_mod.", "module."):
        wrapped = bool(state) and all(name.startswith(prefix) for name in state)
        if wrapped and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path, "weights")
    content = load_saved(path, "weights")
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise FileFormatError(f"{os.fspath(path)}: holds no state_dict")
    return content
