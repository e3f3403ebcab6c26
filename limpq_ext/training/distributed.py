"""Several processes, as torchrun starts them: who is who, agreement, and one gradient exchange.

Everything here also runs in a single process, where it does nothing. Small decisions go through
gloo on the CPU, so that none of them waits for a device.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from limpq_ext.nn.processes import alone, is_distributed
from limpq_ext.training.signals import MainProcessError

Value = TypeVar("Value")

BUCKET_BYTES = 25 * 2**20
"""Gradients are exchanged in pieces of about this size, as DistributedDataParallel does."""


def world_size() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def is_main() -> bool:
    """Whether this is process 0, the only one that writes files and prints."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device | str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the block lasts.

    Without torchrun's environment variables, or in a group that exists, nothing happens.

    Args:
        device: "cpu" is gloo; "cuda" is nccl, and every process takes the GPU of its local rank.

    Yields:
        The device of this process.

    Raises:
        ValueError: There are more processes on this machine than GPUs.
    """
    device = torch.device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    # Its functions have the process group of the moment it is imported as a default argument. Were
    # that ours, it would outlive destroy_process_group, and its threads the interpreter.
    importlib.import_module("torch.distributed.nn.functional")
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: torch finds"
                f" {torch.cuda.device_count()}; start fewer processes (--nproc_per_node)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun starts all again with the store that it had, where gloo would find the addresses
        # of the dead. (With several machines their counts of restarts differ.)
        store, number, processes = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        options["store"] = dist.PrefixStore(f"attempt {attempt}", store)
        options |= {"rank": number, "world_size": processes}
    dist.init_process_group(**options)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def agree(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over all processes."""
    if not is_distributed():
        return numbers
    largest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def add_up(tensor: Tensor) -> Tensor:
    """Add a tensor up over all processes, in place."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def gather(value: Any) -> list[Any]:
    """What every process passed, by rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(function: Callable[[], Value]) -> Value:
    """Call a function in process 0 alone and give its value to all.

    To the function it is the only process there is, so that it may do all that a single one can.

    Raises:
        MainProcessError: In the other processes, where the function raised in process 0.
    """
    if not is_distributed():
        return function()
    message: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            with alone():
                message[0] = function()
        except Exception as error:
            failure, message[1] = error, str(error)
    dist.broadcast_object_list(message, src=0)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise MainProcessError(f"process 0 failed: {message[1]}")
    return message[0]


@torch.no_grad()
def broadcast_state(model: nn.Module, *, buffers_only: bool = False) -> None:
    """Give every process the parameters and buffers that process 0 has.

    Args:
        model: The same in every process; a quantizer also learns what its buffers now say.
        buffers_only: Leave the parameters as they are.
    """
    if not is_distributed():
        return
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if not (buffers_only and isinstance(value, nn.Parameter))
    }
    for value in state.values():
        # A contiguous copy: collectives take no other memory formats.
        sent = value.detach().contiguous()
        dist.broadcast(sent, src=0)
        value.copy_(sent)
    model.load_state_dict(state, strict=False)


class GradientExchange:
    """Averages the gradients of all processes, once per optimizer step.

    The gradients are flattened into buckets in the order of the parameters, so every process ends
    with the same bits. A parameter that got a gradient in some processes only counts as 0 in the
    others and is updated in all; one that got none anywhere keeps ``grad = None``.

    LSQ divides the gradient of an activation scale by the root of the number of elements that share
    it (arXiv 1902.08153, 2.2). Those are the whole batch's, of which a process sees only its share,
    so that gradient is divided by the root of the number of processes as well.

    Args:
        parameters: Those that need a gradient take part. The same in every process.
        activation_scales: Which of them are scales of activations.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], activation_scales: Iterable[nn.Parameter] = ()
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        scales = {id(scale) for scale in activation_scales}
        self._activation_scales = [id(p) in scales for p in self.parameters]

    @torch.no_grad()
    def run(self, values: Tensor) -> Tensor:
        """Average the gradients, in place, and a few values with them.

        Args:
            values: Any small float tensor, the losses for example.

        Returns:
            The mean of ``values`` over the processes.
        """
        if not is_distributed():
            return values
        processes = world_size()
        present = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int8)
        dist.all_reduce(present, dist.ReduceOp.MAX)
        grads = []
        for parameter, is_present, is_scale in zip(
            self.parameters, present.tolist(), self._activation_scales, strict=True
        ):
            if not is_present:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif is_scale:
                parameter.grad *= processes**-0.5
            grads.append(parameter.grad)
        averaged = values.clone()
        pending = []
        for bucket in _buckets([*grads, averaged]):
            flat = _flatten_dense_tensors(bucket)
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in pending:
            work.wait()
            flat /= processes
            for tensor, mean in zip(bucket, _unflatten_dense_tensors(flat, bucket), strict=True):
                tensor.copy_(mean)
        return averaged


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and device together, in order, in pieces of about BUCKET_BYTES."""
    pieces: list[list[Tensor]] = []
    last: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        piece, size = last.get(kind, ([], BUCKET_BYTES))
        size += tensor.nbytes
        if size > BUCKET_BYTES:
            piece, size = [], tensor.nbytes
            pieces.append(piece)
        piece.append(tensor)
        last[kind] = (piece, size)
    return pieces
