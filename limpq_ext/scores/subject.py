"""The network that scores are measured in: float, until one of its quantizers is switched on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

from torch import Tensor, nn

from limpq_ext.conversion.prepare import prepare
from limpq_ext.nn.inputs import moved
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.training.batches import Batches
from limpq_ext.training.calibration import start_scales_from
from limpq_ext.training.model_state import device_of
from limpq_ext.values.indicators import Indicators, Kind, LayerIndicators

KINDS: tuple[Kind, ...] = get_args(Kind)

Key = tuple[str, Kind, int]
"""A layer's name, its weights or its input, and a bit-width."""


class Subject:
    """A copy of a float model with quantizers that pass what they get, until one is switched on.

    Args:
        model: The float model; it is left as it is.
        batches: Some batches of inputs and targets; the step sizes begin at what passes in them.
        bits: Candidate bit-widths.
        scale_start: By which rule they begin: "mse", "max" or "percentile".
        **options: ``fixed``, ``exclude``, ``per_channel_weights`` and ``symmetric_weights`` of
            :func:`limpq_ext.prepare`.

    Attributes:
        network: The copy, in evaluation mode, on the model's device.
        batches: The batches, on that device.
        layers: Its quantized layers by name, all of them candidates of the search.

    Raises:
        ValueError: There are no batches, or the model cannot be prepared.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        bits: Sequence[int],
        *,
        scale_start: ScaleStart = "mse",
        **options: Any,
    ) -> None:
        device = device_of(model)
        self.batches = [moved(batch, device) for batch in batches]
        if not self.batches:
            raise ValueError("there are no batches to measure scores on")
        if scale_start == "lsq":
            raise ValueError(
                "scale_start is 'lsq', which needs a training: expected mse, max or percentile"
            )
        x, _ = self.batches[0]
        network = copy.deepcopy(model).eval()
        self.network = prepare(network, bits, example_input=x, scale_start=scale_start, **options)
        self.network.requires_grad_(True)
        start_scales_from(self.network, self.batches)
        self.layers = quantized_layers(self.network)
        for quantizer in self.network.modules():
            if isinstance(quantizer, LsqQuantizer):
                quantizer.observe = _nothing

    @contextmanager
    def quantized(self, layer: str, kind: Kind, bits: int) -> Iterator[None]:
        """Quantize the weights or the input of one layer for as long as the block lasts."""
        module = self.layers[layer]
        quantizer = module.weight_quantizer if kind == "weight" else module.input_quantizer
        quantizer.select(bits)
        quantizer.observe = None
        try:
            yield
        finally:
            quantizer.observe = _nothing

    @contextmanager
    def all_quantized(self, *tensors: Key) -> Iterator[None]:
        """Quantize several tensors for as long as the block lasts."""
        with ExitStack() as stack:
            for tensor in tensors:
                stack.enter_context(self.quantized(*tensor))
            yield

    def scores(
        self,
        name: str,
        bits: Sequence[int],
        score: Callable[[str, Kind, int], float],
    ) -> Indicators:
        """The scores as indicators.

        Args:
            name: Of the score, for ``meta``.
            bits: The candidates.
            score: That of a layer's weights or input at a bit-width.

        Raises:
            ValueError: A score is NaN or infinite; the message names its layer.
        """
        layers = tuple(
            LayerIndicators(
                layer, *({width: score(layer, kind, width) for width in bits} for kind in KINDS)
            )
            for layer in self.layers
        )
        return Indicators(tuple(bits), layers, {"score": name, "batches": len(self.batches)})


def log_probabilities(output: Any) -> Tensor:
    """The logarithms of a classifier's probabilities, ``[batch, classes]``.

    Raises:
        ValueError: The output is no table of scores.
    """
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the model puts out {what}, expected scores [batch, classes] of 2 or more"
        )
    return output.double().log_softmax(dim=1)  # divergences are small differences


def checked_classes(target: Any, scores: Tensor) -> Tensor:
    """The targets as int64, if they are a class for each sample.

    Raises:
        ValueError: They are something else, or another class than those of the scores.
    """
    whole = isinstance(target, Tensor) and not target.is_floating_point()
    if not whole or target.shape != scores.shape[:1]:
        what = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"the targets are {what}, expected a class index for each sample")
    if bool(((target < 0) | (target >= scores.shape[1])).any()):
        raise ValueError(f"a target is not one of the {scores.shape[1]} classes")
    return target.long()


def _nothing(x: Tensor) -> None:
    """Observes nothing."""
