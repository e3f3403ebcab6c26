"""Recipes: one validated object that says all that a run does, and those that are shipped."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_type_hints

from limpq_ext.allocation.budgets import BUDGETS, UniformLevel, parse_budget
from limpq_ext.allocation.target import load_target
from limpq_ext.data.datasets import DataOptions
from limpq_ext.data.glyphs import CLASSES
from limpq_ext.data.sources import canonical_name
from limpq_ext.nn.start_values import ScaleStart
from limpq_ext.scores.check import LEAST_RANDOM
from limpq_ext.scores.methods import method_named
from limpq_ext.training.finetune import FinetuneOptions, TrainingOptions
from limpq_ext.values.bits import MAX_BITS, MIN_BITS, check_candidates
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.latency import LatencyTable
from limpq_ext.values.optional import require
from limpq_ext.values.options import Options
from limpq_ext.values.reading import (
    YAML_BYTES,
    FileFormatError,
    decode,
    first_problem,
    parse_yaml,
    read_bytes,
    reading,
    shown,
)

if TYPE_CHECKING:
    from limpq_ext.allocation.problem import Question

pydantic = require("pydantic", "cli")

Field = pydantic.Field


LEARNED: Final = "learned"
AUTO: Final = "auto"
DEFAULT_SCORE: Final = "loss_aware"
"""See bench/results/real_networks.md."""

NEEDED_TO_EXPORT: Final = ("onnx", "onnxscript", "onnxruntime")
"""What the extra export installs."""

Autocast = Literal["off", "bfloat16", "float16"]
Calibration = Literal["correct", "reestimate", "off"]


class _Section(pydantic.BaseModel):  # type: ignore[name-defined]  # imported by require
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Which network."""

    name: str = Field(
        "cifar_resnet",
        description="cifar_resnet, a torchvision classifier, timm/NAME or package.module:function,"
        " which is imported and runs code",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of its constructor; classes come from the data"
    )
    weights: str | None = Field(
        None,
        description="float weights: a file, or published ones by name (DEFAULT), which are"
        " downloaded; null: trained here",
    )


class QuantizationSection(_Section):
    """What is quantized, and how."""

    per_channel_weights: bool = Field(False, description="a weight scale per output channel")
    symmetric_weights: bool = Field(False, description="without the lowest weight value")
    scale_max: float | None = Field(
        None, gt=0, description="upper bound of all scales; LIMPQ's own code uses 1.0"
    )
    scale_start: ScaleStart = Field(
        "mse", description="where step sizes begin: mse (least squared error), lsq, max, percentile"
    )
    fixed: tuple[str, ...] | None = Field(
        None, description="layers at 8 bits, by name or pattern; null: the first and the last"
    )
    exclude: tuple[str, ...] = Field((), description="modules to leave in float")


class GlyphsSection(_Section):
    """How the data set ``glyphs`` is drawn."""

    train_images: int = Field(20_000, ge=len(CLASSES), description="validation images included")
    test_images: int = Field(10_000, ge=len(CLASSES))
    difficulty: float = Field(1.0, ge=0, le=3, description="0 is clean and upright")
    fonts: tuple[str, ...] = Field((), description="font files beside those of matplotlib")
    cache: bool = Field(True, description="draw once and keep the images in memory")


def _of(options: type[Options], **defaults: Any) -> Any:
    """A section with the fields, bounds and help of a function's options.

    Args:
        options: The options.
        **defaults: Others than theirs; ... is none.
    """
    kinds = get_type_hints(options)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        default = ... if field.default is dataclasses.MISSING else field.default
        how = {"description": field.metadata["help"] or None, **field.metadata["bounds"]}
        fields[field.name] = (
            kinds[field.name],
            Field(defaults.get(field.name, default), **how),
        )
    return pydantic.create_model(f"_{options.__name__}", __base__=_Section, **fields)


_Data: Any = _of(DataOptions, name="digits")
_Training: Any = _of(TrainingOptions, lr=...)
_Finetuning: Any = _of(FinetuneOptions, lr=..., distill_weight=0.0)


