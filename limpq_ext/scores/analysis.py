"""Where a network loses by quantization: the noise of each tensor, and what can be done about one.

After Gluska and Grobman, "Exploring Neural Networks Quantization via Layer-Wise Quantization
Analysis" (arXiv 2012.08420): the noise at the output breaks down to what each tensor brings in by
itself, which is its local noise and how much of that the rest of the network passes on; where one
layer has most of it, a clip of its own helps where the same clip everywhere would not. The clips
that are tried, and that the output tells which is the best, are this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.scores.one_at_a_time import MEMORY, OneAtATime, Variant
from limpq_ext.scores.subject import KINDS, Subject
from limpq_ext.training.batches import Batches
from limpq_ext.values.files import Document, Strict
from limpq_ext.values.indicators import Kind
from limpq_ext.values.names import listed
from limpq_ext.values.policy import Policy

CLIPS: Final = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)
"""What the step sizes of a layer with most of the noise are multiplied by in search of better."""

MOST: Final = 0.5
"""The share of the noise above which a layer has most of it."""


@dataclass(frozen=True)
class TensorNoise(Strict):
    """The noise of one tensor, all others float.

    Attributes:
        layer: Name of the layer.
        kind: Which of its tensors is quantized.
        bits: At which bit-width.
        local: Noise over signal at the layer's output: the mean square of what quantization moves
            there over that of the float output.
        output: The same at the network's output.
        gain: ``output / local``, what the rest of the network makes of the noise; 0 without noise.
        share: Of the sum of ``output`` over all tensors at these bits.
    """

    layer: str
    kind: Kind
    bits: int
    local: float
    output: float
    gain: float
    share: float


@dataclass(frozen=True)
class WholeNoise(Strict):
    """The noise with all tensors quantized.

    Attributes:
        bits: The bit-width of all of them; None: those of the policy.
        output: Noise over signal at the network's output.
        total: The sum over the tensors, one at a time.
        additivity: ``output / total``: 1 where noises add up, as a search takes them to; 0 without
            noise.
    """

    bits: int | None
    output: float
    total: float
    additivity: float


@dataclass(frozen=True)
class Remedy(Strict):
    """The clip of least noise of the one layer that has most of it.

    Attributes:
        layer: Name of the layer.
        kind: Its tensor with more noise, which is clipped.
        bits: The tensor's bit-width.
        whole_bits: That of all tensors; None: those of the policy.
        share: The layer's share of the noise, both tensors together.
        clip: What the step sizes, and so the clip, are multiplied by.
        scales: The step sizes then: one, or one for each channel.
        signed: Whether the tensor's range has negative values.
        before: Noise over signal at the output with this tensor alone quantized, as it began.
        after: The same with the clip.
        whole_before: With all tensors quantized, as they began.
        whole_after: With the clip of this one.
        kept: Whether it helps, the tensor alone and the whole.
    """

    layer: str
    kind: Kind
    bits: int
    whole_bits: int | None
    share: float
    clip: float
    scales: tuple[float, ...]
    signed: bool
    before: float
    after: float
    whole_before: float
    whole_after: float
    kept: bool


@dataclass(frozen=True)
class LayerwiseAnalysis(Document):
    """Where a network loses by quantization.

    Attributes:
        tensors: One for each layer, kind and bit-width, layers in the order of the network.
        wholes: One for each bit-width of all tensors, or one for the policy.
        remedies: One for each of these in which one layer has most of the noise.
        meta: How it was measured.
    """

    tensors: tuple[TensorNoise, ...]
    wholes: tuple[WholeNoise, ...]
    remedies: tuple[Remedy, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-layerwise-analysis"
    VERSION: ClassVar[int] = 1

    def text(self) -> str:
        """The analysis as tables."""
        width = max(5, *(len(row.layer) for row in self.tensors))
        lines = [
            "noise over signal with one tensor quantized, at its layer's output and the network's:",
            f"{'layer':<{width}}  {'tensor':<10}  {'bits':>4}  {'local':>9}  {'output':>9}"
            f"  {'gain':>9}  {'share':>6}",
        ]
        lines += [
            f"{row.layer:<{width}}  {row.kind:<10}  {row.bits:>4}  {row.local:>9.3g}"
            f"  {row.output:>9.3g}  {row.gain:>9.3g}  {row.share:>6.1%}"
            for row in self.tensors
        ]
        lines.append(f"{'all at':<8}  {'output':>9}  {'sum':>9}  additivity")
        lines += [
            f"{_of_all(row.bits):<8}  {row.output:>9.3g}  {row.total:>9.3g}"
            f"  {row.additivity:>10.2f}"
            for row in self.wholes
        ]
        for remedy in self.remedies:
            lines.append(
                f"{_of_all(remedy.whole_bits)}: {remedy.layer} has {remedy.share:.0%} of the noise;"
                f" its {remedy.kind} at {remedy.bits} bits clipped at {remedy.clip:g} times:"
                f" {remedy.before:.3g} -> {remedy.after:.3g}, the whole"
                f" {remedy.whole_before:.3g} -> {remedy.whole_after:.3g},"
                f" {'kept' if remedy.kept else 'not kept'}"
            )
        return "\n".join(lines)

    def apply(self, model: nn.Module) -> None:
        """Give a quantized network the step sizes of the remedies that are kept.

        To be called before :func:`limpq_ext.calibrate`, which leaves them as they are and corrects
        with them. Bit-widths that a layer does not have are passed over.

        Args:
            model: What :func:`limpq_ext.prepare` or :func:`limpq_ext.apply_policy` returned.

        Raises:
            ValueError: A layer is not in the network, or has another number of step sizes.
        """
        layers = quantized_layers(model)
        kept = [remedy for remedy in self.remedies if remedy.kept]
        missing = [remedy.layer for remedy in kept if remedy.layer not in layers]
        if missing:
            raise ValueError(f"the network has no quantized layer {listed(missing)}")
        for remedy in kept:
            layer = layers[remedy.layer]
            quantizer = layer.weight_quantizer if remedy.kind == "weight" else layer.input_quantizer
            if remedy.bits in quantizer.bits:
                _set_step_sizes(quantizer, remedy)


@torch.no_grad()
def analyse(
    model: nn.Module,
    batches: Batches,
    bits: Sequence[int] | Policy = (2, 3, 4, 5, 6),
    *,
    correct: bool = True,
    memory: int = MEMORY,
    **options: Any,
) -> LayerwiseAnalysis:
    """Say where a network loses by quantization, and what a clip of one layer gives back.

    It needs no targets and no gradients, and the forwards of
    :func:`limpq_ext.scores.layerwise`, one more for each bit-width or the policy, and 12 more for
    each layer that has most of the noise.

    Args:
        model: The float network, which puts out one tensor. It is left as it is, and runs in
            evaluation mode.
        batches: Some batches of inputs and targets, on any device; the targets do not matter.
        bits: Bit-widths, each given to all layers, or a policy, whose layers have its bits, the
            fixed ones too.
        correct: Measured under the correction, as for :func:`limpq_ext.scores.layerwise`.
        memory: As for :func:`limpq_ext.scores.layerwise`.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, which a policy says
            itself, ``exclude``, ``per_channel_weights`` and ``symmetric_weights``, as for
            :func:`limpq_ext.prepare`.

    Raises:
        ValueError: There are no batches, the policy has a layer that the network does not have, the
            float network puts out nothing but zeros or what is not finite, a noise is not finite,
            or the model cannot be prepared.
    """
    if isinstance(bits, Policy):
        if "fixed" in options:
            raise ValueError("fixed is given, which the policy says itself")
        chosen = bits.bits()
        candidates = sorted({width for pair in chosen.values() for width in pair})
        options["fixed"] = ()
    else:
        chosen, candidates = {}, list(bits)
    bench = OneAtATime(model, batches, candidates, correct=correct, memory=memory, **options)
    missing = [name for name in chosen if name not in bench.subject.layers]
    if missing:
        raise ValueError(
            f"policy: {type(model).__name__} has no quantizable layer {listed(missing)}"
        )
    if chosen:
        cases: dict[int | None, dict[str, tuple[int, int]]] = {None: chosen}
    else:
        cases = {width: dict.fromkeys(bench.subject.layers, (width, width)) for width in candidates}
    with bench.opened():
        noises = _Noises(bench)
        rows = noises.of_tensors(cases)
        wholes = noises.of_wholes(list(cases.values()))
        tensors: list[TensorNoise] = []
        totals = {}
        for case in cases:
            totals[case] = math.fsum(output for (_, output) in rows[case].values())
        for case, found in rows.items():
            for (layer, kind), (local, output) in found.items():
                width = cases[case][layer][KINDS.index(kind)]
                gain, share = _ratio(output, local), _ratio(output, totals[case])
                tensors.append(TensorNoise(layer, kind, width, local, output, gain, share))
        remedies = [
            remedy
            for case, whole in zip(cases, wholes, strict=True)
            for remedy in _remedies(noises, case, cases[case], rows[case], totals[case], whole)
        ]
    order = {name: place for place, name in enumerate(bench.subject.layers)}
    tensors.sort(key=lambda row: (order[row.layer], KINDS.index(row.kind), row.bits))
    return LayerwiseAnalysis(
        tuple(tensors),
        tuple(
            WholeNoise(case, whole, totals[case], _ratio(whole, totals[case]))
            for case, whole in zip(cases, wholes, strict=True)
        ),
        tuple(remedies),
        {"batches": len(bench.subject.batches), "correct": correct},
    )


_Assignment = Mapping[str, tuple[int, int]]
_Found = dict[tuple[str, Kind], tuple[float, float]]


class _Noises:
    """Noise over signal, at the output of layers and of the network, over all batches."""

    def __init__(self, bench: OneAtATime) -> None:
        self._bench = bench
        self.subject = bench.subject

    def of_tensors(self, cases: Mapping[int | None, _Assignment]) -> dict[int | None, _Found]:
        """For each case and each tensor alone its local noise and that at the output."""
        sums: dict[tuple[int | None, str, Kind], Tensor] = {}  # local noise and signal, output
        signals = []
        for reference in self._references():
            signals.append(_power(reference))
            for layer in self._bench.order():
                used = [case for case, chosen in cases.items() if layer in chosen]
                for place, kind in enumerate(KINDS):
                    widths = [cases[case][layer][place] for case in used]
                    for case, moved in zip(
                        used, self._of_tensor(layer, kind, widths, reference), strict=True
                    ):
                        key = case, layer, kind
                        sums[key] = sums[key] + moved if key in sums else moved
        signal = float(torch.stack(signals).sum())
        found: dict[int | None, _Found] = {case: {} for case in cases}
        for (case, layer, kind), moved in sums.items():
            noise, local_signal, moved_output = moved.tolist()
            local, output = _ratio(noise, local_signal), moved_output / signal
            if not (math.isfinite(local) and math.isfinite(output)):
                width = cases[case][layer][KINDS.index(kind)]
                raise ValueError(
                    f"layer '{layer}': {kind} noise at {width} bits is {local} at its output and"
                    f" {output} at the network's"
                )
            found[case][layer, kind] = local, output
        return found

    def _of_tensor(
        self, layer: str, kind: Kind, widths: Sequence[int], reference: Tensor
    ) -> Iterator[Tensor]:
        """For each bit-width the noise and the signal of the layer, and the output's noise."""
        if not widths:
            return
        local = torch.zeros(len(widths), 2, dtype=torch.float64, device=reference.device)
        outputs = self._bench.run(
            {layer: [partial(self.subject.quantized, layer, kind, width) for width in widths]},
            partial(_add_local, local),
        )
        for own, output in zip(local, outputs, strict=True):
            yield torch.cat([own, _power(output.double() - reference)[None]])

    def of_wholes(self, cases: Sequence[_Assignment], clip: _Clip | None = None) -> list[float]:
        """The noise at the output with all tensors of a case quantized.

        Args:
            cases: All of the same layers.
            clip: Of one tensor.
        """
        return self._at_output(
            {
                layer: [partial(self._both, layer, case[layer], clip) for case in cases]
                for layer in cases[0]
            }
        )

    def of_clips(self, layer: str, kind: Kind, width: int, clips: Sequence[float]) -> list[float]:
        """The noise at the output with one tensor quantized, its step sizes multiplied."""
        ways = [
            partial(self._clipped, layer, kind, width, _Clip(layer, kind, clip)) for clip in clips
        ]
        return self._at_output({layer: ways})

    def _at_output(self, variants: Mapping[str, Sequence[Variant]]) -> list[float]:
        noises, signals = [], []
        for reference in self._references():
            outputs = self._bench.run(variants)
            noises.append(torch.stack([_power(output.double() - reference) for output in outputs]))
            signals.append(_power(reference))
        ratios: list[float] = (torch.stack(noises).sum(dim=0) / torch.stack(signals).sum()).tolist()
        return ratios

    def _references(self) -> Iterator[Tensor]:
        """The float output of each batch, in float64, ready to run the batch in other ways."""
        for inputs, _ in self._bench.batches:
            output = self._bench.begin(inputs)
            if not isinstance(output, Tensor):
                raise ValueError(f"the model puts out {type(output).__name__}, expected one tensor")
            power = _power(output)
            if not bool(torch.isfinite(power) & (power > 0)):
                raise ValueError(
                    "the float network puts out nothing but zeros"
                    if bool(power == 0)
                    else "the float network puts out a NaN or an infinity"
                )
            yield output.double()

    @contextmanager
    def _both(self, layer: str, pair: tuple[int, int], clip: _Clip | None) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, width in zip(KINDS, pair, strict=True):
                stack.enter_context(self._clipped(layer, kind, width, clip))
            yield

    @contextmanager
    def _clipped(self, layer: str, kind: Kind, width: int, clip: _Clip | None) -> Iterator[None]:
        with self.subject.quantized(layer, kind, width):
            if clip is None or (clip.layer, clip.kind) != (layer, kind):
                yield
                return
            scale = _step_sizes(self.subject, layer, kind, width)
            own = scale.clone()
            scale *= clip.factor
            try:
                yield
            finally:
                scale.copy_(own)


