"""The command line: ``limpq run`` for everything, or one command per stage."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
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
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="File or name (see `limpq recipes`); without one, the demonstration on digits.",
    ),
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="The same as an option.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of the data.")]
DataFractionOption = Annotated[
    float | None, typer.Option(help="Part of the training data that indicators are trained on.")
]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs that indicators are trained.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe; more than once."),
]
CalibrateOption = Annotated[
    int | None,
    typer.Option(metavar="BATCHES", min=1, help="For a first look: no training, these batches."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="cifar_resnet, a torchvision classifier, timm/NAME or module:function."
    ),
]
InputSizeOption = Annotated[
    tuple[int, int, int] | None,
    typer.Option("--input-size", help="Shape of one image: CHANNELS HEIGHT WIDTH."),
]
IndicatorsOption = Annotated[
    Path, typer.Option(help="Indicator file (.json, or LIMPQ's .pkl).", show_default=False)
]
CostsOption = Annotated[Path | None, typer.Option(help="Cost file of `limpq profile`.")]
BitopsOption = Annotated[
    str | None, typer.Option(help="Most BitOps of the searchable layers, per image.")
]
SizeOption = Annotated[str | None, typer.Option(help="Most bytes of all weights.")]
CompressionOption = Annotated[
    str | None, typer.Option(help="Least ratio of 32-bit weights to the policy's.")
]
MeanWeightBitsOption = Annotated[
    str | None, typer.Option(help="Highest mean of the weight bits over the layers.")
]
MeanActivationBitsOption = Annotated[
    str | None, typer.Option(help="Highest mean of the activation bits over the layers.")
]
BitsPerWeightOption = Annotated[
    str | None, typer.Option(help="Highest mean of the bits over all searchable weights.")
]
BitsPerActivationOption = Annotated[
    str | None, typer.Option(help="Highest mean of the bits over all inputs of the layers.")
]
ActivationMemoryOption = Annotated[
    str | None, typer.Option(help="Most bytes of activations held at one moment, per image.")
]
LatencyOption = Annotated[str | None, typer.Option(help="Most seconds, by --latency-table.")]
LatencyTableOption = Annotated[
    Path | None,
    typer.Option(help="Measured seconds: .json, or .csv of layer,weight_bits,activation_bits,..."),
]
RestrictionsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.yaml",
        help="Restrictions by layer or pattern: pairs, fixed, tied, min_bits, ...",
    ),
]
TieSharedInputsOption = Annotated[
    bool,
    typer.Option(
        "--tie-shared-inputs", help="Equal activation bits where layers read the same tensor."
    ),
]
WeightBitsOption = Annotated[
    int | None, typer.Option(help="Bits of all weights: only activations are searched.")
]
ActivationBitsOption = Annotated[
    int | None, typer.Option(help="Bits of all activations: only weights are searched.")
]
AlphaOption = Annotated[
    float, typer.Option(help="Weight of the weight indicators against the activations'.")
]
NormaliseOption = Annotated[
    bool, typer.Option("--normalise", help="Normalised indicators instead of LIMPQ's plain sum.")
]
NonMonotoneOption = Annotated[
    str,
    typer.Option(
        metavar="forbid|isotonic|keep",
        help="What to do with indicators that do not fall as bits grow.",
    ),
]
TimeLimitOption = Annotated[float | None, typer.Option(help="Most seconds to solve.")]
GapOption = Annotated[
    float | None,
    typer.Option(
        help="Relative gap at which to stop; 0 proves.", show_default="0, above 200 layers 1e-6"
    ),
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
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    data_fraction: DataFractionOption = None,
    epochs: EpochsOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run.", show_default="runs/ and the recipe's name"),
    ] = None,
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

    source = _one_recipe(recipe, recipe_option)
    given = _recipe(
        source,
        set_,
        data=data,
        data_fraction=data_fraction,
        epochs=epochs,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
        log_steps=log_steps,
        tensorboard=tensorboard,
    )
    out = out or Path("runs") / Path(source or "digits").stem
    with process_group(pipeline.choose_device(given.device)):
        report = pipeline.run(given, out, fresh=fresh, reporter=_reporter())
    if _is_first():
        _print_report(report)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package; `limpq run NAME` runs one."""
    from .recipe import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, what in shipped.items():
        print(f"{name:<{width}}  {what}")


