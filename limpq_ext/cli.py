"""The command line: ``limpq run`` for everything, or one command per stage."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .checkpoint import Interrupted
from .distributed import MainProcessError, process_group
from .extras import require

if TYPE_CHECKING:
    from .costs import Costs
    from .indicators import Indicators
    from .pipeline import RunReport
    from .policy import Policy
    from .recipe import Recipe
    from .training import Recording, StepDone

typer = require("typer", "cli")

app = typer.Typer(
    name="limpq",
    help="Mixed-precision quantization by learned layer-wise importance (LIMPQ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RECIPE.yaml]", help="Recipe; without one, the demonstration on digits."
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="cifar_resnet or a torchvision classifier.")
]
InputSizeOption = Annotated[
    tuple[int, int, int] | None,
    typer.Option("--input-size", help="Shape of one image: CHANNELS HEIGHT WIDTH."),
]
WeightsOption = Annotated[
    Path, typer.Option("--weights", help="Weights of the float model (.safetensors, .pt).")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
CheckpointStepsOption = Annotated[
    int | None, typer.Option(help="Write a checkpoint after so many steps; 0: not by steps.")
]
CheckpointMinutesOption = Annotated[
    float | None, typer.Option(help="Write one when so many minutes have passed; 0: not by time.")
]


@app.command()
def run(
    recipe: RecipeArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/digits"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Reuse no finished stage and no checkpoint.")
    ] = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
    log_steps: Annotated[
        int | None, typer.Option(help="Write metrics after so many steps, not epochs alone.")
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard", help="Write TensorBoard events as well.")
    ] = None,
) -> None:
    """Run the whole pipeline: float training, indicators, search, fine-tuning, evaluation.

    A second run into the same folder reuses every stage whose inputs did not change, and goes on
    with one that was interrupted. torchrun -m limpq_ext run ... runs it in several processes.
    """
    from . import pipeline

    given = _recipe(
        recipe,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
        log_steps=log_steps,
        tensorboard=tensorboard,
    )
    with process_group(pipeline.choose_device(given.device)):
        report = pipeline.run(given, out, fresh=fresh, reporter=_reporter())
    if _is_first():
        _print_report(report)


@app.command()
def indicators(
    recipe: RecipeArgument = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights of the float model to start from.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Indicator file to write.")] = Path("indicators.json"),
    from_limpq: Annotated[
        Path | None,
        typer.Option(help="Convert this indicator file (.pkl) of LIMPQ's own code instead."),
    ] = None,
    force: ForceOption = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
) -> None:
    """Train the importance indicators of a float model jointly for all candidate bits.

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    """
    from .indicators import Indicators

    _refuse_existing(out, force)
    if from_limpq is not None:
        result = Indicators.from_limpq(from_limpq)
    else:
        if weights is None:
            raise ValueError("--weights is missing: indicators are trained from a float model")
        from .pipeline import Session, choose_device

        given = _recipe(
            recipe, checkpoint_steps=checkpoint_steps, checkpoint_minutes=checkpoint_minutes
        )
        with process_group(choose_device(given.device)):
            session = Session(given)
            model = session.float_model(weights)
            settings = given.model_dump(
                mode="json", include={"seed", "model", "data", "bits", "joint"}
            )
            with _beside(out, given, settings, weights=weights) as recording:
                with _reporter().stage("joint training of the indicators") as on_step:
                    result = session.train_indicators(model, on_step, None, recording)
                if _is_first():
                    result.save(out)
    if not _is_first():
        return
    if from_limpq is not None:
        result.save(out)
    print(f"{out}: indicators of {len(result.layers)} layers at {list(result.bits)} bits")


@app.command()
def profile(
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Take the model from this recipe instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Cost file to write.")] = Path("costs.json"),
    force: ForceOption = False,
) -> None:
    """Count MACs, weights and activations of every layer; nothing is computed."""
    _refuse_existing(out, force)
    costs = _costs(model, input_size, recipe)
    costs.save(out)
    macs = sum(layer.macs for layer in (*costs.layers, *costs.fixed))
    print(
        f"{out}: {len(costs.layers)} searchable and {len(costs.fixed)} fixed layers,"
        f" {macs / 1e9:.3f} GMACs, {costs.all_weights:,} weights"
    )


@app.command()
def search(
    indicators: Annotated[
        Path, typer.Option(help="Indicator file (.json, or LIMPQ's .pkl).", show_default=False)
    ],
    costs: Annotated[Path | None, typer.Option(help="Cost file of `limpq profile`.")] = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    weight_bits_level: Annotated[
        int | None,
        typer.Option(help="With --activation-bits-level: at most this uniform policy's BitOps."),
    ] = None,
    activation_bits_level: Annotated[int | None, typer.Option(help="See above.")] = None,
    bitops: Annotated[
        float | None, typer.Option(help="Most BitOps of the searchable layers, per image.")
    ] = None,
    size: Annotated[float | None, typer.Option(help="Most bytes of all weights.")] = None,
    compression: Annotated[
        float | None, typer.Option(help="Least ratio of 32-bit weights to the policy's.")
    ] = None,
    mean_weight_bits: Annotated[
        float | None, typer.Option(help="Highest mean of the weight bits over the layers.")
    ] = None,
    mean_activation_bits: Annotated[
        float | None, typer.Option(help="Highest mean of the activation bits over the layers.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Weight of the weight indicators against the activations'.")
    ] = 1.0,
    non_monotone: Annotated[
        str,
        typer.Option(
            metavar="forbid|isotonic|keep",
            help="What to do with indicators that do not fall as bits grow.",
        ),
    ] = "forbid",
    time_limit: Annotated[float | None, typer.Option(help="Most seconds to search.")] = None,
    gap: Annotated[float, typer.Option(help="Relative gap at which to stop; 0 proves.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Policy file to write.")] = Path("policy.json"),
    force: ForceOption = False,
) -> None:
    """Find the bits of every layer within the budgets, proven optimal by integer programming.

    The costs come from --costs, or from --model and --input-size.
    """
    from .costs import Costs
    from .search import UniformLevel
    from .search import search as find_policy

    _refuse_existing(out, force)
    if (weight_bits_level is None) != (activation_bits_level is None):
        raise ValueError("--weight-bits-level and --activation-bits-level go together")
    budget: float | UniformLevel | None = bitops
    if weight_bits_level is not None and activation_bits_level is not None:
        if bitops is not None:
            raise ValueError("--bitops and --weight-bits-level both set the BitOps: give one")
        budget = UniformLevel(weight_bits_level, activation_bits_level)
    learned = _indicators(indicators)
    network = Costs.load(costs) if costs is not None else _costs(model, input_size, None)
    policy = find_policy(
        learned,
        network,
        bitops=budget,
        size=size,
        compression=compression,
        mean_weight_bits=mean_weight_bits,
        mean_activation_bits=mean_activation_bits,
        alpha=alpha,
        non_monotone=non_monotone,  # type: ignore[arg-type]  # search checks it and names it
        time_limit=time_limit,
        gap=gap,
    )
    policy.save(out)
    _print_policy(policy, network)
    print(f"policy: {out}")


@app.command()
def finetune(
    policy: Annotated[Path, typer.Option(help="Policy file.", show_default=False)],
    weights: WeightsOption,
    recipe: RecipeArgument = None,
    out: Annotated[Path, typer.Option(help="Weights to write.")] = Path("finetuned.safetensors"),
    force: ForceOption = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
) -> None:
    """Fine-tune a float model at the bits of a policy (LSQ).

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    """
    from .models import save_weights
    from .pipeline import Session, choose_device
    from .policy import Policy

    _refuse_existing(out, force)
    chosen = Policy.load(policy)
    given = _recipe(
        recipe, checkpoint_steps=checkpoint_steps, checkpoint_minutes=checkpoint_minutes
    )
    with process_group(choose_device(given.device)):
        session = Session(given)
        model = session.float_model(weights)
        settings = given.model_dump(mode="json", include={"seed", "model", "data", "finetune"})
        with _beside(out, given, settings, weights=weights, policy=policy) as recording:
            with _reporter().stage("fine-tuning the policy") as on_step:
                tuned = session.finetune_policy(model, chosen, on_step, None, recording)
            if _is_first():
                save_weights(tuned, out)
    if _is_first():
        print(f"weights: {out}")


@app.command()
def evaluate(
    weights: Annotated[
        Path, typer.Option("--weights", help="Weights: of the policy's model, or float.")
    ],
    recipe: RecipeArgument = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file; without one, the float model.")
    ] = None,
) -> None:
    """Evaluate weights on the recipe's test set."""
    from .pipeline import Session, choose_device
    from .policy import Policy

    chosen = None if policy is None else Policy.load(policy)
    given = _recipe(recipe)
    with process_group(choose_device(given.device)):
        session = Session(given)
        with _reporter().stage("evaluating") as on_step:
            result = session.evaluate(weights, chosen, on_step)
    if _is_first():
        print(
            f"accuracy {100 * result.accuracy:.2f} %, loss {result.loss:.4f},"
            f" {result.samples} samples"
        )


