"""All stages of a run in one folder, each reused where nothing it depends on has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from limpq_ext.allocation.budgets import in_words
from limpq_ext.allocation.search import search
from limpq_ext.allocation.target import shipped_targets
from limpq_ext.app.check import check
from limpq_ext.app.exporting import NOT_TRAINED, accuracy_of_file, export_network
from limpq_ext.app.locks import only_one
from limpq_ext.app.recipe import AUTO, LEARNED, Recipe
from limpq_ext.app.results import (
    Result,
    RunReport,
    evaluate_network,
    result_of,
)
from limpq_ext.app.scoring import check_policy, measure_scores, refine_policy
from limpq_ext.app.session import Session
from limpq_ext.app.stages import (
    CHECK,
    COSTS,
    DATA,
    EXPORTED,
    FINETUNED,
    FLOAT_WEIGHTS,
    INDICATORS,
    JOINT_WEIGHTS,
    LOCK,
    PACKED,
    POLICY,
    REFINED,
    SCAN,
    SCORES,
    UNIFORM_FINETUNED,
    UNIFORM_POLICY,
    Reporter,
    Stage,
    Stages,
)
from limpq_ext.app.trainings import finetune_policy, train_float, train_indicators
from limpq_ext.data.loading import Data
from limpq_ext.export.packed import save
from limpq_ext.nn.named import is_published
from limpq_ext.scores.check import ScoreCheck
from limpq_ext.training.distributed import from_main, gather
from limpq_ext.values.costs import Costs
from limpq_ext.values.files import write_json
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy


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
    check(session)
    stages.after_each.append(lambda: _note_broken(session.data, stages, reporter))
    stages.begin(lambda: write_json(folder / DATA, session.data.record))
    part = recipe.model_dump(mode="json")
    common = session.common_key()
    _say_skipped(session.data, reporter)

    # What the stages depend on: parts of the recipe, and files beside those of the run.
    weights = recipe.model.weights
    given = [] if weights is None or is_published(weights) else [str(Path(weights).resolve())]
    target = recipe.search.target
    own_target = None if target in shipped_targets() else target
    read = (recipe.search.latency_table, own_target, recipe.search.interactions)
    measured = [str(Path(path).resolve()) for path in read if path is not None]
    training = part["float_training"] if weights is None else None
    quantized = [common, part["quantization"]]
    images = session.fraction_key()
    learning = [*quantized, images, part["bits"], part["joint"]]
    scoring = [*quantized, images, part["bits"], part["scores"]]
    checking = [*quantized, images, part["scores"], part["check"], part["search"]]
    auto = [part["check"], part["search"]] if recipe.scores.method == AUTO else []
    joint = recipe.finetune.init == "joint"
    tuning = [*quantized, part["finetune"], part["bits"] if joint else None]
    start = [FLOAT_WEIGHTS, JOINT_WEIGHTS] if joint else [FLOAT_WEIGHTS]

    work = _Work(session, folder, reporter)
    indicators, policy = work.indicators_file, work.policy_file
    asked = [FLOAT_WEIGHTS, indicators, COSTS, *measured]

    def stage(
        name: str, do: Callable[[Stage], None], settings: Sequence[Any], inputs: Sequence[str]
    ) -> None:
        with stages.stage(name, settings, inputs) as own:
            if own.go:
                do(own)

    stage("float", work.make_float, [common, training], given)
    if recipe.scores.method == LEARNED:
        stage("indicators", work.learn_indicators, learning, [FLOAT_WEIGHTS])
    stage("profile", work.count_costs, quantized, [])
    if recipe.scores.method != LEARNED:
        found = [FLOAT_WEIGHTS, *([COSTS, *measured] if auto else [])]
        stage("scores", work.measure_scores, [*scoring, *auto], found)
    stage("search", work.find_policy, [part["search"]], [indicators, COSTS, *measured])
    for line in _budgets_in_words(work.found):
        reporter.say(line)
    checked: ScoreCheck | None = None
    if recipe.check.random and work.found.budgets:
        try:
            stage("check", work.check_policy, checking, asked)
        except _NotCheckedError as reason:
            reporter.say(f"check: left out: {reason}")
        else:
            checked = work.checked
            for line in (*checked.text().splitlines(), *checked.warnings()):
                reporter.say(f"check: {line}")
    if recipe.refine.wanted:
        stage("refine", work.refine_policy, [*checking, part["refine"]], [*asked, POLICY])
        reporter.say(_refined_in_words(work.policy))
    stage("finetune", work.tune_policy, tuning, [*start, policy])
    exporting = [("pack", PACKED, work.pack_policy, quantized)]
    if recipe.export.wanted:
        depends = [*quantized, images, part["export"]]
        exporting.append(("export", EXPORTED, work.export_policy, depends))
    files = []
    for name, file, do, depends in exporting:
        try:
            stage(name, do, depends, [FINETUNED, policy])
        except _NotExportedError as reason:
            reporter.say(f"{name}: left out: {reason}")
        else:
            files.append(file)
    stage("baseline", work.tune_uniform, [*tuning, part["baseline"]], [*start, COSTS])
    with stages.stage("evaluate", [], always=True) as own:
        results = tuple(work.evaluate(own, checked, files))
    warnings = () if checked is None or recipe.refine.wanted else checked.warnings()
    return RunReport(results, stages.seconds, tuple(stages.reused), folder, warnings)


class _NotExportedError(Exception):
    """Why there is no file of a network; a run that does not insist on it goes on without."""


class _NotCheckedError(Exception):
    """Why a policy cannot be compared with others; a run goes on without."""


@dataclass(frozen=True)
class _Work:
    """What the stages do, with files that stages before them wrote.

    Attributes:
        session: The recipe.
        folder: Where the files are.
        reporter: Gets titles, progress and lines.
    """

    session: Session
    folder: Path
    reporter: Reporter

    @cached_property
    def costs(self) -> Costs:
        """What the profile wrote."""
        return from_main(lambda: Costs.load(self.folder / COSTS))

    @property
    def indicators_file(self) -> str:
        """What the search reads."""
        return INDICATORS if self.session.recipe.scores.method == LEARNED else SCORES

    @property
    def policy_file(self) -> str:
        """What is fine-tuned."""
        return REFINED if self.session.recipe.refine.wanted else POLICY

    @cached_property
    def indicators(self) -> Indicators:
        """What joint training or the scores wrote."""
        return from_main(lambda: Indicators.load(self.folder / self.indicators_file))

    @cached_property
    def found(self) -> Policy:
        """What the search wrote."""
        return from_main(lambda: Policy.load(self.folder / POLICY))

    @cached_property
    def policy(self) -> Policy:
        """What is fine-tuned: what the search wrote, or what that was refined to."""
        return from_main(lambda: Policy.load(self.folder / self.policy_file))

    @cached_property
    def checked(self) -> ScoreCheck:
        """What the check wrote."""
        return from_main(lambda: ScoreCheck.load(self.folder / CHECK))

    @property
    def uniform(self) -> Policy:
        """The baseline."""
        return self.session.uniform_policy(self.costs)

    def make_float(self, stage: Stage) -> None:
        given = self.session.recipe.model.weights
        if given is not None:
            self.reporter.say(f"the float network has the weights {given}")
            model = self.session.given_float()
        else:
            with self.reporter.stage("training the float network") as on_step:
                model = train_float(self.session, on_step=on_step, recording=stage.recording)
        stage.write(FLOAT_WEIGHTS, partial(self.session.save, model))

    def learn_indicators(self, stage: Stage) -> None:
        with self.reporter.stage("joint training of the indicators") as on_step:
            indicators, prepared = train_indicators(
                self.session,
                self.session.float_model(self.folder / FLOAT_WEIGHTS),
                on_step=on_step,
                recording=stage.recording,
            )
        stage.write(JOINT_WEIGHTS, partial(self.session.save, prepared))
        stage.write(INDICATORS, indicators.save)

    def measure_scores(self, stage: Stage) -> None:
        method = self.session.recipe.scores.method
        with self.reporter.stage(f"measuring the scores ({method})"):
            model = self.session.float_model(self.folder / FLOAT_WEIGHTS)
            scores = measure_scores(self.session, model, self.reporter.say, self.costs)
        stage.write(SCORES, scores.save)

    def count_costs(self, stage: Stage) -> None:
        stage.write(COSTS, self.session.profile().save)

    def find_policy(self, stage: Stage) -> None:
        costs, asked, indicators = self.costs, self.session.recipe.search, self.indicators
        found = from_main(lambda: search(indicators, costs, **asked.question()))
        stage.write(POLICY, found.save)

    def check_policy(self, stage: Stage) -> None:
        with self.reporter.stage("checking what the policy is worth") as on_step:
            model = self.session.float_model(self.folder / FLOAT_WEIGHTS)
            check = check_policy(self.session, model, self.indicators, self.costs, on_step)
        if isinstance(check, str):
            raise _NotCheckedError(check)
        stage.journal.start()
        for policy in check.policies:
            stage.journal.write(
                {"policy": policy.kind, "kl": policy.loss, "agreement": policy.agreement}
            )
        stage.write(CHECK, check.save)

    def refine_policy(self, stage: Stage) -> None:
        with self.reporter.stage("refining the policy") as on_step:
            model = self.session.float_model(self.folder / FLOAT_WEIGHTS)
            refined = refine_policy(
                self.session, model, self.found, self.indicators, self.costs, on_step
            )
        stage.write(REFINED, refined.save)

    def tune_policy(self, stage: Stage) -> None:
        model = self._tuned(self.policy, "fine-tuning the policy", stage)
        stage.write(FINETUNED, partial(self.session.save, model))

    def pack_policy(self, stage: Stage) -> None:
        model = self.session.network(self.folder / FINETUNED, self.policy)
        name = self.session.recipe.model.name

        def pack(path: Path) -> None:
            save(model, path, policy=self.policy, name=name, overwrite=True)

        try:
            stage.write(PACKED, pack)
        except ValueError as error:
            raise _NotExportedError(str(error)) from error

    def export_policy(self, stage: Stage) -> None:
        options = self.session.recipe.export
        model = self.session.network(self.folder / FINETUNED, self.policy)

        def export(path: Path) -> None:
            made = export_network(
                self.session,
                model,
                path,
                shift=options.shift,
                residual_bits=options.residual_bits,
                images=options.images,
                engines=options.engines,
                threads=options.threads,
                overwrite=True,
            )
            for own in made.verified:
                self.reporter.say(f"export: {own}")
            if options.residual_bits is not None:
                self.reporter.say(f"export: {NOT_TRAINED}")

        with self.reporter.stage("exporting the policy's network"):
            try:
                stage.write(EXPORTED, export)
            except (ValueError, ImportError) as error:
                if options.onnx:
                    raise
                raise _NotExportedError(str(error)) from error

    def tune_uniform(self, stage: Stage) -> None:
        level = self.session.recipe.baseline
        title = f"fine-tuning uniform W{level.weight_bits}A{level.activation_bits}"
        model = self._tuned(self.uniform, title, stage)
        stage.write(UNIFORM_POLICY, self.uniform.save)
        stage.write(UNIFORM_FINETUNED, partial(self.session.save, model))

    def _tuned(self, policy: Policy, title: str, stage: Stage) -> nn.Module:
        joint = self.session.recipe.finetune.init == "joint"
        with self.reporter.stage(title) as on_step:
            return finetune_policy(
                self.session,
                self.session.float_model(self.folder / FLOAT_WEIGHTS),
                policy,
                on_step=on_step,
                recording=stage.recording,
                joint_weights=self.folder / JOINT_WEIGHTS if joint else None,
            )

    def evaluate(
        self, stage: Stage, checked: ScoreCheck | None, files: Sequence[str]
    ) -> Iterator[Result]:
        stage.journal.start()
        untrained = {} if checked is None else self._untrained(checked)
        float_network = self.session.network(self.folder / FLOAT_WEIGHTS, None)
        for name, policy, weights, file in (
            ("float", None, FLOAT_WEIGHTS, FLOAT_WEIGHTS),
            ("policy", self.policy, FINETUNED, PACKED),
            ("uniform", self.uniform, UNIFORM_FINETUNED, None),
        ):
            with self.reporter.stage(f"evaluating {name}") as on_step:
                model = self.session.network(self.folder / weights, policy)
                reference = None if policy is None else float_network
                evaluation, confusion = evaluate_network(
                    self.session, model, reference, on_step=on_step
                )
            numbers = {"network": name, **asdict(evaluation)}
            if confusion is not None:
                numbers |= asdict(confusion)
                del numbers["counts"]
            stage.journal.write(numbers)
            yield result_of(
                name,
                evaluation.accuracy,
                self.costs,
                policy,
                untrained=untrained.get(name),
                file_bytes=self._size_of(file) if file in (FLOAT_WEIGHTS, *files) else None,
            )
            if name == "policy" and EXPORTED in files:
                yield self._evaluated_file(stage)

    def _evaluated_file(self, stage: Stage) -> Result:
        """What the exported file comes to in an engine."""
        path, threads = self.folder / EXPORTED, self.session.recipe.export.threads
        with self.reporter.stage(f"evaluating {EXPORTED}") as on_step:
            accuracy = accuracy_of_file(self.session, path, threads=threads, on_step=on_step)
        stage.journal.write({"network": EXPORTED, "accuracy": accuracy})
        size = self._size_of(EXPORTED)
        return result_of(EXPORTED, accuracy, self.costs, self.policy, file_bytes=size)

    def _size_of(self, file: str) -> int:
        return from_main(lambda: (self.folder / file).stat().st_size)

    def _untrained(self, checked: ScoreCheck) -> dict[str, float]:
        """What the policies that are tuned lose before that, as far as it was measured."""
        losses = {
            (policy.weight_bits, policy.activation_bits): policy.loss for policy in checked.policies
        }
        found = {}
        for name, policy in (("policy", self.policy), ("uniform", self.uniform)):
            loss = losses.get(_bits_of(policy, checked.layers))
            if name == "policy" and "refined" in policy.meta:
                loss = policy.meta["refined"]["held_out"]["after"]
            if loss is not None:
                found[name] = loss
        return found


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


def _say_skipped(data: Data, reporter: Reporter) -> None:
    """Say which image files are left out."""
    skipped = data.record.get("skipped", {})
    if skipped:
        first, reason = next(iter(skipped.items()))
        reporter.say(f"data: images left out: {len(skipped)}, the first: {first}: {reason}")


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


def _bits_of(policy: Policy, layers: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The bits of the weights and of the activations, in the order of these layers."""
    bits = policy.bits()
    return tuple(bits[name][0] for name in layers), tuple(bits[name][1] for name in layers)


def _refined_in_words(policy: Policy) -> str:
    """What refinement brought, on the images that it did not see too."""
    told = policy.meta["refined"]
    other = told["held_out"]
    return (
        f"refine: {len(told['record'])} policies measured, KL {told['before']:.4g} ->"
        f" {told['after']:.4g}, on other images {other['before']:.4g} -> {other['after']:.4g}"
    )


def _budgets_in_words(policy: Policy) -> list[str]:
    """What the policy uses of every budget, a line each."""
    if not policy.budgets:
        return ["search: no budget limits the policy"]
    return [
        f"search: {name} limit {in_words(name, budget.limit)}, used {in_words(name, budget.used)}"
        for budget in policy.budgets
        for name in (budget.name,)
    ]
