"""The weight bank as a contender: the one place that knows its interface.

Where this limpq_ext has no weight bank, the case that needs it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from limpq_ext.nn.network import quantized_layers

try:
    from limpq_ext.kernels.bank import WeightBank
except ModuleNotFoundError as error:
    if error.name != "limpq_ext.kernels.bank":
        raise
    WeightBank = None

AVAILABLE = WeightBank is not None


class BankRoundTrip:
    """All weights of a prepared model at all bit-widths, and back, through one bank.

    Args:
        model: What :func:`limpq_ext.prepare` returned.
        bits: Its candidates.
    """

    def __init__(self, model: nn.Module, bits: Sequence[int]) -> None:
        self.layers = quantized_layers(model)
        self.bits = tuple(bits)
        self.bank = WeightBank(self.layers)

    def run(self, grads: Sequence[Sequence[Tensor]]) -> None:
        """Quantize and bring ``grads[layer][bit-width]`` back to the weights and the scales.

        A gradient is handed over as backward leaves it: as the ``grad`` of the quantized weight.
        """
        self.bank.quantize()
        for name, of_layer in zip(self.layers, grads, strict=True):
            for bits, grad in zip(self.bits, of_layer, strict=True):
                self.bank.weight(name, bits).grad = grad
        self.bank.backward()

    def quantized(self) -> list[list[Tensor]]:
        """The weights of the last run, by layer and bit-width."""
        return [[self.bank.weight(name, bits) for bits in self.bits] for name in self.layers]
