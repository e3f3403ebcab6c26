"""``limpq``: the list of commands, and how they end."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Annotated, Final

from limpq_ext.app.cli.evaluate import evaluate
from limpq_ext.app.cli.export import export
from limpq_ext.app.cli.finetune import finetune
from limpq_ext.app.cli.indicators import indicators
from limpq_ext.app.cli.info import info
from limpq_ext.app.cli.measure import measure
from limpq_ext.app.cli.output import is_first, say
from limpq_ext.app.cli.profile import profile
from limpq_ext.app.cli.run import recipes, run
from limpq_ext.app.cli.scores import check_scores, scores
from limpq_ext.app.cli.search import pareto, search
from limpq_ext.training.signals import Interrupted, MainProcessError
from limpq_ext.values.optional import require

typer = require("typer", "cli")

DEBUG: Final = "--debug"

app = typer.Typer(
    name="limpq",
    help="Mixed-precision quantization by learned layer-wise importance (LIMPQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    run,
    recipes,
    indicators,
    scores,
    check_scores,
    profile,
    measure,
    search,
    pareto,
    finetune,
    evaluate,
    export,
    info,
):
    app.command()(command)


def main() -> None:
    """Run the command line; a wrong input ends with one line and exit code 2."""
    former = signal.signal(signal.SIGTERM, _terminated)
    arguments = [argument for argument in sys.argv[1:] if argument != DEBUG]
    try:
        code = app(arguments, standalone_mode=False)
        if code == 128 + signal.SIGINT:  # how it tells of Ctrl-C
            raise Interrupted(signal.SIGINT, "stopped by SIGINT")
        sys.exit(code or 0)
    except Interrupted as stop:
        if is_first():
            say(f"limpq: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.exit(_exit_code(error))
    finally:
        signal.signal(signal.SIGTERM, former)


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option(DEBUG, help="Show where an error comes from; anywhere in a command.")
    ] = False,
) -> None:
    """Mixed-precision quantization by learned layer-wise importance (LIMPQ)."""


def _terminated(number: int, frame: object) -> None:
    """SIGTERM where nothing is being trained; a training notices it itself."""
    raise Interrupted(number, "stopped by SIGTERM")


def _exit_code(error: Exception) -> int:
    """Say in one line what was wrong."""
    if isinstance(error, MainProcessError):  # process 0 says it
        return 2
    show = getattr(error, "show", None)
    if show is not None:  # an error of the command line itself, with its own exit code
        show()
        return getattr(error, "exit_code", 2)
    message = _message(error)
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError)
    if not expected or not message:
        message = f"unexpected {type(error).__name__}: {message} ({DEBUG} shows where)"
    say(f"limpq: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
