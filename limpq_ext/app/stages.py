"""The folder of a run: which stages are done, and that nothing else in it is touched.

``stages.json`` has for every stage a digest of its inputs (its part of the recipe and the files it
read) and of the files it wrote, and digests of the run's other files. What is not in it, or was
changed since, belongs to somebody else and is never replaced, appended to or removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Protocol

from limpq_ext.app.recipe import Recipe, dump_recipe, load_recipe
from limpq_ext.training.checkpoint import Checkpoint
from limpq_ext.training.distributed import from_main, is_main
from limpq_ext.training.loop import Recording, StepDone
from limpq_ext.training.metrics import Journal, MetricsFile, TensorBoard
from limpq_ext.values.files import Document, Strict, open_atomically, remove_leftovers
from limpq_ext.values.reading import FileFormatError

FLOAT_WEIGHTS: Final = "float.safetensors"
INDICATORS: Final = "indicators.json"
JOINT_WEIGHTS: Final = "joint.safetensors"
COSTS: Final = "costs.json"
SCORES: Final = "scores.json"
POLICY: Final = "policy.json"
CHECK: Final = "check.json"
REFINED: Final = "refined.json"
FINETUNED: Final = "finetuned.safetensors"
PACKED: Final = "policy.safetensors"
EXPORTED: Final = "policy.onnx"
UNIFORM_POLICY: Final = "uniform.json"
UNIFORM_FINETUNED: Final = "uniform.safetensors"
RECIPE: Final = "recipe.yaml"
DATA: Final = "data.json"
SCAN: Final = "scan.json"
METRICS: Final = "metrics.jsonl"
TENSORBOARD: Final = "tensorboard"
STAGES: Final = "stages.json"
LOCK: Final = ".limpq.lock"

OUTPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    "float": (FLOAT_WEIGHTS,),
    "indicators": (INDICATORS, JOINT_WEIGHTS),
    "profile": (COSTS,),
    "scores": (SCORES,),
    "search": (POLICY,),
    "check": (CHECK,),
    "refine": (REFINED,),
    "finetune": (FINETUNED,),
    "pack": (PACKED,),
    "export": (EXPORTED,),
    "baseline": (UNIFORM_POLICY, UNIFORM_FINETUNED),
    "evaluate": (),
}
"""The stages of a run in their order, and what each writes beside its records."""


class Reporter(Protocol):
    """Where a run says how far it is."""

    def stage(self, title: str) -> AbstractContextManager[StepDone]:
        """Announce a stage; gives what is called after every step of it."""

    def say(self, line: str) -> None:
        """Print one line."""


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
class _Done(Strict):
    """A stage in the record.

    Attributes:
        inputs: Digest of what it depends on.
        finished: Whether it ran to its end, with those inputs.
        outputs: Digest of each file that it wrote; None while it may be writing it.
        seconds: What it took.
    """

    inputs: str
    finished: bool
    outputs: dict[str, str | None]
    seconds: float


@dataclass(frozen=True)
class _Record(Document):
    """What ``stages.json`` holds.

    Attributes:
        stages: The stages that ran or are running.
        files: For each other file the digests that it may have; none while it is being written.
    """

    stages: dict[str, _Done] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)

    FORMAT: ClassVar[str] = "limpq-run"
    VERSION: ClassVar[int] = 1


def read_record(path: Path) -> _Record:
    """What ``stages.json`` says of a folder.

    Raises:
        OSError: It cannot be read.
        FileFormatError: It is no such file.
    """
    return _Record.load(path)


@dataclass(frozen=True)
class Stage:
    """A stage about to run, or not.

    Attributes:
        go: Whether it has to run.
        journal: Where its records go.
        recording: The same with its checkpoint.
        write_file: Writes one of its outputs, see :meth:`write`.
    """

    go: bool
    journal: Journal
    recording: Recording
    write_file: Callable[[str, Callable[[Path], object]], None]

    def write(self, name: str, save: Callable[[Path], object]) -> None:
        """Write an output in process 0; the others wait, and fail where it does.

        Args:
            name: One of the stage's outputs.
            save: Writes the path that it is given.

        Raises:
            ValueError: Somebody else wrote the file since the stage began.
        """
        from_main(lambda: self.write_file(name, save))


class Stages:
    """Runs the stages of a folder, or finds that they need not run.

    Making one checks every file of the folder that a run would write, and changes nothing but what
    ``fresh`` asks for; :meth:`begin` writes the first files.

    Args:
        folder: It exists, and no other run works in it.
        fresh: Run every stage again and remove all checkpoints.
        reporter: Gets lines.
        recipe: What is run.

    Raises:
        ValueError: A file in the folder was not written, or was changed since, by a run, or
            ``stages.json`` is no such file.
    """

    def __init__(self, folder: Path, fresh: bool, reporter: Reporter, recipe: Recipe) -> None:
        self.folder = folder
        self.reporter = reporter
        self.recipe = recipe
        self.seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self.after_each: list[Callable[[], None]] = []
        self._files: list[Any] = [MetricsFile(folder / METRICS)]
        self._record = _Record()
        self._found: dict[str, str | None] = {}
        from_main(lambda: self._open(fresh))

    def _open(self, fresh: bool) -> None:
        """Read the record of the folder and see that all is as it says."""
        folder = self.folder
        if self.recipe.tensorboard:
            self._files.append(TensorBoard(folder / TENSORBOARD))
        if (folder / STAGES).exists():
            self._record = read_record(folder / STAGES)
        for name in (STAGES, RECIPE, DATA, SCAN, METRICS):
            remove_leftovers(folder / name)
        # A recipe that says the same is left as it is, comments and all.
        for name in (DATA, SCAN, METRICS, *(() if self._says_the_same() else (RECIPE,))):
            self._refuse_foreign(name, self._record.files.get(name))
        if self.recipe.tensorboard and TENSORBOARD not in self._record.files:
            self._refuse_foreign(TENSORBOARD, None)
        for stage, outputs in OUTPUTS.items():
            done = self._record.stages.get(stage)
            for name in outputs:
                remove_leftovers(folder / name)
                self._refuse_foreign(name, _allowed(done, name))
            if done is None:
                self._refuse_foreign(_checkpoint_name(stage), None)
        # What torchrun starts again after a failure goes on with the run that it started.
        if fresh and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
            for name, done in self._record.stages.items():
                Checkpoint(folder / _checkpoint_name(name), key=done.inputs).remove()
                self._note_stage(name, replace(done, finished=False))

    def begin(self, data: Callable[[], None]) -> None:
        """Write the recipe and what the data are.

        Args:
            data: Writes ``data.json``.
        """

        def write() -> None:
            if not self._says_the_same():
                text = dump_recipe(self.recipe).encode()
                # Whichever it is after a crash.
                before = self._record.files.get(RECIPE, ())
                self._note_file(RECIPE, *before, hashlib.sha256(text).hexdigest())
                with open_atomically(self.folder / RECIPE) as file:
                    file.write(text)
                self._note_file(RECIPE, hashlib.sha256(text).hexdigest())
            if self.recipe.tensorboard:
                self._note_file(TENSORBOARD)

        from_main(write)
        self.write_data(data)

    def write_data(self, write: Callable[[], None]) -> None:
        """Write ``data.json``, which nobody else may have changed since it was written last."""

        def checked() -> None:
            self._refuse_foreign(DATA, self._record.files.get(DATA))
            with self.writing(DATA):
                write()

        from_main(checked)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """A block in which process 0 writes a file of the run."""
        if not is_main():
            yield
            return
        self._note_file(name)
        try:
            yield
        finally:
            self._note_written(name)

    @contextmanager
    def stage(
        self,
        name: str,
        settings: Sequence[Any],
        inputs: Sequence[str] = (),
        *,
        always: bool = False,
    ) -> Iterator[Stage]:
        """A stage that says whether it has to run; what it does in the block is recorded after.

        Args:
            name: One of :data:`OUTPUTS`.
            settings: What it depends on.
            inputs: Files that it depends on, in the folder or by their full paths.
            always: Run it in any case.

        Raises:
            FileFormatError: Its checkpoint belongs to other inputs.
        """
        go, key, seconds = from_main(lambda: self._begin(name, settings, inputs, always))
        journal = Journal(name, self._files, self.reporter.say)
        checkpoint = self.folder / _checkpoint_name(name)
        stage = Stage(
            go,
            journal,
            make_recording(self.recipe, checkpoint=checkpoint, key=key, journal=journal),
            partial(self._write, name),
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
        from_main(lambda: self._finish(name, key))

    def _begin(
        self, name: str, settings: Sequence[Any], inputs: Sequence[str], always: bool
    ) -> tuple[bool, str, float]:
        """Whether the stage has to run, the digest of its inputs, and what it took before."""
        key = digest_of(settings, {file: self.folder / file for file in inputs})
        outputs, before = OUTPUTS[name], self._record.stages.get(name)
        checkpoint = Checkpoint(self.folder / _checkpoint_name(name), key=key)
        if before is not None and before.finished:
            # A run that was killed between its end and the removal left it.
            Checkpoint(checkpoint.path, key=before.inputs).remove()
            whole = all((self.folder / file).exists() for file in outputs)
            if before.inputs == key and whole and not always:
                self.reporter.say(f"{name}: nothing it depends on has changed, reused")
                return False, key, before.seconds
        elif before is not None and before.inputs != key and checkpoint.path.exists():
            raise FileFormatError(
                f"{checkpoint.path}: this checkpoint belongs to another recipe or other inputs; go"
                " on with those, or remove it to start this stage over"
            )
        for file in outputs:
            self._refuse_foreign(file, _allowed(before, file))
            self._found[file] = _digest_or_none(self.folder / file)
        self._refuse_foreign(METRICS, self._record.files.get(METRICS))
        self._note_file(METRICS)  # it grows from now on
        known = {} if before is None else before.outputs
        self._note_stage(name, _Done(key, False, known, 0.0))
        return True, key, 0.0

    def _write(self, stage: str, name: str, save: Callable[[Path], object]) -> None:
        path, done = self.folder / name, self._record.stages[stage]
        if _digest_or_none(path) != self._found[name]:
            raise ValueError(
                f"{path} was written by somebody else meanwhile and would be overwritten: move it"
                " away and give the same command again"
            )
        # Whichever file it is after a crash.
        self._note_stage(stage, replace(done, outputs={**done.outputs, name: None}))
        save(path)
        self._note_stage(stage, replace(done, outputs={**done.outputs, name: _digest(path)}))

    def _finish(self, name: str, key: str) -> None:
        self._note_written(METRICS)
        outputs = self._record.stages[name].outputs
        self._note_stage(name, _Done(key, True, outputs, round(self.seconds[name], 3)))
        Checkpoint(self.folder / _checkpoint_name(name), key=key).remove()

    def _note_stage(self, name: str, done: _Done) -> None:
        self._save(replace(self._record, stages={**self._record.stages, name: done}))

    def _note_file(self, name: str, *digests: str) -> None:
        self._save(replace(self._record, files={**self._record.files, name: digests}))

    def _note_written(self, name: str) -> None:
        if (self.folder / name).exists():
            self._note_file(name, _digest(self.folder / name))
        else:
            files = {file: d for file, d in self._record.files.items() if file != name}
            self._save(replace(self._record, files=files))

    def _save(self, record: _Record) -> None:
        self._record = record
        record.save(self.folder / STAGES)

    def _says_the_same(self) -> bool:
        """Whether the folder's recipe is the one that is run."""
        try:
            return load_recipe(self.folder / RECIPE) == self.recipe
        except (OSError, ValueError):
            return False

    def _refuse_foreign(self, name: str, allowed: Sequence[str] | None) -> None:
        """Keep files that no run wrote, or that somebody edited.

        Args:
            name: The file.
            allowed: The digests that it may have, any where there are none; None: it is not of the
                run.
        """
        path = self.folder / name
        if not path.exists():
            return
        if allowed is None:
            how = "is not of a run"
        elif allowed and _digest(path) not in allowed:
            how = "was changed since a run wrote it"
        elif not allowed and name == METRICS and not _is_metrics(path):
            how = "has lines that no run wrote"
        else:
            return
        raise ValueError(
            f"{path} {how} and would be overwritten: move it away or choose another --out"
        )


def _allowed(done: _Done | None, output: str) -> tuple[str, ...] | None:
    if done is None or output not in done.outputs:
        return None
    digest = done.outputs[output]
    return () if digest is None else (digest,)


def _is_metrics(path: Path) -> bool:
    """Whether all lines are records; a killed run may have cut the last one short."""
    *lines, _ = path.read_bytes().split(b"\n")
    try:
        return all(json.loads(line)["stage"] in OUTPUTS for line in lines)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _checkpoint_name(stage: str) -> str:
    return f"{stage}.checkpoint"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_or_none(path: Path) -> str | None:
    return _digest(path) if path.exists() else None
