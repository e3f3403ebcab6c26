"""What commands print and write."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from limpq_ext.allocation.budgets import in_words
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from limpq_ext.app.recipe import Recipe
    from limpq_ext.app.results import RunReport
    from limpq_ext.training.loop import Recording, StepDone
    from limpq_ext.values.costs import Costs
    from limpq_ext.values.policy import Policy


_FILE_COLUMNS: Final = 120
"""Of tables that are not printed to a terminal."""


def say(text: str = "", *, file: TextIO | None = None) -> None:
    """Print text, in which a terminal finds nothing to obey: names come from files of others."""
    shown = "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
    print(shown, file=file or sys.stdout, flush=True)


def is_first() -> bool:
    """Whether this is the only process, or the one of several that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def check_outputs(
    outputs: Mapping[str, Path | None], force: bool, *, checkpoint: bool = False
) -> None:
    """Nothing is overwritten unasked, and this is found out before the work is done.

    Args:
        outputs: The files to write, by option; "--out" is the first.
        force: They may exist.
        checkpoint: There will be a checkpoint beside the first.
    """
    taken: dict[str, str] = {}
    if checkpoint and outputs["--out"] is not None:
        taken[os.path.realpath(_checkpoint_of(outputs["--out"]))] = "the checkpoint of --out"
    for option, path in outputs.items():
        if path is None:
            continue
        if path.is_dir():
            raise ValueError(f"{option}: '{path}' is a folder")
        if not path.parent.is_dir():
            raise ValueError(f"{option}: the folder '{path.parent}' does not exist")
        if path.exists() and not force:
            raise ValueError(f"{option}: '{path}' exists; --force replaces it")
        other = taken.setdefault(os.path.realpath(path), option)
        if other != option:
            raise ValueError(f"{option}: '{path}' is {other} already: give another name")


def write(path: Path, force: bool, save: Callable[[Path], object]) -> None:
    """Write an output; without --force nothing that appeared meanwhile is replaced."""
    from limpq_ext.app.locks import save_as_new

    if force:
        save(path)
    else:
        save_as_new(path, save)


