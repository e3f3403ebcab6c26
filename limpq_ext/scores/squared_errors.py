"""How far quantization moves each tensor: sums of squared errors at the step sizes of a subject."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from limpq_ext.scores.calls import Call
from limpq_ext.scores.subject import Subject
from limpq_ext.values.indicators import Kind


class SquaredErrors:
    """The sums of squared errors of weights, and of inputs as they are counted.

    Args:
        subject: Whose quantizers they are of.
        bits: The candidates.

    Attributes:
        of: The sum by layer, kind and bit-width, float64; of inputs over all that was counted.
    """

    def __init__(self, subject: Subject, bits: Sequence[int]) -> None:
        self.of: defaultdict[tuple[str, Kind, int], Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float64)
        )
        self._subject, self._bits = subject, bits
        for name, layer in subject.layers.items():
            self._add(name, "weight", layer.weight)

    def add_inputs(self, name: str, calls: Sequence[Call]) -> None:
        """Count the inputs of calls of a layer."""
        for one in calls:
            self._add(name, "activation", one.input)

    @torch.no_grad()
    def _add(self, name: str, kind: Kind, x: Tensor) -> None:
        layer = self._subject.layers[name]
        quantizer = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
        for width in self._bits:
            with self._subject.quantized(name, kind, width):
                error = (quantizer(x) - x).square().sum(dtype=torch.float64)
            self.of[name, kind, width] = self.of[name, kind, width] + error
