"""Joint training of the importance indicators: all layers and all bit-widths in one training run.

One step on a batch runs every searchable layer at each candidate bit-width in turn and then once
more with bits drawn at random per layer; the gradients of these n + 1 branches add up to one
optimizer step (LIMPQ, arXiv 2203.08368, section 3.3).

What the branches have in common is computed once: the quantized weights (bank.py) and whatever
comes before the first searchable layer (branches.py). The gradients are those of the plain loop.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bank import WeightBank
from .branches import BranchGraph, UntraceableError
from .indicators import Indicators, LayerIndicators
from .layers import SwitchableBatchNorm
from .prepare import quantized_layers
from .updates import Update

RANDOM_BRANCH = "random"
"""Name of the branch whose layers draw their bits at random."""


@dataclass(frozen=True)
class JointStep:
    """What one joint step did.

    Attributes:
        losses: The loss of every branch, detached scalars: "6", "5", ... and "random"; the mean
            over the processes.
        draw: The bit-width that each layer drew for the random branch.
    """

    losses: dict[str, Tensor]
    draw: dict[str, int]


class JointTrainer:
    """Trains a prepared model's step sizes for all bit-widths jointly.

    Args:
        model: What :func:`limpq_ext.prepare` returned.
        optimizer: Over the model's parameters. One that got no gradient is not touched.
        loss_fn: ``loss_fn(model(x), target)``, a scalar.
        distill: The highest bit-width learns from the target and teaches the other branches by
            cross entropy with its softmax (in-place distillation); outputs must be class scores.
        clip_value: Gradients are clipped to ``[-clip_value, clip_value]`` after they added up.
        seed: Of the random branch. The draw depends on the seed and the step alone, so it is the
            same in every process.
        weight_bank: Quantize all weights once per step instead of in every branch. It takes memory
            for each weight at each bit-width, see :class:`WeightBank`.
        share_stem: Compute what comes before the first searchable layer once per step.
        drop_relu: Let unsigned quantizers take over the ReLU in front of them.
        check_steps: Look for a NaN or an infinity after this many steps; 0: every step on the CPU,
            every 50 elsewhere, so that the host seldom waits for the device.
        on_branch: Called with (branch, output, target) after every branch, its gradients done; the
            output is detached.

    A part that cannot be shared is computed in every branch; the first step warns and says why.

    In a run of several processes (torchrun, with torch.distributed initialised) each passes its
    share of the batch; all start with what process 0 has, and the gradients of all branches are
    averaged once per step, before they are clipped.

    Raises:
        ValueError: The model is not prepared, its layers have different candidates, or an argument
            is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        distill: bool = False,
        clip_value: float = 1.0,
        seed: int = 0,
        weight_bank: bool = True,
        share_stem: bool = True,
        drop_relu: bool = True,
        check_steps: int = 0,
        on_branch: Callable[[str, Any, Any], None] | None = None,
    ) -> None:
        self.layers = quantized_layers(model)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no quantized layers: pass it through limpq_ext.prepare"
            )
        candidates = {
            quantizer.bits
            for layer in self.layers.values()
            for quantizer in (layer.weight_quantizer, layer.input_quantizer)
        }
        if len(candidates) > 1:
            raise ValueError(
                f"the layers' candidate bits differ, joint training needs the same: {candidates}"
            )
        if not clip_value > 0:
            raise ValueError(f"clip_value is {clip_value}, expected a positive number")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.distill = distill
        self.seed = seed
        self.weight_bank = weight_bank
        self.share_stem = share_stem
        self.drop_relu = drop_relu
        self.on_branch = on_branch
        self._update = Update(
            model, optimizer, self._repeat, clip_value=clip_value, check_steps=check_steps
        )
        # From the highest down: the teacher of in-place distillation comes first.
        self.bits = tuple(sorted(candidates.pop(), reverse=True))
        self._norms = [
            module for module in model.modules() if isinstance(module, SwitchableBatchNorm)
        ]
        self._norm_rows: list[_NormRows] = []
        self._bank: WeightBank | None = None
        self._graph: BranchGraph | None = None
        self._started = False

    def step(self, x: Any, target: Any) -> JointStep:
        """Take one joint step on a batch; the model is put into training mode.

        Args:
            x: What the model takes.
            target: What ``loss_fn`` compares its output with.
        """
        if not self.model.training:
            self.model.train()
        if not self._started:
            self._start(x)
        self.optimizer.zero_grad(set_to_none=True)
        draw = self.draw(self.steps)
        losses = self._accumulate(x, target, draw)
        return JointStep(self._update.take(losses, x, target), draw)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._update.steps

    def check(self) -> None:
        """Make sure that all steps so far were finite; this waits for the device.

        Raises:
            NonFiniteError: One was not; it names the step, the branch and the layer.
        """
        self._update.watch.check()

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the training depends on: model, optimizer and steps.

        Raises:
            NonFiniteError: A step so far was not finite.
        """
        return {
            "update": self._update.state_dict(),
            "seed": self.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on from a state of :meth:`state_dict`, of the same model, bits and seed.

        Raises:
            ValueError: The state is of a training with another seed.
            RuntimeError: The state is of another model.
        """
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed is {self.seed}, but the state is of seed {state_dict['seed']}")
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._update.load_state_dict(state_dict["update"])

    @property
    def shared(self) -> dict[str, bool | int]:
        """What the branches share since the first step: "weight_bank", "stem", "dropped_relus"."""
        graph = self._graph
        return {
            "weight_bank": self._bank is not None,
            "stem": graph is not None and graph.stem is not None,
            "dropped_relus": 0 if graph is None else graph.dropped_relus,
        }

    def draw(self, step: int) -> dict[str, int]:
        """The bits that every layer draws for the random branch of a step."""
        places = np.random.default_rng([self.seed, step]).integers(
            len(self.bits), size=len(self.layers)
        )
        return {
            name: self.bits[place] for name, place in zip(self.layers, places.tolist(), strict=True)
        }

    def indicators(self) -> Indicators:
        """The step sizes as they stand now: the importance of every layer at every bit-width.

        Raises:
            ValueError: A step size is NaN or infinite; the message names its layer.
        """
        ascending = tuple(sorted(self.bits))

        def by_bits(values: dict[int, float]) -> dict[int, float]:
            return {bits: values[bits] for bits in ascending}

        layers = tuple(
            LayerIndicators(
                name,
                by_bits(layer.weight_quantizer.values()),
                by_bits(layer.input_quantizer.values()),
            )
            for name, layer in self.layers.items()
        )
        return Indicators(ascending, layers, {"steps": self.steps, "seed": self.seed})

    def _start(self, x: Any) -> None:
        """Find what the branches can share."""
        unshared = []
        if self.weight_bank:
            try:
                self._bank = WeightBank(self.layers)
            except ValueError as error:
                unshared.append(f"weights are quantized in every branch: {error}")
        self._select(dict.fromkeys(self.layers, self.bits[0]))
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
            warnings.warn(sentence, stacklevel=3)
        self._norm_rows = [_NormRows(norm) for norm in self._norms]
        self._started = True

    def _accumulate(self, x: Any, target: Any, draw: dict[str, int]) -> dict[str, Tensor]:
        """All branches forward and backward; their gradients add up. The losses by branch."""
        losses: dict[str, Tensor] = {}
        teacher: Tensor | None = None
        shared: tuple[Any, ...] = (x,)
        forward = self.model
        if self._bank is not None:
            self._bank.quantize()
            torch.clear_autocast_cache()  # of the last step's quantized weights
        self._norm_rows = [
            rows if rows.is_current() else _NormRows(rows.norm) for rows in self._norm_rows
        ]
        for rows in self._norm_rows:
            rows.norm.ready_rows = rows.rows
        if self._graph is not None:
            forward = self._graph.rest
            shared = self._graph.forward_stem(x, len(self.bits) + 1)
        try:
            for branch, bits in self._branches(draw):
                self._select(bits)
                if self._bank is not None:
                    for name, layer in self.layers.items():
                        layer.ready_weight = self._bank.weight(name, bits[name])
                output = forward(*shared)
                if teacher is not None:
                    loss = F.cross_entropy(output, teacher)
                else:
                    loss = self.loss_fn(output, target)
                    if self.distill:
                        teacher = output.detach().softmax(dim=1)
                loss.backward()
                losses[branch] = loss.detach()
                if self.on_branch is not None:
                    self.on_branch(branch, output.detach(), target)
        finally:
            for layer in self.layers.values():
                layer.ready_weight = None
            for norm in self._norms:
                norm.ready_rows = None
        if self._graph is not None:
            self._graph.backward_stem()
        if self._bank is not None:
            self._bank.backward()
        for rows in self._norm_rows:
            rows.collect()
        return losses

    def _passes(self, draw: dict[str, int], x: Any, target: Any) -> Iterator[tuple[str, Tensor]]:
        """Every branch run forward with nothing shared: its name and its loss."""
        teacher: Tensor | None = None
        for branch, bits in self._branches(draw):
            self._select(bits)
            output = self.model(x)
            if teacher is not None:
                loss = F.cross_entropy(output, teacher)
            else:
                loss = self.loss_fn(output, target)
                if self.distill:
                    teacher = output.detach().softmax(dim=1)
            yield branch, loss

    def _repeat(self, step: int, branch: str, x: Any, target: Any) -> None:
        """Run one branch of a step again, in distillation after its teacher."""
        for name, loss in self._passes(self.draw(step - 1), x, target):
            if name == branch:
                loss.backward()
                return

    def _branches(self, draw: dict[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
        for bits in self.bits:
            yield str(bits), dict.fromkeys(self.layers, bits)
        yield RANDOM_BRANCH, draw

    def _select(self, bits: dict[str, int]) -> None:
        for name, layer in self.layers.items():
            layer.select(bits[name], bits[name])
        for norm in self._norms:
            norm.select(bits[norm.source])


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
                self._parameters[name].grad = torch.stack(
                    [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
                )
            for leaf in leaves:
                leaf.grad = None

    def _now(self) -> list[tuple[int, bool]]:
        tensors = (*self.norm.parameters(recurse=False), *self.norm.buffers(recurse=False))
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
