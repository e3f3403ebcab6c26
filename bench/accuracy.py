"""Is the policy worth it? The accuracy of policies at equal cost, on drawn glyphs.

    python -m bench.accuracy --out FOLDER [--networks resnet mobilenet] [--seeds 0 1 2]
    python -m bench.accuracy --out FOLDER --record bench/results/accuracy.json

For each network and seed: a float network, its indicators by joint training, Hessian scores, and
for each budget one policy from each way of choosing bits. Every policy is fine-tuned from the float
network in the same way and evaluated once on the test images. What is finished is kept in FOLDER
and not computed again, so a run can be stopped at any time, and several can share the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import limpq_ext as lq
from limpq_ext.app.weights import load_weights, save_weights
from limpq_ext.data.glyphs import CLASSES, GlyphImages
from limpq_ext.ilp.program import minimise
from limpq_ext.ilp.rows import Row
from limpq_ext.nn.named import CifarResNet
from limpq_ext.training.loop import run_epochs
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import write_json
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.policy import LayerBits, Policy

from .report import describe_run

BITS = (2, 3, 4, 5, 6)
SIZE = 16
TRAIN, TUNE, TEST = 18_000, 9_000, 10_000
FLOAT_EPOCHS, JOINT_EPOCHS, TUNE_EPOCHS = 15, 1, 3
BATCH = 64
RANDOM_DRAWS = 5
KEPT = Fraction(97, 100)
"""The least share of a budget that every policy has to use, so that none wins or loses by cost."""

WAYS = ("learned", "uniform", "negated", *(f"random {i}" for i in range(RANDOM_DRAWS)), "hessian")


@dataclass(frozen=True)
class Budget:
    """What all policies of a comparison may cost.

    Attributes:
        name: As the table names it.
        bits: The level: its square times the MACs are the BitOps, or its multiple of the weights
            is the size in bits.
        by_size: Weights alone are searched.
        activation_bits: Those of all layers where weights alone are searched.
    """

    name: str
    bits: Fraction
    by_size: bool = False
    activation_bits: int = 4

    def used(self, costs: Costs, pair: tuple[int, int]) -> list[int]:
        """What each searchable layer uses of it at some bits of weights and activations."""
        weight_bits, activation_bits = pair
        if self.by_size:
            return [layer.weights * weight_bits for layer in costs.layers]
        return [layer.macs * weight_bits * activation_bits for layer in costs.layers]

    def limit(self, costs: Costs) -> int:
        """The most that all searchable layers may use."""
        if self.by_size:
            return math.floor(self.bits * sum(layer.weights for layer in costs.layers))
        return math.floor(self.bits**2 * sum(layer.macs for layer in costs.layers))


BUDGETS = (
    Budget("BitOps of 2.5 bits", Fraction(5, 2)),
    Budget("BitOps of 3 bits", Fraction(3)),
    Budget("BitOps of 4 bits", Fraction(4)),
    Budget("size of 3 bits, A4", Fraction(3), by_size=True),
)


class SmallMobileNet(nn.Module):
    """Depthwise and pointwise convolutions in turn, as MobileNetV1 (arXiv 1704.04861)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_unit(1, 16, 3)]
        for channels, out, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
            blocks += [_unit(channels, channels, 3, stride, channels), _unit(channels, out, 1)]
        self.features = nn.Sequential(*blocks)
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[batch, num_classes]`` of images ``[batch, 1, H, W]``."""
        return self.fc(self.features(x).mean((2, 3)))


def _unit(channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


NETWORKS = {
    "resnet": lambda: CifarResNet(2, num_classes=len(CLASSES), in_channels=1, width=8),
    "mobilenet": lambda: SmallMobileNet(len(CLASSES)),
}


class Batches:
    """Shuffled batches of images in memory, another order in every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for places in order.split(BATCH)[: len(self)]:
            yield self.images[places], self.labels[places]


def draw(split: str, count: int, folder: Path) -> tuple[Tensor, Tensor]:
    """The images as the networks read them, drawn once and kept."""
    glyphs = GlyphImages(count, split, size=SIZE, channels=1)
    kept = folder / f"{split}-{count}.pt"
    if not kept.exists():
        pixels = torch.stack([glyphs.read(index)[0] for index in range(count)])
        torch.save(pixels, kept)
    pixels = torch.load(kept, weights_only=True)
    return (pixels.float() / 255 - 0.5) / 0.25, torch.from_numpy(glyphs.labels)


