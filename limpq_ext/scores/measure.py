"""What a policy loses without any training, measured: calibrated, in one forward or two.

Start values of step sizes come from the float network, whatever the policy, and so does what the
correction compares with. So all that a policy takes is to put its quantizers in place, weights
being quantized once for each bit-width, and a forward that corrects as it goes. What it corrects is
put back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.graph.trace import trace
from limpq_ext.nn.attention import copied, with_layers
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.layers import QuantizedLayer, quantize_layer, quantized_twin
from limpq_ext.nn.quantizers import ActivationQuantizer, LsqQuantizer
from limpq_ext.nn.start_values import Histogram, ScaleStart, check_rule
from limpq_ext.nn.swapping import swap_modules
from limpq_ext.scores.subject import checked_classes, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.training.correction import Correction
from limpq_ext.training.model_state import device_of
from limpq_ext.values.names import listed, matches
from limpq_ext.values.policy import Policy

Measure = Literal["kl", "loss"]
"""What is measured: the divergence from the float network, or the cross entropy, both in nats."""

MEASURES: Final = get_args(Measure)

MOST_CACHED: Final = 2**30
"""Bytes of quantized weights that are kept, those of the bit-widths that were used last."""


class Measuring(TypedDict, total=False):
    """How a policy's loss is measured; `PolicyLoss` describes them."""

    calibration: Batches | None
    scale_start: ScaleStart
    correct: bool
    exclude: Sequence[str]
    per_channel_weights: bool
    symmetric_weights: bool
    scale_max: float


@dataclass(frozen=True)
class Measurement:
    """What a policy does without training.

    Attributes:
        loss: The mean over the samples, in nats.
        agreement: Share of the samples that it gives the class which the float network gives them,
            0 to 1.
    """

    loss: float
    agreement: float