def _checkpoint_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same output and its checkpoint."""
    from limpq_ext.app.locks import only_one

    with only_one(out.with_name(f".{out.name}.lock"), f"'{out}'"):
        yield


def recording_beside(out: Path, recipe: Recipe, settings: Any, **inputs: Path) -> Recording:
    """Records a stage with a checkpoint beside its output."""
    from limpq_ext.app.stages import digest_of, make_recording
    from limpq_ext.training.distributed import from_main
    from limpq_ext.training.metrics import Journal

    key = from_main(lambda: digest_of(settings, inputs))
    journal = Journal(out.name, (), make_reporter().say)
    return make_recording(recipe, checkpoint=_checkpoint_of(out), key=key, journal=journal)


def remove_checkpoint(recording: Recording | None) -> None:
    """Remove the checkpoint of a stage that is done."""
    if recording is not None and recording.checkpoint is not None:
        recording.checkpoint.remove()


def print_policy(policy: Policy, costs: Costs) -> None:
    """Print the bits of every layer, what they use of the budgets, and sizes."""
    names = [layer.name for layer in policy.layers]
    width = max(map(len, ["layer", *names]))
    say(f"{'layer':<{width}}  weight bits  activation bits")
    for layer in policy.layers:
        say(f"{layer.name:<{width}}  {layer.weight_bits:>11}  {layer.activation_bits:>15}")
    for record in policy.meta.get("non_monotone_records", []):
        say("not monotone: " + ", ".join(f"{key} {value}" for key, value in record.items()))
    say(
        f"objective {policy.objective:.9f}, bound {policy.bound:.9f}, gap {policy.gap:.1e}"
        f" (stopped by: {policy.meta['stopped_by']}), {policy.meta['seconds']:.3f} s"
    )
    bits = policy.bits()
    for budget in policy.budgets:
        used, limit = (in_words(budget.name, value) for value in (budget.used, budget.limit))
        say(f"{budget.name}: {used} used, limit {limit}")
    for check in policy.meta["check"]:
        kept = "kept" if check["used"] <= check["limit"] else "BROKEN"
        say(
            f"checked in integers: {check['name']} {check['used']:,} <= {check['limit']:,}"
            f" {check['unit']}: {kept}"
        )
    say(f"BitOps {costs.bitops(bits) / 1e9:.3f} G")
    sizes = costs.sizes(bits)
    for title, prefix in (("quantized layers", ""), ("whole network", "total_")):
        size, ratio = sizes[f"{prefix}size"], sizes[f"{prefix}compression"]
        if size is not None:
            smaller = "" if ratio is None else f", {ratio:.2f} times smaller than in float32"
            say(f"{title}: {size / 1e3:,.1f} KB{smaller}")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, texts: Sequence[str] = ()
) -> None:
    """Print a table, whose first column is text and whose others are numbers.

    Args:
        title: Above it.
        columns: Their titles.
        rows: The cells.
        texts: Titles of other columns that are text.
    """
    console, table_class = (
        require("rich.console", "cli").Console,
        require("rich.table", "cli").Table,
    )
    table = table_class(title=title)
    for column in columns:
        text = column in (columns[0], *texts)
        table.add_column(column, justify="left" if text else "right")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else _FILE_COLUMNS
    console(file=sys.stdout, width=width).print(table)


def print_report(report: RunReport) -> None:
    """Print the results of a run, the seconds of its stages, and its files."""
    checked = any(result.untrained is not None for result in report.results)
    titles = ["network", "accuracy (%)", "BitOps (G)", "weights (KB)", "compression", "all (KB)"]
    titles.append("file (KB)")
    if checked:
        titles.insert(1, "KL before tuning")
    rows = []
    for result in report.results:
        untrained = "" if result.untrained is None else f"{result.untrained:.4f}"
        file = "" if result.file_bytes is None else f"{result.file_bytes / 1e3:.1f}"
        rows.append(
            (
                result.name,
                *([untrained] if checked else []),
                f"{100 * result.accuracy:.2f}",
                f"{result.bitops / 1e9:.4f}",
                f"{result.size_bytes / 1e3:.1f}",
                f"{result.compression:.2f}",
                f"{result.total_bytes / 1e3:.1f}",
                file,
            )
        )
    print_table("Results on the test set", titles, rows)
    for warning in report.warnings:
        say(f"warning: before fine-tuning {warning}")
    stages = [
        (name, f"{seconds:.1f}", "reused" if name in report.reused else "")
        for name, seconds in report.seconds.items()
    ]
    print_table("Seconds in each stage", ("stage", "seconds", ""), stages, texts=("",))
    say(f"files: {report.folder.resolve()}")
    for path in sorted(report.folder.iterdir()):
        say(f"  {path.name}  {path.stat().st_size / 1e3:.1f} KB")


def make_reporter() -> _Reporter:
    """What says how far a stage is; of several processes one does."""
    return _Reporter() if is_first() else _SilentReporter()


class _Reporter:
    """Progress bars on a terminal, a plain line at the start and end of a stage elsewhere."""

    def say(self, line: str) -> None:
        say(line)

    @contextmanager
    def stage(self, title: str) -> Iterator[StepDone]:
        if not sys.stdout.isatty():
            yield self._plain(title)
            return
        progress = require("rich.progress", "cli")
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    def _plain(self, title: str) -> StepDone:
        start = last = time.monotonic()
        say(f"{title} ...")

        def on_step(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > 10:
                last = now
                say(f"{title}: {done} of {total} steps, {now - start:.1f} s")

        return on_step


class _SilentReporter(_Reporter):
    """For the processes that do not print."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def stage(self, title: str) -> Iterator[StepDone]:
        yield lambda done, total: None
