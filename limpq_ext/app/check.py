"""What can be seen to fail in any stage of a run, before the first one trains."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.search import search
from limpq_ext.app.recipe import LEARNED, NEEDED_TO_EXPORT, Recipe
from limpq_ext.app.session import Session
from limpq_ext.app.trainings import make_joint_trainer, train_loader
from limpq_ext.export.engines import check_engine
from limpq_ext.export.onnx_graph import onnx_graph
from limpq_ext.nn.named import is_published
from limpq_ext.training.distributed import from_main
from limpq_ext.training.metrics import Meter
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.optional import require

CHECK_SECONDS: Final = 10.0
"""The most that is taken to see, before anything trains, whether a policy is possible."""


def check(session: Session) -> None:
    """Look, before anything trains, for what would keep a later stage from its work.

    The search is tried with indicators that stand in for the learned ones.

    Raises:
        ValueError: A part of the recipe cannot be done: the network cannot be prepared, a
            training does not fit data or device, the search's question is wrong.
        InfeasibleError: No policy keeps the budgets and restrictions.
        FileNotFoundError: The latency table or the float weights do not exist.
        ImportError: An extra is missing.
    """
    require("safetensors", "train")
    if session.recipe.export.onnx:
        for module in NEEDED_TO_EXPORT:
            require(module, "export")
    given = session.recipe.model.weights
    if given is not None and not is_published(given) and not Path(given).is_file():
        raise FileNotFoundError(f"weights '{given}' do not exist")
    costs = session.profile()
    from_main(lambda: check_search(session.recipe, costs))
    if session.recipe.export.wanted:
        for engine in session.recipe.export.engines or ():
            check_engine(engine)
    model = session.create_model()
    quantized = session.quantize(model, session.uniform_policy(costs))
    if session.recipe.export.onnx:
        onnx_graph(quantized, session.example_input())
    prepared = session.prepare(model)
    if session.recipe.scores.method == LEARNED:
        make_joint_trainer(session, prepared, Meter(session.device))
    for options in (session.recipe.float_training, session.recipe.finetune):
        train_loader(session, options)
    if session.recipe.scores.method == LEARNED:
        train_loader(session, session.recipe.joint, session.recipe.data.fraction)


def check_search(recipe: Recipe, costs: Costs) -> None:
    """See whether a recipe's search can have an answer, whatever its indicators will be.

    Raises:
        ValueError: Its question is wrong: unknown bits, a latency table with holes, ...
        InfeasibleError: No policy keeps its budgets and restrictions.
        FileNotFoundError: The latency table does not exist.
    """
    falling = {bits: 1 / bits for bits in recipe.bits}
    stand_in = Indicators(
        recipe.bits, tuple(LayerIndicators(layer.name, falling, falling) for layer in costs.layers)
    )
    question = recipe.search.question()
    limit = question.get("time_limit")
    question["time_limit"] = CHECK_SECONDS if limit is None else min(limit, CHECK_SECONDS)
    try:
        with suppress(TimeoutError):  # the search itself may take longer
            search(stand_in, costs, **{**question, "gap": 1.0})  # type: ignore[arg-type]  # a Question
    except InfeasibleError:
        with suppress(TimeoutError):
            search(stand_in, costs, **question)  # says exactly what could be kept
        raise
