"""All stages of a run in one folder, each reused where nothing it depends on has changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.search import search
from limpq_ext.app.locks import only_one
from limpq_ext.app.models import create_model, is_published, load_weights, save_weights
from limpq_ext.app.recipe import Recipe, TrainingSection
from limpq_ext.app.stages import (
    COSTS,
    DATA,
    FINETUNED,
    FLOAT_WEIGHTS,
    INDICATORS,
    JOINT_WEIGHTS,
    LOCK,
    POLICY,
    SCAN,
    UNIFORM_FINETUNED,
    UNIFORM_POLICY,
    Reporter,
    Stages,
)
from limpq_ext.conversion.apply import apply_policy
from limpq_ext.conversion.prepare import prepare
from limpq_ext.data.datasets import load_data
from limpq_ext.data.loading import Data, make_loader
from limpq_ext.graph.fingerprint import graph_digest, source_digest, structure_digest
from limpq_ext.graph.profile import profile
from limpq_ext.joint.trainer import JointTrainer
from limpq_ext.training.batches import batches_of_epoch
from limpq_ext.training.calibration import calibrate
from limpq_ext.training.distributed import broadcast_state, from_main, gather, rank
from limpq_ext.training.evaluation import Confusion, Evaluation, confuse, evaluate
from limpq_ext.training.finetune import finetune
from limpq_ext.training.loop import EpochDone, Recording, StepDone, run_epochs
from limpq_ext.training.metrics import Meter, Record
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import write_json
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.optional import require
from limpq_ext.values.policy import Policy

CHECK_SECONDS: Final = 10.0
"""The most that is taken to see, before anything trains, whether a policy is possible."""

Split = Literal["test", "val"]


@dataclass(frozen=True)
class Result:
    """One network at the end of a run.

    Attributes:
        name: "float", "policy" or "uniform".
        accuracy: On the test set, 0 to 1.
        bitops: Of the searchable layers for one sample; a float layer counts 32 * 32 bits.
        size_bytes: Of all weights, without biases and batch normalisation.
        compression: Ratio to 32-bit weights.
        total_bytes: Of all parameters, those that stay in float32 included.
    """

    name: str
    accuracy: float
    bitops: int
    size_bytes: float
    compression: float
    total_bytes: float


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

    What can be seen to fail in any stage fails before the first one trains. A stage that was
    interrupted goes on from its checkpoint, which is removed when it is done. With several
    processes (torchrun) all of them call this; process 0 alone reads and writes the folder.

    Args:
        recipe: What to do.
        folder: Where the files go; made where it is missing.
        fresh: Run every stage again, also those whose inputs did not change or that have a
            checkpoint.
        reporter: Gets titles, progress and lines.

    Raises:
        ValueError: The recipe cannot be run, or another run works in the folder, or a file in it
            was not written, or was changed after it was written, by a run, or a checkpoint belongs
            to another recipe; nothing is overwritten then.
        InfeasibleError: No policy keeps the budgets and restrictions.
        Interrupted: SIGINT or SIGTERM came while a stage trained; its checkpoint is written.
    """
    with _folder_made(folder), only_one(folder / LOCK, f"the folder '{folder}'"):
        return _run(recipe, folder, Stages(folder, fresh, reporter, recipe), reporter)


