"""Packed safetensors: what the header of such a file says, checked before a tensor is read.

A quantized layer ``NAME`` has four tensors: ``NAME.weight_packed``, words of 32 bits with the codes
of its weights, ``NAME.weight_scale``, ``NAME.weight_shape`` and ``NAME.input_scale``, in the bit
layout and under the names of compressed-tensors' format ``pack-quantized``. All other tensors of
the network have the names of its state_dict. The metadata have a JSON object, a `PackedNetwork`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Final, Literal

from limpq_ext.values.bits import check_bits
from limpq_ext.values.files import Formatted, Strict
from limpq_ext.values.names import listed
from limpq_ext.values.policy import Policy
from limpq_ext.values.reading import (
    DEPTH,
    TEXT_BYTES,
    as_json,
    decode,
    open_regular,
    parse_json,
    reading,
    shown,
)

KEY: Final = "limpq-packed"
"""The entry of the metadata that says what the file holds."""

MOST_WEIGHT_BITS: Final = 8
WORD_BITS: Final = 32

_DTYPE_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_MOST_AXES: Final = 5  # of a weight: those of a convolution in three dimensions


@dataclass(frozen=True)
class PackedWeight(Strict):
    """How the weights of a layer are quantized and packed.

    Attributes:
        bits: The bit-width, 2 to 8.
        packed_dim: The axis of the matrix ``[first axis, all others]`` that words run along.
        dtype: Of the weights.
        symmetric: Whether the lowest value is left out.
        channel_axis: The axis of the weight with a scale for each index; None: one scale.
        scale_min: The least scale in use; None: the default.
        scale_max: The largest; likewise.
    """

    bits: int
    packed_dim: Literal[0, 1]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    symmetric: bool = False
    channel_axis: int | None = None
    scale_min: float | None = None
    scale_max: float | None = None

    def __post_init__(self) -> None:
        check_bits("weights", self.bits)
        if self.bits > MOST_WEIGHT_BITS:
            raise ValueError(f"{self.bits} bits, packed weights have at most {MOST_WEIGHT_BITS}")
        _check_guards(self.scale_min, self.scale_max)


@dataclass(frozen=True)
class PackedInput(Strict):
    """How the input of a layer is quantized.

    Attributes:
        bits: The bit-width, 2 to 16.
        signed: Whether the range has negative values.
        symmetric: Whether the lowest value of a signed range is left out.
        scale_min: The least scale in use; None: the default.
        scale_max: The largest; likewise.
    """

    bits: int
    signed: bool
    symmetric: bool = False
    scale_min: float | None = None
    scale_max: float | None = None

    def __post_init__(self) -> None:
        check_bits("input", self.bits)
        _check_guards(self.scale_min, self.scale_max)


@dataclass(frozen=True)
class PackedLayer(Strict):
    """How a layer is quantized.

    Attributes:
        weight: Its weights.
        input: What comes into it.
    """

    weight: PackedWeight
    input: PackedInput


@dataclass(frozen=True)
class PackedNetwork(Formatted):
    """What the metadata say.

    Attributes:
        architecture: Class of the network.
        layers: The quantized layers by name.
        model: The name that a recipe gives the network, where it was told.
        attention: Modules of attention that go through their layers, other than in the float model.
        policy: The whole policy, where it was given.

    Raises:
        ValueError: There is no layer, or the bits of the policy are others.
    """

    architecture: str
    layers: dict[str, PackedLayer]
    model: str | None = None
    attention: tuple[str, ...] = ()
    policy: Policy | None = None

    FORMAT: ClassVar[str] = KEY
    VERSION: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("there are no quantized layers")
        if self.policy is not None:
            check_same_bits(self.policy, self.bits())

    def bits(self) -> dict[str, tuple[int, int]]:
        """Name -> (weight bits, activation bits)."""
        return {name: (layer.weight.bits, layer.input.bits) for name, layer in self.layers.items()}

    def document(self) -> dict[str, Any]:
        """The JSON object in the metadata, without what has its default."""
        fields = dataclasses.asdict(self, dict_factory=_without_none)
        if self.policy is not None:
            fields["policy"] = dataclasses.asdict(self.policy)
        return {"format": self.FORMAT, "version": self.VERSION, **fields}


def check_same_bits(policy: Policy, bits: dict[str, tuple[int, int]]) -> None:
    """Refuse a policy that is not of these layers, or gives them other bits.

    Raises:
        ValueError: It is; the message names the first layer.
    """
    chosen = policy.bits()
    for name in {**bits, **chosen}:
        if name not in chosen:
            raise ValueError(f"policy: has no bits for the quantized layer '{name}'")
        if name not in bits:
            raise ValueError(f"policy: has bits for '{name}', which is no quantized layer")
        if chosen[name] != bits[name]:
            theirs, ours = (f"W{weight}A{input}" for weight, input in (chosen[name], bits[name]))
            raise ValueError(f"policy: layer '{name}' is at {ours}, the policy has {theirs}")


def _without_none(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if value is not None}


def _check_guards(scale_min: float | None, scale_max: float | None) -> None:
    for what, value in (("scale_min", scale_min), ("scale_max", scale_max)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{what} is {value}, expected a positive number")
    if scale_min is not None and scale_max is not None and scale_min > scale_max:
        raise ValueError(f"scale_min is {scale_min}, above scale_max, {scale_max}")


# ------------------------------------------------------------------------------------------ shapes


def joined(layer: str, tensor: str) -> str:
    """The name of a layer's tensor; the layer may be the network itself, which has no name."""
    return f"{layer}.{tensor}" if layer else tensor


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix: the first axis, by all others."""
    return shape[0], math.prod(shape[1:])


def words_shape(shape: tuple[int, ...], bits: int, packed_dim: int) -> tuple[int, int]:
    """The shape of a weight's words: along ``packed_dim`` as many as hold its codes densely."""
    rows, columns = matrix_shape(shape)
    if packed_dim == 0:
        return -(-rows * bits // WORD_BITS), columns
    return rows, -(-columns * bits // WORD_BITS)


def best_packed_dim(shape: tuple[int, ...], bits: int) -> Literal[0, 1]:
    """The axis that takes fewer words; 1, as in compressed-tensors, where both take as many."""
    along_rows, along_columns = (math.prod(words_shape(shape, bits, dim)) for dim in (1, 0))
    return 0 if along_columns < along_rows else 1


# ------------------------------------------------------------------------------------------ header


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a file: dtype as safetensors calls it, shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.count * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class PackedHeader:
    """What a file holds, without the values.

    Attributes:
        network: The metadata.
        tensors: All tensors by name.
        shapes: The shapes of the quantized weights, by layer.
        nbytes: Of the file.
    """

    network: PackedNetwork
    tensors: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]
    nbytes: int

    def packed_bytes(self) -> int:
        """The bytes of the words of all quantized weights."""
        return sum(self.tensors[joined(name, "weight_packed")].nbytes for name in self.shapes)

    def others(self) -> dict[str, StoredTensor]:
        """The tensors that are not of a quantized layer's quantization."""
        own = {joined(name, tensor) for name in self.shapes for tensor in _TENSORS}
        return {name: tensor for name, tensor in self.tensors.items() if name not in own}


_TENSORS: Final = ("weight_packed", "weight_scale", "weight_shape", "input_scale")


def read_header(path: str | os.PathLike[str]) -> PackedHeader:
    """Read what a packed file holds; its tensors stay in the file.

    Args:
        path: The file.

    Returns:
        What it says, checked: every tensor lies within the file, and those of a quantized layer
        have the sizes that its bits and its shape ask for.

    Raises:
        OSError: If it cannot be read.
        FileFormatError: If it is no such file; the message names file, tensor or field, and reason.
    """
    with open_regular(path, "packed safetensors") as file:
        size = os.fstat(file.fileno()).st_size
        with reading(path, "not a safetensors file"):
            content = _json_header(file, size)
            metadata = content.pop("__metadata__", {})
            tensors = _tensors(content, size, file.tell())
        with reading(path):
            document = _document(metadata)
        network = PackedNetwork.from_document(document, path)
        with reading(path):
            shapes = {
                name: _layer_shape(file, name, layer, tensors)
                for name, layer in network.layers.items()
            }
    return PackedHeader(network, tensors, shapes, size)


def _json_header(file: BinaryIO, size: int) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header has {length} bytes, the file {size}")
    if length > TEXT_BYTES:
        raise ValueError(f"its header is larger than {TEXT_BYTES / 2**20:g} MiB")
    content = parse_json(decode(file.read(length)))
    if not isinstance(content, dict):
        raise ValueError(f"its header is {shown(content)}, not a JSON object")
    return content


def _tensors(content: dict[str, Any], size: int, begin: int) -> dict[str, StoredTensor]:
    found = {name: _tensor(f"tensor {shown(name)}", entry) for name, entry in content.items()}
    end = 0
    for start, stop, name in sorted((it.start, it.start + it.nbytes, n) for n, it in found.items()):
        if start != end:
            raise ValueError(f"tensor {shown(name)} begins at byte {start}, expected {end}")
        end = stop
    if begin + end != size:
        raise ValueError(f"its tensors end at byte {begin + end}, the file at {size}")
    return {
        name: dataclasses.replace(tensor, start=begin + tensor.start)
        for name, tensor in found.items()
    }


def _tensor(where: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: is {shown(entry)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise ValueError(f"{where}: dtype is {as_json(dtype)}, not that of plain real numbers")
    if not _are_sizes(shape):
        raise ValueError(f"{where}: shape is {as_json(shape)}, expected whole numbers")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: data_offsets is {as_json(offsets)}, expected begin and end")
    tensor = StoredTensor(dtype, tuple(shape), offsets[0])
    if tensor.nbytes != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where}: has {offsets[1] - offsets[0]} bytes, {dtype} of shape {as_json(shape)} takes"
            f" {shown(tensor.nbytes)}"
        )
    return tensor


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= DEPTH
        and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def _document(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise ValueError(f"is no packed network: its metadata have no '{KEY}'")
    other = [name for name in metadata if name != KEY]
    if other:
        raise ValueError(f"metadata: unknown key {listed(other)}")
    text = metadata[KEY]
    if not isinstance(text, str):
        raise ValueError(f"metadata: '{KEY}' is {shown(text)}, expected a text")
    document = parse_json(text)
    if not isinstance(document, dict):
        raise ValueError(f"metadata: '{KEY}' holds {shown(document)}, not a JSON object")
    return document


def _layer_shape(
    file: BinaryIO, name: str, layer: PackedLayer, tensors: dict[str, StoredTensor]
) -> tuple[int, ...]:
    """The shape of a layer's weight, with which its tensors agree."""
    where = {tensor: joined(name, tensor) for tensor in _TENSORS}
    missing = [tensor for tensor in where.values() if tensor not in tensors]
    if missing:
        raise ValueError(f"layer '{name}': there is no tensor {listed(missing)}")
    if joined(name, "weight") in tensors:
        raise ValueError(f"layer '{name}': has weights twice, packed and as they are")
    shape = _read_shape(file, where["weight_shape"], tensors[where["weight_shape"]])
    axis = layer.weight.channel_axis
    if axis is not None and not 0 <= axis < len(shape):
        raise ValueError(f"layer '{name}': channel_axis is {axis}, its weight has shape {shape}")
    scale = "F64" if layer.weight.dtype == "float64" else "F32"
    words = words_shape(shape, layer.weight.bits, layer.weight.packed_dim)
    expected = {
        "weight_packed": ("I32", words),
        "weight_scale": (scale, (1,) if axis is None else (shape[axis], 1)),
        "input_scale": (scale, (1,)),
    }
    for what, (dtype, dims) in expected.items():
        tensor = tensors[where[what]]
        if (tensor.dtype, tensor.shape) != (dtype, dims):
            raise ValueError(
                f"tensor '{where[what]}' is {tensor.dtype} of shape {shown(tensor.shape)}, expected"
                f" {dtype} of shape {shown(dims)} for {layer.weight.bits} bits of a weight of shape"
                f" {shown(shape)}"
            )
    return shape


def _read_shape(file: BinaryIO, name: str, tensor: StoredTensor) -> tuple[int, ...]:
    if tensor.dtype != "I64" or len(tensor.shape) != 1 or not 2 <= tensor.count <= _MOST_AXES:
        raise ValueError(
            f"tensor '{name}' is {tensor.dtype} of shape {shown(tensor.shape)}, expected I64 of 2"
            f" to {_MOST_AXES} sizes"
        )
    file.seek(tensor.start)
    shape = struct.unpack(f"<{tensor.count}q", file.read(tensor.nbytes))
    if min(shape) < 1:
        raise ValueError(f"tensor '{name}' is {shape}, expected sizes of 1 or more")
    return shape
