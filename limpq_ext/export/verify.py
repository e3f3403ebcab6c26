"""Whether a file computes what the network does, layer by layer.

Outputs say little: where a value lies between two codes, the order of a sum decides which it
becomes, and what follows goes another way. So every layer is given what it was given in PyTorch,
and the codes that come into the next layers are compared. They differ by a step at most, and
seldom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limpq_ext.export.codes import ZERO, LayerCodes, layer_codes
from limpq_ext.export.engines import OnnxRuntime, make_engine
from limpq_ext.export.qcdq import CODES, codes_in
from limpq_ext.export.tracing import input_arrays
from limpq_ext.nn.attention import copied
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.network import quantized_layers
from limpq_ext.training.batches import Batches

MOST_DIFFERING: Final = 1e-3
"""The largest share of codes that may differ."""

MOST_ROUNDED: Final = 1e-2
"""The same of engines that round biases to whole products of codes.

Where codes are shifted it is a tenth of that and less, but for 8-bit inputs of layers that follow
one with few bits, whose products are coarse beside the steps of 8 bits.
"""

LEAST_AGREEING: Final = 0.9
"""The share of samples that have the network's class where codes are not compared."""

GIVEN: Final = ".given"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Verification:
    """What an engine computes of a file, beside the network in PyTorch.

    Attributes:
        engine: Its name and version; "onnxruntime, unoptimized" computes node by node.
        layers: How many times a layer runs in a forward; 0 where codes were not looked at.
        integer_kernels: How many of these the engine multiplies in integers.
        differing: The share of codes that differ.
        worst: The layer into which most of these come, as a share; None where none differs.
        largest: The largest difference of a code, in steps.
        farthest: The largest difference of an output that is made of the same codes, over the
            largest output.
        agreement: The share of the samples that get the class which the network gives them.
        samples: How many there were.
        accuracy: The share that gets the class of its target; None where targets are no classes.
        network_accuracy: That of the network in PyTorch.
        seconds: The median time of a forward of one sample; None where it was not timed.
        float_seconds: That of the same network in float32, in turn with it.
    """

    engine: str
    layers: int
    integer_kernels: int
    differing: float
    worst: str | None
    largest: int
    farthest: float
    agreement: float
    samples: int
    accuracy: float | None = None
    network_accuracy: float | None = None
    seconds: float | None = None
    float_seconds: float | None = None

    def __str__(self) -> str:
        timed = ""
        if self.seconds is not None and self.float_seconds is not None:
            timed = f", {1e3 * self.seconds:.3f} ms, {1e3 * self.float_seconds:.3f} in float32"
        if not self.layers:
            return f"{self.engine}: {self.agreement:.2%} equal classes on {self.samples} samples"
        return (
            f"{self.engine}: {self.integer_kernels} of {self.layers} layers in integers,"
            f" {self.differing:.1e} of the codes differ, {self.agreement:.2%} equal classes on"
            f" {self.samples} samples{timed}"
        )

    def check(self, most: float) -> None:
        """Refuse a file that does not compute what the network does.

        Args:
            most: The largest share of codes that may differ, by one step, and the largest
                difference of an output over the largest one.

        Raises:
            ValueError: A code differs by more than a step, or more of them do, or an output is
                farther away.
        """
        if self.largest > 1:
            raise ValueError(
                f"{self.engine} does not compute what it should: a code that comes into"
                f" layer '{self.worst}' differs by {self.largest} steps"
            )
        if self.differing > most:
            raise ValueError(
                f"{self.engine} does not compute what it should: {self.differing:.2%} of the"
                f" codes that come into layers differ, most in '{self.worst}', {most:.2%} may"
            )
        if not self.farthest <= most:
            raise ValueError(
                f"{self.engine} does not compute what it should: from the same codes an output"
                f" differs by {self.farthest:.2%} of the largest, {most:.2%} may"
            )


def verify_onnx(
    model: bytes,
    network: nn.Module,
    batches: Batches,
    engine: str,
    *,
    optimized: bool = True,
    by_itself: bool = False,
    threads: int = 1,
) -> Verification:
    """Compare what an engine computes of a file with what the network computes in PyTorch.

    Args:
        model: The bytes of a file of `qcdq_model`.
        network: The quantized network that it was made of; it is left as it is.
        batches: Some batches of inputs and targets. Where targets are class indices, it is counted
            how many are met.
        engine: "onnxruntime" or "openvino".
        optimized: Whether onnxruntime may put kernels of its own in the place of nodes.
        by_itself: Compare codes with those of the file, computed node by node: those of one whose
            additions are quantized are not the network's.
        threads: How many the engine computes with.

    Raises:
        ValueError: There are no batches, there is no such engine, or it refuses the file.
        ImportError: The engine is not installed.
    """

    def loaded(file: bytes) -> Any:
        if not optimized:
            return OnnxRuntime(file, threads=threads, optimized=False)
        return make_engine(engine, file, threads=threads)

    whole, forced = loaded(model), loaded(_forced(model))
    differing: dict[str, list[int]] = {}
    largest: dict[str, int] = {}
    counts = _Counts()
    of_file = OnnxRuntime(_telling(model), optimized=False) if by_itself else None
    farthest = 0.0
    for inputs, output, target, codes in _recorded(network, batches):
        feeds = dict(zip(whole.inputs, inputs, strict=True))
        counts.add(whole.run(feeds)[whole.outputs[0]], output, target)
        if of_file is not None:
            told = of_file.run(feeds)
            output = told[whole.outputs[0]]
            codes = {name: v for name, v in told.items() if f"{name}{GIVEN}" in forced.inputs}
        given = {f"{name}{GIVEN}": value for name, value in codes.items()}
        needed = {name: v for name, v in {**feeds, **given}.items() if name in forced.inputs}
        outputs = forced.run(needed)
        away = np.abs(outputs[whole.outputs[0]] - output).max() / np.abs(output).max()
        farthest = max(farthest, float(away))
        for name, expected in codes.items():
            steps = np.abs(outputs[name].astype(np.int16) - expected)
            count = differing.setdefault(name, [0, 0])
            count[0] += int((steps != 0).sum())
            count[1] += steps.size
            largest[name] = max(largest.get(name, 0), int(steps.max()))
    if not counts.samples:
        raise ValueError("there are no batches to verify the file with")
    shares = {name: count / of for name, (count, of) in differing.items()}
    worst = max(shares, key=lambda name: (largest[name] > 1, shares[name]))
    return Verification(
        f"{whole.name} {whole.version}{'' if optimized else ', unoptimized'}",
        sum(f".{CODES}" in name for name in shares),
        whole.integer_kernels,
        sum(count for count, _ in differing.values()) / sum(of for _, of in differing.values()),
        worst.partition(f".{CODES}")[0] if shares[worst] else None,
        max(largest.values()),
        farthest,
        **counts.shares(),
    )


