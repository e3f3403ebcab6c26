"""A quantized network as a whole: its layers by name, and the bits that it runs at."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.layers import QuantizedLayer
from limpq_ext.values.names import listed


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a prepared model by name, in the order of ``named_modules()``."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)
    }


def select_bits(model: nn.Module, bits: int | Mapping[str, tuple[int, int]]) -> None:
    """Run a prepared model at these bits from now on, batch normalisation included.

    Args:
        model: What :func:`limpq_ext.prepare` returned.
        bits: One bit-width for all, or (weight bits, activation bits) of every layer by name.

    Raises:
        ValueError: A layer is missing or unknown, or a bit-width is not a candidate.
    """
    layers = quantized_layers(model)
    if isinstance(bits, Mapping):
        unknown = [name for name in bits if name not in layers]
        if unknown:
            raise ValueError(f"bits: the model has no quantized layer {listed(unknown)}")
        missing = [name for name in layers if name not in bits]
        if missing:
            raise ValueError(f"bits: nothing is given for {listed(missing)}")
        chosen = dict(bits)
    else:
        chosen = dict.fromkeys(layers, (bits, bits))
    for name, layer in layers.items():
        layer.select(*chosen[name])
    for module in model.modules():
        if isinstance(module, SwitchableBatchNorm):
            module.select(chosen[module.source][0])
