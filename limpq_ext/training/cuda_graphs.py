"""A function of tensors captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Results = TypeVar("Results")


class Captured(Generic[Results]):
    """A function of tensors as one CUDA graph, replayed on tensors of the same shapes.

    Args:
        compute: What to capture. It must not wait for the device, and returns what the replays are
            to give: containers of tensors.
        inputs: What it is called with; the values do not matter.
        parameters: Those to which it gives gradients.

    Attributes:
        inputs: The tensors that the graph reads, which hold what was replayed last.
    """

    def __init__(
        self,
        compute: Callable[..., Results],
        inputs: Sequence[Tensor],
        *,
        parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.inputs = tuple(value.clone() for value in inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = compute(*self.inputs)
        self._grads = [(parameter, parameter.grad) for parameter in parameters]

    def fits(self, *inputs: Tensor) -> bool:
        """Whether the graph was captured for tensors like these."""
        return all(
            given.shape == own.shape and given.dtype == own.dtype
            for given, own in zip(inputs, self.inputs, strict=True)
        )

    def replay(self, *inputs: Tensor) -> Results:
        """What ``compute`` returns for these; gradients are in the parameters."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        for parameter, grad in self._grads:
            parameter.grad = grad
        return tree_map(torch.clone, self._results)
