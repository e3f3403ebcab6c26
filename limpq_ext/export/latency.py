"""Latency tables, measured on the machine that runs this.

Whole networks are run in an engine, one for each pair of bits, in turn; the times of their nodes
are put together by layer. What the table predicts of mixed policies is measured beside it.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn

from limpq_ext.conversion.apply import apply_policy
from limpq_ext.export.codes import LayerCodes, layer_codes
from limpq_ext.export.engines import ENGINES, check_engine, make_engine
from limpq_ext.export.machine import processor
from limpq_ext.export.node_times import (
    NodeTimes,
    OnnxRuntimeNodes,
    OpenVinoNodes,
    TimedNetwork,
    TorchNodes,
    Whole,
    layer_of,
)
from limpq_ext.export.onnx_graph import onnx_graph, serialized
from limpq_ext.export.pooling import Pair, Pooled, pool
from limpq_ext.export.qcdq import write_codes
from limpq_ext.export.tracing import input_arrays
from limpq_ext.graph.profile import profile
from limpq_ext.nn.attention import copied
from limpq_ext.nn.inputs import Inputs, call, samples_in
from limpq_ext.training.calibration import start_scales_from
from limpq_ext.values.bits import check_candidates
from limpq_ext.values.costs import Costs
from limpq_ext.values.latency import LatencyEntry, LatencyTable
from limpq_ext.values.policy import LayerBits, Policy

TORCH: Final = "torch"

MOST_BITS: Final = 8
"""Of what a file holds for engines."""

LOADS: Final = 3
"""How often all networks are loaded anew: where their data lies changes how long they take."""

POLICIES: Final = 5
"""Mixed policies that are predicted and measured."""

_BUSY: Final = 0.1
"""The share of a network's time that may differ from its fastest round before it is said."""

_TICKS: Final = {"onnxruntime": 1e-6, "openvino": 1e-6}
"""Seconds that the clocks of engines count in."""

_WHAT: Final = {
    TORCH: "the fake-quantized network in PyTorch: it computes in float, and quantizes all weights"
    " in each forward",
}
"""What is measured where it is no file in integers."""

_NODES: Final[Mapping[str, Callable[..., TimedNetwork]]] = {
    "onnxruntime": OnnxRuntimeNodes,
    "openvino": OpenVinoNodes,
}

Bits = dict[str, Pair]
"""Of all layers, by name."""

Rounds = list[list[float]]
"""Seconds of each round of each load."""

Load = Callable[[Bits, bool], TimedNetwork]
"""Loads the network at some bits, with the times of its nodes or without."""


