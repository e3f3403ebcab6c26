"""What goes through the layers in one forward, and what a classifier's loss is on a batch."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from limpq_ext.nn.inputs import call
from limpq_ext.scores.subject import Subject, checked_classes, log_probabilities


class Call(NamedTuple):
    """One call of a layer; its tensors are those of the graph, and nothing changes them in place.

    Attributes:
        inputs: What it was called with, its input first.
        keywords: What it was called with by keyword.
        output: What it put out.
    """

    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """What is quantized."""
        x: Tensor = self.inputs[0]
        return x


class Calls:
    """The calls of a network's layers, for as long as a block lasts.

    Args:
        subject: Whose layers are watched.

    Attributes:
        of: The calls of each layer by name, in their order.
        norms: How often each batch normalisation ran.
    """

    def __init__(self, subject: Subject) -> None:
        self.of: dict[str, list[Call]] = {name: [] for name in subject.layers}
        self.norms: Counter[nn.Module] = Counter()
        self._subject = subject
        self._stack = ExitStack()

    def __enter__(self) -> Calls:
        for name, layer in self._subject.layers.items():
            noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def enter(
                module: nn.Module, inputs: Any, keywords: dict[str, Any], noted: list[Any] = noted
            ) -> Any:
                rest = dict(keywords)
                x, *others = inputs or (rest.pop("input"),)
                x = x.clone()
                if torch.is_grad_enabled() and not x.requires_grad:
                    x.requires_grad_()
                noted.append(((x, *others), rest))
                return noted[-1]

            def leave(
                module: nn.Module,
                inputs: Any,
                output: Tensor,
                name: str = name,
                noted: list[Any] = noted,
            ) -> Tensor:
                given, keywords = noted.pop()
                self.of[name].append(Call(given, keywords, output))
                return output.clone()  # what comes after may change it in place

            self._keep(layer.register_forward_pre_hook(enter, with_kwargs=True))
            self._keep(layer.register_forward_hook(leave))
        for module in self._subject.network.modules():
            if isinstance(module, _BatchNorm):
                self._keep(module.register_forward_hook(lambda norm, *_: self._count(norm)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _count(self, norm: nn.Module) -> None:
        self.norms[norm] += 1

    def gradients(
        self, value: Tensor, at: Literal["inputs", "outputs"]
    ) -> dict[str, list[Tensor | None]]:
        """The gradient of a value at each call's input or output; None where it has none."""
        places = [
            one.input if at == "inputs" else one.output
            for calls in self.of.values()
            for one in calls
        ]
        found = iter(torch.autograd.grad(value, places, allow_unused=True))
        return {name: [next(found) for _ in calls] for name, calls in self.of.items()}


def loss_of(
    subject: Subject, x: Any, target: Any, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """The cross-entropy of a batch, in nats.

    Raises:
        ValueError: The targets are no classes, or the output is no table of scores.
    """
    scores = log_probabilities(call(subject.network, x))
    return F.nll_loss(scores, checked_classes(target, scores), reduction=reduction)
