"""What happens between the last backward of a step and its end, the same in every training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import GradientExchange, broadcast_state
from .failures import FiniteWatch, Repeat


class Update:
    """Exchange the gradients, look whether they are finite, clip them, take the optimizer's step.

    Every process starts with what process 0 has.

    Args:
        model: What is trained.
        optimizer: Over its parameters.
        repeat: Repeats a branch of a step, to find the layer that is not finite.
        clip_value: Gradients are clipped to ``[-clip_value, clip_value]`` after the exchange; None:
            not at all.
        scaler: What the losses' gradients were scaled by; a step in which they overflow is skipped.
        check_steps: As for :class:`limpq_ext.failures.FiniteWatch`.

    Attributes:
        steps: How many were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        repeat: Repeat,
        *,
        clip_value: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_steps: int = 0,
    ) -> None:
        broadcast_state(model)
        self.steps = 0
        self.optimizer = optimizer
        self.clip_value = clip_value
        self.scaler = scaler
        self.watch = FiniteWatch(model, optimizer, repeat, steps=check_steps)
        self._exchange = GradientExchange(model)

    def take(self, losses: Mapping[str, Tensor], x: Any, target: Any) -> dict[str, Tensor]:
        """Update the parameters from the gradients that add up in their ``.grad``.

        Args:
            losses: The loss of every branch, detached scalars.
            x: The batch, kept for the case that it has to be repeated.
            target: What belongs to it.

        Returns:
            The losses, averaged over the processes.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite.
        """
        values = self._exchange.run(torch.stack(list(losses.values())))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            grads = []  # the scaler deals with those that are not finite
        self.watch.look(self.steps + 1, tuple(losses), values, grads, (x, target))
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.steps += 1
        return dict(zip(losses, values.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken.

        Raises:
            NonFiniteError: A step since the last look was not finite.
        """
        self.watch.check()
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return {"steps": self.steps, "scaler": scaler}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on counting from a state."""
        self.steps = state_dict["steps"]
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict["scaler"])
