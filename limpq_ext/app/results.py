"""What the networks of a recipe come to on its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from limpq_ext.app.session import Session
from limpq_ext.data.loading import make_loader
from limpq_ext.training.evaluation import Confusion, Evaluation, evaluate, evaluate_beside
from limpq_ext.training.loop import StepDone
from limpq_ext.values.costs import FLOAT_BITS, Costs
from limpq_ext.values.policy import Policy

Split = Literal["test", "val"]


@dataclass(frozen=True)
class Result:
    """One network at the end of a run.

    Attributes:
        name: "float", "policy", "policy.onnx" for its file in an engine, or "uniform".
        accuracy: On the test set, 0 to 1.
        bitops: Of the searchable layers for one sample; a float layer counts 32 * 32 bits.
        size_bytes: Of all weights, without biases and batch normalisation.
        compression: Ratio to 32-bit weights.
        total_bytes: Of all parameters, those that stay in float32 included.
        untrained: Divergence of the outputs from the float network's before any fine-tuning, in
            nats; None where it was not measured.
        file_bytes: Size of the file that it is, or is to be deployed as; None where there is none.
    """

    name: str
    accuracy: float
    bitops: int
    size_bytes: float
    compression: float
    total_bytes: float
    untrained: float | None = None
    file_bytes: int | None = None


def result_of(
    name: str,
    accuracy: float,
    costs: Costs,
    policy: Policy | None,
    *,
    untrained: float | None = None,
    file_bytes: int | None = None,
) -> Result:
    """The result of a network.

    Args:
        name: What it is called.
        accuracy: On the test set.
        costs: Of the network.
        policy: Its bits; None: the float network.
        untrained: What it loses before any fine-tuning.
        file_bytes: The size of its file.
    """
    bits = (
        dict.fromkeys((layer.name for layer in costs.layers), (FLOAT_BITS, FLOAT_BITS))
        if policy is None
        else policy.bits()
    )
    float_size = FLOAT_BITS * costs.all_weights
    size = float_size if policy is None else costs.size_bits(bits)
    return Result(
        name,
        accuracy,
        bitops=costs.bitops(bits),
        size_bytes=size / 8,
        compression=float_size / size,
        total_bytes=(size + FLOAT_BITS * costs.parameters_in_float()) / 8,
        untrained=untrained,
        file_bytes=file_bytes,
    )


@dataclass(frozen=True)
class RunReport:
    """What a run came to.

    Attributes:
        results: The float network, the searched policy and the uniform baseline.
        seconds: What every stage took when it ran.
        reused: The stages that did not have to run again.
        folder: Where the files are.
        warnings: What the user should know of the policy, a sentence each.
    """

    results: tuple[Result, ...]
    seconds: dict[str, float]
    reused: tuple[str, ...]
    folder: Path
    warnings: tuple[str, ...] = ()


def evaluate_network(
    session: Session,
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    split: Split = "test",
    on_step: StepDone | None = None,
) -> tuple[Evaluation, Confusion | None]:
    """How a network does on a split and, with a reference, where it decides otherwise than that.

    Raises:
        ValueError: The network puts out what is not finite.
    """
    batches, confusion = _batches(session, split), None
    if reference is None:
        result = evaluate(model, batches, on_step=on_step)
    else:
        result, confusion = evaluate_beside(model, reference, batches, on_step=on_step)
    if not math.isfinite(result.loss):
        raise ValueError(
            f"the loss on the {split} images is {result.loss}: the network puts out NaN or"
            " infinite scores"
        )
    return result, confusion


def _batches(session: Session, split: Split) -> Any:
    data, workers = getattr(session.data, split), session.recipe.data.workers
    return make_loader(data, batch_size=256, train=False, workers=workers)