@app.command()
def indicators(
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    data_fraction: DataFractionOption = None,
    epochs: EpochsOption = None,
    set_: SetOption = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights of the float model to start from.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Indicator file to write.")] = Path("indicators.json"),
    joint_weights: Annotated[
        Path | None,
        typer.Option(help="Write the trained model here, for `limpq finetune --joint-weights`."),
    ] = None,
    calibrate: CalibrateOption = None,
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Take them from this file instead: a .checkpoint, or of LIMPQ's own code the"
            " indicators (.pkl) or a checkpoint (.tar).",
        ),
    ] = None,
    force: ForceOption = False,
    checkpoint_steps: CheckpointStepsOption = None,
    checkpoint_minutes: CheckpointMinutesOption = None,
) -> None:
    """Train the importance indicators of a float model jointly for all candidate bits.

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    With --calibrate nothing is trained: the indicators are the start values of the step sizes.
    """
    _refuse_existing(out, force)
    if joint_weights is not None:
        _refuse_existing(joint_weights, force)
    if from_file is not None:
        result = _indicators(from_file)
    else:
        if weights is None:
            raise ValueError("--weights is missing: indicators are trained from a float model")
        from .models import save_weights
        from .pipeline import Session, choose_device

        given = _recipe(
            _one_recipe(recipe, recipe_option),
            set_,
            data=data,
            data_fraction=data_fraction,
            epochs=epochs,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
        )
        with process_group(choose_device(given.device)):
            session = Session(given)
            model = session.float_model(weights)
            settings = given.model_dump(
                mode="json", include={"seed", "model", "quantization", "bits", "joint"}
            )
            settings |= {"data": session.data_key(), "fraction": given.data.fraction}
            with _beside(out, given, settings, weights=weights) as recording:
                if calibrate is not None:
                    result, prepared = session.calibrated_indicators(model, calibrate)
                else:
                    with _reporter().stage("joint training of the indicators") as on_step:
                        result, prepared = session.train_indicators(model, on_step, None, recording)
                if _is_first():
                    if joint_weights is not None:
                        save_weights(prepared, joint_weights)
                    result.save(out)
    if not _is_first():
        return
    if from_file is not None:
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
    indicators: IndicatorsOption,
    costs: CostsOption = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    weight_bits_level: Annotated[
        int | None,
        typer.Option(help="With --activation-bits-level: the same as --bitops w3a4."),
    ] = None,
    activation_bits_level: Annotated[int | None, typer.Option(help="See above.")] = None,
    bitops: BitopsOption = None,
    size: SizeOption = None,
    compression: CompressionOption = None,
    mean_weight_bits: MeanWeightBitsOption = None,
    mean_activation_bits: MeanActivationBitsOption = None,
    bits_per_weight: BitsPerWeightOption = None,
    bits_per_activation: BitsPerActivationOption = None,
    activation_memory: ActivationMemoryOption = None,
    latency: LatencyOption = None,
    latency_table: LatencyTableOption = None,
    restrictions: RestrictionsOption = None,
    tie_shared_inputs: TieSharedInputsOption = False,
    weight_bits: WeightBitsOption = None,
    activation_bits: ActivationBitsOption = None,
    alpha: AlphaOption = 1.0,
    normalise: NormaliseOption = False,
    non_monotone: NonMonotoneOption = "forbid",
    time_limit: TimeLimitOption = None,
    gap: GapOption = None,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER",
            help="Say why this layer got its bits, and what other limits would change.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Policy file to write.")] = Path("policy.json"),
    force: ForceOption = False,
) -> None:
    """Find the bits of every layer within the budgets, proven optimal by integer programming.

    The costs come from --costs, or from --model and --input-size. A budget is a number in its unit
    (1.2e9), the level of a uniform policy (w3a4), or a share of what 8 bits use (25%).
    """
    from .explain import check_layer
    from .explain import explain as find_reasons
    from .search import search as find_policy

    _refuse_existing(out, force)
    if (weight_bits_level is None) != (activation_bits_level is None):
        raise ValueError("--weight-bits-level and --activation-bits-level go together")
    if weight_bits_level is not None:
        if bitops is not None:
            raise ValueError("--bitops and --weight-bits-level both set the BitOps: give one")
        bitops = f"w{weight_bits_level}a{activation_bits_level}"
    question = _question(
        latency_table,
        restrictions,
        {
            "bitops": bitops,
            "size": size,
            "compression": compression,
            "mean_weight_bits": mean_weight_bits,
            "mean_activation_bits": mean_activation_bits,
            "bits_per_weight": bits_per_weight,
            "bits_per_activation": bits_per_activation,
            "activation_memory": activation_memory,
            "latency": latency,
        },
        tie_shared_inputs=tie_shared_inputs,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        alpha=alpha,
        normalise=normalise,
        non_monotone=non_monotone,
        time_limit=time_limit,
        gap=gap,
    )
    learned = _indicators(indicators)
    network = _load_costs(costs, model, input_size)
    if explain is not None:
        check_layer(network, explain)
    policy = find_policy(learned, network, **question)
    reasons = None if explain is None else find_reasons(learned, network, explain, **question)
    policy.save(out)
    _print_policy(policy, network)
    if reasons is not None:
        print(reasons.text())
    print(f"policy: {out}")


