"""Quantized convolution and linear layers.

Every class here *is* the float class it replaces: the same parameters under the same names, the
same attributes, the same isinstance; what is added are two quantizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from limpq_ext.nn.quantizers import ActivationQuantizer, LsqQuantizer, WeightQuantizer
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.nn.swapping import OfMadeClass, in_place_of, made_class, with_class


class QuantizedLayer(OfMadeClass, nn.Module):
    """A layer whose input and weight are fake-quantized before its own computation.

    Attributes:
        input_quantizer: Quantizes what comes in.
        weight_quantizer: Quantizes ``weight``; the bias stays float.
        ready_weight: The quantized weight where it was computed before, as a weight bank does;
            None: the quantizer computes it.
    """

    weight: Tensor
    input_quantizer: LsqQuantizer
    weight_quantizer: LsqQuantizer
    ready_weight: Tensor | None = None

    @property
    def weight_bits(self) -> int:
        """The selected bit-width of the weights."""
        return self.weight_quantizer.selected_bits

    @property
    def activation_bits(self) -> int:
        """The selected bit-width of the input."""
        return self.input_quantizer.selected_bits

    def select(self, weight_bits: int, activation_bits: int) -> None:
        """Run at these bit-widths from now on.

        Raises:
            ValueError: One of them is not a candidate of this layer.
        """
        self.weight_quantizer.select(weight_bits)
        self.input_quantizer.select(activation_bits)

    def quantized_weight(self) -> Tensor:
        """The weight at the selected bit-width: of the shape and dtype of ``weight``."""
        return (
            self.weight_quantizer(self.weight) if self.ready_weight is None else self.ready_weight
        )

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The float layer's own forward on quantized input and weight."""
        with in_place_of(self, weight=self.quantized_weight()):
            return super().forward(self.input_quantizer(input), *args, **kwargs)


class _QuantConv(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        x = self.input_quantizer(input)
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore[operator]  # of nn.ConvNd


class QuantConv1d(_QuantConv, nn.Conv1d):
    """nn.Conv1d on quantized input and weight."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """nn.Conv2d on quantized input and weight."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """nn.Conv3d on quantized input and weight."""


class QuantConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """nn.ConvTranspose1d on quantized input and weight."""


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d on quantized input and weight."""


class QuantConvTranspose3d(QuantizedLayer, nn.ConvTranspose3d):
    """nn.ConvTranspose3d on quantized input and weight."""


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear on quantized input and weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        x = self.input_quantizer(input)
        return F.linear(x, self.quantized_weight(), self.bias)


QUANTIZABLE: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}


def channel_axis(module: nn.Module, x: Tensor) -> int:
    """The axis of the channels in what a layer or a normalisation takes or puts out."""
    if isinstance(module, nn.Linear):
        return x.dim() - 1
    return x.dim() - module.weight.dim() + 1 if isinstance(module, _ConvNd) else 1


def quantizable_base(module: nn.Module) -> type[nn.Module] | None:
    """The float class of this package's table that ``module`` is an instance of, or None."""
    return next((base for base in QUANTIZABLE if isinstance(module, base)), None)


def _overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the class of ``module`` computes otherwise than ``base`` does."""
    own = type(module)
    methods = ("forward", "_conv_forward")
    return any(getattr(own, name, None) is not getattr(base, name, None) for name in methods)


def quantize_layer(
    module: nn.Module,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    *,
    per_channel_weights: bool = False,
    symmetric_weights: bool = False,
    scale_max: float = float("inf"),
    scale_start: ScaleStart = "mse",
    name: str = "",
) -> QuantizedLayer:
    """A quantized layer that shares the parameters of ``module``, also of a subclass.

    Args:
        module: nn.Conv1d, 2d or 3d, nn.ConvTranspose1d, 2d or 3d, nn.Linear or a subclass of one.
            A subclass with a ``forward`` of its own runs that, on the quantized input and with the
            quantized weight in the place of ``self.weight``.
        weight_bits: Candidate bit-widths of the weights, each 2 to 16.
        activation_bits: Candidate bit-widths of the input.
        per_channel_weights: One weight scale per output channel; of a transposed convolution, one
            per output channel of a group, which is the second axis of its weight.
        symmetric_weights: Leave out the lowest weight value, so that the range is symmetric.
        scale_max: Upper bound of the scales in use.
        scale_start: Where the step sizes begin, as for `LsqQuantizer`.
        name: What errors call the layer.

    Raises:
        TypeError: ``module`` is none of those layers.
        ValueError: A bit-width is outside 2 to 16 or stands twice.
    """
    base = quantizable_base(module)
    if base is None:
        supported = ", ".join(f"nn.{known.__name__}" for known in QUANTIZABLE)
        raise TypeError(
            f"layer '{name}' is a {type(module).__name__}; quantized are {supported} and subclasses"
        )
    weight: Any = module.weight
    weight_quantizer = WeightQuantizer(
        weight,
        weight_bits,
        per_channel=per_channel_weights,
        channel_axis=int(getattr(module, "transposed", False)),
        symmetric=symmetric_weights,
        scale_max=scale_max,
        scale_start=scale_start,
        name=f"layer '{name}': weight quantizer",
    )
    input_quantizer = ActivationQuantizer(
        activation_bits,
        scale_max=scale_max,
        scale_start=scale_start,
        name=f"layer '{name}': input quantizer",
    ).to(weight.device)
    layer = quantized_twin(module, weight_quantizer, input_quantizer)
    layer.train(module.training)
    return layer


def quantized_twin(
    module: nn.Module, weight_quantizer: nn.Module, input_quantizer: nn.Module
) -> QuantizedLayer:
    """A layer with these quantizers that shares all else with ``module``, quantized or not."""
    layer: Any
    if isinstance(module, QuantizedLayer):
        layer = with_class(module, type(module))
        layer.ready_weight = None
    else:
        own: Any = type(module)
        base: Any = quantizable_base(module)
        layer = with_class(module, _quantized_class(own, base, _overrides_forward(module, base)))
    layer.weight_quantizer = weight_quantizer
    layer.input_quantizer = input_quantizer
    return layer


@cache
def _quantized_class(own: Any, base: Any, overrides: bool) -> type[QuantizedLayer]:
    if own is base:
        return QUANTIZABLE[base]
    mixin = QuantizedLayer if overrides else QUANTIZABLE[base]
    name = f"Quant{own.__name__}"
    return made_class(name, mixin, own, _quantized_class, own, base, overrides)