@dataclass(frozen=True)
class _Clip:
    layer: str
    kind: Kind
    factor: float


def _remedies(
    noises: _Noises,
    case: int | None,
    chosen: _Assignment,
    found: _Found,
    total: float,
    whole: float,
) -> Iterator[Remedy]:
    """The remedy of the layer that has most of the noise, if one has."""
    by_layer = {layer: math.fsum(found[layer, kind][1] for kind in KINDS) for layer in chosen}
    layer = max(by_layer, key=lambda name: by_layer[name])
    if not by_layer[layer] > MOST * total or len(chosen) == 1:
        return
    kind = max(KINDS, key=lambda kind: found[layer, kind][1])
    width = chosen[layer][KINDS.index(kind)]
    before = found[layer, kind][1]
    after, clip = min(zip(noises.of_clips(layer, kind, width, CLIPS), CLIPS, strict=True))
    (whole_after,) = noises.of_wholes([chosen], _Clip(layer, kind, clip))
    scales = _step_sizes(noises.subject, layer, kind, width) * clip
    yield Remedy(
        layer,
        kind,
        width,
        case,
        share=by_layer[layer] / total,
        clip=clip,
        scales=tuple(scales.reshape(-1).tolist()),
        signed=bool(_quantizer(noises.subject, layer, kind).signed),
        before=before,
        after=after,
        whole_before=whole,
        whole_after=whole_after,
        kept=after < before and whole_after < whole,
    )


