"""Losses and gradients that become NaN or infinite: noticed without waiting for the device, named.

On the CPU every step is looked at before its update. Elsewhere the device keeps the first bad step,
its losses and its batch, and holds back further updates where the optimizer can (a fused one, as
under a gradient scaler), so that the host has to read a flag only now and then. The bad step is
then repeated, branch by branch and layer by layer, to find where it begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.distributed import gather

CHECK_STEPS = 50
"""How often the flag is read on a device that a read would wait for."""

Repeat = Callable[[int, str, Any, Any], None]
"""``repeat(step, branch, x, target)`` runs one branch of a step forward and backward, plainly."""


class NonFiniteError(ValueError):
    """A loss or gradient became NaN or infinite.

    Attributes:
        step: The step, the first is 1.
        branch: Name of the branch; "" where there are no branches, or none was found.
        layer: Name of the first layer that shows it; "" where none was found.
    """

    def __init__(self, message: str, *, step: int, branch: str, layer: str) -> None:
        super().__init__(message)
        self.step = step
        self.branch = branch
        self.layer = layer


@dataclass(frozen=True)
class Sighting:
    """Where a value that is not finite shows first.

    Attributes:
        layer: Name of a layer, "" where it is none.
        what: In words.
    """

    layer: str
    what: str


class FiniteWatch:
    """Ends a training whose losses or gradients are not finite.

    Args:
        model: What is trained.
        optimizer: What updates it.
        repeat: Repeats a branch of a step, to find the layer.
        steps: Look after this many steps; 0: every step on the CPU, every ``CHECK_STEPS``
            elsewhere.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, repeat: Repeat, *, steps: int = 0
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.repeat = repeat
        self.steps = steps
        self._recorded: _Record | None = None
        self._branches: tuple[str, ...] = ()

    def look(
        self,
        step: int,
        branches: Sequence[str],
        losses: Tensor,
        grads: Sequence[Tensor],
        batch: Any,
    ) -> None:
        """Look at a step after its gradients added up and before its update.

        Args:
            step: Its number, the first is 1.
            branches: Their names.
            losses: One each, ``[len(branches)]``.
            grads: Of all parameters that have one.
            batch: ``(x, target)``.

        Raises:
            NonFiniteError: This step, or one since the last look, is not finite.
        """
        if self._period(losses) == 1:
            self._branches = tuple(branches)
            if bool(_any_bad(losses, grads)):
                self._fail(step, losses, batch)
            return
        self.expect(step, branches, losses, batch)
        self.note(losses, grads, batch)
        self.check_in_time(step)

    def expect(
        self,
        step: int,
        branches: Sequence[str],
        losses: Tensor,
        batch: Any,
        *,
        for_graph: bool = False,
    ) -> None:
        """Prepare the device for `note` of a step; the arguments are those of `look`.

        With ``for_graph`` a CUDA graph will write to what is prepared for such batches: it is kept.
        """
        self._branches = tuple(branches)
        if self._recorded is None:
            self._recorded = _Record(losses)
        self._recorded.expect(step, batch, for_graph)

    def note(self, losses: Tensor, grads: Sequence[Tensor], batch: Any) -> None:
        """Look at a step on the device alone.

        A CUDA graph can capture this. The arguments are those of `look`.
        """
        assert self._recorded is not None
        self._recorded.add(_any_bad(losses, grads), losses, batch)

    @contextmanager
    def holding_back(self) -> Iterator[None]:
        """Let the optimizer, if it can, take no step in the block once one was not finite.

        A CUDA graph can capture the block. The optimizer is told as a GradScaler tells it, and what
        it was told does not stay behind: its owner may go on to use it otherwise.
        """
        if self._recorded is None or not holds_back(self.optimizer):
            yield
            return
        told = {"grad_scale": None, "found_inf": self._recorded.held}
        for name, value in told.items():
            setattr(self.optimizer, name, value)
        try:
            yield
        finally:
            for name in told:
                self.optimizer.__dict__.pop(name, None)  # a GradScaler removes them itself

    def reset(self) -> None:
        """Forget all steps: the training goes on from a state before them."""
        self._recorded = None

    def check_in_time(self, step: int) -> None:
        """Check after every so many steps.

        Raises:
            NonFiniteError: A step since the last look was not finite.
        """
        if self._recorded is not None and step % self._period(self._recorded.held) == 0:
            self.check()

    def check(self) -> None:
        """Read what the device noticed; this waits for it.

        Raises:
            NonFiniteError: A step since the last look was not finite.
        """
        if self._recorded is None:
            return
        if bool(self._recorded.seen):
            self._fail(*self._recorded.read())
        self._recorded.drop_batches()

    def _period(self, losses: Tensor) -> int:
        return self.steps or (1 if losses.device.type == "cpu" else CHECK_STEPS)

    def _fail(self, step: int, losses: Tensor, batch: Any) -> None:
        values = dict(zip(self._branches, losses.tolist(), strict=True))
        bad = [branch for branch, loss in values.items() if not math.isfinite(loss)]
        what = f"the loss became {values[bad[0]]}" if bad else "a gradient became NaN or infinite"
        branch, process, sighting = self._locate(step, bad[:1] or self._branches, batch)
        if sighting is None:
            branch = bad[0] if bad else ""
            place = "it did not show again when the step was repeated"
        else:
            place = f"it shows first in {sighting.what}" + f" in process {process}" * (process > 0)
        raise NonFiniteError(
            f"step {step}{branch and f', branch {branch!r}'}: {what}; {place}."
            " Lower the learning rate or check the data",
            step=step,
            branch=branch,
            layer="" if sighting is None else sighting.layer,
        )

    def _locate(
        self, step: int, branches: Sequence[str], batch: Any
    ) -> tuple[str, int, Sighting | None]:
        """Branch, process and place that show it, from running the branches of the step again."""
        x, target = batch
        for branch in branches:
            repeat = partial(self.repeat, step, branch, x, target)
            for process, seen in enumerate(gather(first_sighting(self.model, x, repeat))):
                if seen is not None:
                    return branch, process, seen
        return "", 0, None


