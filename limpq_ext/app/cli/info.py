"""``limpq info``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated

from limpq_ext.app.cli.arguments import InputSizeOption, ModelOption
from limpq_ext.app.cli.inputs import count_costs
from limpq_ext.app.cli.output import say
from limpq_ext.values.optional import require
from limpq_ext.values.packed_files import PackedHeader, joined, read_header

typer = require("typer", "cli")


def info(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A quantized network in packed safetensors."),
    ] = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    bits: Annotated[
        int, typer.Option(help="With --model: how many candidate bit-widths.", min=1, max=15)
    ] = 5,
) -> None:
    """Print versions, build flags, CPU capability and CUDA architectures.

    With FILE: what it holds instead, its size, and the bits of every layer. With --model: how many
    layers can be searched, and the memory that their joint training takes.
    """
    if file is not None:
        if model is not None:
            raise ValueError("FILE and --model are told about one at a time")
        _print_packed(read_header(file))
        return
    from importlib import metadata

    import torch

    from limpq_ext import __version__
    from limpq_ext.kernels.ops import build_info

    built = build_info()
    rows = {
        "limpq_ext": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "built with torch": built["built with torch"],
        "compiler": built["compiler"],
        "build flags": built["flags"],
        "CPU capability": built["cpu capability"],
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": (
            f"built with CUDA {built['cuda version']}" if "cuda version" in built else "not loaded"
        ),
        "CUDA architectures": built.get("cuda architectures", "none"),
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
        or "none",
    }
    for package in ("torchvision", "numpy", "highspy", "pydantic", "safetensors", "scikit-learn"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    if model is not None:
        from limpq_ext.kernels.bank import bank_nbytes

        costs = count_costs(model, input_size or (3, 224, 224), None)
        weights = [layer.weights for layer in costs.layers]
        buffer = sum(bank_nbytes(4 * count, bits) for count in weights)
        rows["model"] = model
        rows["searchable layers"] = f"{len(weights)}, {sum(weights):,} weights"
        rows["weight bank"] = (
            f"{buffer / 1e6:.1f} MB in float32 for {bits} bit-widths; a joint step holds as much"
            " again for its gradients"
        )
    _print_rows(rows)


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")


def _print_packed(header: PackedHeader) -> None:
    """Print what a packed file holds, and its layers as a table."""
    network = header.network
    bits = network.bits()
    weights = {name: math.prod(shape) for name, shape in header.shapes.items()}
    total = sum(weights.values())
    rest = header.others().values()
    packed, others = header.packed_bytes(), sum(tensor.nbytes for tensor in rest)
    in_float = 4 * (total + sum(tensor.count for tensor in rest))
    named = "" if network.model is None else f", the model '{network.model}'"
    means = [sum(pair[place] for pair in bits.values()) / len(bits) for place in (0, 1)]
    rows = {
        "format": f"{network.FORMAT}, version {network.VERSION}",
        "architecture": f"{network.architecture}{named}",
        "quantized layers": f"{len(bits)}, {total:,} weights",
        "mean bits": f"weights {means[0]:.2f}, activations {means[1]:.2f} (by layer)",
        "quantized weights": _size(packed, 4 * total),
        "in float": f"{others / 1e6:.3f} MB",
        "file": _size(header.nbytes, in_float),
    }
    if network.policy is not None:
        gap = network.policy.gap
        rows["policy"] = "not searched" if gap is None else f"searched, gap {gap:.1e}"
    _print_rows(rows)
    width = max(map(len, ["layer", *bits]))
    say()
    say(f"{'layer':<{width}}  weight bits  activation bits      weights        bytes")
    for name, (weight_bits, activation_bits) in bits.items():
        taken = header.tensors[joined(name, "weight_packed")].nbytes
        say(
            f"{name:<{width}}  {weight_bits:>11}  {activation_bits:>15}  {weights[name]:>11,}"
            f"  {taken:>11,}"
        )


def _size(taken: int, in_float: int) -> str:
    return f"{taken / 1e6:.3f} MB, {in_float / taken:.2f} times smaller than in float32"