class DataSection(_Data):
    """Which data; what is null is as usual for the data set."""

    fraction: float = Field(
        1.0, gt=0, le=1, description="part of the training images that indicators are trained on"
    )
    workers: int = Field(0, ge=0, description="processes that load batches")
    glyphs: GlyphsSection = Field(default_factory=GlyphsSection)

    @pydantic.field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        return canonical_name(name)


class TrainingSection(_Training):
    """One stage of training."""

    batch_size: int = Field(64, ge=1)
    autocast: Autocast = Field(
        "off", description="dtype of the forward; float16 comes with a gradient scaler"
    )


class JointSection(TrainingSection):
    """Joint training of the indicators."""

    indicators: Literal["step_sizes", "sensitivities"] = Field(
        "step_sizes",
        description="step_sizes, which LIMPQ takes; sensitivities: what errors add to the loss,"
        " measured in the same steps",
    )
    distill: bool = Field(False, description="the highest bit-width teaches the others")
    channels_last: bool = Field(False, description="memory format of weights and activations")
    compile: bool = Field(False, description="torch.compile what a branch runs")
    cuda_graph: bool = Field(False, description="capture a step in CUDA graphs")
    weight_bank: bool = Field(
        True, description="quantize all weights once a step; takes memory, see `limpq info --model`"
    )
    share_stem: bool = Field(
        True, description="compute what comes before the first searchable layer once a step"
    )
    drop_relu: bool = Field(True, description="let quantizers take over the ReLUs before them")


