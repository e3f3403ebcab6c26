"""Targets: the pairs of bits that an engine has kernels for, and what it wants tied. They are data.

A target is a YAML file: those of the package in ``targets/``, or a user's own::

    description: Our accelerator, 8-bit activations.
    source: manual, section 3        # optional
    pairs: [[4, 8], [8, 8]]          # or weight_bits: [4, 8] and activation_bits: [8], all pairs
    tie_shared_inputs: true          # optional: layers that read one tensor, equal activation bits
    tie_added_inputs: true           # optional: likewise the operands and the sum of one addition
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from limpq_ext.allocation.measures import Pair
from limpq_ext.values.bits import check_bits
from limpq_ext.values.files import Strict
from limpq_ext.values.optional import require
from limpq_ext.values.reading import (
    YAML_BYTES,
    FileFormatError,
    decode,
    first_problem,
    parse_yaml,
    read_bytes,
    reading,
    shown,
)


@dataclass(frozen=True)
class Target:
    """What a policy is to run on.

    Attributes:
        name: Its name, in errors.
        pairs: The (weight bits, activation bits) that it has kernels for.
        tie_shared_inputs: Whether layers that read one tensor have equal activation bits.
        tie_added_inputs: Whether those do that read the operands of one addition, or its sum.
        description: What it is.
        source: Where that is documented.

    Raises:
        TypeError: Bits are not integers.
        ValueError: There are no pairs, one stands twice, or bits are outside 2 to 16.
    """

    name: str
    pairs: tuple[Pair, ...]
    tie_shared_inputs: bool = False
    tie_added_inputs: bool = False
    description: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        where = f"target {self.name!r}"
        pairs = tuple((check_bits(where, weight), check_bits(where, a)) for weight, a in self.pairs)
        object.__setattr__(self, "pairs", pairs)
        if not pairs:
            raise ValueError(f"{where}: has no pairs of bits")
        twice = [pair for pair in pairs if pairs.count(pair) > 1]
        if twice:
            raise ValueError(f"{where}: the pair {list(twice[0])} stands twice")


def shipped_targets() -> list[str]:
    """The names of the targets that come with the package."""
    folder = resources.files("limpq_ext.allocation") / "targets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir())


def load_target(source: str | os.PathLike[str]) -> Target:
    """Read a target.

    Args:
        source: The name of one that comes with the package ("onnxruntime", "openvino", "tensorrt",
            "finn"), or a YAML file.

    Returns:
        The target, for :func:`limpq_ext.search`.

    Raises:
        FileNotFoundError: There is neither.
        FileFormatError: It is not YAML, or a key or value is wrong; the message names file, key and
            reason.
        ImportError: PyYAML or pydantic is not installed.
    """
    name = os.fspath(source)
    file: Any = Path(name)
    shipped = shipped_targets()
    if name in shipped:
        file = Path(str(resources.files("limpq_ext.allocation") / "targets" / f"{name}.yaml"))
    elif not file.exists():
        raise FileNotFoundError(
            f"target '{name}' does not exist: expected a file, or one of {', '.join(shipped)}"
        )
    data = read_bytes(file, "target", YAML_BYTES)
    with reading(name):
        text = decode(data)
    with reading(name, "not YAML"):
        content = parse_yaml(text)
    if not isinstance(content, dict):
        raise FileFormatError(f"{name}: holds {shown(content)}, not the keys of a target")
    pydantic = require("pydantic", "search")
    with reading(name):
        try:
            written = pydantic.TypeAdapter(_Written).validate_json(json.dumps(content))
        except pydantic.ValidationError as error:
            raise FileFormatError(first_problem(error, content)) from error
        return Target(
            Path(name).stem,
            written.all_pairs(),
            written.tie_shared_inputs,
            written.tie_added_inputs,
            written.description,
            written.source,
        )


@dataclass(frozen=True)
class _Written(Strict):
    """A target as a file has it."""

    description: str
    source: str = ""
    pairs: tuple[Pair, ...] | None = None
    weight_bits: tuple[int, ...] | None = None
    activation_bits: tuple[int, ...] | None = None
    tie_shared_inputs: bool = False
    tie_added_inputs: bool = False

    def all_pairs(self) -> tuple[Pair, ...]:
        """The pairs, however they are written."""
        weights, activations = self.weight_bits, self.activation_bits
        if self.pairs is not None and weights is None and activations is None:
            return self.pairs
        if self.pairs is None and weights is not None and activations is not None:
            return tuple((weight, activation) for weight in weights for activation in activations)
        raise ValueError("expected pairs, or weight_bits and activation_bits")
