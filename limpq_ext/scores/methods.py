"""The scores by name: what the command line and recipes can ask for, and what each one takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from limpq_ext.scores.loss_aware import loss_aware
from limpq_ext.scores.one_at_a_time import layerwise
from limpq_ext.scores.relevance import relevance, relevance_sensitivity
from limpq_ext.scores.second_order import fisher, gradient
from limpq_ext.scores.statistics import activation_variance, weight_error
from limpq_ext.scores.traces import hessian, lampq
from limpq_ext.values.indicators import Indicators


@dataclass(frozen=True)
class Method:
    """A score.

    Attributes:
        function: Takes a float model, batches, ``bits`` and options of `Subject`.
        source: Where it is from.
        needs: What it needs beside inputs: "forwards", "gradients" or "targets, gradients".
        cost: In forwards and backwards of all batches.
    """

    function: Callable[..., Indicators]
    source: str
    needs: str
    cost: str


METHODS: Final[Mapping[str, Method]] = {
    "layerwise": Method(
        layerwise,
        "arXiv 2012.08420, 2001.00281",
        "forwards",
        "2 x layers x bits forwards from the layer on",
    ),
    "loss_aware": Method(
        loss_aware,
        "after arXiv 2203.08368",
        "targets, gradients",
        "1 forward and backward",
    ),
    "fisher": Method(
        fisher,
        "arXiv 1905.12558",
        "targets, gradients",
        "1 forward and backward, 2 x bits forwards of the layers",
    ),
    "gradient": Method(
        gradient,
        "NVIDIA Model Optimizer",
        "targets, gradients",
        "1 forward and backward, 2 x bits forwards of the layers",
    ),
    "hessian": Method(
        hessian,
        "arXiv 1911.03852",
        "targets, gradients",
        "1 forward and backward, 8 backwards of second order",
    ),
    "lampq": Method(
        lampq,
        "after arXiv 2511.10004",
        "targets, gradients",
        "1 forward and backward of each sample, 6 forwards for each type",
    ),
    "relevance": Method(
        relevance,
        "after arXiv 2401.11243",
        "forwards",
        "1 forward and a way back of 3 to 10 forwards",
    ),
    "relevance_sensitivity": Method(
        relevance_sensitivity,
        "after arXiv 2501.06357",
        "forwards",
        "what relevance takes, 2 x layers x bits forwards",
    ),
    "activation_variance": Method(
        activation_variance, "after NNCF", "forwards", "1 forward, 1 for the step sizes"
    ),
    "weight_error": Method(weight_error, "", "forwards", "1 forward, 1 for the step sizes"),
}
"""All of them, by the names that they have in :mod:`limpq_ext.scores`."""


def method_named(name: str) -> Method:
    """The score of a name.

    Raises:
        ValueError: There is none.
    """
    if name not in METHODS:
        raise ValueError(f"there is no score '{name}': it is one of {', '.join(METHODS)}")
    return METHODS[name]


def methods_text() -> str:
    """The table, a line each."""
    lines = [("score", "needs", "cost", "source")]
    lines += [(name, own.needs, own.cost, own.source) for name, own in METHODS.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
