"""How long each node of a running network takes, as the engines themselves say.

A layer that runs alone is another layer: its data is in the cache, nothing is fused with it. So
times are taken from inside whole networks, by onnxruntime's profile, OpenVINO's counters, or hooks
on the layers in PyTorch.
"""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from limpq_ext.export.engines import Engine, Feeds, OnnxRuntime, OpenVino
from limpq_ext.nn.inputs import Inputs, call
from limpq_ext.nn.network import quantized_layers

NodeTimes = list[tuple[tuple[str, ...], float]]
"""Of each node its own name, those of the nodes that were fused into it, and its seconds."""


class TimedNetwork(Protocol):
    """A network that an engine has loaded, with what it is given."""

    def run(self) -> float:
        """Run it once: the seconds of the whole forward."""
        ...

    def nodes(self) -> list[NodeTimes]:
        """The times of the nodes in each run so far; nothing is run afterwards."""
        ...


class Whole:
    """A network of which the whole forward is timed alone, as it runs for a user.

    Args:
        forward: Runs it once.
    """

    def __init__(self, forward: Callable[[], object]) -> None:
        self._forward = forward

    @classmethod
    def of_engine(cls, engine: Engine, feeds: Feeds) -> Whole:
        """That of a file which an engine has loaded."""
        return cls(lambda: engine.run(feeds))

    def run(self) -> float:
        """Run it once: the seconds of the whole forward."""
        begin = time.perf_counter()
        self._forward()
        return time.perf_counter() - begin

    def nodes(self) -> list[NodeTimes]:
        """None were timed."""
        return []


class OnnxRuntimeNodes(Whole):
    """A file in onnxruntime, which writes a profile; its clock counts microseconds.

    Args:
        model: The bytes of the file.
        feeds: The inputs by name.
        threads: How many it computes with.
    """

    def __init__(self, model: bytes, feeds: Feeds, *, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._engine = OnnxRuntime(model, threads=threads, profile=Path(self._folder.name))
        super().__init__(lambda: self._engine.run(feeds))

    def nodes(self) -> list[NodeTimes]:
        """The times of the nodes in each run so far; nothing is run afterwards."""
        with self._folder:
            return nodes_in_profile(json.loads(self._engine.end_profile().read_text()))


def nodes_in_profile(events: Iterable[dict[str, Any]]) -> list[NodeTimes]:
    """The nodes of each run in a profile that onnxruntime wrote."""
    events = list(events)
    begins = sorted(event["ts"] for event in events if event["name"] == "model_run")
    found: list[NodeTimes] = [[] for _ in begins]
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event["cat"] == "Node" and name != event["name"]:
            run = bisect.bisect_right(begins, event["ts"]) - 1
            if run >= 0:
                found[run].append(((name,), 1e-6 * event["dur"]))
    return found


class OpenVinoNodes(Whole):
    """A file in OpenVINO with its performance counters, whose clock counts microseconds.

    Args:
        model: The bytes of the file.
        feeds: The inputs by name.
        threads: How many it computes with.
    """

    def __init__(self, model: bytes, feeds: Feeds, *, threads: int) -> None:
        self._engine = OpenVino(model, threads=threads, counters=True)
        self._found: list[NodeTimes] = []
        super().__init__(lambda: self._engine.run(feeds))

    def run(self) -> float:
        """Run it once: the seconds of the whole forward."""
        seconds = super().run()
        self._found.append(self._engine.counters())
        return seconds

    def nodes(self) -> list[NodeTimes]:
        """The times of the nodes in each run so far."""
        return self._found


class TorchNodes(Whole):
    """A fake-quantized network in PyTorch, its layers timed by hooks.

    Args:
        network: The network, on the CPU.
        inputs: What its forward takes.
    """

    def __init__(self, network: nn.Module, inputs: Inputs) -> None:
        super().__init__(lambda: call(network, inputs))
        self._found: list[NodeTimes] = []
        for name, layer in quantized_layers(network).items():
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end(name))

    @torch.no_grad()
    def run(self) -> float:
        """Run it once: the seconds of the whole forward."""
        self._found.append([])
        return super().run()

    def nodes(self) -> list[NodeTimes]:
        """The times of the layers in each run so far."""
        return self._found

    def _begin(self, _: nn.Module, __: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, name: str) -> Callable[..., None]:
        def end(*_: Any) -> None:
            self._found[-1].append(((name,), time.perf_counter() - self._begun))

        return end


def layer_of(names: Sequence[str], layers: Collection[str]) -> str | None:
    """The layer that a node belongs to: of the first of its names that begins with a layer's.

    Args:
        names: As in `NodeTimes`. Engines add to names: ``conv1_token_2``, ``conv1/WithoutBiases``.
        layers: The names of the layers; the longest that fits counts.
    """
    for name in names:
        ends = [end for end, mark in enumerate(name) if mark in "._/"]
        for end in (len(name), *reversed(ends)):
            if name[:end] in layers:
                return name[:end]
    return None
