"""Small searches, and what every possible policy of them does, written down once more.

Nothing here uses the package's rows, restrictions or solver: uses are counted from the definitions
of the budgets, in fractions, and restrictions are judged policy by policy.
"""

import itertools
import math
from fractions import Fraction

from hypothesis import strategies as st

from limpq_ext.values.costs import Costs, LayerCost, LiveTensor
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.latency import LatencyEntry, LatencyTable

BUDGETS = (
    "bitops",
    "size",
    "total_size",
    "compression",
    "mean_weight_bits",
    "mean_activation_bits",
    "bits_per_weight",
    "bits_per_activation",
    "activation_memory",
    "latency",
)
LIMITS = {
    "bitops": st.integers(1, 900),
    "size": st.integers(1, 320).map(lambda n: n / 8),
    "total_size": st.integers(100, 720).map(lambda n: n / 8),
    "compression": st.integers(30, 160).map(lambda n: n / 10),
    "mean_weight_bits": st.integers(20, 80).map(lambda n: n / 10),
    "mean_activation_bits": st.integers(20, 80).map(lambda n: n / 10),
    "bits_per_weight": st.integers(20, 80).map(lambda n: n / 10),
    "bits_per_activation": st.integers(20, 80).map(lambda n: n / 10),
    "activation_memory": st.integers(8, 1600).map(lambda n: n / 8),
    "latency": st.integers(1, 300).map(lambda n: n / 1000),
}


@st.composite
def problems(draw, largest=12, smallest_count=1, most=(4, 3)):
    """Indicators and costs; at most 4 layers at 2 bit-widths, or 3 layers at 3, or ``most``."""
    bits = tuple(sorted(draw(st.sets(st.integers(2, 8), min_size=2, max_size=3))))
    count = draw(st.integers(smallest_count, most[0] if len(bits) == 2 else most[1]))
    names = [f"block{i // 2}.layer{i}" for i in range(count)]
    value = st.integers(1, 50).map(lambda n: n / 64)

    def values():
        return {b: draw(value) for b in bits}

    def cost(name):
        small = st.integers(0, largest)
        # one weight and one activation at least, so that there is something to average
        return LayerCost(name, "linear", draw(small), draw(small) + 1, draw(small) + 1)

    layers = tuple(LayerIndicators(name, values(), values()) for name in names)
    fixed = (LayerCost("first", "conv2d", 7, draw(st.integers(1, largest)), 3),)
    shared = ()
    if count > 1 and draw(st.booleans()):
        group = draw(st.lists(st.sampled_from(names), min_size=2, unique=True))
        shared = (tuple(name for name in names if name in group),)
    tensors = []
    for name in [None, "first", *names]:
        first = draw(st.integers(0, count))
        last = draw(st.integers(first, count))
        tensors.append(LiveTensor(draw(st.integers(0, largest)), name, first, last))
    costs = Costs(
        tuple(map(cost, names)),
        fixed,
        shared_inputs=shared,
        tensors=tuple(tensors),
        parameters=99,
        float_parameters=11,
    )
    return Indicators(bits, layers), costs


@st.composite
def latency_tables(draw, costs, bits):
    """Seconds of every layer at every pair of bits, in no order at all."""
    seconds = st.integers(0, 99).map(lambda n: n / 1000)
    entries = [
        LatencyEntry(layer.name, bw, ba, draw(seconds))
        for layer in costs.layers
        for bw, ba in itertools.product(bits, repeat=2)
    ]
    entries += [LatencyEntry(layer.name, 8, 8, draw(seconds)) for layer in costs.fixed]
    return LatencyTable(tuple(entries))


def uses(costs, bits, table=None):
    """What a policy uses of every budget, in the user's units."""
    layers, fixed = costs.layers, costs.fixed
    weights = [layer.weights for layer in layers]
    inputs = [layer.activations for layer in layers]
    pairs = [bits[layer.name] for layer in layers]
    size = sum(n * bw for n, (bw, _) in zip(weights, pairs, strict=True))
    every_bit = size + 8 * sum(layer.weights for layer in fixed)
    used = {
        "bitops": Fraction(
            sum(layer.macs * bw * ba for layer, (bw, ba) in zip(layers, pairs, strict=True))
        ),
        "size": Fraction(every_bit, 8),
        "total_size": Fraction(every_bit, 8) + 4 * (costs.float_parameters or 0),
        "compression": Fraction(32 * costs.all_weights, every_bit),
        "mean_weight_bits": Fraction(sum(bw for bw, _ in pairs), len(pairs)),
        "mean_activation_bits": Fraction(sum(ba for _, ba in pairs), len(pairs)),
        "bits_per_weight": Fraction(size, sum(weights)),
        "bits_per_activation": Fraction(
            sum(n * ba for n, (_, ba) in zip(inputs, pairs, strict=True)), sum(inputs)
        ),
    }
    if costs.tensors:
        used["activation_memory"] = Fraction(costs.activation_memory_bits(bits), 8)
    if table is not None:
        seconds = {
            (e.layer, e.weight_bits, e.activation_bits): Fraction(str(e.seconds))
            for e in table.entries
        }
        used["latency"] = sum(
            (seconds[(layer.name, *bits[layer.name])] for layer in layers), Fraction(0)
        ) + sum((seconds[layer.name, 8, 8] for layer in fixed), Fraction(0))
    return used


def within(name, use, limit):
    """Whether one budget is kept."""
    limit = Fraction(str(limit))
    return use >= limit if name == "compression" else use <= limit


