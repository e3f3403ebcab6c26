"""The files of LIMPQ's own code: its indicators, its checkpoints, its bit lists.

https://github.com/1hunters/LIMPQ names the layers of a model under DataParallel, "module.conv1".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from limpq_ext.values.files import open_atomically
from limpq_ext.values.indicators import StepSizes
from limpq_ext.values.pickles import load_pickle
from limpq_ext.values.policy import LayerBits, Policy
from limpq_ext.values.reading import (
    FileFormatError,
    decode,
    parse_yaml,
    read_bytes,
    reading,
    shown,
)


def read_indicators(path: str | os.PathLike[str]) -> Iterator[StepSizes]:
    """What the pickle of its importance_extractor.py holds, see `Indicators.from_limpq`.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is not such a pickle.
    """
    data = read_bytes(path, "LIMPQ indicators")
    with reading(path, "not read as a pickle"):
        content = load_pickle(data)
    return _layers(content)


def read_step_sizes(path: str | os.PathLike[str], bits: Sequence[int]) -> Iterator[StepSizes]:
    """The step sizes in one of its checkpoints, see `Indicators.from_limpq_checkpoint`.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is not such a checkpoint.
    """
    # The other files do not need torch.
    from limpq_ext.values.tensor_files import load_saved

    return _step_sizes(load_saved(path, "LIMPQ checkpoint"), bits)


def _step_sizes(content: Any, bits: Sequence[int]) -> Iterator[StepSizes]:
    """The step sizes of all layers in such a checkpoint.

    Raises:
        FileFormatError: If something in it is missing or of another type.
    """
    import torch

    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise FileFormatError("holds no state_dict")
    endings = (".quan_w_fn.s", ".quan_a_fn.s")
    for name in state:
        if not isinstance(name, str):
            raise FileFormatError(f"its state_dict has the key {shown(name)}, which is no name")
    names = [name.removesuffix(endings[0]) for name in state if name.endswith(endings[0])]
    if not names:
        raise FileFormatError("its state_dict has no quan_w_fn.s: no indicator training")
    for name in names:
        values = []
        for ending in endings:
            step_sizes = state.get(name + ending)
            if not isinstance(step_sizes, torch.Tensor) or step_sizes.shape != (len(bits),):
                shape = tuple(getattr(step_sizes, "shape", ())) if name + ending in state else None
                found = "is missing" if shape is None else f"has shape {shape}"
                raise FileFormatError(f"{name}{ending} {found}, not one for each of {list(bits)}")
            if not step_sizes.is_floating_point():
                raise FileFormatError(f"{name}{ending} is {step_sizes.dtype}, no step sizes")
            values.append(dict(zip(bits, step_sizes.tolist(), strict=True)))
        yield name.removeprefix("module."), *values


def read_policy(path: str | os.PathLike[str], layers: Iterable[str]) -> Policy:
    """The policy of a YAML configuration of its fine-tuning, see `Policy.from_limpq`.

    Raises:
        OSError: If the file cannot be read.
        FileFormatError: If it is not YAML, lacks a list, or they do not fit the layers.
        ImportError: If PyYAML is not installed.
    """
    names = list(layers)
    data = read_bytes(path, "LIMPQ configuration")
    with reading(path, "not a YAML file"):
        content = parse_yaml(decode(data))
    lists = []
    for key in ("weight_bits", "act_bits"):
        values = content.get(key) if isinstance(content, dict) else None
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise FileFormatError(f"{os.fspath(path)}: {key}: is no list of integers")
        if len(values) != len(names):
            raise FileFormatError(
                f"{os.fspath(path)}: {key}: has {len(values)} entries for {len(names)} layers"
            )
        lists.append(values)
    with reading(path):
        return Policy(tuple(map(LayerBits, names, *lists)), meta={"source": "LIMPQ"})


def write_policy(
    policy: Policy, path: str | os.PathLike[str], layers: Iterable[str] | None = None
) -> None:
    """Write the two lists, to be pasted into such a configuration, see `Policy.save_limpq`.

    Raises:
        ValueError: If ``layers`` are not those of the policy.
        OSError: If the file cannot be written.
    """
    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}
    names = list(bits) if layers is None else list(layers)
    if sorted(names) != sorted(bits):
        odd = next((n for n in [*names, *bits] if names.count(n) != (n in bits)), None)
        raise ValueError(f"layers: {odd!r} stands in the policy or in layers, not once in both")
    weight, activation = zip(*(bits[name] for name in names), strict=True)
    with open_atomically(path) as file:
        file.write(f"weight_bits: {list(weight)}\nact_bits: {list(activation)}\n".encode())


def _layers(content: Any) -> Iterator[StepSizes]:
    """The layers of an unpickled LIMPQ file.

    Raises:
        FileFormatError: If something in it is missing or of another type.
    """
    expected = {"weight": dict, "act": dict, "layer_name": list}
    if not isinstance(content, dict) or content.keys() != expected.keys():
        raise FileFormatError(f"does not hold a dict of exactly {', '.join(expected)}")
    for key, kind in expected.items():
        if not isinstance(content[key], kind):
            raise FileFormatError(f"{key}: is no {kind.__name__}")
    names = content["layer_name"]
    for name in names:
        if not isinstance(name, str):
            raise FileFormatError(f"layer_name: {shown(name)} is no string")
    known = set(names)
    for key in ("weight", "act"):
        for name in content[key]:
            if name not in known:
                raise FileFormatError(f"{key}: layer {shown(name)} is not in layer_name")
    for name in names:
        weight, activation = (_values(content[key], key, name) for key in ("weight", "act"))
        yield name.removeprefix("module."), weight, activation


def _values(layers: dict[Any, Any], key: str, name: str) -> dict[int, float]:
    """The indicators of one layer, whose bits are strings in the file."""
    values = layers.get(name)
    if not isinstance(values, dict):
        raise FileFormatError(f"{key}: layer {name!r} has no dict of indicators")
    for b, value in values.items():
        if not (isinstance(b, str) and b.isascii() and b.isdigit() and len(b) <= 2 and b[0] != "0"):
            raise FileFormatError(f"{key}: layer {name!r}: {shown(b)} is no bit-width")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise FileFormatError(f"{key}: layer {name!r}: indicator at {b} bits is no number")
    return {int(b): value for b, value in values.items()}
