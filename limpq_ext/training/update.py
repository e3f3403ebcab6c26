"""What happens between the last backward of a step and its end, the same in every training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limpq_ext.nn.quantizers import ActivationQuantizer
from limpq_ext.training.cuda_graphs import Captured
from limpq_ext.training.distributed import GradientExchange, broadcast_state
from limpq_ext.training.nonfinite import FiniteWatch, NonFiniteError, Repeat, holds_back


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
        check_steps: As for :class:`limpq_ext.training.nonfinite.FiniteWatch`.

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
        _start_momentum(optimizer)
        modules = model.modules()
        scales = [module.scale for module in modules if isinstance(module, ActivationQuantizer)]
        self._exchange = GradientExchange(model.parameters(), scales)
        self._captured: _CapturedUpdate | None = None
        optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    def take(
        self, losses: Mapping[str, Tensor], x: Any, target: Any, *, capture: bool = False
    ) -> dict[str, Tensor]:
        """Update the parameters from the gradients that add up in their ``.grad``.

        Args:
            losses: The loss of every branch, detached scalars.
            x: The batch, kept for the case that it has to be repeated.
            target: What belongs to it.
            capture: The batch and the gradients are in the same tensors in every call with this
                set: what follows the exchange can be a CUDA graph. It is one if the optimizer is a
                fused one; others wait for the device or cannot be told there to hold back.

        Returns:
            The losses, averaged over the processes.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite.
            ValueError: No parameter that the optimizer holds got a gradient.
        """
        step, branches, batch = self.steps + 1, tuple(losses), (x, target)
        values = self._exchange.run(torch.stack(list(losses.values())))
        if all(p.grad is None for p in self._parameters()):
            raise ValueError(
                f"step {step}: the loss depends on none of the parameters that the optimizer holds"
            )
        if capture and holds_back(self.optimizer):
            self.watch.expect(step, branches, values, batch, for_graph=True)
            if self._captured is None or not self._captured.fits(values):
                self._captured = _CapturedUpdate(self, values, batch)
            self._captured.replay(values)
            self.watch.check_in_time(step)
        else:
            grads = self._unscaled()
            try:
                self.watch.look(step, branches, values, grads, batch)
            except NonFiniteError:
                if self.scaler is not None:  # which else would not unscale in another step
                    self.scaler.update(self.scaler.get_scale())
                raise
            self._step_optimizer()
        self.steps = step
        return dict(zip(losses, values.unbind(), strict=True))

    def _unscaled(self) -> list[Tensor]:
        """The gradients that have to be finite; the scaler deals with those that it scaled."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            return []
        return [p.grad for p in self._parameters() if p.grad is not None]

    def _step_optimizer(self) -> None:
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self._parameters(), self.clip_value)
        with self.watch.holding_back():
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
        if self.scaler is not None:
            self.scaler.update()

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _forget(self) -> None:
        """What was captured goes on with the optimizer's old state; it is captured again."""
        self._captured = None

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken.

        Raises:
            NonFiniteError: A step since the last look was not finite.
        """
        self.watch.check()
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return {"steps": self.steps, "scaler": scaler}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on counting from a state, whatever the steps after it came to."""
        self.steps = state_dict["steps"]
        self.watch.reset()
        self._forget()
        if self.scaler is not None:
            self.scaler.load_state_dict(state_dict["scaler"])


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let a fused SGD's momentum begin with 0, which its first step takes to the same values.

    It would begin with uninitialised memory where that step is held back.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault(
                    "momentum_buffer", torch.zeros_like(parameter)
                )


class _CapturedUpdate:
    """What follows the exchange as one CUDA graph: look, clip, step.

    The learning rate is in a tensor, which follows the optimizer's; where another of its options
    changes, the graph no longer fits.
    """

    def __init__(self, update: Update, values: Tensor, batch: Any) -> None:
        self._groups = update.optimizer.param_groups
        self._options = _options(self._groups)
        self._rates = [
            torch.tensor(float(group["lr"]), dtype=torch.float32, device=values.device)
            for group in self._groups
        ]

        def compute(values: Tensor) -> tuple[()]:
            update.watch.note(values, update._unscaled(), batch)
            update._step_optimizer()
            return ()

        with self._capturable():
            self._captured = Captured(compute, (values,))

    def fits(self, values: Tensor) -> bool:
        return self._options == _options(self._groups) and self._captured.fits(values)

    def replay(self, values: Tensor) -> None:
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        self._captured.replay(values)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """The optimizer reads its learning rates from the device, for a while."""
        before = [dict(group) for group in self._groups]
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, options in zip(self._groups, before, strict=True):
                group.update(options)


def _options(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    varying = ("params", "lr")
    return [
        {name: value for name, value in group.items() if name not in varying} for group in groups
    ]