def excess(name, use, limit):
    """By what share of its limit a budget is exceeded, the compression's in bits of the weights."""
    limit = Fraction(str(limit))
    if name == "compression":
        use, limit = 1 / use, 1 / limit
    return max(Fraction(0), use / limit - 1)


def fits(name, pattern):
    """Patterns of the tests are names, names of blocks, or all."""
    return pattern in ("*", name, name.split(".")[0])


def allowed(costs, bits, question, forbidden=frozenset()):
    """Whether a policy keeps all restrictions of a question."""
    fixed = question.get("fixed") or {}
    for name, pair in bits.items():
        own = [given for pattern, given in fixed.items() if fits(name, pattern)]
        if any(pair != tuple(given) for given in own):
            return False
        for side, kind in enumerate(("weight", "activation")):
            given = question.get(f"{kind}_bits")
            if not own and given is not None and pair[side] != given:
                return False
            is_given = own or given is not None
            if not is_given and (name, kind, pair[side]) in forbidden:
                return False
        for pattern, pairs in (question.get("pairs") or {}).items():
            if fits(name, pattern) and pair not in [tuple(p) for p in pairs]:
                return False
        for pattern, least in (question.get("min_bits") or {}).items():
            low = (least, least) if isinstance(least, int) else least
            if fits(name, pattern) and (pair[0] < low[0] or pair[1] < low[1]):
                return False
    for group in question.get("tied", ()):
        patterns = [group] if isinstance(group, str) else group
        tied = {bits[name] for name in bits if any(fits(name, p) for p in patterns)}
        if len(tied) > 1:
            return False
    if question.get("tie_shared_inputs") or question.get("activation_memory") is not None:
        for group in costs.shared_inputs:
            if len({bits[name][1] for name in group if name in bits}) > 1:
                return False
    return True


def every_policy(indicators, costs, question, alpha):
    """All policies that keep the restrictions: (objective, name -> bits)."""
    _, records = indicators.monotone("forbid")
    forbidden = {(r.layer, r.kind, r.bits) for r in records}
    given = {question.get("weight_bits"), question.get("activation_bits")}
    given |= {b for pair in (question.get("fixed") or {}).values() for b in pair}
    bits = sorted({*indicators.bits, *given} - {None})
    by_name = {layer.name: layer for layer in indicators.layers}
    names = [layer.name for layer in costs.layers]

    def known(pair):
        sides = zip(pair, ("weight", "activation"), strict=True)
        return all(b in (*indicators.bits, question.get(f"{kind}_bits")) for b, kind in sides)

    own = [
        [
            pair
            for pair in itertools.product(bits, repeat=2)
            if allowed(costs, {name: pair}, {**question, "tied": ()}, forbidden)
            and all(
                b in indicators.bits
                or question.get(f"{kind}_bits") == b
                or is_fixed(name, question)
                for b, kind in zip(pair, ("weight", "activation"), strict=True)
            )
        ]
        for name in names
    ]
    for pairs in itertools.product(*own):
        assignment = dict(zip(names, pairs, strict=True))
        if allowed(costs, assignment, question, forbidden):
            objective = math.fsum(
                by_name[n].activation.get(ba, 0.0) + alpha * by_name[n].weight.get(bw, 0.0)
                for n, (bw, ba) in assignment.items()
            )
            yield objective, assignment


def is_fixed(name, question):
    """Whether a question gives a layer its bits."""
    return any(fits(name, pattern) for pattern in question.get("fixed") or {})


def best_policy(indicators, costs, question, limits, alpha, table=None):
    """The best policy within budgets and restrictions: (objective, bits), None if there is none.

    Of equally good ones (to 1e-12) it has the fewest BitOps, then the fewest bits.
    """
    whole = {**question, **limits}
    kept = []
    for objective, bits in every_policy(indicators, costs, whole, alpha):
        used = uses(costs, bits, table)
        if all(within(name, used[name], limit) for name, limit in limits.items()):
            kept.append((objective, used["bitops"], used["size"], bits))
    if not kept:
        return None
    lowest = min(objective for objective, *_ in kept)
    tied = [entry for entry in kept if entry[0] <= lowest * (1 + 1e-12)]
    return min(tied, key=lambda entry: entry[1:3])


@st.composite
def restrictions(draw, indicators, costs):
    """Some restrictions of a problem, that may contradict each other."""
    names = [layer.name for layer in costs.layers]
    patterns = st.sampled_from(["*", *names, *{name.split(".")[0] for name in names}])
    bit = st.sampled_from(indicators.bits)
    pair = st.tuples(bit, bit)
    question = {}
    if draw(st.booleans()):
        question["pairs"] = draw(
            st.dictionaries(patterns, st.lists(pair, min_size=2, max_size=6), max_size=2)
        )
    if draw(st.integers(0, 2)) == 0:
        any_pair = st.tuples(st.integers(2, 9), st.integers(2, 9))
        question["fixed"] = draw(
            st.dictionaries(st.sampled_from(names), st.one_of(pair, any_pair), max_size=1)
        )
    if draw(st.integers(0, 2)) == 0:
        question["min_bits"] = draw(st.dictionaries(patterns, st.one_of(bit, pair), max_size=2))
    if len(names) > 1 and draw(st.booleans()):
        group = st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True)
        question["tied"] = draw(st.lists(group, min_size=1, max_size=2))
    question["tie_shared_inputs"] = draw(st.booleans())
    one_side = draw(st.sampled_from([None, None, None, "weight_bits", "activation_bits"]))
    if one_side:
        question[one_side] = draw(st.one_of(bit, st.integers(2, 9)))
    return question