def verify_outputs(
    engine: str, run: Callable[[Any], Array], network: nn.Module, batches: Batches
) -> Verification:
    """Compare the classes of what runs a file with the network's.

    Args:
        engine: Its name and version.
        run: The output for the inputs of a batch.
        network: The quantized network that the file was made of; it is left as it is.
        batches: Some batches of inputs and targets.

    Raises:
        ValueError: There are no batches, or more than one in ten samples has another class.
    """
    counts = _Counts()
    network = copied(network).cpu().float().eval()
    for inputs, target in moved(list(batches), torch.device("cpu")):
        with torch.no_grad():
            output = call(network, inputs)
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        counts.add(run(inputs), first.numpy(), target)
    if not counts.samples:
        raise ValueError("there are no batches to verify the file with")
    found = Verification(engine, 0, 0, 0.0, None, 0, 0.0, **counts.shares())
    if found.agreement < LEAST_AGREEING:
        raise ValueError(
            f"{engine} does not compute what it should: it gives {found.agreement:.1%} of the"
            f" samples the network's class, {LEAST_AGREEING:.0%} are the least"
        )
    return found


class _Counts:
    """How often classes are those of the network, and those of the targets."""

    def __init__(self) -> None:
        self.samples = self._values = self._agreeing = 0
        self._targets: list[tuple[int, int]] | None = []

    def add(self, found: Array, output: Array, target: Any) -> None:
        """Count a batch: scores ``[samples, classes, ...]`` of the file and of the network."""
        classes, expected = (
            own.argmax(1) if own.ndim > 1 else np.round(own) for own in (found, output)
        )
        self.samples += len(output)
        self._values += classes.size
        self._agreeing += int((classes == expected).sum())
        whole = isinstance(target, Tensor) and not target.is_floating_point()
        if not whole or target.shape != classes.shape:
            self._targets = None
        elif self._targets is not None:
            wanted = target.numpy()
            self._targets.append((int((classes == wanted).sum()), int((expected == wanted).sum())))

    def shares(self) -> dict[str, Any]:
        """What a `Verification` says of them."""
        told: dict[str, Any] = {
            "agreement": self._agreeing / self._values,
            "samples": self.samples,
        }
        if self._targets:
            ours, network = (sum(own) / self._values for own in zip(*self._targets, strict=True))
            told |= {"accuracy": ours, "network_accuracy": network}
        return told


def _forced(model: bytes) -> bytes:
    """A file whose layers are given their codes, and which puts out those that it finds itself."""
    import onnx
    import onnx_ir as ir

    made = ir.from_proto(onnx.load_from_string(model))
    graph = made.graph
    for name, codes in codes_in(graph).items():
        given = ir.Value(name=f"{name}{GIVEN}", shape=codes.shape, type=codes.type)
        codes.replace_all_uses_with(given)
        graph.inputs.append(given)
        graph.outputs.append(codes)
    forced: bytes = ir.to_proto(made).SerializeToString()
    return forced


def _telling(model: bytes) -> bytes:
    """A file that puts out all codes as well."""
    import onnx
    import onnx_ir as ir

    made = ir.from_proto(onnx.load_from_string(model))
    made.graph.outputs.extend(codes_in(made.graph).values())
    told: bytes = ir.to_proto(made).SerializeToString()
    return told


@torch.no_grad()
def _recorded(
    network: nn.Module, batches: Batches
) -> Iterator[tuple[list[Array], Array, Any, dict[str, Array]]]:
    """Of each batch inputs, output and target, and the codes that come into every layer."""
    network = copied(network).cpu().float().eval()
    layers = layer_codes(network)
    seen: dict[str, Array] = {}
    for name, layer in quantized_layers(network).items():
        layer.input_quantizer.register_forward_hook(_remember(layers[name], seen))
    for batch, target in batches:
        seen.clear()
        batch = moved(batch, torch.device("cpu"))
        output = call(network, batch)
        first = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        target = moved(target, torch.device("cpu"))
        yield input_arrays(network, batch), first.numpy(), target, dict(seen)


def _remember(layer: LayerCodes, seen: dict[str, Array]) -> Any:
    zero = ZERO if layer.input_range.signed else 0

    def remember(_: nn.Module, __: Any, output: Tensor) -> None:
        name, number = f"{layer.name}.{CODES}", 2
        while name in seen:
            name, number = f"{layer.name}.{CODES}.{number}", number + 1
        codes = (output / layer.input_range.scale).round() + zero
        seen[name] = codes.to(torch.uint8).numpy()

    return remember