def choose(
    scores: Indicators,
    costs: Costs,
    budget: Budget,
    *,
    negated: bool = False,
    kept: Fraction = KEPT,
) -> Policy:
    """The policy with the least sum of scores, or of negated ones, within the budget.

    Args:
        scores: Of the searchable layers.
        costs: Of the network.
        budget: What may be used.
        kept: The least share of it that is used, also where few bits score best.
        negated: LIMPQ's ablation: the bits go where the indicators say that they help least.
    """
    by_name = {layer.name: layer for layer in scores.layers}
    widths = (budget.activation_bits,) if budget.by_size else scores.bits
    pairs = [(bw, ba) for bw in scores.bits for ba in widths]
    values = []
    for layer in costs.layers:
        score = by_name[layer.name]
        values.append([score.weight[bw] + score.activation[ba] for bw, ba in pairs])
    used = [list(own) for own in zip(*(budget.used(costs, pair) for pair in pairs), strict=True)]
    if negated:
        most = max(map(max, values))
        values = [[most - value for value in group] for group in values]
    limit = budget.limit(costs)
    highest = [max(group) for group in used]
    unused = [[top - cost for cost in group] for top, group in zip(highest, used, strict=True)]
    rows = [Row(used, limit), Row(unused, sum(highest) - math.ceil(kept * limit))]
    solution = minimise(values, rows, gap=0.0, deadline=time.perf_counter() + 60)
    chosen = [pairs[i] for i in solution.chosen]
    return Policy(
        tuple(
            LayerBits(layer.name, *bits) for layer, bits in zip(costs.layers, chosen, strict=True)
        ),
        tuple(LayerBits(layer.name, 8, 8) for layer in costs.fixed),
    )


def policy_of(
    way: str, budget: Budget, learned: Indicators, hessian: Indicators, costs: Costs, seed: int
) -> Policy | None:
    """The policy of a way of choosing; None where it has none at this budget."""
    if way == "uniform":
        if budget.bits.denominator != 1:
            return None
        bits = int(budget.bits)
        return Policy.uniform(costs, bits, budget.activation_bits if budget.by_size else bits)
    if way == "hessian":
        return choose(hessian, costs, budget)
    if way.startswith("random"):
        return choose(random_scores(costs, BITS, [seed, int(way.split()[1])]), costs, budget)
    return choose(learned, costs, budget, negated=way == "negated")


def random_scores(costs: Costs, bits: Sequence[int], seed: int | Sequence[int]) -> Indicators:
    """Random numbers that fall with the bits, as scores of the searchable layers."""
    generator = np.random.default_rng(seed)
    layers = [
        LayerIndicators(
            layer.name,
            *(
                dict(zip(bits, sorted(generator.random(len(bits)), reverse=True), strict=True))
                for _ in range(2)
            ),
        )
        for layer in costs.layers
    ]
    return Indicators(tuple(bits), tuple(layers))


