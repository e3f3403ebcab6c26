"""Joint training of the importance indicators: all layers and all bit-widths in one training run.

One step on a batch runs every searchable layer at each candidate bit-width in turn and then once
more with bits drawn at random per layer; the gradients of these n + 1 branches add up to one
optimizer step (LIMPQ, arXiv 2203.08368, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        check_steps: Look for a NaN or an infinity after this many steps; 0: every step on the CPU,
            every 50 elsewhere, so that the host seldom waits for the device.
        on_branch: Called with (branch, output, target) after every branch, its gradients done; the
            output is detached.

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
        self.on_branch = on_branch
        self._update = Update(
            model, optimizer, self._repeat, clip_value=clip_value, check_steps=check_steps
        )
        # From the highest down: the teacher of in-place distillation comes first.
        self.bits = tuple(sorted(candidates.pop(), reverse=True))
        self._norms = [
            module for module in model.modules() if isinstance(module, SwitchableBatchNorm)
        ]

    def step(self, x: Any, target: Any) -> JointStep:
        """Take one joint step on a batch; the model is put into training mode.

        Args:
            x: What the model takes.
            target: What ``loss_fn`` compares its output with.
        """
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        draw = self.draw(self.steps)
        losses: dict[str, Tensor] = {}
        for branch, output, loss in self._passes(draw, x, target):
            loss.backward()
            losses[branch] = loss.detach()
            if self.on_branch is not None:
                self.on_branch(branch, output.detach(), target)
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

    def _passes(
        self, draw: dict[str, int], x: Any, target: Any
    ) -> Iterator[tuple[str, Any, Tensor]]:
        """Every branch run forward: its name, its output and its loss."""
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
            yield branch, output, loss

    def _repeat(self, step: int, branch: str, x: Any, target: Any) -> None:
        """Run one branch of a step again, in distillation after its teacher."""
        for name, _, loss in self._passes(self.draw(step - 1), x, target):
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