class PolicyLoss:
    """The loss of any policy of a network, calibrated and not trained.

    It is what ``apply_policy``, ``calibrate(..., reference=model)`` and a forward come to, at the
    cost of one forward of the batches for each policy where they are those of the calibration, and
    of both where they are others.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and targets to measure on, on any device.
        measure: "kl": the mean of KL(float || quantized) over the samples; targets do not matter.
            "loss": the mean cross entropy with the targets, which are class indices.
        calibration: The batches that step sizes begin at and statistics are corrected with; None:
            the same.
        scale_start: Where step sizes begin: "mse", "max" or "percentile".
        correct: Correct batch normalisation and biases by what quantization moves.
        exclude: Names or patterns of modules that stay in float.
        **options: ``per_channel_weights``, ``symmetric_weights`` and ``scale_max`` of
            :func:`limpq_ext.apply_policy`.

    Raises:
        ValueError: There are no batches, the output is no table of scores of two or more classes,
            the targets are no classes, there is no such measure or rule, or the model has parts
            that cannot be quantized and are not excluded.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        measure: Measure = "kl",
        calibration: Batches | None = None,
        scale_start: ScaleStart = "mse",
        correct: bool = True,
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure is {measure!r}, expected one of {', '.join(MEASURES)}")
        if check_rule(scale_start) == "lsq":
            raise ValueError(
                "scale_start is 'lsq', which begins at what the policy itself puts out: expected"
                " mse, max or percentile"
            )
        self.measure = measure
        device = device_of(model)
        measured = [moved(batch, device) for batch in batches]
        if not measured:
            raise ValueError("there are no batches to measure the loss on")
        calibrating = measured
        if calibration is not None:
            calibrating = [moved(batch, device) for batch in calibration]
            if not calibrating:
                raise ValueError("there are no batches to calibrate with")
        self._inputs = [x for x, _ in measured]
        self._network, self._layers = _with_quantizers(
            model, self._inputs[0], exclude, {"scale_start": scale_start, **options}
        )
        self._correction = Correction(model, calibrating, device) if correct else None
        self._shares_forward = correct and calibration is None
        self._observe(calibrating)
        with torch.no_grad():
            self._reference = self._outputs()
        self._target = None
        if measure == "loss":
            targets = [target for _, target in measured]
            whole = all(isinstance(target, Tensor) for target in targets)
            self._target = checked_classes(torch.cat(targets) if whole else None, self._reference)

    def __call__(self, policy: Policy) -> float:
        """The loss of a policy, in nats; see `measured`."""
        return self.measured(policy).loss

    @torch.no_grad()
    def measured(self, policy: Policy) -> Measurement:
        """The loss of a policy, and how often it decides as the float network does.

        Args:
            policy: Bits of all layers that are not excluded, the fixed ones included.

        Raises:
            ValueError: The policy is of other layers, or its loss is NaN or infinite.
        """
        found = self.log_probabilities(policy)
        agreement = (found.argmax(1) == self._reference.argmax(1)).double().mean()
        loss, agreeing = torch.stack([self._losses(found).mean(), agreement]).tolist()
        return Measurement(max(0.0, loss), agreeing)  # below 0 by rounding only

    @torch.no_grad()
    def losses(self, policy: Policy) -> Tensor:
        """What a policy loses on each sample, whose mean is its loss: ``[samples]``, in float64.

        Args:
            policy: Bits of all layers that are not excluded, the fixed ones included.

        Raises:
            ValueError: The policy is of other layers, or its loss is NaN or infinite.
        """
        return self._losses(self.log_probabilities(policy))

    def _losses(self, found: Tensor) -> Tensor:
        if self._target is None:
            losses = F.kl_div(found, self._reference, reduction="none", log_target=True).sum(1)
        else:
            losses = F.nll_loss(found, self._target, reduction="none")
        if not torch.isfinite(loss := losses.mean()):
            raise ValueError(f"the loss of the policy is {float(loss)}")
        return losses

    @torch.no_grad()
    def log_probabilities(self, policy: Policy) -> Tensor:
        """What a policy says of all samples: ``[samples, classes]``, in float64.

        Args:
            policy: Bits of all layers that are not excluded, the fixed ones included.

        Raises:
            ValueError: The policy is of other layers.
        """
        self._select(policy)
        with self._corrections_undone():
            if self._correction is None:
                return self._outputs()
            found = self._correction.apply(self._network)
            return log_probabilities(found) if self._shares_forward else self._outputs()

    def _outputs(self) -> Tensor:
        """The logarithms of the probabilities of all samples, ``[samples, classes]``."""
        return torch.cat([log_probabilities(call(self._network, x)) for x in self._inputs])

    def _select(self, policy: Policy) -> None:
        chosen = policy.bits()
        unknown = [name for name in chosen if name not in self._layers]
        if unknown:
            raise ValueError(f"policy: the network has no layer {listed(unknown)} to quantize")
        missing = [name for name in self._layers if name not in chosen]
        if missing:
            raise ValueError(f"policy: there are no bits for {listed(missing)}: exclude it")
        for name, layer in self._layers.items():
            layer.select(*chosen[name])

    def _observe(self, batches: Sequence[tuple[Any, Tensor]]) -> None:
        """Count what comes into the layers of the float network."""
        with torch.no_grad():
            for layer in self._layers.values():
                layer.observing(True)
            for x, _ in batches:
                call(self._network, x)
            for layer in self._layers.values():
                layer.observing(False)

    @contextmanager
    def _corrections_undone(self) -> Iterator[None]:
        kept = [
            (tensor, tensor.clone())
            for module in self._network.modules()
            for tensor in _corrected(module)
        ]
        try:
            yield
        finally:
            for tensor, value in kept:
                tensor.copy_(value)


class _Layer:
    """A layer in its place in the network, and its quantizers at all bits that were asked for."""

    def __init__(
        self, name: str, module: nn.Module, weights: _QuantizedWeights, options: dict[str, Any]
    ) -> None:
        self._name, self._module, self._weights, self._options = name, module, weights, options
        self._histogram = Histogram()
        self._quantizers: dict[int, tuple[LsqQuantizer, LsqQuantizer]] = {}
        # Neither quantizes before bits are selected.
        self.in_place = quantized_twin(module, nn.Identity(), nn.Identity())

    def observing(self, on: bool) -> None:
        """Count what comes in from now on, or no longer."""
        counter = _Counter(self._histogram, f"layer '{self._name}': input quantizer")
        self.in_place.input_quantizer = counter if on else nn.Identity()  # type: ignore[assignment]

    def select(self, weight_bits: int, activation_bits: int) -> None:
        """Run at these bits from now on."""
        weight_quantizer, _ = self._at(weight_bits)
        self.in_place.weight_quantizer = weight_quantizer
        self.in_place.input_quantizer = self._at(activation_bits)[1]
        self.in_place.ready_weight = self._weights.get(
            (self._name, weight_bits), lambda: weight_quantizer(self.in_place.weight).detach()
        )

    def _at(self, bits: int) -> tuple[LsqQuantizer, LsqQuantizer]:
        if bits not in self._quantizers:
            made = quantize_layer(self._module, (bits,), (bits,), name=self._name, **self._options)
            made.eval()
            assert isinstance(made.input_quantizer, ActivationQuantizer)
            made.input_quantizer.start_from(self._histogram)
            self._quantizers[bits] = made.weight_quantizer, made.input_quantizer
        return self._quantizers[bits]


class _Counter(nn.Module):
    """Stands where an input quantizer does, and counts what comes."""

    def __init__(self, histogram: Histogram, name: str) -> None:
        super().__init__()
        self._histogram, self._name = histogram, name

    def forward(self, x: Tensor) -> Tensor:
        try:
            self._histogram.add(x)
        except ValueError as error:
            raise ValueError(f"{self._name}: {error}") from None
        return x


class _QuantizedWeights:
    """Weights of layers at bit-widths, as many as may be kept; those used last stay."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int], quantize: Callable[[], Tensor]) -> Tensor:
        """The weights of a layer at a bit-width, quantized where they are not there."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        weight = self._kept[key] = quantize()
        self._bytes += weight.nbytes
        while self._bytes > MOST_CACHED and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return weight


def _with_quantizers(
    model: nn.Module, example: Any, exclude: Sequence[str], options: dict[str, Any]
) -> tuple[nn.Module, dict[str, _Layer]]:
    """A copy of a float model with places for quantizers, and its layers by name."""
    names = [layer.name for layer in trace(model, example, exclude=exclude).layers]
    network = copied(with_layers(model, lambda name: not matches(name, exclude))).eval()
    modules = dict(network.named_modules())
    weights = _QuantizedWeights()
    layers = {name: _Layer(name, modules[name], weights, options) for name in names}
    swap: dict[nn.Module, nn.Module] = {modules[name]: layers[name].in_place for name in names}
    return swap_modules(network, swap), layers


def _corrected(module: nn.Module) -> list[Tensor]:
    """What the correction may change in a module."""
    if isinstance(module, _BatchNorm):
        statistics = (module.running_mean, module.running_var)
        return [tensor for tensor in statistics if tensor is not None]
    bias: Any = module.bias if isinstance(module, QuantizedLayer) else None
    return [] if bias is None else [bias]
