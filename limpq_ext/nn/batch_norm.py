"""Batch normalisation that switches with the bits of the layer that feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.swapping import OfMadeClass, float_class, in_place_of, made_class, with_class


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
        with in_place_of(self, **row):
            return super().forward(input)

    def _forward_selected(self, input: Tensor, selected: Tensor) -> Tensor:
        index = selected.reshape(1)
        row = {
            name: None if value is None else value.index_select(0, index).squeeze(0)
            for name, value in self._tensors().items()
        }
        with in_place_of(self, **row):
            output = super().forward(input)
        with torch.no_grad():
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                updated = row[name]
                if updated is not None and self.training:
                    getattr(self, name).index_copy_(0, index, updated.unsqueeze(0))
        return output

    def row(self, index: int) -> dict[str, Tensor | None]:
        """The tensors of the ``index``-th bit-width, views, by name."""
        tensors = self._tensors().items()
        return {name: None if value is None else value[index] for name, value in tensors}

    def _tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in self._stacked}

    def extra_repr(self) -> str:
        """Features and bit-widths, as printed in a model."""
        return f"{super().extra_repr()}, bits={self.bits}, source={self.source!r}"

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in self._stacked:
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if value is not None and own is not None and value.shape == own.shape[1:]:
                state_dict[prefix + name] = value.expand(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _switchable_class(own: Any) -> type[SwitchableBatchNorm]:
    name = f"Switchable{own.__name__}"
    return made_class(name, SwitchableBatchNorm, own, _switchable_class, own)
