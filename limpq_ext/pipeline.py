"""All stages of a run in one folder, each reused where nothing it depends on has changed.

The folder's ``stages.json`` records for every finished stage a digest of its inputs (its part of
the recipe and the files it read) and of the files it wrote.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .calibration import calibrate
from .checkpoint import Checkpoint
from .costs import Costs, profile
from .data import Data, make_loader
from .datasets import load_data
from .distributed import broadcast_state, from_main, gather, rank
from .evaluation import Confusion, Evaluation, confuse, evaluate
from .files import open_atomically, remove_leftovers, write_json
from .finetune import finetune
from .indicators import Indicators
from .joint import JointTrainer
from .metrics import Journal, Meter, MetricsFile, Record, TensorBoard
from .models import create_model, is_published, load_weights, save_weights
from .policy import Policy
from .prepare import apply_policy, prepare
from .reading import FileFormatError, read_object, shown
from .recipe import Recipe, TrainingSection, dump_recipe
from .search import search
from .training import (
    EpochDone,
    Recording,
    StepDone,
    batches_of_epoch,
    make_optimizer,
    run_epochs,
)

FLOAT_WEIGHTS = "float.safetensors"
INDICATORS = "indicators.json"
JOINT_WEIGHTS = "joint.safetensors"
COSTS = "costs.json"
POLICY = "policy.json"
FINETUNED = "finetuned.safetensors"
UNIFORM_POLICY = "uniform.json"
UNIFORM_FINETUNED = "uniform.safetensors"
RECIPE = "recipe.yaml"
DATA = "data.json"
SCAN = "scan.json"
METRICS = "metrics.jsonl"
STAGES = "stages.json"
TENSORBOARD = "tensorboard"


Split = Literal["test", "val"]


class Reporter(Protocol):
    """Where a run says how far it is."""

    def stage(self, title: str) -> AbstractContextManager[StepDone]:
        """Announce a stage; gives what is called after every step of it."""

    def say(self, line: str) -> None:
        """Print one line."""


@dataclass(frozen=True)
class Result:
    """One network at the end of a run.

    Attributes:
        name: "float", "policy" or "uniform".
        accuracy: On the test set, 0 to 1.
        bitops: Of the searchable layers for one sample; a float layer counts 32 * 32 bits.
        size_bytes: Of all weights, without biases and batch normalisation.
        compression: Ratio to 32-bit weights.
    """

    name: str
    accuracy: float
    bitops: int
    size_bytes: float
    compression: float


@dataclass(frozen=True)
class RunReport:
    """What a run came to.

    Attributes:
        results: The float network, the searched policy and the uniform baseline.
        seconds: What every stage took when it ran.
        reused: The stages that did not have to run again.
        folder: Where the files are.
    """

    results: tuple[Result, ...]
    seconds: dict[str, float]
    reused: tuple[str, ...]
    folder: Path


def run(recipe: Recipe, folder: Path, *, fresh: bool = False, reporter: Reporter) -> RunReport:
    """Run all stages of a recipe.

    A stage that was interrupted goes on from its checkpoint, which is removed when it is done. With
    several processes (torchrun) all of them call this; process 0 alone reads and writes the folder.

    Args:
        recipe: What to do.
        folder: Where the files go; made where it is missing.
        fresh: Run every stage again, also those whose inputs did not change or that have a
            checkpoint.
        reporter: Gets titles, progress and lines.

    Raises:
        ValueError: The recipe cannot be run, or a file in the folder was not written, or was
            changed after it was written, by a run, or a checkpoint belongs to another recipe;
            nothing is overwritten then.
        Interrupted: SIGINT or SIGTERM came while a stage trained; its checkpoint is written.
    """
    session = Session(recipe, scan_cache=folder / SCAN)
    stages = _Stages(folder, fresh, reporter, recipe)
    stages.after_each.append(lambda: _note_broken(session.data, folder, reporter))
    from_main(lambda: write_json(folder / DATA, session.data.record))
    part = recipe.model_dump(mode="json")
    common = {"seed": part["seed"], "model": part["model"], "data": session.data_key()}
    quantized = [common, part["quantization"]]
    skipped = session.data.record.get("skipped", {})
    if skipped:
        first, reason = next(iter(skipped.items()))
        reporter.say(f"data: images left out: {len(skipped)}, the first: {first}: {reason}")

    given = recipe.model.weights
    files = [str(Path(given).resolve())] if given is not None and not is_published(given) else []
    training = part["float_training"] if given is None else None
    with stages.stage("float", [FLOAT_WEIGHTS], [common, training], files) as stage:
        if stage.go:
            if given is not None:
                reporter.say(f"the float network has the weights {given}")
                model = session.given_float()
            else:
                with reporter.stage("training the float network") as on_step:
                    model = session.train_float(on_step, None, stage.recording)
            stage.write(lambda: save_weights(model, folder / FLOAT_WEIGHTS))

    with stages.stage(
        "indicators",
        [INDICATORS, JOINT_WEIGHTS],
        [*quantized, part["data"]["fraction"], part["bits"], part["joint"]],
        [FLOAT_WEIGHTS],
    ) as stage:
        if stage.go:
            with reporter.stage("joint training of the indicators") as on_step:
                indicators, prepared = session.train_indicators(
                    session.float_model(folder / FLOAT_WEIGHTS), on_step, None, stage.recording
                )
            stage.write(lambda: save_weights(prepared, folder / JOINT_WEIGHTS))
            stage.write(lambda: indicators.save(folder / INDICATORS))

    with stages.stage("profile", [COSTS], quantized) as stage:
        if stage.go:
            stage.write(lambda: session.profile().save(folder / COSTS))
    costs = from_main(lambda: Costs.load(folder / COSTS))

    table = recipe.search.latency_table
    measured = [] if table is None else [str(Path(table).resolve())]
    with stages.stage(
        "search", [POLICY], [part["search"]], [INDICATORS, COSTS, *measured]
    ) as stage:
        if stage.go:
            stage.write(
                lambda: search_policy(recipe, Indicators.load(folder / INDICATORS), costs).save(
                    folder / POLICY
                )
            )
    policy = from_main(lambda: Policy.load(folder / POLICY))

    joint = recipe.finetune.init == "joint"
    tuned = [*quantized, part["finetune"], part["bits"] if joint else None]
    start = [FLOAT_WEIGHTS, JOINT_WEIGHTS] if joint else [FLOAT_WEIGHTS]
    joint_weights = folder / JOINT_WEIGHTS if joint else None
    with stages.stage("finetune", [FINETUNED], tuned, [*start, POLICY]) as stage:
        if stage.go:
            with reporter.stage("fine-tuning the policy") as on_step:
                model = session.finetune_policy(
                    session.float_model(folder / FLOAT_WEIGHTS),
                    policy,
                    on_step,
                    None,
                    stage.recording,
                    joint_weights=joint_weights,
                )
            stage.write(lambda: save_weights(model, folder / FINETUNED))

    level = recipe.baseline
    uniform = Policy.uniform(costs, level.weight_bits, level.activation_bits)
    with stages.stage(
        "baseline",
        [UNIFORM_POLICY, UNIFORM_FINETUNED],
        [*tuned, part["baseline"]],
        [*start, COSTS],
    ) as stage:
        if stage.go:
            title = f"fine-tuning uniform W{level.weight_bits}A{level.activation_bits}"
            with reporter.stage(title) as on_step:
                model = session.finetune_policy(
                    session.float_model(folder / FLOAT_WEIGHTS),
                    uniform,
                    on_step,
                    None,
                    stage.recording,
                    joint_weights=joint_weights,
                )
            stage.write(lambda: uniform.save(folder / UNIFORM_POLICY))
            stage.write(lambda: save_weights(model, folder / UNIFORM_FINETUNED))

    float_bits = dict.fromkeys((layer.name for layer in costs.layers), (32, 32))
    results = []
    with stages.stage("evaluate", [], [], always=True) as stage:
        stage.journal.start()
        float_network = session.network(folder / FLOAT_WEIGHTS, None)
        for name, chosen, weights in (
            ("float", None, FLOAT_WEIGHTS),
            ("policy", policy, FINETUNED),
            ("uniform", uniform, UNIFORM_FINETUNED),
        ):
            with reporter.stage(f"evaluating {name}") as on_step:
                model = session.network(folder / weights, chosen)
                evaluation = session.evaluate(model, on_step)
                numbers = {"network": name, **asdict(evaluation)}
                if chosen is not None:
                    confusion = session.confuse(model, float_network, None)
                    numbers |= {
                        key: value for key, value in asdict(confusion).items() if key != "counts"
                    }
            stage.journal.write(numbers)
            bits = float_bits if chosen is None else chosen.bits()
            size_bits = 32 * costs.all_weights if chosen is None else costs.size_bits(bits)
            results.append(
                Result(
                    name,
                    evaluation.accuracy,
                    costs.bitops(bits),
                    size_bits / 8,
                    32 * costs.all_weights / size_bits,
                )
            )
    return RunReport(tuple(results), stages.seconds, tuple(stages.reused), folder)


class Session:
    """The stages of a recipe in memory: data and device are set up once.

    Args:
        recipe: What to do.
        scan_cache: Where it is remembered which image files can be read.

    Raises:
        ValueError: The data set or the device is unknown, the model does not exist, or the data are
            not as they should be.
        FileNotFoundError: There are no data.
    """

    def __init__(self, recipe: Recipe, *, scan_cache: Path | None = None) -> None:
        self.recipe = recipe
        self.device = choose_device(recipe.device)
        options = recipe.data.model_dump(exclude={"workers", "fraction"})
        self.data: Data = load_data(**options, scan_cache=scan_cache)
        self.create_model()

    def data_key(self) -> dict[str, Any]:
        """What a stage depends on of the data: not where they are or who loads them."""
        included = {"image_size", "channels", "augment", "mean", "std", "on_corrupt"}
        options = self.recipe.data.model_dump(mode="json", include=included)
        return {**options, "fingerprint": self.data.record["fingerprint"]}

    def create_model(self) -> nn.Module:
        """The recipe's model with random weights from its seed, on the CPU."""
        torch.manual_seed(self.recipe.seed)
        return model_for(self.recipe, self.data)

    def float_model(self, weights: Path) -> nn.Module:
        """The float model with weights from a file, on the device; process 0 reads the file."""
        model = self.create_model()
        from_main(lambda: load_weights(model, weights))
        model.to(self.device)
        broadcast_state(model)
        return model

    def given_float(self) -> nn.Module:
        """The float model with the weights that the recipe names, on the device.

        Raises:
            FileNotFoundError: They are a file that does not exist.
            FileFormatError: They are not of this model.
            ConnectionError: They could not be downloaded.
        """
        weights = self.recipe.model.weights
        assert weights is not None
        if not is_published(weights):
            return self.float_model(Path(weights))
        model = self.create_model()

        def download() -> None:
            published = model_for(self.recipe, self.data, weights=weights)
            model.load_state_dict(published.state_dict())

        from_main(download)
        model.to(self.device)
        broadcast_state(model)
        return model

    def train_float(
        self,
        on_step: StepDone | None,
        on_epoch: EpochDone | None,
        recording: Recording | None = None,
    ) -> nn.Module:
        """The float model, trained from its random start."""
        model = self.create_model().to(self.device)
        self._finetune(model, self.recipe.float_training, on_step, on_epoch, recording)
        return model

    def train_indicators(
        self,
        model: nn.Module,
        on_step: StepDone | None,
        on_epoch: EpochDone | None,
        recording: Recording | None = None,
    ) -> tuple[Indicators, nn.Module]:
        """The indicators of a float model, and the prepared model that they were trained in."""
        options = self.recipe.joint
        prepared = self.prepare(model)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        prepared.to(self.device).to(memory_format=layout).train()  # type: ignore[call-overload]  # not in torch's stub
        optimizer = make_optimizer(
            prepared,
            options.optimizer,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

        def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(output, target, label_smoothing=options.label_smoothing)

        meter = Meter(self.device)
        trainer = JointTrainer(
            prepared,
            optimizer,
            loss_fn,
            distill=options.distill,
            seed=self.recipe.seed,
            autocast=_dtype(options.autocast),
            compile_forward=torch.compile if options.compile else None,
            cuda_graph=options.cuda_graph,
            weight_bank=options.weight_bank,
            share_stem=options.share_stem,
            drop_relu=options.drop_relu,
            on_branch=meter.add_branch,
        )

        def take_step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            losses = trainer.step(x.contiguous(memory_format=layout), target).losses
            for branch, loss in losses.items():
                meter.add(f"loss {branch}", loss)
            return torch.stack(list(losses.values())).mean()

        run_epochs(
            take_step,
            optimizer,
            self._train_loader(options, self.recipe.data.fraction),
            model=prepared,
            epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            parts={"trainer": trainer},
            meter=meter,
            check=trainer.check,
            observe=lambda: {"indicators": _by_layer(trainer.indicators())},
            recording=recording,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        return trainer.indicators(), prepared

    def prepare(self, model: nn.Module) -> nn.Module:
        """A float model with the recipe's candidate bits, on the device."""
        options = self.recipe.quantization
        prepared = prepare(
            model,
            self.recipe.bits,
            example_input=self.example_input(),
            fixed=options.fixed,
            exclude=options.exclude,
            **self._quantizers(),
        )
        return prepared.to(self.device)

    def quantize(self, model: nn.Module, policy: Policy) -> nn.Module:
        """A float or prepared model at the bits of a policy."""
        return apply_policy(model, policy, **self._quantizers())

    def profile(self) -> Costs:
        """The costs of the model."""
        options = self.recipe.quantization
        return profile(
            self.create_model(),
            self.example_input(),
            fixed=options.fixed,
            exclude=options.exclude,
        )

    def finetune_policy(
        self,
        model: nn.Module,
        policy: Policy,
        on_step: StepDone | None,
        on_epoch: EpochDone | None,
        recording: Recording | None = None,
        *,
        joint_weights: Path | None = None,
    ) -> nn.Module:
        """The quantized model of a policy, fine-tuned.

        Args:
            model: The float model, which it starts from, and which teaches it if the recipe says.
            policy: The bits.
            on_step: Called after every step.
            on_epoch: Called after every epoch.
            recording: Checkpoints and records.
            joint_weights: Start from the prepared model that was saved here instead; process 0
                reads the file.
        """
        start = model
        if joint_weights is not None:
            start = self.prepare(model)
            from_main(lambda: load_weights(start, joint_weights))
            broadcast_state(start)
        quantized = self.quantize(start, policy).to(self.device)
        options = self.recipe.finetune
        teacher = model if options.distill_weight else None
        self._finetune(quantized, options, on_step, on_epoch, recording, teacher)
        return quantized

    def network(
        self, weights: Path, policy: Policy | None, *, calibrate_batches: int = 0
    ) -> nn.Module:
        """A network with weights from a file, on the device; process 0 reads the file.

        Args:
            weights: Of the float network, or of the policy's.
            policy: Its bits; None: the float network.
            calibrate_batches: The weights are the float network's; it is quantized without
                training, calibrated with so many training batches.
        """
        if policy is None or calibrate_batches:
            model = self.float_model(weights)
            if policy is not None:
                model = self.quantize(model, policy).to(self.device)
                calibrate(model, self._some_batches(calibrate_batches))
            return model
        model = self.quantize(self.create_model(), policy)
        from_main(lambda: load_weights(model, weights))
        model.to(self.device)
        broadcast_state(model)
        return model

    def calibrated_indicators(self, model: nn.Module, batches: int) -> tuple[Indicators, nn.Module]:
        """The start values of the step sizes, from a float model and a few batches: a first look.

        Returns:
            They, and the prepared model that has them.
        """
        prepared = self.prepare(model)
        calibrate(prepared, self._some_batches(batches))
        return Indicators.from_model(prepared, {"calibrated_batches": batches}), prepared

    def evaluate(
        self, model: nn.Module, on_step: StepDone | None, split: Split = "test"
    ) -> Evaluation:
        """How a network does on a split."""
        return evaluate(model, self._eval_loader(split), on_step=on_step)

    def confuse(
        self,
        model: nn.Module,
        reference: nn.Module,
        on_step: StepDone | None,
        split: Split = "test",
    ) -> Confusion:
        """Where a network decides otherwise than another one on a split."""
        return confuse(model, reference, self._eval_loader(split), on_step=on_step)

    def _eval_loader(self, split: Split) -> Any:
        data, workers = getattr(self.data, split), self.recipe.data.workers
        return make_loader(data, batch_size=256, train=False, workers=workers)

    def _some_batches(self, count: int) -> list[Any]:
        """The first training batches of the joint stage, whatever the number of processes."""
        loader = self._train_loader(self.recipe.joint, self.recipe.data.fraction)
        return list(itertools.islice(batches_of_epoch(loader, 0), count))

    def _quantizers(self) -> dict[str, Any]:
        options = self.recipe.quantization.model_dump(exclude={"fixed", "exclude"})
        if options["scale_max"] is None:
            options["scale_max"] = math.inf
        return options

    def example_input(self) -> torch.Tensor:
        """One empty image."""
        return torch.zeros(1, *self.data.image_shape)

    def _train_loader(self, options: TrainingSection, fraction: float = 1.0) -> Any:
        # Every process drops out other activations.
        torch.manual_seed(self.recipe.seed + rank())
        return make_loader(
            self.data.train.part(fraction, self.recipe.data.seed),
            batch_size=options.batch_size,
            train=True,
            seed=self.recipe.seed,
            workers=self.recipe.data.workers,
        )

    def _finetune(
        self,
        model: nn.Module,
        options: TrainingSection,
        on_step: StepDone | None,
        on_epoch: EpochDone | None,
        recording: Recording | None,
        teacher: nn.Module | None = None,
    ) -> None:
        finetune(
            model,
            self._train_loader(options),
            recording=recording,
            on_step=on_step,
            on_epoch=on_epoch,
            teacher=teacher,
            autocast=_dtype(options.autocast),
            **options.model_dump(exclude={"batch_size", "autocast", "init"}),
        )


def _dtype(autocast: str) -> torch.dtype | None:
    return None if autocast == "off" else getattr(torch, autocast)


def model_for(recipe: Recipe, data: Data, *, weights: str | None = None) -> nn.Module:
    """The recipe's model, with the classes (and for cifar_resnet the channels) of its data.

    Args:
        recipe: The recipe.
        data: Its data.
        weights: Published weights by name; None: random ones.

    Raises:
        ValueError: The recipe gives the model another number of classes, or it does not exist.
    """
    options = {"num_classes": data.num_classes, **recipe.model.options}
    if options["num_classes"] != data.num_classes:
        raise ValueError(
            f"model.options.num_classes is {options['num_classes']}, but the data set"
            f" {recipe.data.name} has {data.num_classes} classes"
        )
    if recipe.model.name == "cifar_resnet":
        options.setdefault("in_channels", data.image_shape[0])
    return create_model(recipe.model.name, weights=weights, **options)


def search_policy(recipe: Recipe, indicators: Indicators, costs: Costs) -> Policy:
    """The search of a recipe."""
    return search(indicators, costs, **recipe.search.question())


def choose_device(name: str) -> torch.device:
    """The device of a recipe: "auto" is CUDA where there is one.

    In a run of several processes "auto" and "cuda" are the GPU of this process.

    Raises:
        ValueError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device '{name}': expected auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{name}' is not supported: expected auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{name}': torch finds no CUDA device here")
    return device


def make_recording(recipe: Recipe, *, checkpoint: Path, key: str, journal: Journal) -> Recording:
    """Checkpoints and records of a stage, as the recipe wants them.

    Args:
        recipe: Says how often.
        checkpoint: The file.
        key: What the checkpoint has to belong to, see :func:`digest_of`.
        journal: Where records go.
    """
    steps, minutes = recipe.checkpoint_steps, recipe.checkpoint_minutes
    return Recording(
        Checkpoint(checkpoint, key=key, steps=steps, minutes=minutes), journal, recipe.log_steps
    )


def digest_of(settings: Sequence[Any], files: Mapping[str, Path]) -> str:
    """A digest of what a stage depends on: settings, and files by a name that is kept."""
    read = {name: _digest(path) for name, path in files.items()}
    return hashlib.sha256(json.dumps([settings, read], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Stage:
    """A stage about to run, or not.

    Attributes:
        go: Whether it has to run.
        journal: Where its records go.
        recording: The same with its checkpoint.
    """

    go: bool
    journal: Journal
    recording: Recording

    def write(self, save: Callable[[], None]) -> None:
        """Write an output in process 0; the others wait, and fail where it does."""
        from_main(save)


class _Stages:
    """Runs stages of a folder, or finds that they need not run."""

    def __init__(self, folder: Path, fresh: bool, reporter: Reporter, recipe: Recipe) -> None:
        self.folder = folder
        self.reporter = reporter
        self.recipe = recipe
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.record: dict[str, Any] = {}
        self.files: list[Any] = [MetricsFile(folder / METRICS)]
        self.after_each: list[Callable[[], None]] = []
        from_main(lambda: self._open(fresh))

    def _open(self, fresh: bool) -> None:
        """Read the record of the folder and write the recipe into it."""
        folder = self.folder
        if self.recipe.tensorboard:
            self.files.append(TensorBoard(folder / TENSORBOARD))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STAGES).exists():
            self.record = read_record(folder / STAGES)
        elif (folder / RECIPE).exists():
            raise ValueError(
                f"{folder} holds a {RECIPE} but no {STAGES}: it is not the folder of a run;"
                " choose another with --out"
            )
        for name in (STAGES, RECIPE, METRICS):
            remove_leftovers(folder / name)
        # What torchrun starts again after a failure goes on with the run that it started.
        if fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
            for name, stage in self.record.items():
                stage["inputs"] = ""
                (folder / _checkpoint_name(name)).unlink(missing_ok=True)
        write_json(folder / STAGES, self.record)
        with open_atomically(folder / RECIPE) as file:
            file.write(dump_recipe(self.recipe).encode())

    @contextmanager
    def stage(
        self,
        name: str,
        outputs: Sequence[str],
        settings: Sequence[Any],
        inputs: Sequence[str] = (),
        *,
        always: bool = False,
    ) -> Iterator[_Stage]:
        """A stage that says whether it has to run; what it does in the block is recorded after."""
        go, key, seconds = from_main(lambda: self._begin(name, outputs, settings, inputs, always))
        journal = Journal(name, self.files, self.reporter.say)
        checkpoint = self.folder / _checkpoint_name(name)
        stage = _Stage(
            go,
            journal,
            make_recording(self.recipe, checkpoint=checkpoint, key=key, journal=journal),
        )
        if not go:
            self.reused.append(name)
            self.seconds[name] = seconds
            yield stage
            return
        start = time.perf_counter()
        yield stage
        self.seconds[name] = time.perf_counter() - start
        for function in self.after_each:
            function()
        from_main(lambda: self._finish(name, outputs, key))

    def _begin(
        self,
        name: str,
        outputs: Sequence[str],
        settings: Sequence[Any],
        inputs: Sequence[str],
        always: bool,
    ) -> tuple[bool, str, float]:
        """Whether the stage has to run, the digest of its inputs, and what it took before."""
        for file in outputs:
            remove_leftovers(self.folder / file)
        self._refuse_foreign(name, outputs)
        key = digest_of(settings, {file: self.folder / file for file in inputs})
        before = self.record.get(name)
        whole = all((self.folder / file).exists() for file in outputs)
        fit = before is not None and before["inputs"] == key and whole
        if before is not None and fit and not always:
            self.reporter.say(f"{name}: nothing it depends on has changed, reused")
            (self.folder / _checkpoint_name(name)).unlink(missing_ok=True)
            return False, key, before["seconds"]
        # Claimed before they are written, so that a stage that was killed can run again.
        self.record[name] = {"inputs": "", "outputs": dict.fromkeys(outputs), "seconds": 0.0}
        write_json(self.folder / STAGES, self.record)
        return True, key, 0.0

    def _finish(self, name: str, outputs: Sequence[str], key: str) -> None:
        self.record[name] = {
            "inputs": key,
            "outputs": {file: _digest(self.folder / file) for file in outputs},
            "seconds": round(self.seconds[name], 3),
        }
        write_json(self.folder / STAGES, self.record)
        (self.folder / _checkpoint_name(name)).unlink(missing_ok=True)

    def _refuse_foreign(self, name: str, outputs: Sequence[str]) -> None:
        """Keep files that no run wrote, or that somebody edited."""
        written = self.record.get(name, {}).get("outputs", {})
        for file in outputs:
            path = self.folder / file
            claimed = file in written and written[file] is None
            if path.exists() and not claimed and written.get(file) != _digest(path):
                how = "was changed since a run wrote it" if file in written else "is not of a run"
                raise ValueError(
                    f"{path} {how} and would be overwritten: move it away or choose another --out"
                )


def read_record(path: Path) -> dict[str, Any]:
    """What ``stages.json`` says about every stage: "inputs", "outputs" and "seconds".

    Raises:
        OSError: It cannot be read.
        FileFormatError: It is no such file.
    """
    record = read_object(path, "stages")
    for name, stage in record.items():
        where = f"{path}: {shown(name)}"
        if not isinstance(stage, dict):
            raise FileFormatError(f"{where}: is {shown(stage)}, not the record of a stage")
        outputs = stage.get("outputs")
        if not isinstance(stage.get("inputs"), str):
            raise FileFormatError(f"{where}: inputs: is missing, or no digest")
        if not isinstance(outputs, dict) or not all(
            digest is None or isinstance(digest, str) for digest in outputs.values()
        ):
            raise FileFormatError(f"{where}: outputs: is missing, or not digests by file")
        seconds = stage.get("seconds")
        if type(seconds) not in (int, float) or not 0 <= float(seconds or 0) < math.inf:
            raise FileFormatError(f"{where}: seconds: is {shown(seconds)}, no number of seconds")
    return record


def _note_broken(data: Data, folder: Path, reporter: Reporter) -> None:
    """Say which files broke while they were loaded, and write it down beside the splits."""
    names = sorted({name for process in gather(data.broken()) for name in process})
    if names != data.record.get("broken_while_loading", []):
        data.record["broken_while_loading"] = names
        from_main(lambda: write_json(folder / DATA, data.record))
        reporter.say(
            f"data: images that could not be read and were replaced by others: {len(names)},"
            f" such as {names[-1]}"
        )


def _checkpoint_name(stage: str) -> str:
    return f"{stage}.checkpoint"


def _by_layer(indicators: Indicators) -> Record:
    return {
        layer.name: {
            "weight": {str(bits): value for bits, value in layer.weight.items()},
            "activation": {str(bits): value for bits, value in layer.activation.items()},
        }
        for layer in indicators.layers
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
