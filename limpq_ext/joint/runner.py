"""How the branches of a joint step run: what they share, compiled, at bits in tensors.

A branch is a forward and backward pass of the prepared model at chosen bits. However it is
executed, the gradients are those of the plain loop of passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpq_ext.joint.sharing import BranchGraph, UntraceableError
from limpq_ext.kernels.bank import WeightBank, add_gradient
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import call
from limpq_ext.nn.layers import QuantizedLayer

Bits = Mapping[str, int]
"""The bit-width of each quantized layer, by name."""


class BranchRunner:
    """Runs a prepared model at chosen bits, many times on one batch.

    Args:
        model: What :func:`limpq_ext.prepare` returned.
        layers: Its quantized layers, all with the same candidates.
        weight_bank: Quantize all weights once per step.
        share_stem: Compute what comes before the first searchable layer once per step.
        drop_relu: Let unsigned quantizers take over the ReLU or ReLU6 in front of them.
        compile_forward: Compiles what a branch runs, for example ``torch.compile``; None: nothing
            is compiled. One graph serves all branches: tensors select the bits.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, QuantizedLayer],
        *,
        weight_bank: bool,
        share_stem: bool,
        drop_relu: bool,
        compile_forward: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.candidates = next(iter(layers.values())).weight_quantizer.bits
        self.norms = [m for m in model.modules() if isinstance(m, SwitchableBatchNorm)]
        self.weight_bank = weight_bank
        self.share_stem = share_stem
        self.drop_relu = drop_relu
        self.compile_forward = compile_forward
        self._places = {name: place for place, name in enumerate(self.layers)}
        self._bank: WeightBank | None = None
        self._graph: BranchGraph | None = None
        self._rows: list[_NormRows] = []
        self._selection: Tensor | None = None
        self._compiled: Callable[..., Any] | None = None
        self._uncompiled = False
        self._steps = 0

    @property
    def shared(self) -> dict[str, bool | int]:
        """What the branches share since the first step: "weight_bank", "stem", "dropped_relus"."""
        graph = self._graph
        return {
            "weight_bank": self._bank is not None,
            "stem": graph is not None and graph.stem is not None,
            "dropped_relus": 0 if graph is None else graph.dropped_relus,
        }

    def run_alone(self, x: Any, bits: Bits) -> Any:
        """The output of one branch, nothing shared; its gradients go straight to the parameters."""
        self._select(bits)
        return call(self.model, x)

    @contextmanager
    def step(
        self, x: Any, branches: int, *, by_tensor: Bits | None = None
    ) -> Iterator[Callable[[Bits], Any]]:
        """Run branches on a batch; at the end of the block the parameters have their gradients.

        Args:
            x: The inputs of the batch.
            branches: How many will run; each one's backward has to follow its forward.
            by_tensor: Bits that a tensor selects, as a captured graph needs it: a branch that is
                given this very object reads them from the device, where :meth:`set_selection`
                puts others later.

        Yields:
            What gives the output of a branch at the bits that it is called with.
        """
        if self._steps == 0:
            self._start(x)
        self._steps += 1
        if self._bank is not None:
            self._bank.quantize()
            torch.clear_autocast_cache()  # of the last step's quantized weights
        self._rows = [r if r.is_current() else _NormRows(r.norm) for r in self._rows]
        inputs = x if self._graph is None else self._graph.forward_stem(x, branches)

        def run(bits: Bits) -> Any:
            # The first step gives quantizers their start values, which no graph does.
            compiled = None if self._steps == 1 or self._uncompiled else self._compiled
            self._use(bits, by_tensor=compiled is not None or bits is by_tensor)
            forward = self.model if self._graph is None else self._graph.rest
            return call(forward if compiled is None else compiled, inputs)

        try:
            yield run
        finally:
            self._use_nothing()
        if self._graph is not None:
            self._graph.backward_stem()
        if self._bank is not None:
            self._bank.backward()
        for rows in self._rows:
            rows.collect()

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run branches as they are, so that hooks of the modules are called, in the block."""
        self._uncompiled = True
        try:
            yield
        finally:
            self._uncompiled = False

    def ready_gradient(self, name: str, bits: int) -> Tensor | None:
        """The gradient so far of a layer's weight at a bit-width, where a bank quantized it."""
        return None if self._bank is None else self._bank.weight(name, bits).grad

    def set_selection(self, bits: Bits) -> None:
        """Write the bits that tensors select from now on; this does not wait for the device."""
        places = torch.tensor([self.candidates.index(bits[name]) for name in self.layers])
        device = next(iter(self.layers.values())).weight.device
        if device.type == "cuda":
            places = places.pin_memory()
        if self._selection is None:
            self._selection = torch.empty_like(places, device=device)
        self._selection.copy_(places, non_blocking=True)

    def _start(self, x: Any) -> None:
        """Find what the branches can share; warn of what they cannot."""
        unshared = []
        if self.weight_bank:
            try:
                self._bank = WeightBank(self.layers)
            except ValueError as error:
                unshared.append(f"weights are quantized in every branch: {error}")
        # The same bits as the first branch: the check of the graph gives quantizers their start.
        self._select(dict.fromkeys(self.layers, max(self.candidates)))
        if self.share_stem or self.drop_relu:
            try:
                self._graph = BranchGraph(
                    self.model, x, share_stem=self.share_stem, drop_relu=self.drop_relu
                )
                if self._graph.reason:
                    unshared.append(f"the stem is computed in every branch: {self._graph.reason}")
            except UntraceableError as error:
                unshared.append(f"the stem is computed in every branch: {error}")
        for sentence in unshared:
            warnings.warn(sentence, stacklevel=5)
        self._rows = [_NormRows(norm) for norm in self.norms]
        if self.compile_forward is not None:
            forward = self.model if self._graph is None else self._graph.rest
            self._compiled = self.compile_forward(forward)

    def _select(self, bits: Bits) -> None:
        for name, layer in self.layers.items():
            layer.select(bits[name], bits[name])
        for norm in self.norms:
            norm.select(bits[norm.source])

    def _use(self, bits: Bits, *, by_tensor: bool) -> None:
        """Let the modules run at these bits, with what was computed before."""
        self._use_nothing()
        self._select(bits)
        if by_tensor:
            if self._compiled is not None or self._selection is None:
                self.set_selection(bits)
            assert self._selection is not None
            for name, layer in self.layers.items():
                selected = self._selection[self._places[name]]
                layer.input_quantizer.selected = layer.weight_quantizer.selected = selected
            for norm in self.norms:
                norm.selected = self._selection[self._places[norm.source]]
        else:
            for rows in self._rows:
                rows.norm.ready_rows = rows.rows
        # The bank has a tensor for each bit-width: which one is meant is known where no graph was
        # captured, also one that is compiled takes it as an input.
        if self._bank is not None and (not by_tensor or self._compiled is not None):
            for name, layer in self.layers.items():
                layer.ready_weight = self._bank.weight(name, bits[name])

    def _use_nothing(self) -> None:
        for layer in self.layers.values():
            layer.ready_weight = None
            layer.input_quantizer.selected = layer.weight_quantizer.selected = None
        for norm in self.norms:
            norm.ready_rows = norm.selected = None