def _run(recipe: Recipe, folder: Path, stages: Stages, reporter: Reporter) -> RunReport:
    with nullcontext() if recipe.data.root is None else stages.writing(SCAN):
        session = Session(recipe, scan_cache=folder / SCAN)
    session.check()
    stages.after_each.append(lambda: _note_broken(session.data, stages, reporter))
    stages.begin(lambda: write_json(folder / DATA, session.data.record))
    part = recipe.model_dump(mode="json")
    common = session.common_key()
    quantized = [common, part["quantization"]]
    skipped = session.data.record.get("skipped", {})
    if skipped:
        first, reason = next(iter(skipped.items()))
        reporter.say(f"data: images left out: {len(skipped)}, the first: {first}: {reason}")

    given = recipe.model.weights
    files = [str(Path(given).resolve())] if given is not None and not is_published(given) else []
    training = part["float_training"] if given is None else None
    with stages.stage("float", [common, training], files) as stage:
        if stage.go:
            if given is not None:
                reporter.say(f"the float network has the weights {given}")
                model = session.given_float()
            else:
                with reporter.stage("training the float network") as on_step:
                    model = session.train_float(on_step, None, stage.recording)
            stage.write(FLOAT_WEIGHTS, partial(session.save, model))

    with stages.stage(
        "indicators",
        [*quantized, session.fraction_key(), part["bits"], part["joint"]],
        [FLOAT_WEIGHTS],
    ) as stage:
        if stage.go:
            with reporter.stage("joint training of the indicators") as on_step:
                indicators, prepared = session.train_indicators(
                    session.float_model(folder / FLOAT_WEIGHTS), on_step, None, stage.recording
                )
            stage.write(JOINT_WEIGHTS, partial(session.save, prepared))
            stage.write(INDICATORS, indicators.save)

    with stages.stage("profile", quantized) as stage:
        if stage.go:
            stage.write(COSTS, session.profile().save)
    costs = from_main(lambda: Costs.load(folder / COSTS))

    table = recipe.search.latency_table
    measured = [] if table is None else [str(Path(table).resolve())]
    with stages.stage("search", [part["search"]], [INDICATORS, COSTS, *measured]) as stage:
        if stage.go:
            found = from_main(
                lambda: search_policy(recipe, Indicators.load(folder / INDICATORS), costs)
            )
            stage.write(POLICY, found.save)
    policy = from_main(lambda: Policy.load(folder / POLICY))
    for line in _budgets_in_words(policy):
        reporter.say(line)

    joint = recipe.finetune.init == "joint"
    tuned = [*quantized, part["finetune"], part["bits"] if joint else None]
    start = [FLOAT_WEIGHTS, JOINT_WEIGHTS] if joint else [FLOAT_WEIGHTS]
    joint_weights = folder / JOINT_WEIGHTS if joint else None
    with stages.stage("finetune", tuned, [*start, POLICY]) as stage:
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
            stage.write(FINETUNED, partial(session.save, model))

    uniform = session.uniform_policy(costs)
    with stages.stage("baseline", [*tuned, part["baseline"]], [*start, COSTS]) as stage:
        if stage.go:
            level = recipe.baseline
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
            stage.write(UNIFORM_POLICY, uniform.save)
            stage.write(UNIFORM_FINETUNED, partial(session.save, model))

    float_bits = dict.fromkeys((layer.name for layer in costs.layers), (32, 32))
    results = []
    with stages.stage("evaluate", [], always=True) as stage:
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
                    (size_bits + 32 * costs.parameters_in_float()) / 8,
                )
            )
    return RunReport(tuple(results), stages.seconds, tuple(stages.reused), folder)


@contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Make a folder, for process 0, and leave none behind where nothing was written into it."""
    made: list[Path] = []

    def make() -> None:
        made.extend(path for path in (folder, *folder.parents) if not path.exists())
        folder.mkdir(parents=True, exist_ok=True)

    from_main(make)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()
        raise


def _budgets_in_words(policy: Policy) -> list[str]:
    """What the policy uses of every budget, a line each."""
    if not policy.budgets:
        return ["search: no budget limits the policy"]
    return [
        f"search: {budget.name} limit {budget.limit:,.10g}, used {budget.used:,.10g}"
        for budget in policy.budgets
    ]


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

    def check(self) -> None:
        """Look, before anything trains, for what would keep a later stage from its work.

        The search is tried with indicators that stand in for the learned ones.

        Raises:
            ValueError: A part of the recipe cannot be done: the network cannot be prepared, a
                training does not fit data or device, the search's question is wrong.
            InfeasibleError: No policy keeps the budgets and restrictions.
            FileNotFoundError: The latency table or the float weights do not exist.
            ImportError: An extra is missing.
        """
        require("safetensors", "train")
        given = self.recipe.model.weights
        if given is not None and not is_published(given) and not Path(given).is_file():
            raise FileNotFoundError(f"weights '{given}' do not exist")
        costs = self.profile()
        from_main(lambda: check_search(self.recipe, costs))
        model = self.create_model()
        self.quantize(model, self.uniform_policy(costs))
        self._joint_trainer(self.prepare(model), Meter(self.device))
        for options in (self.recipe.float_training, self.recipe.finetune):
            self._train_loader(options)
        self._train_loader(self.recipe.joint, self.recipe.data.fraction)

    @cached_property
    def network_key(self) -> dict[str, Any]:
        """What the network is: digests of its graph, its modules and its source."""
        model, name = self.create_model(), self.recipe.model.name
        return {
            **self.origin,
            "structure": structure_digest(model),
            "source": source_digest(model, name.partition(":")[0] if ":" in name else None),
        }

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What the metadata of weights say of the network that they are of.

        Nothing, where its forward cannot be followed: it can be evaluated all the same.
        """
        try:
            graph = graph_digest(self.create_model(), self.example_input())
        except ValueError:
            return {}
        return {"graph": graph, "input_shape": list(self.data.image_shape)}

    def common_key(self) -> dict[str, Any]:
        """What every stage depends on."""
        part = self.recipe.model_dump(mode="json", include={"seed", "model"})
        return {**part, "network": self.network_key, "data": self.data_key()}

    def fraction_key(self) -> Any:
        """What part of the training images the indicators are trained on."""
        data = self.recipe.data
        return {"fraction": data.fraction, "seed": data.seed if data.fraction < 1 else None}

    def save(self, model: nn.Module, path: Path) -> None:
        """Write weights, with what they are of."""
        save_weights(model, path, network=self.origin)

    def _load(self, model: nn.Module, path: Path) -> None:
        """Load weights, which have to be of this network where they say of which they are."""
        load_weights(model, path, network=self.origin)

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
        from_main(lambda: self._load(model, weights))
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
        prepared.to(self.device).to(memory_format=layout).train()
        meter = Meter(self.device)
        trainer = self._joint_trainer(prepared, meter)

        def take_step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            losses = trainer.step(x.contiguous(memory_format=layout), target).losses
            for branch, loss in losses.items():
                meter.add(f"loss {branch}", loss)
            return torch.stack(list(losses.values())).mean()

        run_epochs(
            take_step,
            trainer.optimizer,
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

    def _joint_trainer(self, prepared: nn.Module, meter: Meter) -> JointTrainer:
        """What trains a prepared model as the recipe says."""
        options = self.recipe.joint
        optimizer = make_optimizer(
            prepared,
            options.optimizer,
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )

        def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(output, target, label_smoothing=options.label_smoothing)

        return JointTrainer(
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

    def uniform_policy(self, costs: Costs) -> Policy:
        """The baseline's policy."""
        level = self.recipe.baseline
        return Policy.uniform(costs, level.weight_bits, level.activation_bits)

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
            from_main(lambda: self._load(start, joint_weights))
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
        from_main(lambda: self._load(model, weights))
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
        """How a network does on a split.

        Raises:
            ValueError: The network puts out what is not finite.
        """
        result = evaluate(model, self._eval_loader(split), on_step=on_step)
        if not math.isfinite(result.loss):
            raise ValueError(
                f"the loss on the {split} images is {result.loss}: the network puts out NaN or"
                " infinite scores"
            )
        return result

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


def check_search(recipe: Recipe, costs: Costs) -> None:
    """See whether a recipe's search can have an answer, whatever its indicators will be.

    Raises:
        ValueError: Its question is wrong: unknown bits, a latency table with holes, ...
        InfeasibleError: No policy keeps its budgets and restrictions.
        FileNotFoundError: The latency table does not exist.
    """
    falling = {bits: 1 / bits for bits in recipe.bits}
    stand_in = Indicators(
        recipe.bits, tuple(LayerIndicators(layer.name, falling, falling) for layer in costs.layers)
    )
    question = recipe.search.question()
    limit = question.get("time_limit")
    question["time_limit"] = CHECK_SECONDS if limit is None else min(limit, CHECK_SECONDS)
    try:
        with suppress(TimeoutError):  # the search itself may take longer
            search(stand_in, costs, **{**question, "gap": 1.0})  # type: ignore[arg-type]  # a Question
    except InfeasibleError:
        with suppress(TimeoutError):
            search(stand_in, costs, **question)  # says exactly what could be kept
        raise


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


def _note_broken(data: Data, stages: Stages, reporter: Reporter) -> None:
    """Say which files broke while they were loaded, and write it down beside the splits."""
    names = sorted({name for process in gather(data.broken()) for name in process})
    if names != data.record.get("broken_while_loading", []):
        data.record["broken_while_loading"] = names
        stages.write_data(lambda: write_json(stages.folder / DATA, data.record))
        reporter.say(
            f"data: images that could not be read and were replaced by others: {len(names)},"
            f" such as {names[-1]}"
        )


def _by_layer(indicators: Indicators) -> Record:
    return {
        layer.name: {
            "weight": {str(bits): value for bits, value in layer.weight.items()},
            "activation": {str(bits): value for bits, value in layer.activation.items()},
        }
        for layer in indicators.layers
    }
