"""What is measured of a network: scores, policies without training, start values, fine-tuning."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import limpq_ext as lq
from limpq_ext.nn.start_values import SCALE_STARTS
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.files import open_atomically
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy

from .accuracy import Budget, choose, random_scores
from .networks import BATCH, GLYPH_SIZE, Shuffled, network, outputs
from .real_networks_report import NotThereYet, Results

BITS: Final = (2, 3, 4, 5, 6, 8)
SCORE_BATCH: Final = 32
CALIBRATION_IMAGES: Final = 128
"""Of the correction, of step sizes and of scores."""
CHOICE_IMAGES: Final = 128
"""Of those that are held, on which the best scores are chosen for fine-tuning; policies are refined
on the rest."""
REFINE_STEPS: Final = 60
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

LOSS_AWARE_IMAGES: Final = 512
"""The score that takes one forward and backward is measured on more images."""

REFINED: Final = ("loss_aware",)
"""The scores whose policies are refined by measured swaps, where the package can."""

NEGATED: Final = ("fisher", "learned")
"""The scores whose negation is tried."""


@dataclass(frozen=True)
class Tuning:
    """How a network's policies are fine-tuned.

    Attributes:
        batch: Images in a step.
        size: Their height and width; they are made smaller where it is another one.
        lr: Highest learning rate.
        optimizer: Which one.
        frozen_norms: Batch normalisation keeps its corrected statistics.
    """

    batch: int
    size: int
    lr: float
    optimizer: str = "sgd"
    frozen_norms: bool = False


TUNING: Final = {
    "lite0": Tuning(batch=16, size=96, lr=3e-5, optimizer="adamw", frozen_norms=True),
    "lite1": Tuning(batch=16, size=96, lr=3e-5, optimizer="adamw", frozen_norms=True),
    "resnet20": Tuning(batch=64, size=GLYPH_SIZE, lr=0.004),
    "transformer": Tuning(batch=64, size=GLYPH_SIZE, lr=5e-4, optimizer="adamw"),
}


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
        if name == "resnet50":
            continue
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

    def _batches(self, start: int, count: int) -> list[Any]:
        return self.images.batches(start, count, SCORE_BATCH)

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
            [(part, None) for part in x.split(BATCH)],
            calibration=self._batches(0, CALIBRATION_IMAGES),
            per_channel_weights=True,
        )

    @property
    def _choice(self) -> Tensor:
        return self.images.held[:CHOICE_IMAGES]

    @functools.cached_property
    def prepared(self) -> nn.Module:
        """The network with the start values of all bit-widths, found once and kept."""
        kept = self.folder / f"{self.name}-start-values.pt"
        options: dict[str, Any] = {"example_input": self.example, "per_channel_weights": True}
        if not kept.exists():
            prepared = lq.prepare(self.model, BITS, scale_start="mse", **options)
            lq.calibrate(prepared, self._batches(0, CALIBRATION_IMAGES))
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
                [(x, None) for x in self.images.held[CHOICE_IMAGES:].split(SCORE_BATCH)],
                self.costs,
                indicators=self.indicators(score),
                bits=BITS,
                steps=REFINE_STEPS,
                measuring={
                    "per_channel_weights": True,
                    "calibration": self._batches(0, CALIBRATION_IMAGES),
                },
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

    def calibrated(self, policy: Policy, size: int) -> nn.Module:
        """The network at a policy's bits, without training, for images of a size."""
        model = lq.apply_policy(self.prepared, policy, per_channel_weights=True, scale_start="mse")
        batches = [
            (_resized(x, size), target) for x, target in self._batches(0, CALIBRATION_IMAGES)
        ]
        lq.calibrate(model, batches, reference=self.model)
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

    @property
    def score_images(self) -> int:
        """How many images most scores are measured on."""
        return SCORE_BATCH if self.name == "resnet50" else CALIBRATION_IMAGES

    def _score(self, score: str) -> dict[str, Any]:
        began = time.process_time()
        if score == "learned":
            found = self._learned()
        else:
            function, options = SCORES[score]
            images = LOSS_AWARE_IMAGES if score == "loss_aware" else self.score_images
            found = {
                score: getattr(lq.scores, function)(
                    self.model,
                    self._batches(0, images),
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
        lq.calibrate(
            model, self._batches(0, CALIBRATION_IMAGES), reference=self.model if corrected else None
        )
        if treatment == "kept":
            model.load_state_dict(before, strict=False)
        return self.compared(outputs(model, self.images.test), self.reference)

    def _tuned(self, policy: Policy, seed: int) -> dict[str, Any]:
        how = TUNING[self.name]
        torch.manual_seed(seed)
        model = self.calibrated(policy, how.size).train()
        if how.frozen_norms:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
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
