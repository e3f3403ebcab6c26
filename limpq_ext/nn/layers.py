"""Quantized convolution and linear layers, and batch normalisation that switches with the bits.

Every class here *is* the float class it replaces: the same parameters under the same names, the
same attributes, the same isinstance; what is added are two quantizers, or rows of statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.quantizers import ActivationQuantizer, LsqQuantizer, WeightQuantizer


class OfMadeClass:
    """Copied and pickled although its class was made at run time, from that of a float module.

    Such a class has ``_made_by``: a function that can be imported, and the arguments to which it
    returns the class.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """As of any module, but for how another process finds the class."""
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        made_by = type(self).__dict__.get("_made_by")
        if made_by is None or isinstance(reduced, str):
            return reduced
        return (_blank, made_by, *reduced[2:])


def _blank(make_class: Any, *args: Any) -> Any:
    cls = make_class(*args)
    return cls.__new__(cls)


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
        with _in_place_of(self, weight=self.quantized_weight()):
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


def quantizable_base(module: nn.Module) -> type[nn.Module] | None:
    """The float class of this package's table that ``module`` is an instance of, or None."""
    return next((base for base in QUANTIZABLE if isinstance(module, base)), None)


def overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
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
    options: dict[str, Any] = {"scale_max": scale_max}
    weight_quantizer = WeightQuantizer(
        weight,
        weight_bits,
        per_channel=per_channel_weights,
        channel_axis=int(getattr(module, "transposed", False)),
        symmetric=symmetric_weights,
        name=f"layer '{name}': weight quantizer",
        **options,
    )
    input_quantizer = ActivationQuantizer(
        activation_bits, name=f"layer '{name}': input quantizer", **options
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
        layer = with_class(module, _quantized_class(own, base, overrides_forward(module, base)))
    layer.weight_quantizer = weight_quantizer
    layer.input_quantizer = input_quantizer
    return layer


class SwitchableBatchNorm(OfMadeClass, _BatchNorm):
    """Batch normalisation with parameters and statistics of its own for each bit-width.

    ``weight``, ``bias``, ``running_mean`` and ``running_var`` keep their names and get a leading
    axis, ``[len(bits), num_features]``; loading a float model's ``[num_features]`` fills every row.

    Attributes:
        bits: The bit-widths, one row each.
        source: Name of the layer that feeds this one and whose bits choose the row.
        ready_rows: The tensors of each row where they were taken before, as a joint step does;
            None: ``forward`` takes them.
        selected: As for :class:`LsqQuantizer`: a tensor that chooses the row instead of
            ``select()``.

    Source:
        Yu et al., "Slimmable Neural Networks", arXiv 1812.08928; used by LIMPQ for bit-widths.
    """

    bits: tuple[int, ...]
    source: str
    ready_rows: Sequence[dict[str, Tensor | None]] | None = None
    selected: Tensor | None = None
    _row: int

    _stacked = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

    @classmethod
    def from_float(
        cls, module: _BatchNorm, bits: Sequence[int], source: str
    ) -> SwitchableBatchNorm:
        """One row for each of ``bits``, all equal to ``module``, which is left as it is."""
        base: Any = type(module)
        norm = with_class(module, _switchable_class(base))
        for name in cls._stacked:
            value = getattr(module, name)
            if value is None:
                continue
            stacked = value.detach().expand(len(bits), *value.shape).clone()
            if isinstance(value, nn.Parameter):
                norm._parameters[name] = nn.Parameter(stacked, requires_grad=value.requires_grad)
            else:
                norm._buffers[name] = stacked
        norm.bits = tuple(bits)
        norm.source = source
        norm._row = 0
        return norm

    def at(self, bits: int) -> _BatchNorm:
        """An ordinary one with the row of this bit-width.

        Raises:
            ValueError: There is no row for ``bits``.
        """
        self.select(bits)
        norm = with_class(self, float_class(self))
        for name, value in self.row(self._row).items():
            if value is not None and name in norm._parameters:
                own = nn.Parameter(value.detach().clone(), getattr(self, name).requires_grad)
                norm._parameters[name] = own
            elif value is not None:
                norm._buffers[name] = value.clone()
        return norm

    def select(self, bits: int) -> None:
        """Use the row of this bit-width from now on.

        Raises:
            ValueError: There is no row for ``bits``.
        """
        if bits not in self.bits:
            raise ValueError(f"batch norm fed by '{self.source}' has no row for {bits} bits")
        self._row = self.bits.index(bits)

    def forward(self, input: Tensor) -> Tensor:
        """The float class's own forward with the selected row in the place of each tensor."""
        if self.selected is not None:
            return self._forward_selected(input, self.selected)
        row = self.row(self._row) if self.ready_rows is None else self.ready_rows[self._row]
        with _in_place_of(self, **row):
            return super().forward(input)

    def _forward_selected(self, input: Tensor, selected: Tensor) -> Tensor:
        index = selected.reshape(1)
        row = {
            name: None if value is None else value.index_select(0, index).squeeze(0)
            for name in self._stacked
            for value in (getattr(self, name),)
        }
        with _in_place_of(self, **row):
            output = super().forward(input)
        with torch.no_grad():
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                updated = row[name]
                if updated is not None and self.training:
                    getattr(self, name).index_copy_(0, index, updated.unsqueeze(0))
        return output

    def row(self, index: int) -> dict[str, Tensor | None]:
        """The tensors of the ``index``-th bit-width, views, by name."""
        values = {name: getattr(self, name) for name in self._stacked}
        return {name: None if value is None else value[index] for name, value in values.items()}

    def extra_repr(self) -> str:
        """Features and bit-widths, as printed in a model."""
        return f"{super().extra_repr()}, bits={self.bits}, source={self.source!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self._stacked:
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and own is not None and value.shape == own.shape[1:]:
                state_dict[prefix + name] = value.expand(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def float_class(module: nn.Module) -> Any:
    """The class that ``module`` had before it was quantized or made switchable."""
    added = (QuantizedLayer, SwitchableBatchNorm)
    return next(
        cls for cls in type(module).__mro__ if not issubclass(cls, added) and cls is not OfMadeClass
    )


def swap_modules(model: nn.Module, swap: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they stand, in place; a shared one stays shared.

    Returns:
        The model, or what replaces it.
    """
    if model in swap:
        return swap[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in swap:
                parent._modules[name] = swap[child]
    return model


@contextmanager
def _in_place_of(module: nn.Module, **tensors: Tensor | None) -> Iterator[None]:
    """Let ``module.name`` be another tensor for a while.

    The tensor goes where the module keeps its own one: torch.compile can follow that.
    """
    places = {name: _place(module, name) for name in tensors}
    own = {name: place[name] for name, place in places.items() if name in place}
    for name, place in places.items():
        place[name] = tensors[name]
    try:
        yield
    finally:
        for name, place in places.items():
            if name in own:
                place[name] = own[name]
            else:
                del place[name]


def _place(module: nn.Module, name: str) -> dict[str, Any]:
    if name in module._parameters:
        return module._parameters
    return module._buffers if name in module._buffers else module.__dict__


def with_class(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A twin of ``module`` of another class: the same tensors and submodules, its own dicts."""
    twin = cls.__new__(cls)
    for key, value in module.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
    return twin


@cache
def _quantized_class(own: Any, base: Any, overrides: bool) -> type[QuantizedLayer]:
    if own is base:
        return QUANTIZABLE[base]
    mixin = QuantizedLayer if overrides else QUANTIZABLE[base]
    name = f"Quant{own.__name__}"
    return made_class(name, mixin, own, _quantized_class, own, base, overrides)


@cache
def _switchable_class(own: Any) -> type[SwitchableBatchNorm]:
    name = f"Switchable{own.__name__}"
    return made_class(name, SwitchableBatchNorm, own, _switchable_class, own)


def made_class(name: str, mixin: type, own: type, *made_by: Any) -> Any:
    """A class of ``mixin`` and ``own``; ``made_by`` is as in :class:`OfMadeClass`."""
    members: dict[str, Any] = {"__module__": own.__module__, "_made_by": made_by}
    computed: Any = getattr(own, "weight", None)
    if isinstance(computed, property):
        # A parametrized weight; what is put in its place for a while comes first.
        def weight(self: Any) -> Any:
            return self.__dict__["weight"] if "weight" in self.__dict__ else compute(self)

        compute: Any = computed.fget
        members["weight"] = computed.getter(weight)
    return type(name, (mixin, own), members)
