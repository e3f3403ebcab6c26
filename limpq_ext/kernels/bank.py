"""The weight bank: every layer's weight at every bit-width, quantized in one call.

A joint step runs each layer at each candidate bit-width and once more at a random one, and the
weights change only at its end. So all quantized weights are made once per step, forward and
backward in one call each, instead of once per layer and pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from limpq_ext.kernels.ops import bank_backward, bank_forward

NO_AXIS = -(2**63)
"""What the operators take for the channel axis of a layer with one scale per bit-width."""

ALIGNMENT = 64
"""Every quantized weight starts at a multiple of this many bytes: a cache line."""


class BankedQuantizer(Protocol):
    """What a bank needs of a weight quantizer.

    Attributes:
        bits: The bit-widths.
        channel_axis: The axis that has a scale per index; None: one scale per bit-width.
        scale_min: The lowest scale in use.
        scale_max: The highest scale in use.
    """

    bits: tuple[int, ...]
    channel_axis: int | None
    scale_min: float
    scale_max: float

    @property
    def scale(self) -> Tensor:
        """The step sizes, a row for each bit-width."""

    def thresholds(self, bits: int) -> tuple[int, int]:
        """``(quant_min, quant_max)`` at a bit-width."""


class BankedLayer(Protocol):
    """What a bank needs of a layer."""

    @property
    def weight(self) -> Tensor:
        """A parameter."""

    @property
    def weight_quantizer(self) -> BankedQuantizer:
        """What quantizes it."""


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

    def __init__(self, layers: Mapping[str, BankedLayer]) -> None:
        if not layers:
            raise ValueError("a weight bank needs at least one layer")
        for name, layer in layers.items():
            if not isinstance(layer.weight, nn.Parameter):
                raise ValueError(f"layer '{name}': its weight is computed and no parameter")
        self._layers = dict(layers)
        self._layout: list[tuple[Any, ...]] = []
        self._how: tuple[list[Any], ...] = ()
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
        if self._current_layout() != self._layout:
            if any(leaf.grad is not None for leaf in self._leaves.values()):
                raise RuntimeError(
                    "a weight or scale of the bank was replaced before backward() used its"
                    " gradients; call backward() first"
                )
            self._build()
        bank_forward(*self._tensors(), self._values, *self._how)
        # A pass that still needs the former values then says so instead of using the new ones.
        increment_version(self._leaves.values())
        self._versions = self._current_versions()
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
        if self._current_layout() != self._layout:
            raise RuntimeError(
                "a weight or scale of the bank was replaced between quantize() and backward()"
            )
        leaves = self._leaves.values()
        used = {place: leaf.grad for place, leaf in enumerate(leaves) if leaf.grad is not None}
        # The layers that have a gradient, in order, as the operator returns them.
        layers = list(dict.fromkeys(self._layer_of[place] for place in used))
        versions = self._current_versions()
        for layer in layers:
            if versions[layer] != self._versions[layer]:
                raise RuntimeError(
                    f"layer '{list(self._layers)[layer]}': the weight or its scales were modified"
                    " between quantize() and backward()"
                )
        gradients = bank_backward(list(used.values()), list(used), *self._tensors(), *self._how)
        for leaf in leaves:
            leaf.grad = None
        for layer, dweight, dscale in zip(layers, *gradients, strict=True):
            weight, scale = self._parameters[layer]
            add_gradient(weight, dweight)
            add_gradient(scale, dscale)

    def _current_parameters(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.weight, layer.weight_quantizer.scale) for layer in self._layers.values()]

    def _current_layout(self) -> list[tuple[Any, ...]]:
        """Which tensors the parameters are, and where and how they lie in memory."""
        return [
            (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            for pair in self._current_parameters()
            for tensor in pair
        ]

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(weight._version, scale._version) for weight, scale in self._parameters]

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and the scales, without autograd."""
        return (
            [weight.detach() for weight, _ in self._parameters],
            [scale.detach() for _, scale in self._parameters],
        )

    def _build(self) -> None:
        """Allocate the buffer, cut it into leaves, and write down what the kernels are told."""
        self._filled = False
        self._parameters = self._current_parameters()
        self._layout = self._current_layout()
        device = self._parameters[0][0].device
        for name, (weight, _) in zip(self._layers, self._parameters, strict=True):
            if weight.is_meta and device == weight.device:
                raise ValueError(
                    f"weight bank: layer '{name}' is on meta, where tensors hold no values"
                )
            if weight.device != device:
                raise ValueError(
                    f"weight bank: layer '{name}' is on {weight.device}, other layers are on"
                    f" {device}"
                )
            if not is_dense(weight):
                raise ValueError(
                    f"weight bank: layer '{name}': the weight's memory has gaps or overlaps,"
                    f" strides {tuple(weight.stride())}"
                )
        quantizers = [layer.weight_quantizer for layer in self._layers.values()]
        sizes = [
            bank_nbytes(weight.nbytes, len(quantizer.bits))
            for quantizer, (weight, _) in zip(quantizers, self._parameters, strict=True)
        ]
        self._buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._values: list[Tensor] = []
        self._leaves: dict[tuple[str, int], Tensor] = {}
        self._layer_of: list[int] = []
        for place, (name, (weight, _), quantizer, piece) in enumerate(
            zip(self._layers, self._parameters, quantizers, self._buffer.split(sizes), strict=True)
        ):
            for bits, memory in zip(quantizer.bits, piece.chunk(len(quantizer.bits)), strict=True):
                values = _laid_out_as(weight, memory)
                self._values.append(values)
                self._leaves[name, bits] = values.detach().requires_grad_()
                self._layer_of.append(place)
        ranges = [quantizer.thresholds(bits) for quantizer in quantizers for bits in quantizer.bits]
        self._how = (
            [len(quantizer.bits) for quantizer in quantizers],
            [quant_min for quant_min, _ in ranges],
            [quant_max for _, quant_max in ranges],
            [NO_AXIS if q.channel_axis is None else q.channel_axis for q in quantizers],
            [quantizer.scale_min for quantizer in quantizers],
            [quantizer.scale_max for quantizer in quantizers],
        )


def bank_nbytes(weight_nbytes: int, bit_widths: int) -> int:
    """Bytes that one layer takes in the buffer of a weight bank.

    Args:
        weight_nbytes: Bytes of its weight.
        bit_widths: How many candidates it has.
    """
    return -(-weight_nbytes // ALIGNMENT) * ALIGNMENT * bit_widths


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's memory has neither gaps nor overlaps."""
    if tensor.is_contiguous():
        return True
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in axes if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _laid_out_as(weight: Tensor, memory: Tensor) -> Tensor:
    """A tensor laid out as the dense ``weight`` is, on bytes that are at least as many."""
    values = memory[: weight.nbytes].view(weight.dtype)
    return values.as_strided(weight.shape, weight.stride())


def add_gradient(parameter: Tensor, grad: Tensor | None) -> None:
    """Add to a parameter's ``.grad`` as autograd does; None adds nothing."""
    if grad is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