@app.command()
def info(
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    bits: Annotated[
        int, typer.Option(help="With --model: how many candidate bit-widths.", min=1, max=15)
    ] = 5,
) -> None:
    """Print versions, build flags, CPU capability and CUDA architectures.

    With --model: how many layers can be searched, and the memory that their joint training takes.
    """
    from importlib import metadata

    import torch

    from . import _C, __version__
    from ._build import TORCH_VERSION

    rows = {
        "limpq_ext": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "built for torch": TORCH_VERSION,
        "compiler": _C.compiler,
        "build flags": _C.build_flags,
        "CPU capability": _C.cpu_capability(),
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": f"built with CUDA {_C.cuda_version}" if _C.cuda_version else "not built",
        "CUDA architectures": _C.cuda_architectures or "none",
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        )
        or "none",
    }
    for package in ("torchvision", "numpy", "highspy", "pydantic", "safetensors", "scikit-learn"):
        try:
            rows[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            rows[package] = "not installed"
    if model is not None:
        from .bank import bank_nbytes

        costs = _costs(model, input_size or (3, 224, 224), None)
        weights = [layer.weights for layer in costs.layers]
        buffer = sum(bank_nbytes(4 * count, bits) for count in weights)
        rows["model"] = model
        rows["searchable layers"] = f"{len(weights)}, {sum(weights):,} weights"
        rows["weight bank"] = (
            f"{buffer / 1e6:.1f} MB in float32 for {bits} bit-widths; a joint step holds as much"
            " again for its gradients"
        )
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def main() -> None:
    """Run the command line; a wrong input ends with one line and exit code 2."""
    former = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
        if code == 128 + signal.SIGINT:  # how it tells of Ctrl-C
            raise Interrupted(signal.SIGINT, "stopped by SIGINT")
        sys.exit(code or 0)
    except Interrupted as stop:
        if _is_first():
            print(f"limpq: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        sys.exit(code)
    finally:
        signal.signal(signal.SIGTERM, former)


def _terminated(number: int, frame: object) -> None:
    """SIGTERM where nothing is being trained; a training notices it itself."""
    raise Interrupted(number, "stopped by SIGTERM")


def _exit_code(error: Exception) -> int | None:
    """Say what was wrong with the input; None for an error that is not the user's."""
    if isinstance(error, MainProcessError):  # process 0 says it
        return 2
    if isinstance(error, ValueError | OSError | ImportError):
        print(f"limpq: {' '.join(_message(error).split())}", file=sys.stderr)
        return 2
    show = getattr(error, "show", None)
    if show is not None:  # an error of the command line itself, with its own exit code
        show()
        return getattr(error, "exit_code", 2)
    return None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _recipe(path: Path | None, **changes: Any) -> Recipe:
    """The recipe of a file, or the default one, with what the command line gives instead."""
    from .recipe import Recipe, load_recipe, make_recipe

    recipe = Recipe() if path is None else load_recipe(path)
    given = {key: value for key, value in changes.items() if value is not None}
    return make_recipe({**recipe.model_dump(), **given}, source="command line") if given else recipe


@contextmanager
def _beside(out: Path, recipe: Recipe, settings: Any, **inputs: Path) -> Iterator[Recording]:
    """Records a stage with a checkpoint beside its output, removed when the block is done."""
    from .distributed import from_main
    from .metrics import Journal
    from .pipeline import digest_of, make_recording

    checkpoint = out.with_name(f"{out.name}.checkpoint")
    key = from_main(lambda: digest_of(settings, inputs))
    yield make_recording(
        recipe, checkpoint=checkpoint, key=key, journal=Journal(out.name, (), _reporter().say)
    )
    if _is_first():
        checkpoint.unlink(missing_ok=True)


def _is_first() -> bool:
    """Whether this is the only process, or the one of several that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def _indicators(path: Path) -> Indicators:
    from .indicators import Indicators

    return Indicators.from_limpq(path) if path.suffix == ".pkl" else Indicators.load(path)


def _costs(
    model: str | None, input_size: tuple[int, int, int] | None, recipe: Path | None
) -> Costs:
    import torch

    from .costs import profile as count
    from .models import create_shapes

    if recipe is not None or model is None:
        if recipe is None:
            raise ValueError("nothing says which network: give --costs, --recipe or --model")
        from .pipeline import Session

        return Session(_recipe(recipe)).profile()
    if input_size is None:
        raise ValueError("--input-size is missing: --model needs the shape of an image")
    if min(input_size) < 1:
        raise ValueError(f"--input-size is {input_size}, expected positive numbers")
    return count(create_shapes(model), torch.zeros(1, *input_size, device="meta"))


def _refuse_existing(path: Path, force: bool) -> None:
    """Nothing is overwritten unasked, and this is found out before the work is done."""
    if path.is_dir():
        raise ValueError(f"--out: '{path}' is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder '{path.parent}' does not exist")
    if path.exists() and not force:
        raise ValueError(f"--out: '{path}' exists; --force replaces it")


def _print_policy(policy: Policy, costs: Costs) -> None:
    names = [layer.name for layer in policy.layers]
    width = max(map(len, ["layer", *names]))
    print(f"{'layer':<{width}}  weight bits  activation bits")
    for layer in policy.layers:
        print(f"{layer.name:<{width}}  {layer.weight_bits:>11}  {layer.activation_bits:>15}")
    for record in policy.meta.get("non_monotone_records", []):
        print("not monotone: " + ", ".join(f"{key} {value}" for key, value in record.items()))
    print(
        f"objective {policy.objective:.9f}, bound {policy.bound:.9f}, gap {policy.gap:.1e},"
        f" {policy.meta['seconds']:.3f} s"
    )
    bits = policy.bits()
    for budget in policy.budgets:
        print(f"{budget.name}: {budget.used:,.6g} used, limit {budget.limit:,.6g}")
    print(
        f"BitOps {costs.bitops(bits) / 1e9:.3f} G, weights {costs.size_bits(bits) / 8e3:.1f} KB,"
        f" compression {float(costs.compression(bits)):.2f}"
    )


def _print_report(report: RunReport) -> None:
    console, table_class = (
        require("rich.console", "cli").Console,
        require("rich.table", "cli").Table,
    )
    results = table_class(title="Results on the test set")
    for title in ("network", "accuracy (%)", "BitOps (G)", "weights (KB)", "compression"):
        results.add_column(title, justify="left" if title == "network" else "right")
    for result in report.results:
        results.add_row(
            result.name,
            f"{100 * result.accuracy:.2f}",
            f"{result.bitops / 1e9:.4f}",
            f"{result.size_bytes / 1e3:.1f}",
            f"{result.compression:.2f}",
        )
    stages = table_class(title="Seconds in each stage")
    stages.add_column("stage")
    stages.add_column("seconds", justify="right")
    stages.add_column("")
    for name, seconds in report.seconds.items():
        stages.add_row(name, f"{seconds:.1f}", "reused" if name in report.reused else "")
    out = console(file=sys.stdout)
    out.print(results)
    out.print(stages)
    print(f"files: {report.folder.resolve()}")
    for path in sorted(report.folder.iterdir()):
        print(f"  {path.name}  {path.stat().st_size / 1e3:.1f} KB")


def _reporter() -> _Reporter:
    return _Reporter() if _is_first() else _SilentReporter()


class _Reporter:
    """Progress bars on a terminal, a plain line at the start and end of a stage elsewhere."""

    def say(self, line: str) -> None:
        print(line, flush=True)

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
        print(f"{title} ...", flush=True)

        def on_step(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > 10:
                last = now
                print(f"{title}: {done} of {total} steps, {now - start:.1f} s", flush=True)

        return on_step


class _SilentReporter(_Reporter):
    """For the processes that do not print."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def stage(self, title: str) -> Iterator[StepDone]:
        yield lambda done, total: None


if __name__ == "__main__":
    main()