class _NormRows:
    """The rows of a switchable batch normalisation, cut once instead of in every pass.

    The rows of its parameters are leaves; ``collect()`` hands their gradients on.
    """

    def __init__(self, norm: SwitchableBatchNorm) -> None:
        self.norm = norm
        self.rows = [norm.row(index) for index in range(len(norm.bits))]
        self._parameters = dict(norm.named_parameters(recurse=False))
        self._addresses = self._now()
        self._leaves = {
            name: [row.requires_grad_(parameter.requires_grad) for row in parameter.detach()]
            for name, parameter in self._parameters.items()
        }
        for name, leaves in self._leaves.items():
            for row, leaf in zip(self.rows, leaves, strict=True):
                row[name] = leaf

    def is_current(self) -> bool:
        """Whether the rows still are views of the module's tensors."""
        return self._now() == self._addresses

    def collect(self) -> None:
        """Give the parameters the gradients of their rows; none where no row has one."""
        for name, leaves in self._leaves.items():
            if any(leaf.grad is not None for leaf in leaves):
                grad = torch.stack(
                    [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
                )
                add_gradient(self._parameters[name], grad)
            for leaf in leaves:
                leaf.grad = None

    def _now(self) -> list[tuple[int, bool]]:
        tensors = (*self.norm.parameters(recurse=False), *self.norm.buffers(recurse=False))
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