class Study:
    """One network and seed, with everything that its cells need.

    Args:
        network: Of `NETWORKS`.
        seed: Of the weights and of the batches.
        folder: Where results and weights are kept.
        train: Images and labels.
        test: Images and labels.
    """

    def __init__(
        self,
        network: str,
        seed: int,
        folder: Path,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
    ) -> None:
        self.name = f"{network}-{seed}"
        self.seed = seed
        self.path = folder / f"{self.name}.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}
        self._weights = folder / f"{self.name}.safetensors"
        self._indicators = folder / f"{self.name}-indicators.json"
        self._network = NETWORKS[network]
        self._train, self._test = train, test
        example = train[0][:1]
        self.costs = lq.profile(self._network(), example)

    def run(self) -> None:
        """Compute the cells that are missing."""
        model = self._float_model()
        learned = self._learned(model)
        x, target = (part[:256] for part in self._train)
        hessian = lq.scores.hessian(model, [(x, target)], BITS, seed=self.seed)
        for budget in BUDGETS:
            for way in WAYS:
                cell = f"{budget.name}: {way}"
                if cell in self.results:
                    continue
                policy = policy_of(way, budget, learned, hessian, self.costs, self.seed)
                if policy is None:
                    continue
                start = time.perf_counter()
                accuracy = self._tuned(model, policy)
                self._keep(
                    cell,
                    {
                        "accuracy": accuracy,
                        "bitops": self.costs.bitops(policy.bits()),
                        "size_bits": self.costs.size_bits(policy.bits()),
                        "weight_bits": [layer.weight_bits for layer in policy.layers],
                        "activation_bits": [layer.activation_bits for layer in policy.layers],
                        "seconds": time.perf_counter() - start,
                    },
                )

    def _keep(self, cell: str, result: dict[str, object]) -> None:
        self.results[cell] = result
        write_json(self.path, self.results)
        print(f"{self.name}: {cell}: {100 * float(result['accuracy']):.2f} %", flush=True)

    def _float_model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        model = self._network()
        if self._weights.exists():
            load_weights(model, self._weights)
            return model
        batches = Batches(*self._train, seed=self.seed)
        lq.finetune(model, batches, epochs=FLOAT_EPOCHS, lr=0.1, weight_decay=5e-4, warmup_epochs=1)
        save_weights(model, self._weights)
        self._keep("float", {"accuracy": self._accuracy(model)})
        return model

    def _learned(self, model: nn.Module) -> Indicators:
        if self._indicators.exists():
            return Indicators.load(self._indicators)
        torch.manual_seed(self.seed)
        example = self._train[0][:1]
        prepared = lq.prepare(model, BITS, example_input=example, scale_start="lsq").train()
        optimizer = make_optimizer(prepared, lr=0.01, weight_decay=2.5e-5)
        trainer = lq.JointTrainer(prepared, optimizer, nn.functional.cross_entropy, seed=self.seed)

        def take_step(x: Tensor, target: Tensor) -> Tensor:
            return torch.stack(list(trainer.step(x, target).losses.values())).mean()

        run_epochs(
            take_step,
            optimizer,
            Batches(*self._train, seed=self.seed),
            model=prepared,
            epochs=JOINT_EPOCHS,
            parts={"trainer": trainer},
            check=trainer.check,
        )
        indicators = trainer.indicators()
        indicators.save(self._indicators)
        return indicators

    def _tuned(self, model: nn.Module, policy: Policy) -> float:
        torch.manual_seed(self.seed)
        quantized = lq.apply_policy(model, policy, scale_start="lsq")
        images, labels = (part[:TUNE] for part in self._train)
        lq.finetune(quantized, Batches(images, labels, seed=self.seed), epochs=TUNE_EPOCHS, lr=0.02)
        return self._accuracy(quantized)

    def _accuracy(self, model: nn.Module) -> float:
        images, labels = self._test
        return lq.evaluate(
            model, list(zip(images.split(500), labels.split(500), strict=True))
        ).accuracy


def finished(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What the studies in a folder have found: network and seed -> cell -> result."""
    return {
        path.stem: json.loads(path.read_text())
        for network in NETWORKS
        for path in sorted(folder.glob(f"{network}-*.json"))
        if not path.stem.endswith("-indicators")
    }


def record(folder: Path, path: Path) -> None:
    """Write all results with what they were measured on and how."""
    sizes = {"image_size": SIZE, "train": TRAIN, "tune": TUNE, "test": TEST, "batch": BATCH}
    epochs = {"float": FLOAT_EPOCHS, "joint": JOINT_EPOCHS, "finetune": TUNE_EPOCHS}
    run = describe_run("cpu", **sizes, epochs=epochs, bits=BITS)
    write_json(path, {"run": run, "studies": finished(folder)})


def table(folder: Path) -> str:
    """The results in a folder as Markdown: mean and deviation over the seeds, in per cent."""
    lines = [
        f"Test accuracy in per cent on {TEST:,} images, mean and standard deviation over the seeds;"
        f" random: over seeds and {RANDOM_DRAWS} draws.",
        "",
        "| network | budget | learned | uniform | negated | random | Hessian |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        studies = [
            results
            for name, results in finished(folder).items()
            if name.rpartition("-")[0] == network
        ]
        if not studies:
            continue
        floats = [study["float"]["accuracy"] for study in studies if "float" in study]
        lines.append(f"| {network} | float ({len(floats)} seeds) | {_shown(floats)} | | | | |")
        for budget in BUDGETS:
            cells = []
            for way in ("learned", "uniform", "negated", "random", "hessian"):
                found = [
                    result["accuracy"]
                    for study in studies
                    for cell, result in study.items()
                    if cell.startswith(f"{budget.name}: {way}")
                ]
                cells.append(_shown(found))
            lines.append(f"| {network} | {budget.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(shares: Iterable[float]) -> str:
    values = [100 * share for share in shares]
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--record", type=Path, help="write the results to this file and end")
    options = parser.parse_args()
    if options.record is not None:
        record(options.out, options.record)
        print(table(options.out))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    train = draw("train", TRAIN, options.out)
    test = draw("test", TEST, options.out)
    for seed in options.seeds:
        for network in options.networks:
            Study(network, seed, options.out, train, test).run()
    print(table(options.out))


if __name__ == "__main__":
    main()
