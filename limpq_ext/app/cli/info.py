"""``limpq info``."""

from __future__ import annotations

import sys
from typing import Annotated

from limpq_ext.app.cli.arguments import InputSizeOption, ModelOption
from limpq_ext.app.cli.inputs import count_costs
from limpq_ext.app.cli.output import say
from limpq_ext.values.optional import require

typer = require("typer", "cli")


def info(
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    bits: Annotated[
        int, typer.Option(help="With --model: how many candidate bit-widths.", min=1, max=15)
    ] = 5,
) -> None:
    """Print versions, build flags, CPU capability and CUDA architectures.

    With --model: how many layers can be searched, and the memory that their joint training takes.
    """
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
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")