class ScoresSection(_Section):
    """What bits are worth to each layer, and the images that it is measured on."""

    method: str = Field(
        DEFAULT_SCORE,
        description="a score of `limpq scores --list`; learned: the joint training of section"
        " joint; auto: the score whose optimum loses least on this network",
    )
    candidates: tuple[str, ...] | None = Field(
        None, description="what auto chooses from; null: all of `limpq scores --list`"
    )
    batches: int = Field(4, ge=1)
    batch_size: int = Field(64, ge=1)

    @pydantic.field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        if method not in (LEARNED, AUTO):
            method_named(method)
        return method

    @pydantic.field_validator("candidates")
    @classmethod
    def _check_candidates(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names == ():
            raise ValueError("there is nothing to choose from")
        for name in names or ():
            method_named(name)
        return names


class CheckSection(_Section):
    """What the searched policy is worth without training, beside uniform and random ones."""

    random: int = Field(5, ge=0, description="random policies, 3 or more; 0: there is no check")
    neighbours: int = Field(0, ge=0, description="policies a swap of bits away")
    batches: int = Field(
        4, ge=1, description="of validation images; without any, training images of no score"
    )

    @pydantic.field_validator("random")
    @classmethod
    def _check_random(cls, random: int) -> int:
        if 0 < random < LEAST_RANDOM:
            raise ValueError(f"expected 0, or {LEAST_RANDOM} or more")
        return random


class RefineSection(_Section):
    """Swaps of bits that lower what the policy loses without training; off without a limit."""

    seconds: float | None = Field(None, gt=0, description="the most that it may take")
    steps: int | None = Field(None, ge=1, description="the most policies that are measured")
    deviations: float = Field(
        2.0,
        ge=0,
        description="a swap is kept where the loss falls by more than so many standard errors",
    )
    patience: int = Field(50, ge=1, description="policies in a row that did not help")

    @property
    def wanted(self) -> bool:
        """Whether there is a limit."""
        return self.seconds is not None or self.steps is not None


class ExportSection(_Section):
    """The fine-tuned network as an ONNX file that engines run in integers."""

    onnx: bool | None = Field(
        None, description="write policy.onnx; null: where the extra export is installed"
    )
    shift: bool = Field(
        True, description="codes of weights times powers of two: exact, and engines round less"
    )
    residual_bits: Literal[8] | None = Field(
        None, description="quantize what enters additions: faster, and not what was trained"
    )
    images: int = Field(256, ge=1, description="images that the file is verified with")
    engines: tuple[Literal["onnxruntime", "openvino"], ...] | None = Field(
        None,
        min_length=1,
        description="what has to compute as the network does; null: what is installed of them",
    )
    threads: int = Field(1, ge=1, description="threads that engines compute with")

    @property
    def wanted(self) -> bool:
        """Whether there is to be a file."""
        if self.onnx is None:
            return all(map(find_spec, NEEDED_TO_EXPORT))
        return self.onnx


class FinetuneSection(TrainingSection, _Finetuning):
    """Fine-tuning of a policy."""

    init: Literal["float", "joint"] = Field(
        "float", description="start from the float network or from the jointly trained one"
    )
    calibrate: Calibration | None = Field(
        None,
        description="before training: step sizes from several batches, and batch normalisation"
        " corrected by what quantization moves (correct) or estimated anew (reestimate); off: from"
        " the first batch, and kept; null: correct, off where init is joint or scale_start is lsq",
    )
    calibration_batches: int = Field(4, ge=1, description="batches to calibrate with")


class LevelSection(_Section):
    """The bits of a uniform policy."""

    weight_bits: int = Field(3, ge=MIN_BITS, le=MAX_BITS)
    activation_bits: int = Field(3, ge=MIN_BITS, le=MAX_BITS)


def _read_budget(value: Any, info: Any) -> Any:
    """A level or share that is written as text has to be one."""
    if isinstance(value, str):
        parse_budget(info.field_name, value)
    return value


def _read_pair(value: Any) -> Any:
    """Pairs of bits may be written as a level."""
    if isinstance(value, str):
        level = parse_budget("pair of bits", value)
        if not isinstance(level, UniformLevel):
            raise ValueError(f"{value!r} is no pair of bits such as w4a8")
        return (level.weight_bits, level.activation_bits)
    return value


_Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
_Pair = Annotated[tuple[_Bits, _Bits], pydantic.BeforeValidator(_read_pair)]
_Budget = Annotated[
    float | LevelSection | str | None,
    Field(union_mode="left_to_right"),
    pydantic.AfterValidator(_read_budget),
]


class RestrictionsSection(_Section):
    """Which bits layers may have, by names or patterns of layers; also a file of its own."""

    pairs: dict[str, tuple[_Pair, ...]] | None = Field(
        None, description="the only pairs of bits: [[4, 8], [8, 8]] or [w4a8, w8a8]"
    )
    fixed: dict[str, _Pair] | None = Field(None, description="given bits: [8, 8] or w8a8")
    tied: tuple[str | tuple[str, ...], ...] = Field(
        (), description="groups with equal bits, each a pattern or a list of patterns"
    )
    tie_shared_inputs: bool = Field(
        False, description="equal activation bits where layers read the same tensor"
    )
    tie_added_inputs: bool = Field(
        False, description="equal activation bits where layers read operands or sum of an addition"
    )
    min_bits: dict[str, _Bits | _Pair] | None = Field(
        None, description="fewest bits: 4, [4, 8] or w4a8"
    )
    weight_bits: _Bits | None = Field(None, description="of all weights: search activations only")
    activation_bits: _Bits | None = Field(
        None, description="of all activations: search weights only"
    )


_Budgets: Any = pydantic.create_model(
    "_Budgets",
    __base__=RestrictionsSection,
    **{name: (_Budget, Field(None, description=kind.help)) for name, kind in BUDGETS.items()},
)


class SearchSection(_Budgets):
    """Budgets, restrictions and options of the search; what is null does not limit.

    A budget is a number, the level of a uniform policy (w3a4, or weight_bits and activation_bits),
    or a share of what 8 bits use (25%). Where none is given, and ``bitops`` is not null, the limit
    is the BitOps of W3A3.
    """

    latency_table: str | None = Field(None, description="file (.json, .csv)")
    target: str | None = Field(
        None, description="onnxruntime, openvino, tensorrt, finn or a file (.yaml)"
    )
    alpha: float = 1.0
    normalise: bool = Field(False, description="normalised indicators instead of the plain sum")
    non_monotone: Literal["forbid", "isotonic", "keep"] = "forbid"
    interactions: str | None = Field(None, description="file of pairwise scores to add (.json)")
    smoothness: float = Field(
        0.0, description="what a bit of difference between a layer and the next one costs"
    )
    time_limit: float | None = Field(None, description="seconds")
    gap: float | None = Field(
        None, description="relative gap at which to stop; null: 0, above 200 layers 1e-6"
    )

    @pydantic.model_validator(mode="after")
    def _set_default(self) -> SearchSection:
        if "bitops" not in self.model_fields_set and not any(
            getattr(self, name, None) is not None for name in BUDGETS
        ):
            # Past the check that it is frozen, and it does not count as given.
            object.__setattr__(self, "bitops", LevelSection())
        return self

    @property
    def has_default_budget(self) -> bool:
        """Whether nobody gave a budget, so that the default one is in force."""
        return self.bitops is not None and "bitops" not in self.model_fields_set

    def question(self) -> Question:
        """The same as `search` takes it; reads latency table, target and interactions.

        Raises:
            OSError: One of these files cannot be read.
            FileFormatError: They are not what they should be.
        """
        given: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        for name in BUDGETS:
            if isinstance(given[name], LevelSection):
                level = given[name]
                given[name] = UniformLevel(level.weight_bits, level.activation_bits)
            elif isinstance(given[name], str):
                given[name] = parse_budget(name, given[name])
        if self.latency_table is not None:
            given["latency_table"] = LatencyTable.load(self.latency_table)
        if self.target is not None:
            given["target"] = load_target(self.target)
        if self.interactions is not None:
            given["interactions"] = Interactions.load(self.interactions)
        return given  # type: ignore[return-value]  # the fields are those of Question


class Recipe(_Section):
    """All that ``limpq run`` does; the defaults are the digits demonstration."""

    seed: int = Field(0, ge=0)
    device: str = Field(
        "auto", description="auto (CUDA where there is one), cpu, cuda, cuda:1, ..."
    )
    checkpoint_minutes: float = Field(
        10, ge=0, description="a checkpoint when so many minutes have passed; 0: not by time"
    )
    checkpoint_steps: int = Field(
        0, ge=0, description="a checkpoint after so many steps; 0: not by steps"
    )
    log_steps: int = Field(
        0, ge=0, description="numbers are written after so many steps; 0: after epochs alone"
    )
    tensorboard: bool = Field(False, description="write TensorBoard events beside the metrics")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    bits: tuple[int, ...] = (2, 3, 4, 5, 6)
    float_training: TrainingSection = Field(
        default_factory=lambda: TrainingSection(
            epochs=30, lr=0.1, weight_decay=5e-4, warmup_epochs=2
        )
    )
    joint: JointSection = Field(default_factory=lambda: JointSection(epochs=10, lr=0.01))
    scores: ScoresSection = Field(default_factory=ScoresSection)
    search: SearchSection = Field(default_factory=SearchSection)
    check: CheckSection = Field(default_factory=CheckSection)
    refine: RefineSection = Field(default_factory=RefineSection)
    export: ExportSection = Field(default_factory=ExportSection)
    baseline: LevelSection = Field(
        default_factory=LevelSection, description="uniform policy to compare with"
    )
    finetune: FinetuneSection = Field(
        default_factory=lambda: FinetuneSection(epochs=30, lr=0.02, warmup_epochs=1)
    )

    @pydantic.field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        return check_candidates(bits)

    @pydantic.model_validator(mode="after")
    def _check_start(self) -> Recipe:
        level = self.baseline
        if self.finetune.init == "joint" and not {
            level.weight_bits,
            level.activation_bits,
        } <= set(self.bits):
            raise ValueError(
                f"finetune.init is joint, but the baseline's W{level.weight_bits}"
                f"A{level.activation_bits} is not among the bits {list(self.bits)}"
            )
        if self.finetune.init == "joint" and self.scores.method != LEARNED:
            raise ValueError(
                f"finetune.init is joint, but with scores.method {self.scores.method} there is no"
                " joint training"
            )
        if self.finetune.init == "joint" and self.finetune.calibrate == "correct":
            raise ValueError(
                "finetune.calibrate is correct, but with finetune.init joint there is nothing to"
                " correct: batch normalisation was trained at these bits"
            )
        return self

    @property
    def calibration(self) -> Calibration:
        """How a policy is calibrated before it is fine-tuned."""
        if self.finetune.calibrate is not None:
            return self.finetune.calibrate
        begun = self.finetune.init == "joint" or self.quantization.scale_start == "lsq"
        return "off" if begun else "correct"


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package: what each does, by name."""
    folder = resources.files("limpq_ext.app") / "recipes"
    files = {item.name: item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return {
        name.removesuffix(".yaml"): files[name].read_text("utf-8").splitlines()[0].lstrip("# ")
        for name in sorted(files)
    }


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML file; what it leaves out has its default.

    Args:
        path: The file, or the name of a shipped recipe.

    Raises:
        FileNotFoundError: There is neither.
        FileFormatError: It is not YAML, or a key or value is wrong; one line that names file, key
            and reason.
    """
    name = os.fspath(path)
    file: Any = Path(path)
    shipped = shipped_recipes()
    if name in shipped:
        file = Path(str(resources.files("limpq_ext.app") / "recipes" / f"{name}.yaml"))
    elif not file.exists():
        raise FileNotFoundError(
            f"recipe '{name}' does not exist: expected a file, or one of {', '.join(shipped)}"
        )
    content = _content(file, name)
    with reading(name):
        return make_recipe(content, source=name)


def load_restrictions(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read restrictions from a YAML file with the keys of `RestrictionsSection`.

    Returns:
        The restrictions as `search` takes them.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is not YAML, or a key or value is wrong; one line that names file, key
            and reason.
    """
    name = os.fspath(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"restrictions file '{name}' does not exist")
    content = _content(Path(path), name)
    with reading(name):
        section = _validated(RestrictionsSection, content, name)
    return {name: getattr(section, name) for name in type(section).model_fields}


def _content(file: Any, name: str) -> dict[str, Any]:
    """The keys and values of a YAML file, none if it is empty; ``name`` is for the errors."""
    data = read_bytes(file, "recipe", YAML_BYTES)
    with reading(name, "not a YAML file"):
        content = parse_yaml(decode(data))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise FileFormatError(f"{name}: expected keys and values, not {type(content).__name__}")
    return content


def make_recipe(content: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Validate keys and values.

    Args:
        content: Nested keys and values.
        source: What the error calls it.

    Raises:
        ValueError: A key is unknown or a value is wrong; one line that names key and reason.
    """
    return _validated(Recipe, content, source)


def _validated(kind: Any, content: dict[str, Any], source: str) -> Any:
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {first_problem(error, content)}") from error


def parse_assignment(text: str) -> tuple[str, Any]:
    """Key and value of ``finetune.epochs=3``; the value is read as YAML.

    Raises:
        ValueError: There is no "=", no key, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"'{text}': expected KEY=VALUE, for example finetune.epochs=3")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"{shown(text)}: the value is not YAML: {error}") from error


def override(recipe: Recipe, values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """A recipe with other values.

    Args:
        recipe: What to start from.
        values: By key, with dots between sections: ``{"finetune.epochs": 3}``. The last of two that
            contradict each other counts.
        source: What the error calls it.

    Raises:
        ValueError: A key is unknown or a value is wrong.
    """
    content = recipe.model_dump()
    if recipe.search.has_default_budget:  # which another budget among the values replaces
        content["search"]["bitops"] = None
    for key, value in values.items():
        *sections, last = key.split(".")
        inner = content
        for at, section in enumerate(sections, start=1):
            if section not in inner:
                raise ValueError(f"{source}: {'.'.join(sections[:at])}: unknown key")
            if inner[section] is None:
                inner[section] = {}
            inner = inner[section]
            if not isinstance(inner, dict):
                raise ValueError(
                    f"{source}: {key}: '{'.'.join(sections[:at])}' is {inner!r} and has no keys"
                )
        inner[last] = value
    search = content["search"]
    asked = any(re.match(r"search(\.bitops|$)", key) for key in values)
    if recipe.search.has_default_budget and not asked and isinstance(search, dict):
        del search["bitops"]
    return make_recipe(content, source=source)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every value stated."""
    yaml = require("yaml", "cli")
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