@app.command()
def pareto(
    indicators: IndicatorsOption,
    costs: CostsOption = None,
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    over: Annotated[str, typer.Option(help="The budget that moves, such as bitops.")] = "bitops",
    points: Annotated[int, typer.Option(help="How many limits.")] = 100,
    start: Annotated[
        str | None, typer.Option(help="Strictest limit; by default the smallest that can be kept.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option(help="Loosest limit; by default what no limit would use.")
    ] = None,
    bitops: BitopsOption = None,
    size: SizeOption = None,
    compression: CompressionOption = None,
    mean_weight_bits: MeanWeightBitsOption = None,
    mean_activation_bits: MeanActivationBitsOption = None,
    bits_per_weight: BitsPerWeightOption = None,
    bits_per_activation: BitsPerActivationOption = None,
    activation_memory: ActivationMemoryOption = None,
    latency: LatencyOption = None,
    latency_table: LatencyTableOption = None,
    restrictions: RestrictionsOption = None,
    tie_shared_inputs: TieSharedInputsOption = False,
    weight_bits: WeightBitsOption = None,
    activation_bits: ActivationBitsOption = None,
    alpha: AlphaOption = 1.0,
    normalise: NormaliseOption = False,
    non_monotone: NonMonotoneOption = "forbid",
    time_limit: TimeLimitOption = None,
    gap: GapOption = None,
    out: Annotated[Path, typer.Option(help="Curve file to write.")] = Path("curve.json"),
    table: Annotated[
        Path | None,
        typer.Option("--csv", help="Table to write.", show_default="OUT with the suffix .csv"),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Find the best policies for a whole range of one budget, the others kept.

    The knee is marked and uniform policies stand beside the curve. Budgets, restrictions and
    options are those of `limpq search`.
    """
    from .budgets import parse_budget
    from .pareto import pareto as find_curve

    table = out.with_suffix(".csv") if table is None else table
    _refuse_existing(out, force)
    _refuse_existing(table, force, "--csv")
    question = _question(
        latency_table,
        restrictions,
        {
            "bitops": bitops,
            "size": size,
            "compression": compression,
            "mean_weight_bits": mean_weight_bits,
            "mean_activation_bits": mean_activation_bits,
            "bits_per_weight": bits_per_weight,
            "bits_per_activation": bits_per_activation,
            "activation_memory": activation_memory,
            "latency": latency,
        },
        tie_shared_inputs=tie_shared_inputs,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        alpha=alpha,
        normalise=normalise,
        non_monotone=non_monotone,
        time_limit=time_limit,
        gap=gap,
    )
    curve = find_curve(
        _indicators(indicators),
        _load_costs(costs, model, input_size),
        over=over,
        points=points,
        start=None if start is None else parse_budget("--start", start),
        stop=None if stop is None else parse_budget("--stop", stop),
        **question,
    )
    curve.save(out)
    curve.save_csv(table)
    print(curve.text())
    print(f"curve: {out}, {table}")


@app.command()
def finetune(
    policy: Annotated[Path, typer.Option(help="Policy file.", show_default=False)],
    weights: WeightsOption,
    recipe: RecipeArgument = None,
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    joint_weights: Annotated[
        Path | None,
        typer.Option(help="Start from this model of `limpq indicators --joint-weights`."),
    ] = None,
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
        _one_recipe(recipe, recipe_option),
        set_,
        data=data,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
    )
    if given.finetune.init == "joint" and joint_weights is None:
        raise ValueError("finetune.init is joint, but --joint-weights is missing")
    with process_group(choose_device(given.device)):
        session = Session(given)
        model = session.float_model(weights)
        settings = given.model_dump(
            mode="json", include={"seed", "model", "quantization", "finetune"}
        )
        settings["data"] = session.data_key()
        inputs = {"weights": weights, "policy": policy}
        if joint_weights is not None:
            settings["bits"] = list(given.bits)
            inputs["joint_weights"] = joint_weights
        with _beside(out, given, settings, **inputs) as recording:
            with _reporter().stage("fine-tuning the policy") as on_step:
                tuned = session.finetune_policy(
                    model, chosen, on_step, None, recording, joint_weights=joint_weights
                )
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
    recipe_option: RecipeOption = None,
    data: DataOption = None,
    set_: SetOption = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file; without one, the float model.")
    ] = None,
    float_weights: Annotated[
        Path | None, typer.Option(help="Also compare with the float model of these weights.")
    ] = None,
    calibrate: CalibrateOption = None,
    split: Annotated[
        str, typer.Option(metavar="test|val", help="Compare and choose on val; report test.")
    ] = "test",
    out: Annotated[Path | None, typer.Option(help="JSON file to write all numbers to.")] = None,
    force: ForceOption = False,
) -> None:
    """Evaluate weights on the recipe's test set: top-1, top-5, loss, every class.

    With --float-weights: where the network decides otherwise than the float one.
    With --calibrate: --weights are the float model's; it is quantized by --policy, not trained.
    """
    from dataclasses import asdict

    from .files import write_json
    from .pipeline import Session, choose_device
    from .policy import Policy

    if split not in ("test", "val"):
        raise ValueError(f"--split is '{split}', expected test or val")
    if calibrate is not None and policy is None:
        raise ValueError("--calibrate needs --policy: a float model has nothing to calibrate")
    if out is not None:
        _refuse_existing(out, force)
    chosen = None if policy is None else Policy.load(policy)
    given = _recipe(_one_recipe(recipe, recipe_option), set_, data=data)
    with process_group(choose_device(given.device)):
        session = Session(given)
        model = session.network(weights, chosen, calibrate_batches=calibrate or 0)
        with _reporter().stage("evaluating") as on_step:
            result = session.evaluate(model, on_step, split)  # type: ignore[arg-type]  # checked above
        confusion = None
        if float_weights is not None:
            with _reporter().stage("comparing with the float network") as on_step:
                reference = session.network(float_weights, None)
                confusion = session.confuse(model, reference, on_step, split)  # type: ignore[arg-type]  # as above
    if not _is_first():
        return
    print(f"accuracy {_percent(result.accuracy)}, loss {result.loss:.4f}, {result.samples} samples")
    if result.top5 is not None:
        print(f"top-5 accuracy {_percent(result.top5)}")
    known = [
        (accuracy, index)
        for index, accuracy in enumerate(result.class_accuracy)
        if accuracy is not None
    ]
    worst = ", ".join(f"{index} ({_percent(accuracy)})" for accuracy, index in sorted(known)[:5])
    print(f"lowest accuracy: class {worst}")
    if confusion is not None:
        print(
            f"the same class as the float network: {_percent(confusion.agreement)};"
            f" right where that is wrong: {_percent(confusion.gained)},"
            f" wrong where that is right: {_percent(confusion.lost)}"
        )
    if out is not None:
        against = None if confusion is None else asdict(confusion)
        write_json(out, {"split": split, **asdict(result), "against_float": against})
        print(f"numbers: {out}")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


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

    from . import __version__
    from .ops import build_info

    built = build_info()
    rows = {
        "limpq_ext": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "built with torch": built["built with torch"],
        "compiler": built["compiler"],
        "build flags": built["flags"],
        "CPU capability": built["cpu capability"],
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": (
            f"built with CUDA {built['cuda version']}" if "cuda version" in built else "not loaded"
        ),
        "CUDA architectures": built.get("cuda architectures", "none"),
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


def _one_recipe(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise ValueError(f"two recipes, '{argument}' and --recipe {option}: give one")
    return argument if option is None else option


def _recipe(
    source: str | Path | None, assignments: Sequence[str] | None = None, **changes: Any
) -> Recipe:
    """The recipe of a file or name, or the default one, with what the command line gives."""
    from .recipe import Recipe, load_recipe, override, parse_assignment

    recipe = Recipe() if source is None else load_recipe(source)
    given = {
        _KEYS.get(option, option): str(value) if isinstance(value, Path) else value
        for option, value in changes.items()
        if value is not None
    }
    given |= dict(map(parse_assignment, assignments or ()))
    return override(recipe, given, source="command line") if given else recipe


_KEYS = {"data": "data.root", "data_fraction": "data.fraction", "epochs": "joint.epochs"}
"""The key of the recipe that an option sets, where it is not the option's name."""


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

    readers = {
        ".pkl": Indicators.from_limpq,
        ".tar": Indicators.from_limpq_checkpoint,  # its checkpoints are called *.pth.tar
        ".checkpoint": Indicators.from_checkpoint,
    }
    return readers.get(path.suffix, Indicators.load)(path)


def _load_costs(
    path: Path | None, model: str | None, input_size: tuple[int, int, int] | None
) -> Costs:
    from .costs import Costs

    return Costs.load(path) if path is not None else _costs(model, input_size, None)


def _question(
    latency_table: Path | None,
    restrictions: Path | None,
    budgets: dict[str, str | None],
    **options: Any,
) -> dict[str, Any]:
    """What the options of a search ask, as `search` takes it; options go over the file."""
    from .budgets import parse_budget
    from .latency import LatencyTable
    from .recipe import load_restrictions

    question: dict[str, Any] = {} if restrictions is None else load_restrictions(restrictions)
    in_file = {name for name, value in question.items() if value}
    question |= {name: value for name, value in options.items() if value or name not in in_file}
    for name, text in budgets.items():
        question[name] = None if text is None else parse_budget(name, text)
    question["latency_table"] = None if latency_table is None else LatencyTable.load(latency_table)
    return question


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


def _refuse_existing(path: Path, force: bool, option: str = "--out") -> None:
    """Nothing is overwritten unasked, and this is found out before the work is done."""
    if path.is_dir():
        raise ValueError(f"{option}: '{path}' is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: the folder '{path.parent}' does not exist")
    if path.exists() and not force:
        raise ValueError(f"{option}: '{path}' exists; --force replaces it")


def _print_policy(policy: Policy, costs: Costs) -> None:
    names = [layer.name for layer in policy.layers]
    width = max(map(len, ["layer", *names]))
    print(f"{'layer':<{width}}  weight bits  activation bits")
    for layer in policy.layers:
        print(f"{layer.name:<{width}}  {layer.weight_bits:>11}  {layer.activation_bits:>15}")
    for record in policy.meta.get("non_monotone_records", []):
        print("not monotone: " + ", ".join(f"{key} {value}" for key, value in record.items()))
    print(
        f"objective {policy.objective:.9f}, bound {policy.bound:.9f}, gap {policy.gap:.1e}"
        f" (stopped by: {policy.meta['stopped_by']}), {policy.meta['seconds']:.3f} s"
    )
    bits = policy.bits()
    for budget in policy.budgets:
        print(f"{budget.name}: {budget.used:,.6g} used, limit {budget.limit:,.6g}")
    for check in policy.meta["check"]:
        kept = "kept" if check["used"] <= check["limit"] else "BROKEN"
        print(
            f"checked in integers: {check['name']} {check['used']:,} <= {check['limit']:,}"
            f" {check['unit']}: {kept}"
        )
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