def measure_latency(
    model: nn.Module,
    example_input: Inputs,
    *,
    bits: Sequence[int] = (4, 8),
    costs: Costs | None = None,
    engine: str = "onnxruntime",
    threads: int = 1,
    rounds: int = 10,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure how long each layer takes at each pair of bits, on this machine.

    The whole network is run at each pair of the bits (all layers alike) and the times of its nodes
    come from inside the engine: onnxruntime's profile, OpenVINO's performance counters; layers of
    the same network measured alone do not add up to it. The networks run in turn, round by round,
    each twice, the first time for its caches alone; all are loaded anew three times. A layer takes
    what it does in its fastest round, since all else on the machine only adds to it; a whole
    network the median of its rounds. Pairs of a layer that differ by less than the noise get one
    value, see :func:`limpq_ext.export.pooling.pool`: many processors take as long for 2 bits as for
    8.

    What belongs to no layer (additions, pooling, what the engine does between nodes, what else runs
    on the machine) is the same for every policy here and not in the table.
    ``meta["unattributed"]`` has it: a limit on the whole network is that plus the ``latency`` that
    the search is given. All networks are in memory at once, those of pairs twice.

    With "torch" it is the fake-quantized network in PyTorch on the CPU that is measured, which
    computes in float and quantizes all weights in each forward: what evaluation costs, not what
    integers would.

    Args:
        model: The float model; it is left as it is, and its weights do not matter.
        example_input: What its forward takes: the batch that is timed, with values that activations
            can be quantized by (not zeros).
        bits: Candidate bit-widths, 2 to 8; all pairs of weight and activation bits are measured.
        costs: Of :func:`limpq_ext.profile`, for which layers there are and which are fixed; None:
            it is profiled.
        engine: "onnxruntime", "openvino" or "torch".
        threads: How many the engine computes with.
        rounds: How many in each load.
        seed: For the mixed policies.
        on_step: Called after every round with how many are done, and how many there are.

    Returns:
        Seconds per sample of searchable layers at all pairs and of the fixed layers at their bits.
        ``meta`` says on which processor, with which engine, threads and batch it was measured, what
        is unattributed, which pairs have one value (``groups``), what was measured before that
        (``measured``: lowest, median and highest of the loads) and, of five random mixed policies,
        which time is predicted (the sum of the entries, and what is unattributed) and which was
        measured in the same rounds: the median, and under ``fastest`` the fastest round.
        ``meta["notes"]`` says it in sentences.

    Raises:
        TypeError: Bits are not integers.
        ValueError: There is no such engine, bits are outside 2 to 8, threads or rounds below 1, a
            layer of the costs is not in the model or sees nothing but zeros, PyTorch cannot export
            the network, or the engine refuses it.
        ImportError: The engine is not installed.
    """
    candidates = check_candidates(bits)
    if engine != TORCH and engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}, expected one of {', '.join((*ENGINES, TORCH))}")
    if engine != TORCH:
        check_engine(engine)
    for name, count in (("threads", threads), ("rounds", rounds)):
        if count < 1:
            raise ValueError(f"{name} is {count}, expected 1 or more")
    costs = profile(model, example_input) if costs is None else costs
    for width in (*candidates, costs.fixed_bits):
        if width > MOST_BITS:
            raise ValueError(f"bits: {width} is measured by no engine, expected 2 to {MOST_BITS}")
    searchable = [layer.name for layer in costs.layers]
    pairs = [(weight, activation) for weight in candidates for activation in candidates]
    uniform = {pair: _all_layers(costs, dict.fromkeys(searchable, pair)) for pair in pairs}
    mixed = _mixed(costs, pairs, seed)
    model = copied(model).cpu().float().eval()
    with _threads(threads):
        load = loader(engine, model, example_input, costs, candidates, threads)
        found = _Found(samples_in(example_input))
        for number in range(LOADS):
            _run(load, uniform, mixed, rounds, found, _after(on_step, number * rounds, rounds))
    about = {
        "engine": engine,
        "engine_version": _version(engine),
        "torch_version": torch.__version__,
        **processor(),
        "threads": threads,
        "batch": found.samples,
        "what": _WHAT.get(engine, "the file that export_onnx writes"),
        "bits": list(candidates),
        "loads": LOADS,
        "rounds": rounds,
        "seed": seed,
    }
    return _table(found, costs, mixed, about, _TICKS.get(engine, 0.0))


def loader(
    engine: str,
    model: nn.Module,
    example_input: Inputs,
    costs: Costs,
    candidates: Sequence[int],
    threads: int,
) -> Load:
    """What loads a float model at some bits into an engine."""
    batches = [(example_input, torch.empty(0))]

    def quantized(policy: Policy) -> nn.Module:
        made = apply_policy(model, policy)
        start_scales_from(made, batches)
        return made.eval()

    if engine == TORCH:

        def load_torch(bits: Bits, with_nodes: bool) -> TimedNetwork:
            fixed = {layer.name for layer in costs.fixed}
            of = [LayerBits(name, *pair) for name, pair in bits.items()]
            policy = Policy(
                tuple(own for own in of if own.name not in fixed),
                tuple(own for own in of if own.name in fixed),
            )
            network = quantized(policy)
            if with_nodes:
                return TorchNodes(network, example_input)
            return Whole(torch.no_grad()(lambda: call(network, example_input)))

        return load_torch

    codes: dict[int, Mapping[str, LayerCodes]] = {}
    for width in dict.fromkeys((*candidates, costs.fixed_bits)):
        network = quantized(Policy.uniform(costs, width, width))
        codes[width] = layer_codes(network)
    import onnx_ir as ir

    graph = ir.to_proto(onnx_graph(network, example_input))
    arrays = input_arrays(model, example_input)

    def load_file(bits: Bits, with_nodes: bool) -> TimedNetwork:
        made = ir.from_proto(graph)
        layers = {
            name: replace(codes[weight][name], input_range=codes[activation][name].input_range)
            for name, (weight, activation) in bits.items()
        }
        write_codes(made, layers)
        names = [str(value.name) for value in made.graph.inputs]
        feeds = dict(zip(names, arrays, strict=True))
        file = serialized(made)
        if with_nodes:
            return _NODES[engine](file, feeds, threads=threads)
        return Whole.of_engine(make_engine(engine, file, threads=threads), feeds)

    return load_file


@dataclass
class _Found:
    """What each load gave, in seconds per sample.

    Attributes:
        samples: How many a forward has.
        layers: Of each pair and layer, in the fastest round.
        whole: Of each pair, the whole network in each round.
        mixed: Of each mixed policy, the same.
    """

    samples: int
    layers: dict[Pair, dict[str, list[float]]] = field(default_factory=dict)
    whole: dict[Pair, Rounds] = field(default_factory=dict)
    mixed: dict[int, Rounds] = field(default_factory=dict)


def _run(
    load: Load,
    uniform: Mapping[Pair, Bits],
    mixed: Sequence[Bits],
    rounds: int,
    found: _Found,
    on_round: Callable[[int], None],
) -> None:
    """Load all networks, run them in turn, and add their times to what was found."""
    inside = {pair: load(bits, True) for pair, bits in uniform.items()}
    whole = {pair: load(bits, False) for pair, bits in uniform.items()}
    policies = [load(bits, False) for bits in mixed]
    networks = [*inside.values(), *whole.values(), *policies]
    seconds: list[list[float]] = [[] for _ in networks]
    for done in range(rounds):
        for network, own in zip(networks, seconds, strict=True):
            network.run()
            own.append(network.run() / found.samples)
        on_round(done + 1)
    of_whole = seconds[len(inside) :]
    for place, pair in enumerate(uniform):
        found.whole.setdefault(pair, []).append(of_whole[place])
        names = list(uniform[pair])
        times = found.layers.setdefault(pair, {name: [] for name in names})
        runs = [_by_layer(nodes, names) for nodes in inside[pair].nodes()[1::2]]
        for name, own in times.items():
            own.append(min(run[name] for run in runs) / found.samples)
    for place, rounds_of_policy in enumerate(of_whole[len(uniform) :]):
        found.mixed.setdefault(place, []).append(rounds_of_policy)


def _by_layer(nodes: NodeTimes, layers: Collection[str]) -> dict[str, float]:
    """The seconds of a run's nodes by layer."""
    found = dict.fromkeys(layers, 0.0)
    for names, seconds in nodes:
        layer = layer_of(names, layers)
        if layer is not None:
            found[layer] += seconds
    return found


def _table(
    found: _Found, costs: Costs, mixed: Sequence[Bits], about: dict[str, Any], tick: float
) -> LatencyTable:
    """The table of what was found, and what it predicts."""
    searchable = [layer.name for layer in costs.layers]
    fixed = [layer.name for layer in costs.fixed]
    fixed_pair = (costs.fixed_bits, costs.fixed_bits)
    pooled = pool(
        {name: {pair: own[name] for pair, own in found.layers.items()} for name in searchable},
        tick / found.samples,
    )
    seconds: dict[tuple[str, Pair], float] = {}
    for name in searchable:
        seconds |= {(name, pair): _whole_ns(value) for pair, value in pooled[name].seconds.items()}
    for name in fixed:
        fastest = [min(own[name]) for own in found.layers.values()]
        seconds[name, fixed_pair] = _whole_ns(statistics.median(fastest))
    wholes = {pair: _usual(own) for pair, own in found.whole.items()}
    whole = statistics.median(wholes.values())
    searched = {pair: sum(seconds[name, pair] for name in searchable) for pair in found.whole}
    of_fixed = sum(seconds[name, fixed_pair] for name in fixed)

    def unattributed(statistic: Callable[[Rounds], float]) -> float:
        return statistics.median(
            statistic(own) - searched[pair] - of_fixed for pair, own in found.whole.items()
        )

    rest, least = unattributed(_usual), unattributed(_fastest)
    predictions: list[dict[str, Any]] = []
    for place, bits in enumerate(mixed):
        layers = sum(seconds[layer] for layer in bits.items())
        predictions.append(
            {
                "bits": {name: list(pair) for name, pair in bits.items()},
                **_compared(layers + rest, _usual(found.mixed[place])),
                "fastest": _compared(layers + least, _fastest(found.mixed[place])),
            }
        )
    meta = about | {
        "whole": {pair_text(pair): own for pair, own in wholes.items()},
        "unattributed": {"seconds": rest, "share": rest / whole, "fastest": least},
        "measured": {
            name: {
                pair_text(pair): {
                    "median": statistics.median(own[name]),
                    "lowest": min(own[name]),
                    "highest": max(own[name]),
                }
                for pair, own in found.layers.items()
            }
            for name in searchable
        },
        "groups": {
            name: [[pair_text(pair) for pair in group] for group in own.groups]
            for name, own in pooled.items()
        },
        "noise": {name: own.noise for name, own in pooled.items()},
        "predictions": predictions,
        "median_error": statistics.median(abs(own["error"]) for own in predictions),
        "median_error_of_fastest": statistics.median(
            abs(own["fastest"]["error"]) for own in predictions
        ),
        "notes": _notes(pooled, rest, least, whole),
    }
    entries = tuple(LatencyEntry(name, *pair, value) for (name, pair), value in seconds.items())
    return LatencyTable(entries, meta)


def _usual(loads: Rounds) -> float:
    """The median of the medians of the loads."""
    return statistics.median(map(statistics.median, loads))


def _fastest(loads: Rounds) -> float:
    return min(map(min, loads))


def _compared(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def _notes(pooled: Mapping[str, Pooled], rest: float, least: float, whole: float) -> list[str]:
    """What to know about a table."""
    pairs = len(next(iter(pooled.values())).seconds)
    alike = sum(len(own.groups) == 1 for own in pooled.values())
    merged = sum(1 < len(own.groups) < pairs for own in pooled.values())
    notes = []
    if pairs > 1:
        shares = [
            own.noise / statistics.fmean(own.seconds.values())
            for own in pooled.values()
            if any(own.seconds.values())
        ]
        noise = f"the noise, {statistics.median(shares):.1%} of a layer's time" if shares else "it"
        text = (
            f"pairs of bits that differ by less than {noise}, have one value: in {alike} of"
            f" {len(pooled)} layers all {pairs} pairs, in {merged} some"
        )
        if alike == len(pooled):
            text += "; bits make no difference to the time here, so no budget on it can save any"
        notes.append(text)
    if least >= 0:
        text = (
            f"{1e3 * rest:.3f} ms ({rest / whole:.1%} of the whole network) belong to no layer and"
            " are not in the table: a limit on the whole network has to leave room for them"
        )
    else:
        text = (
            f"the layers take {-1e3 * least:.3f} ms longer together than the whole network does"
            " where the engine does not time them"
        )
    notes.append(text)
    if rest - least > _BUSY * whole:
        notes.append(
            f"{1e3 * (rest - least):.3f} ms of the whole network's {1e3 * whole:.3f} are gone in"
            " the fastest round: other work on this machine, measure again without it"
        )
    return notes


def _whole_ns(seconds: float) -> float:
    """Digits that no clock gave would be exact numbers to a search."""
    return round(seconds, 9)


def pair_text(pair: Pair) -> str:
    """A pair of bits as people write it."""
    return f"W{pair[0]}A{pair[1]}"


def _all_layers(costs: Costs, chosen: Bits) -> Bits:
    """The bits of all layers, those of the fixed ones given by the costs."""
    return chosen | {layer.name: (costs.fixed_bits, costs.fixed_bits) for layer in costs.fixed}


def _mixed(costs: Costs, pairs: Sequence[Pair], seed: int) -> list[Bits]:
    """Different policies by chance, fewer where there are not so many."""
    choose = random.Random(seed).choice
    found: list[Bits] = []
    for _ in range(10 * POLICIES):
        policy = _all_layers(costs, {layer.name: choose(pairs) for layer in costs.layers})
        if policy not in found and len(found) < POLICIES:
            found.append(policy)
    return found


def _after(
    on_step: Callable[[int, int], None] | None, before: int, rounds: int
) -> Callable[[int], None]:
    """Tells how many rounds of all loads are done."""

    def tell(done: int) -> None:
        if on_step is not None:
            on_step(before + done, LOADS * rounds)

    return tell


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch with so many threads, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _version(engine: str) -> str:
    version: str = importlib.import_module(engine).__version__
    return version.split("-")[0]
