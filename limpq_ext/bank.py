"""The weight bank: every layer's weight at every bit-width, quantized in one call.

A joint step runs each layer at each candidate bit-width and once more at a random one, and the
weights change only at its end. So all quantized weights are made once per step, forward and
backward in one call each, instead of once per layer and pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _C as _C  # loading it registers torch.classes.limpq
from .layers import QuantizedLayer
from .ops import lsq_grad_factor

ALIGNMENT = 64
"""Every quantized weight starts at a multiple of this many bytes: a cache line."""


class WeightBank:
    """The quantized weights of all layers at all their bit-widths, in one buffer.

    Once per step: ``quantize()`` fills the buffer; the passes use ``weight(name, bits)``, a leaf
    that collects gradients; ``backward()`` turns the leaves' gradients into those of the weights
    and scales::

        bank = WeightBank(quantized_layers(model))
        bank.quantize()
        loss = F.conv2d(x, bank.weight("layer1.0.conv1", 4)).square().mean()
        loss.backward()
        bank.backward()

    Bit for bit what the layers' weight quantizers give one by one: the quantized weights, the
    gradient of each scale, and the gradient of the weights where one bit-width was used. Where
    several were, their gradients are added in float32 (float64 for float64 weights) in the order of
    the quantizer's ``bits``, and rounded to the weight's dtype once. The same bits for any number
    of threads.

    Memory, in bytes: the buffer is ``nbytes``, the sum over layers of ``weight.nbytes`` times the
    number of bit-widths (a ResNet-18 with five: 223 MB in float32), and is kept as long as the
    bank. The leaves that were used hold a gradient each until ``backward()``, at most ``nbytes``
    more; ``backward()`` allocates one gradient per weight.

    Args:
        layers: Quantized layers by name; their ``weight`` and ``weight_quantizer`` are used. All on
            one device.

    Raises:
        ValueError: There is no layer, the layers are on several devices, or a weight is not a
            parameter or not dense in memory.

    Hooks of the parameters are not called: gradients are added to ``.grad`` directly.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        if not layers:
            raise ValueError("a weight bank needs at least one layer")
        for name, layer in layers.items():
            if not isinstance(layer.weight, nn.Parameter):
                raise ValueError(f"layer '{name}': its weight is computed and no parameter")
        self._layers = dict(layers)
        self._table: Any = None
        self._build()

    @property
    def nbytes(self) -> int:
        """Size of the buffer that holds the quantized weights, in bytes."""
        return self._buffer.nbytes

    @torch.no_grad()
    def quantize(self) -> None:
        """Quantize the weights as they stand now. The leaves keep their gradients.

        The table of addresses is built once; it is built again, with new leaves, after a parameter
        was replaced or moved.

        Raises:
            RuntimeError: A parameter was replaced while leaves hold gradients of the former one.
        """
        if not self._is_current():
            if any(leaf.grad is not None for leaf in self._leaves.values()):
                raise RuntimeError(
                    "a weight or scale of the bank was replaced before backward() used its"
                    " gradients; call backward() first"
                )
            self._build()
        self._table.forward()
        self._filled = True

    def weight(self, name: str, bits: int) -> Tensor:
        """The weight of a layer at a bit-width, as ``quantize()`` left it.

        Args:
            name: Of the layer.
            bits: One of the bit-widths of its weight quantizer.

        Returns:
            A leaf that requires a gradient, a view of the buffer: of the shape, dtype and strides
            of the layer's weight. The same tensor in every call, so that uses in several passes add
            up in its ``.grad``.

        Raises:
            KeyError: The layer is not in the bank, or has not this bit-width.
            RuntimeError: ``quantize()`` was never called.
        """
        if not self._filled:
            raise RuntimeError("the weight bank is empty: call quantize() first")
        try:
            return self._leaves[name, bits]
        except KeyError:
            if name not in self._layers:
                raise KeyError(f"the weight bank has no layer '{name}'") from None
            candidates = self._layers[name].weight_quantizer.bits
            raise KeyError(f"layer '{name}' has no {bits} bits, those are {candidates}") from None

    @torch.no_grad()
    def backward(self) -> None:
        """Add what the leaves collected to ``.grad`` of the weights and scales, and clear them.

        A bit-width that was not used is not read; a layer without any gets no gradient. A scale
        whose bit-width was not used gets 0, as in autograd.

        Raises:
            RuntimeError: A weight or scale changed since ``quantize()``.
        """
        if not self._is_current():
            raise RuntimeError(
                "a weight or scale of the bank was replaced between quantize() and backward()"
            )
        grads = [leaf.grad for leaf in self._leaves.values()]
        dweights, dscales = self._table.backward(grads)
        for leaf in self._leaves.values():
            leaf.grad = None
        for (weight, scale), dweight, dscale in zip(
            self._parameters, dweights, dscales, strict=True
        ):
            add_gradient(weight, dweight)
            add_gradient(scale, dscale)

    def _current_parameters(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.weight_quantizer.scale) for layer in self._layers.values()]

    def _is_current(self) -> bool:
        """Whether the table still describes the layers' parameters."""
        same = all(
            weight is old_weight and scale is old_scale
            for (weight, scale), (old_weight, old_scale) in zip(
                self._current_parameters(), self._parameters, strict=True
            )
        )
        return same and self._table.is_current()

    def _build(self) -> None:
        """Allocate the buffer, cut it into leaves, and write the table of addresses."""
        self._filled = False
        self._parameters = self._current_parameters()
        sizes = [
            bank_nbytes(weight.nbytes, len(layer.weight_quantizer.bits))
            for layer, (weight, _) in zip(self._layers.values(), self._parameters, strict=True)
        ]
        self._buffer = torch.empty(
            sum(sizes), dtype=torch.uint8, device=self._parameters[0][0].device
        )
        self._leaves: dict[tuple[str, int], Tensor] = {}
        self._table = torch.classes.limpq.WeightBank()
        pieces = self._buffer.split(sizes)
        for (name, layer), (weight, scale), piece in zip(
            self._layers.items(), self._parameters, pieces, strict=True
        ):
            quantizer = layer.weight_quantizer
            leaves = {
                (name, bits): _leaf_like(weight, at)
                for bits, at in zip(quantizer.bits, piece.chunk(len(quantizer.bits)), strict=True)
            }
            ranges = [quantizer.thresholds(bits) for bits in quantizer.bits]
            self._table.add(
                f"layer '{name}'",
                weight,
                scale,
                [quant_min for quant_min, _ in ranges],
                [quant_max for _, quant_max in ranges],
                quantizer.channel_axis,
                [
                    lsq_grad_factor(weight, quant_max, quantizer.channel_axis)
                    for _, quant_max in ranges
                ],
                quantizer.scale_min,
                quantizer.scale_max,
                list(leaves.values()),
            )
            self._leaves.update(leaves)


def bank_nbytes(weight_nbytes: int, bit_widths: int) -> int:
    """Bytes that one layer takes in the buffer of a weight bank.

    Args:
        weight_nbytes: Bytes of its weight.
        bit_widths: How many candidates it has.
    """
    return -(-weight_nbytes // ALIGNMENT) * ALIGNMENT * bit_widths


def _leaf_like(weight: Tensor, memory: Tensor) -> Tensor:
    """A leaf laid out as ``weight`` is, without gaps, on bytes that are at least as many."""
    values = memory[: weight.nbytes].view(weight.dtype)
    strides = torch.empty_like(weight, device="meta").stride()
    return values.as_strided(weight.shape, strides).detach().requires_grad_()


def add_gradient(parameter: Tensor, grad: Tensor | None) -> None:
    """Add to a parameter's ``.grad`` as autograd does; None adds nothing."""
    if grad is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
