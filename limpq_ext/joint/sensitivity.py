"""What every layer's quantization errors add to the loss, from gradients that a joint step has.

The branch at the highest bit-width is the one nearest to the float network. With the gradient G of
the summed loss of a batch of N samples at a quantized tensor there, and the error e_b of that
tensor at b bits, the loss moves by <G, e_b> to first order. Half of <G, e_b>^2 / N, taken for each
channel by itself and added, is what is measured: of samples whose gradients are independent and
near 0 in the mean, the second order with the empirical Fisher information, and more where an error
moves the loss of all samples the same way (bench/NOTES.md compares it with samples by themselves).
`limpq_ext.quantization_error_sums` gives the sums at all bit-widths in one pass over x and g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limpq_ext.nn.layers import QuantizedLayer, channel_axis
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.distributed import is_distributed
from limpq_ext.values.indicators import Indicators, LayerIndicators


class SensitivityMeter:
    """Collects the sums of steps that it watches; all processes of a training have the same.

    Args:
        layers: The quantized layers by name, all with the same candidates.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self._layers = dict(layers)
        first = next(iter(self._layers.values()))
        self._bits = first.weight_quantizer.bits
        shape = (2, len(self._layers), len(self._bits))
        device = first.weight.device
        # The sums of weights and of activations; the samples and steps that they are of.
        self._totals = torch.zeros(shape, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)
        self._inputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, list[Tensor]] = {}

    @contextmanager
    def watching(
        self,
        x: Any,
        ready_gradient: Callable[[str], Tensor | None],
        *,
        mean: bool = True,
        loss_scale: Tensor | float = 1.0,
    ) -> Iterator[None]:
        """Watch one branch, forward and backward.

        Args:
            x: The inputs of the batch; the first tensor among them begins with the samples, which
                are counted.
            ready_gradient: The gradient of the named layer's quantized weight where the layer did
                not quantize it itself, else None.
            mean: The loss is the mean over the samples; else their sum.
            loss_scale: What the loss is multiplied by before its backward.
        """
        samples = next(leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)).shape[0]
        self._inputs = {name: [] for name in self._layers}
        self._gradients = {name: [] for name in self._layers}
        handles = []
        try:
            for name, layer in self._layers.items():
                for quantizer, took in (
                    (layer.input_quantizer, self._takes_input(name, layer)),
                    (layer.weight_quantizer, self._takes_weight(name)),
                ):
                    handles.append(quantizer.register_forward_hook(_following(took)))
            yield
        finally:
            for handle in handles:
                handle.remove()
        # What takes a gradient of the branch to that of the sum of the samples' losses.
        self._add(samples, (samples if mean else 1) / loss_scale, ready_gradient)

    def indicators(self, meta: Mapping[str, Any]) -> Indicators:
        """The sensitivities, in nats where the loss is in nats.

        Raises:
            ValueError: No step was watched, or none of them was finite.
        """
        samples, steps = self._counts.tolist()
        if not samples:
            raise ValueError("no step's sensitivities were measured yet")
        scores = (self._totals / (2 * samples)).tolist()
        layers = tuple(
            LayerIndicators(
                name, *(dict(zip(self._bits, kind[place], strict=True)) for kind in scores)
            )
            for place, name in enumerate(self._layers)
        )
        return Indicators(tuple(self._bits), layers, {**meta, "measured_steps": int(steps)})

    def state_dict(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"totals": self._totals.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor] | None, /) -> None:
        """Go on from a state; None: from nothing."""
        for name, own in (("totals", self._totals), ("counts", self._counts)):
            if state_dict is None:
                own.zero_()
            else:
                own.copy_(state_dict[name])

    def _takes_input(
        self, name: str, layer: QuantizedLayer
    ) -> Callable[[LsqQuantizer, Tensor, Tensor], None]:
        def take(quantizer: LsqQuantizer, x: Tensor, grad: Tensor) -> None:
            axis = channel_axis(layer, x)
            self._inputs[name].append(quantizer.error_sums(x, grad, sum_axis=axis).sums)

        return take

    def _takes_weight(self, name: str) -> Callable[[LsqQuantizer, Tensor, Tensor], None]:
        def take(quantizer: LsqQuantizer, weight: Tensor, grad: Tensor) -> None:
            self._gradients[name].append(grad)

        return take

    @torch.no_grad()
    def _add(
        self,
        samples: int,
        factor: Tensor | float,
        ready_gradient: Callable[[str], Tensor | None],
    ) -> None:
        parts = []
        for name, layer in self._layers.items():
            no_weight, no_input = self._no_sums(layer)
            ready, calls = ready_gradient(name), self._gradients[name]
            grad = ready if ready is not None else sum(calls[1:], calls[0]) if calls else None
            parts.append(no_weight if grad is None else weight_sums(layer, grad))
            sums = self._inputs[name]
            parts.append(sum(sums[1:], sums[0]) if sums else no_input)
        self._inputs, self._gradients = {}, {}
        # Of the whole batch before they are squared, so that processes do not matter.
        whole = torch.cat([part.flatten() for part in parts]) * factor
        counts = self._counts.new_tensor([samples, 1.0])
        if is_distributed():
            dist.all_reduce(whole)
            dist.all_reduce(counts[:1])
        finite = whole.isfinite().all()  # not where a scaled gradient overflowed
        squares = [
            part.reshape(len(self._bits), -1).square().sum(dim=1)
            for part in whole.split([part.numel() for part in parts])
        ]
        values = torch.stack(squares).reshape(len(self._layers), 2, -1).transpose(0, 1)
        self._totals += torch.where(finite, values, 0.0)
        self._counts += counts * finite

    def _no_sums(self, layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
        """Those of the weights and of the input of a layer that did not run here."""
        shape = layer.weight.shape
        if getattr(layer, "transposed", False):
            channels = shape[1], shape[0]
        else:
            channels = shape[0], shape[1] * int(getattr(layer, "groups", 1))
        of_weight, of_input = (self._totals.new_zeros(len(self._bits), count) for count in channels)
        return of_weight, of_input


def weight_sums(layer: QuantizedLayer, grad: Tensor) -> Tensor:
    """The error sums of a layer's weights by output channel, ``[len(bits), channels]``."""
    channels = int(getattr(layer, "transposed", False))
    return layer.weight_quantizer.error_sums(layer.weight, grad, sum_axis=channels).sums


def _following(
    take: Callable[[LsqQuantizer, Tensor, Tensor], None],
) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
    """A hook of a quantizer's forward that takes its input and the gradient of its output."""

    def follow(quantizer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            assert isinstance(quantizer, LsqQuantizer)
            kept = quantizer, inputs[0].detach()
            output.register_hook(lambda grad: take(*kept, grad))

    return follow