class _Record:
    """The first bad step, kept on the device in tensors that stay where they are.

    Attributes:
        seen: Whether there was one.
        held: The same as a float, as optimizers take it.
    """

    def __init__(self, losses: Tensor) -> None:
        self.seen = torch.zeros((), dtype=torch.bool, device=losses.device)
        self.held = torch.zeros((), device=losses.device)
        self._now = torch.zeros((), dtype=torch.int64, device=losses.device)
        self._step = self._now.clone()
        self._losses = losses.detach().clone()
        # One place for each shape of a batch, and whether it was the bad one.
        self._batches: dict[Any, tuple[Tensor, Any]] = {}
        self._of_graphs: set[Any] = set()

    def expect(self, step: int, batch: Any, for_graph: bool) -> None:
        self._now.fill_(step)
        shapes, _ = _tensors(batch)
        if shapes not in self._batches:
            self._batches[shapes] = (torch.zeros_like(self.seen), tree_map(_copied, batch))
        if for_graph:
            self._of_graphs.add(shapes)

    def drop_batches(self) -> None:
        """Free the places of batches, none of which was bad, but for those that graphs write to."""
        self._batches = {
            shapes: place for shapes, place in self._batches.items() if shapes in self._of_graphs
        }

    @torch.no_grad()
    def add(self, bad: Tensor, losses: Tensor, batch: Any) -> None:
        first = bad & ~self.seen
        shapes, tensors = _tensors(batch)
        here, kept = self._batches[shapes]
        owned = (self._step, self._losses, *_tensors(kept)[1])
        for own, new in zip(owned, (self._now, losses, *tensors), strict=True):
            own.copy_(torch.where(first, new, own))
        here |= first
        self.seen |= bad
        self.held.copy_(self.seen)

    def read(self) -> tuple[int, Tensor, Any]:
        batch = next(kept for here, kept in self._batches.values() if bool(here))
        return int(self._step), self._losses, batch


def _tensors(batch: Any) -> tuple[tuple[torch.Size, ...], list[Tensor]]:
    """The tensors of a batch and their shapes."""
    tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
    return tuple(tensor.shape for tensor in tensors), tensors


def first_sighting(model: nn.Module, x: Any, run: Callable[[], None]) -> Sighting | None:
    """The first place in a forward and backward that holds a NaN or an infinity.

    Args:
        model: What is run; its gradients are lost.
        x: What goes in.
        run: Runs the model forward and backward.

    Returns:
        The place, or None where all is finite.
    """
    leaves = [leaf for leaf in tree_flatten(x)[0] if isinstance(leaf, Tensor)]
    if not all(_finite(leaf) for leaf in leaves):
        return Sighting("", "the batch itself")
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return Sighting(name.rpartition(".")[0], f"the parameter '{name}'")
    found: list[Sighting] = []
    with _hooks(model, found.append):
        for parameter in model.parameters():
            parameter.grad = None
        run()
    return found[0] if found else None


@contextmanager
def _hooks(model: nn.Module, report: Callable[[Sighting], None]) -> Iterator[None]:
    handles: list[Any] = []

    def look_at(tensor: Tensor, sighting: Sighting) -> None:
        if not _finite(tensor):
            report(sighting)

    def watch(layer: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in tree_flatten(output)[0]:
                if not isinstance(tensor, Tensor):
                    continue
                look_at(tensor, Sighting(layer, f"the output of {kind}"))
                if tensor.requires_grad:
                    gradient = Sighting(layer, f"the gradient at the output of {kind}")
                    handles.append(tensor.register_hook(partial(look_at, sighting=gradient)))

        return after

    for name, module in model.named_modules():
        layer, kind = name, f"layer '{name}'" if name else "the model"
        if isinstance(module, LsqQuantizer):
            layer, _, quantizer = name.rpartition(".")
            kind = f"the {quantizer.replace('_', ' ')} of layer '{layer}'"
        handles.append(module.register_forward_hook(watch(layer, kind)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sighting = Sighting(name.rpartition(".")[0], f"the gradient of '{name}'")
            handles.append(parameter.register_hook(partial(look_at, sighting=sighting)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def holds_back(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer can be told on the device not to take a step: a fused one can."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _any_bad(losses: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """Whether a loss or gradient is not finite, on the device of the losses."""
    return ~(losses.isfinite().all() & _all_finite(grads).to(losses.device))


def _all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether all are finite, on their device. A sum would overflow where no gradient does."""
    if all(grad.device.type == "cpu" for grad in grads):
        # There the largest magnitude by norm takes 20 times as long as both extremes.
        extremes = [value.double() for grad in grads if grad.numel() for value in grad.aminmax()]
        return torch.stack([*extremes, torch.zeros((), dtype=torch.double)]).isfinite().all()
    return nn.utils.get_total_norm(grads, torch.inf).isfinite()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())