def _quantizer(subject: Subject, layer: str, kind: Kind) -> LsqQuantizer:
    module = subject.layers[layer]
    return module.weight_quantizer if kind == "weight" else module.input_quantizer


def _step_sizes(subject: Subject, layer: str, kind: Kind, width: int) -> Tensor:
    """The step sizes of a tensor at a bit-width, where the quantizer keeps them."""
    quantizer = _quantizer(subject, layer, kind)
    return quantizer.scale.detach()[quantizer.bits.index(width)]


def _set_step_sizes(quantizer: LsqQuantizer, remedy: Remedy) -> None:
    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    row = quantizer.bits.index(remedy.bits)
    own = state["scale"][row]
    if own.numel() != len(remedy.scales):
        raise ValueError(
            f"layer '{remedy.layer}' has {own.numel()} step sizes for its {remedy.kind}, the remedy"
            f" has {len(remedy.scales)}: it is of another granularity"
        )
    own.copy_(own.new_tensor(remedy.scales).reshape(own.shape))
    state["initialized"][row] = True
    state["signed_range"].fill_(int(remedy.signed))
    quantizer.load_state_dict(state)


def _add_local(sums: Tensor, place: int, quantized: Tensor, in_float: Tensor) -> None:
    sums[place, 0] += _power(quantized.double() - in_float)
    sums[place, 1] += _power(in_float)


def _power(x: Tensor) -> Tensor:
    return x.double().square().sum()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _of_all(bits: int | None) -> str:
    return "policy" if bits is None else f"{bits} bits"
