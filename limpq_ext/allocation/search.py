"""The search: one integer linear program picks the bits of every layer under budgets.

`problem` states the program, `limpq_ext.ilp.program` solves it to proven optimality, and the answer
is checked in exact integers afterwards. Where there is none, `infeasible` tells why.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from limpq_ext.allocation.budgets import (
    Asked,
    Number,
    ShareOf8Bit,
    UniformLevel,
    of_8bit,
    uniform,
)
from limpq_ext.allocation.infeasible import InfeasibleError, why_infeasible
from limpq_ext.allocation.measures import Pair
from limpq_ext.allocation.problem import make_problem
from limpq_ext.allocation.target import Target
from limpq_ext.ilp.rows import NoSolutionError
from limpq_ext.values.costs import Costs
from limpq_ext.values.indicators import Indicators, Rule
from limpq_ext.values.interactions import Interactions
from limpq_ext.values.latency import LatencyTable
from limpq_ext.values.policy import Policy

__all__ = [
    "InfeasibleError",
    "ShareOf8Bit",
    "UniformLevel",
    "of_8bit",
    "search",
    "uniform",
]


def search(
    indicators: Indicators,
    costs: Costs,
    *,
    bitops: Asked | None = None,
    size: Asked | None = None,
    total_size: Asked | None = None,
    compression: Asked | None = None,
    mean_weight_bits: Asked | None = None,
    mean_activation_bits: Asked | None = None,
    bits_per_weight: Asked | None = None,
    bits_per_activation: Asked | None = None,
    activation_memory: Asked | None = None,
    latency: Asked | None = None,
    latency_table: LatencyTable | None = None,
    pairs: Mapping[str, Iterable[Pair]] | None = None,
    fixed: Mapping[str, Pair] | None = None,
    tied: str | Iterable[str | Iterable[str]] = (),
    tie_shared_inputs: bool = False,
    tie_added_inputs: bool = False,
    min_bits: Mapping[str, int | Pair] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    target: Target | None = None,
    alpha: Number = 1.0,
    normalise: bool = False,
    non_monotone: Rule = "forbid",
    interactions: Interactions | None = None,
    smoothness: Number = 0.0,
    time_limit: Number | None = None,
    gap: Number | None = None,
) -> Policy:
    """Find the bits of every layer with the smallest sum of indicators within the budgets.

    Any number of budgets and restrictions counts at once; without one, every layer gets its best
    bits. A budget is a number in its unit, the level of a `uniform` policy, or a share `of_8bit`;
    as on the command line these may be strings: ``"1.2e9"``, ``"w4a4"``, ``"25%"``.
    Restrictions name layers by their names or by patterns (``"layer1.*"``); the name of a module
    stands for all layers in it. Of equally good policies the one with fewer BitOps is taken, then
    the smaller one.

    Args:
        indicators: Learned indicators of the searchable layers.
        costs: Costs of the same layers and of the fixed ones.
        bitops: Most BitOps (MACs * weight bits * activation bits) of the searchable layers for one
            sample.
        size: Largest size of all weights in bytes, with the fixed layers at their bits and without
            biases and batch normalisation.
        total_size: Largest size of the whole network in bytes: ``size``, and every other parameter
            (embeddings, normalisations, biases, excluded layers) in float32.
        compression: Smallest ratio of the weights at 32 bits to the weights as in ``size``; a
            number or a level.
        mean_weight_bits: Largest mean of the weight bits over the searchable layers.
        mean_activation_bits: The same for the activation bits.
        bits_per_weight: Largest mean of the weight bits where every weight of the searchable
            layers counts the same.
        bits_per_activation: The same for the activation bits, by elements of the layers' inputs.
        activation_memory: Most bytes of the tensors between layers that are held at one moment,
            for one sample, as `Costs.activation_memory_bits` counts them. It brings
            ``tie_shared_inputs``, since a tensor is held with one bit-width.
        latency: Most seconds, by ``latency_table``; fixed layers count where the table has them.
        latency_table: What each layer takes at each pair of bits that it can have.
        pairs: For patterns of layers the only (weight bits, activation bits) that they may have,
            such as ``{"*": [(4, 8), (8, 8)]}``.
        fixed: For patterns of layers the (weight bits, activation bits) that they have. They may
            be bits that are no candidates, or are forbidden; bits without an indicator add nothing
            to the objective, which they could not change.
        tied: Groups of layers with equal bits, each a pattern or a list of patterns.
        tie_shared_inputs: Whether layers that read one and the same tensor have equal activation
            bits, so that it is quantized once.
        tie_added_inputs: Whether layers that read the operands of one addition, or what it puts
            out, have equal activation bits, for hardware that adds one type.
        min_bits: For patterns of layers the fewest bits, or (weight bits, activation bits).
        weight_bits: Bits of the weights of all layers that ``fixed`` does not name, so that only
            activations are searched; they may be any, as in ``fixed``.
        activation_bits: The same for activations, so that only weights are searched.
        target: What the policy is to run on, of :func:`limpq_ext.load_target`: searchable layers
            have pairs of bits that it has kernels for, and it may tie shared inputs.
        alpha: Weight of the weight indicators against the activation indicators.
        normalise: Search with `Indicators.normalised` instead of LIMPQ's plain sum.
        non_monotone: What to do with indicators that do not fall as bits grow, see
            `Indicators.monotone`; what was done stands in ``meta["non_monotone_records"]``.
        interactions: Pairwise scores, such as those of :func:`limpq_ext.scores.interactions`: what
            two tensors cost together beyond what each costs alone. They are added as they are;
            ``alpha`` does not weigh them, and they do not go with ``normalise``. They may be
            negative, and their matrix need not be positive semi-definite: CLADO (arXiv 2307.05657)
            makes it so for its solver, here products of choices are made linear exactly. Bits
            without an interaction add nothing.
        smoothness: What each bit of difference between a layer and the next one adds to the
            objective, for weight bits and activation bits alike; the order is that of the
            indicators.
        time_limit: Most seconds that the search takes, what it prepares included; the best policy
            found until then is returned. Finding out why there is no policy takes as long again.
        gap: Relative gap at which to stop early; 0 proves optimality. None: 0 for up to 200
            searchable layers, 1e-6 for more.

    Returns:
        The policy, layers in the order of ``costs``. Its objective is summed from the chosen
        indicators, their interactions and the steps' penalty, whose parts
        ``meta["objective_parts"]`` holds. Its budgets were checked in exact integers:
        ``meta["check"]`` holds those. Interactions between few layers, as within blocks, are
        proven as plain indicators are; where more are connected, as by ``smoothness``, HiGHS
        proves the policy, up to its tolerance, in seconds instead of hundredths.
        ``meta["stopped_by"]`` says what ended the search: ``"optimal"``, the policy is proven
        optimal in integers and its gap is 0; ``"tolerance"``, HiGHS calls it optimal, which holds
        up to HiGHS's tolerance, and bound and gap allow for that; ``"gap"`` or ``"time"``, the gap
        that was asked for or the time limit was reached.

    Raises:
        TypeError: If a budget, restriction or option has another type.
        ValueError: If a budget is a string that is none of these, or is not positive and finite, an
            option is out of range, the interactions are of other layers or bits, restrictions
            contradict each other or fit no layer, the layers of indicators and costs differ, or the
            latency table has holes.
        InfeasibleError: If no policy keeps budgets and restrictions.
        TimeoutError: If the time limit passed before there was any policy.
        RuntimeError: If HiGHS fails.
        ImportError: If highspy is not installed.
    """
    start = time.perf_counter()
    problem = make_problem(
        indicators,
        costs,
        bitops=bitops,
        size=size,
        total_size=total_size,
        compression=compression,
        mean_weight_bits=mean_weight_bits,
        mean_activation_bits=mean_activation_bits,
        bits_per_weight=bits_per_weight,
        bits_per_activation=bits_per_activation,
        activation_memory=activation_memory,
        latency=latency,
        latency_table=latency_table,
        pairs=pairs,
        fixed=fixed,
        tied=tied,
        tie_shared_inputs=tie_shared_inputs,
        tie_added_inputs=tie_added_inputs,
        min_bits=min_bits,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        target=target,
        alpha=alpha,
        normalise=normalise,
        non_monotone=non_monotone,
        interactions=interactions,
        smoothness=smoothness,
        time_limit=time_limit,
        gap=gap,
    )
    try:
        solution = problem.solve(began=start)
    except NoSolutionError:
        raise why_infeasible(problem) from None
    return problem.policy(solution, seconds=time.perf_counter() - start)
