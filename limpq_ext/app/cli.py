"""The command line: ``limpq run`` for everything, or one command per stage."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from limpq_ext.training.signals import Interrupted, MainProcessError
from limpq_ext.values.optional import require

if TYPE_CHECKING:
    from limpq_ext.app.recipe import Recipe
    from limpq_ext.app.run import RunReport
    from limpq_ext.training.loop import Recording, StepDone
    from limpq_ext.values.costs import Costs
    from limpq_ext.values.indicators import Indicators
    from limpq_ext.values.policy import Policy

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
SizeOption = Annotated[
    str | None, typer.Option(help="Most bytes of the weights of searchable and fixed layers.")
]
TotalSizeOption = Annotated[
    str | None, typer.Option(help="Most bytes of the whole network, what stays in float32 too.")
]
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
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Let the recipe import the module of its model, which runs its code."
    ),
]
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
    allow_code: AllowCodeOption = False,
) -> None:
    """Run the whole pipeline: float training, indicators, search, fine-tuning, evaluation.

    A second run into the same folder reuses every stage whose inputs did not change, and goes on
    with one that was interrupted. torchrun -m limpq_ext run ... runs it in several processes.
    """
    from limpq_ext.app import run as pipeline
    from limpq_ext.training.distributed import process_group

    source = _one_recipe(recipe, recipe_option)
    given = _recipe(
        source,
        set_,
        allow_code=allow_code,
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
    from limpq_ext.app.recipe import shipped_recipes

    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for name, what in shipped.items():
        _say(f"{name:<{width}}  {what}")


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
    allow_code: AllowCodeOption = False,
) -> None:
    """Train the importance indicators of a float model jointly for all candidate bits.

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    With --calibrate nothing is trained: the indicators are the start values of the step sizes.
    """
    outputs = {"--out": out, "--joint-weights": joint_weights}
    _check_outputs(outputs, force, checkpoint=True)
    if from_file is not None:
        result = _indicators(from_file)
        if _is_first():
            _write(out, force, result.save)
    else:
        if weights is None:
            raise ValueError("--weights is missing: indicators are trained from a float model")
        from limpq_ext.app.run import Session, choose_device
        from limpq_ext.training.distributed import process_group

        given = _recipe(
            _one_recipe(recipe, recipe_option),
            set_,
            allow_code=allow_code,
            data=data,
            data_fraction=data_fraction,
            epochs=epochs,
            checkpoint_steps=checkpoint_steps,
            checkpoint_minutes=checkpoint_minutes,
        )
        with process_group(choose_device(given.device)), _locked(out):
            session = Session(given)
            model = session.float_model(weights)
            part = given.model_dump(mode="json", include={"quantization", "bits", "joint"})
            settings = [part, session.common_key(), session.fraction_key()]
            if calibrate is not None:
                result, prepared = session.calibrated_indicators(model, calibrate)
                recording = None
            else:
                recording = _recording(out, given, settings, weights=weights)
                with _reporter().stage("joint training of the indicators") as on_step:
                    result, prepared = session.train_indicators(model, on_step, None, recording)
            if _is_first():
                if joint_weights is not None:
                    _write(joint_weights, force, partial(session.save, prepared))
                _write(out, force, result.save)
            _remove_checkpoint(recording)
    if _is_first():
        _say(f"{out}: indicators of {len(result.layers)} layers at {list(result.bits)} bits")


@app.command()
def profile(
    model: ModelOption = None,
    input_size: InputSizeOption = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Take the model from this recipe instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Cost file to write.")] = Path("costs.json"),
    force: ForceOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Count MACs, weights and activations of every layer; nothing is computed."""
    _check_outputs({"--out": out}, force)
    costs = _costs(model, input_size, recipe, allow_code=allow_code)
    _write(out, force, costs.save)
    macs = sum(layer.macs for layer in (*costs.layers, *costs.fixed))
    _say(
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
    total_size: TotalSizeOption = None,
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
    from limpq_ext.allocation.explain import check_layer
    from limpq_ext.allocation.explain import explain as find_reasons
    from limpq_ext.allocation.search import search as find_policy

    _check_outputs({"--out": out}, force)
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
            "total_size": total_size,
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
    _write(out, force, policy.save)
    _print_policy(policy, network)
    if reasons is not None:
        _say(reasons.text())
    _say(f"policy: {out}")


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
    total_size: TotalSizeOption = None,
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
    from limpq_ext.allocation.budgets import parse_budget
    from limpq_ext.allocation.pareto import pareto as find_curve

    table = out.with_suffix(".csv") if table is None else table
    _check_outputs({"--out": out, "--csv": table}, force)
    if points > MOST_POINTS:
        raise ValueError(f"--points is {points:,}, at most {MOST_POINTS:,} are found")
    question = _question(
        latency_table,
        restrictions,
        {
            "bitops": bitops,
            "size": size,
            "total_size": total_size,
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
    _write(out, force, curve.save)
    _write(table, force, curve.save_csv)
    _say(curve.text())
    _say(f"curve: {out}, {table}")


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
    allow_code: AllowCodeOption = False,
) -> None:
    """Fine-tune a float model at the bits of a policy (LSQ).

    The same command goes on after an interruption, from the checkpoint OUT.checkpoint.
    """
    from limpq_ext.app.run import Session, choose_device
    from limpq_ext.training.distributed import process_group
    from limpq_ext.values.policy import Policy

    _check_outputs({"--out": out}, force, checkpoint=True)
    chosen = Policy.load(policy)
    given = _recipe(
        _one_recipe(recipe, recipe_option),
        set_,
        allow_code=allow_code,
        data=data,
        checkpoint_steps=checkpoint_steps,
        checkpoint_minutes=checkpoint_minutes,
    )
    if given.finetune.init == "joint" and joint_weights is None:
        raise ValueError("finetune.init is joint, but --joint-weights is missing")
    with process_group(choose_device(given.device)), _locked(out):
        session = Session(given)
        model = session.float_model(weights)
        part = given.model_dump(mode="json", include={"quantization", "finetune"})
        inputs = {"weights": weights, "policy": policy}
        if joint_weights is not None:
            part["bits"] = list(given.bits)
            inputs["joint_weights"] = joint_weights
        recording = _recording(out, given, [part, session.common_key()], **inputs)
        with _reporter().stage("fine-tuning the policy") as on_step:
            tuned = session.finetune_policy(
                model, chosen, on_step, None, recording, joint_weights=joint_weights
            )
        if _is_first():
            _write(out, force, partial(session.save, tuned))
        _remove_checkpoint(recording)
    if _is_first():
        _say(f"weights: {out}")


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
    allow_code: AllowCodeOption = False,
) -> None:
    """Evaluate weights on the recipe's test set: top-1, top-5, loss, every class.

    With --float-weights: where the network decides otherwise than the float one.
    With --calibrate: --weights are the float model's; it is quantized by --policy, not trained.
    """
    from dataclasses import asdict

    from limpq_ext.app.run import Session, choose_device
    from limpq_ext.training.distributed import process_group
    from limpq_ext.values.files import write_json
    from limpq_ext.values.policy import Policy

    if split not in ("test", "val"):
        raise ValueError(f"--split is '{split}', expected test or val")
    if calibrate is not None and policy is None:
        raise ValueError("--calibrate needs --policy: a float model has nothing to calibrate")
    _check_outputs({"--out": out}, force)
    chosen = None if policy is None else Policy.load(policy)
    given = _recipe(_one_recipe(recipe, recipe_option), set_, allow_code=allow_code, data=data)
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
    _say(f"accuracy {_percent(result.accuracy)}, loss {result.loss:.4f}, {result.samples} samples")
    if result.top5 is not None:
        _say(f"top-5 accuracy {_percent(result.top5)}")
    known = [
        (accuracy, index)
        for index, accuracy in enumerate(result.class_accuracy)
        if accuracy is not None
    ]
    worst = ", ".join(f"{index} ({_percent(accuracy)})" for accuracy, index in sorted(known)[:5])
    _say(f"lowest accuracy: class {worst}")
    if confusion is not None:
        _say(
            f"the same class as the float network: {_percent(confusion.agreement)};"
            f" right where that is wrong: {_percent(confusion.gained)},"
            f" wrong where that is right: {_percent(confusion.lost)}"
        )
    if out is not None:
        against = None if confusion is None else asdict(confusion)
        numbers = {"split": split, **asdict(result), "against_float": against}
        _write(out, force, lambda path: write_json(path, numbers))
        _say(f"numbers: {out}")


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

    from limpq_ext import __version__
    from limpq_ext.kernels.ops import build_info

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
        from limpq_ext.kernels.bank import bank_nbytes

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
        _say(f"{name:<{width}}  {value}")


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
        if _is_first():
            _say(f"limpq: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        if len(arguments) < len(sys.argv) - 1:
            traceback.print_exc()
        sys.exit(_exit_code(error))
    finally:
        signal.signal(signal.SIGTERM, former)


DEBUG = "--debug"


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
    _say(f"limpq: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _say(text: str = "", *, file: TextIO | None = None) -> None:
    """Print text, in which a terminal finds nothing to obey: names come from files of others."""
    shown = "".join(
        character
        if character.isprintable() or character in "\n\t"
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
    print(shown, file=file or sys.stdout, flush=True)


def _one_recipe(argument: str | None, option: str | None) -> str | None:
    if argument is not None and option is not None:
        raise ValueError(f"two recipes, '{argument}' and --recipe {option}: give one")
    return argument if option is None else option


def _recipe(
    source: str | Path | None,
    assignments: Sequence[str] | None = None,
    *,
    allow_code: bool = False,
    **changes: Any,
) -> Recipe:
    """The recipe of a file or name, or the default one, with what the command line gives.

    Raises:
        ValueError: It is wrong, or would run code that the command line does not name.
    """
    from limpq_ext.app.recipe import Recipe, load_recipe, override, parse_assignment

    recipe = Recipe() if source is None else load_recipe(source)
    given = {
        _KEYS.get(option, option): str(value) if isinstance(value, Path) else value
        for option, value in changes.items()
        if value is not None
    }
    given |= dict(map(parse_assignment, assignments or ()))
    changed = override(recipe, given, source="command line") if given else recipe
    name = changed.model.name
    if ":" in name:
        named = name == given.get("model.name") or "model" in given
        if not (named or allow_code):
            raise ValueError(
                f"{source}: its model '{name}' imports a module, which runs code: if you trust it,"
                f" give --allow-code, or name it yourself with --set model.name={name}"
            )
        _find_modules_here()
    return changed


def _find_modules_here() -> None:
    """Let a model's module be one of the working directory, where a command does not look."""
    here = os.getcwd()  # noqa: PTH109  # sys.path holds strings
    if here not in sys.path:
        sys.path.insert(0, here)


MOST_POINTS = 100_000
"""Points of a curve; more would be found for days and fill the memory."""

_KEYS = {"data": "data.root", "data_fraction": "data.fraction", "epochs": "joint.epochs"}
"""The key of the recipe that an option sets, where it is not the option's name."""


def _checkpoint_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.checkpoint")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same output and its checkpoint."""
    from limpq_ext.app.locks import only_one

    with only_one(out.with_name(f".{out.name}.lock"), f"'{out}'"):
        yield


def _recording(out: Path, recipe: Recipe, settings: Any, **inputs: Path) -> Recording:
    """Records a stage with a checkpoint beside its output."""
    from limpq_ext.app.stages import digest_of, make_recording
    from limpq_ext.training.distributed import from_main
    from limpq_ext.training.metrics import Journal

    key = from_main(lambda: digest_of(settings, inputs))
    journal = Journal(out.name, (), _reporter().say)
    return make_recording(recipe, checkpoint=_checkpoint_of(out), key=key, journal=journal)


def _remove_checkpoint(recording: Recording | None) -> None:
    if recording is not None and recording.checkpoint is not None:
        recording.checkpoint.remove()


def _is_first() -> bool:
    """Whether this is the only process, or the one of several that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def _indicators(path: Path) -> Indicators:
    from limpq_ext.values.indicators import Indicators

    readers = {
        ".pkl": Indicators.from_limpq,
        ".tar": Indicators.from_limpq_checkpoint,  # its checkpoints are called *.pth.tar
        ".checkpoint": Indicators.from_checkpoint,
    }
    return readers.get(path.suffix, Indicators.load)(path)


def _load_costs(
    path: Path | None, model: str | None, input_size: tuple[int, int, int] | None
) -> Costs:
    from limpq_ext.values.costs import Costs

    return Costs.load(path) if path is not None else _costs(model, input_size, None)


def _question(
    latency_table: Path | None,
    restrictions: Path | None,
    budgets: dict[str, str | None],
    **options: Any,
) -> dict[str, Any]:
    """What the options of a search ask, as `search` takes it; options go over the file."""
    from limpq_ext.allocation.budgets import parse_budget
    from limpq_ext.app.recipe import load_restrictions
    from limpq_ext.values.latency import LatencyTable

    question: dict[str, Any] = {} if restrictions is None else load_restrictions(restrictions)
    in_file = {name for name, value in question.items() if value}
    question |= {name: value for name, value in options.items() if value or name not in in_file}
    for name, text in budgets.items():
        question[name] = None if text is None else parse_budget(name, text)
    question["latency_table"] = None if latency_table is None else LatencyTable.load(latency_table)
    return question


def _costs(
    model: str | None,
    input_size: tuple[int, int, int] | None,
    recipe: Path | None,
    *,
    allow_code: bool = False,
) -> Costs:
    import torch

    from limpq_ext.app.models import create_shapes
    from limpq_ext.graph.profile import profile as count

    if recipe is not None or model is None:
        if recipe is None:
            raise ValueError("nothing says which network: give --costs, --recipe or --model")
        from limpq_ext.app.run import Session

        return Session(_recipe(recipe, allow_code=allow_code)).profile()
    if input_size is None:
        raise ValueError("--input-size is missing: --model needs the shape of an image")
    if min(input_size) < 1:
        raise ValueError(f"--input-size is {input_size}, expected positive numbers")
    if ":" in model:
        _find_modules_here()
    return count(create_shapes(model), torch.zeros(1, *input_size, device="meta"))


def _check_outputs(
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


def _write(path: Path, force: bool, save: Callable[[Path], object]) -> None:
    """Write an output; without --force nothing that appeared meanwhile is replaced."""
    from limpq_ext.app.locks import save_as_new

    if force:
        save(path)
    else:
        save_as_new(path, save)


def _print_policy(policy: Policy, costs: Costs) -> None:
    from limpq_ext.allocation.budgets import in_words

    names = [layer.name for layer in policy.layers]
    width = max(map(len, ["layer", *names]))
    _say(f"{'layer':<{width}}  weight bits  activation bits")
    for layer in policy.layers:
        _say(f"{layer.name:<{width}}  {layer.weight_bits:>11}  {layer.activation_bits:>15}")
    for record in policy.meta.get("non_monotone_records", []):
        _say("not monotone: " + ", ".join(f"{key} {value}" for key, value in record.items()))
    _say(
        f"objective {policy.objective:.9f}, bound {policy.bound:.9f}, gap {policy.gap:.1e}"
        f" (stopped by: {policy.meta['stopped_by']}), {policy.meta['seconds']:.3f} s"
    )
    bits = policy.bits()
    for budget in policy.budgets:
        used, limit = (in_words(budget.name, value) for value in (budget.used, budget.limit))
        _say(f"{budget.name}: {used} used, limit {limit}")
    for check in policy.meta["check"]:
        kept = "kept" if check["used"] <= check["limit"] else "BROKEN"
        _say(
            f"checked in integers: {check['name']} {check['used']:,} <= {check['limit']:,}"
            f" {check['unit']}: {kept}"
        )
    _say(f"BitOps {costs.bitops(bits) / 1e9:.3f} G")
    sizes = costs.sizes(bits)
    for title, prefix in (("quantized layers", ""), ("whole network", "total_")):
        size, ratio = sizes[f"{prefix}size"], sizes[f"{prefix}compression"]
        if size is not None:
            smaller = "" if ratio is None else f", {ratio:.2f} times smaller than in float32"
            _say(f"{title}: {size / 1e3:,.1f} KB{smaller}")


def _print_report(report: RunReport) -> None:
    console, table_class = (
        require("rich.console", "cli").Console,
        require("rich.table", "cli").Table,
    )
    results = table_class(title="Results on the test set")
    titles = ("network", "accuracy (%)", "BitOps (G)", "weights (KB)", "compression", "all (KB)")
    for title in titles:
        results.add_column(title, justify="left" if title == "network" else "right")
    for result in report.results:
        results.add_row(
            result.name,
            f"{100 * result.accuracy:.2f}",
            f"{result.bitops / 1e9:.4f}",
            f"{result.size_bytes / 1e3:.1f}",
            f"{result.compression:.2f}",
            f"{result.total_bytes / 1e3:.1f}",
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
    _say(f"files: {report.folder.resolve()}")
    for path in sorted(report.folder.iterdir()):
        _say(f"  {path.name}  {path.stat().st_size / 1e3:.1f} KB")


def _reporter() -> _Reporter:
    return _Reporter() if _is_first() else _SilentReporter()


class _Reporter:
    """Progress bars on a terminal, a plain line at the start and end of a stage elsewhere."""

    def say(self, line: str) -> None:
        _say(line)

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
        _say(f"{title} ...")

        def on_step(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last > 10:
                last = now
                _say(f"{title}: {done} of {total} steps, {now - start:.1f} s")

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
