from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import allowed, every_policy, problems, restrictions

from limpq_ext.allocation.infeasible import InfeasibleError
from limpq_ext.allocation.problem import make_problem
from limpq_ext.allocation.restrictions import merged
from limpq_ext.allocation.search import search
from limpq_ext.values.costs import Costs, LayerCost, LiveTensor
from limpq_ext.values.indicators import Indicators, LayerIndicators

NAMES = ("block0.a", "block0.b", "block1.a", "block1.b")


def example(bits=(2, 4, 8), shared=(), fixed_shared=False):
    values = {b: 1 / b for b in bits}
    layers = tuple(LayerIndicators(name, values, values) for name in NAMES)
    costs = tuple(LayerCost(name, "linear", 10, 10, 10) for name in NAMES)
    shared = (*shared, ("block0.a", "fc")) if fixed_shared else shared
    return Indicators(bits, layers), Costs(
        costs, (LayerCost("fc", "linear", 7, 5, 3),), shared_inputs=shared
    )


def bits_of(policy):
    return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in policy.layers}


@settings(max_examples=150, deadline=None)
@given(problem=problems(), data=st.data())
def test_pairs_and_links_admit_exactly_the_policies_that_keep_the_restrictions(problem, data):
    indicators, costs = problem
    question = data.draw(restrictions(indicators, costs))
    every = [bits for _, bits in every_policy(indicators, costs, question, 1.0)]
    try:
        checked = make_problem(indicators, costs, **question)
    except ValueError:
        assert not every
        return
    for bits in every:
        assert checked.allows(list(bits.values()))
    # and no other one: each pair that is left is in some policy, unless ties in a ring exclude it
    for place, pairs in enumerate(checked.columns):
        used = {list(bits.values())[place] for bits in every}
        assert used <= set(pairs)
    product = 1
    for pairs in checked.columns:
        product *= len(pairs)
    if not checked.links:
        assert product == len(every)


def test_hardware_pairs_hold_for_all_layers_and_more_for_some():
    policy = search(
        *example(), pairs={"*": [(4, 8), (8, 8)], "block1": [(4, 8), (2, 2)]}, mean_weight_bits=6
    )
    bits = bits_of(policy)
    assert set(bits.values()) == {(4, 8), (8, 8)}
    assert bits["block1.a"] == bits["block1.b"] == (4, 8)


def test_fixed_layers_keep_bits_that_are_no_candidates_and_add_nothing_to_the_objective():
    indicators, costs = example()
    free = search(indicators, costs)
    policy = search(indicators, costs, fixed={"block0.*": (16, 3)}, mean_weight_bits=10)
    assert bits_of(policy)["block0.a"] == bits_of(policy)["block0.b"] == (16, 3)
    assert policy.objective == free.objective / 2 + 0.25  # block1 at W4A8 at best
    assert policy.budgets[0].used == 10


def test_a_fixed_layer_may_have_bits_that_the_rule_forbids():
    odd = {2: 0.1, 4: 0.4}
    indicators = Indicators((2, 4), (LayerIndicators("a", odd, odd),))
    costs = Costs((LayerCost("a", "linear", 1, 1, 1),), ())
    assert bits_of(search(indicators, costs)) == {"a": (4, 4)}
    assert bits_of(search(indicators, costs, fixed={"a": (2, 4)})) == {"a": (2, 4)}
    with pytest.raises(ValueError, match=r"layer 'a' has no bits left that pairs\['a'\] allow"):
        search(indicators, costs, pairs={"a": [(2, 2)]})


def test_weight_only_search_gives_all_activations_the_bits_that_were_given():
    policy = search(*example(), activation_bits=16, fixed={"block0.a": (8, 4)}, bitops=1600)
    bits = bits_of(policy)
    assert bits.pop("block0.a") == (8, 4)
    assert {activation for _, activation in bits.values()} == {16}
    assert sorted(weight for weight, _ in bits.values()) == [2, 2, 4]


def test_activation_only_search_gives_all_weights_the_bits_that_were_given():
    policy = search(*example(), weight_bits=3, bits_per_activation=5)
    assert {weight for weight, _ in bits_of(policy).values()} == {3}
    # of the activations alone: weights of 3 bits have no indicator
    assert policy.objective == sum(1 / activation for _, activation in bits_of(policy).values())


def test_minimum_bits_hold_for_both_sides_or_each():
    bits = bits_of(
        search(*example(), min_bits={"*": (2, 4), "block1.a": 8}, mean_weight_bits=3.5,
               mean_activation_bits=5)
    )  # fmt: skip
    assert bits == {
        "block0.a": (2, 4), "block0.b": (2, 4), "block1.a": (8, 8), "block1.b": (2, 4)
    }  # fmt: skip


def test_ties_that_share_a_layer_are_one():
    indicators, costs = example(shared=(("block0.a", "block0.b"), ("block0.b", "block1.a")))
    question = {"tied": [["block0.a", "block1.b"]], "tie_shared_inputs": True}
    bits = bits_of(search(indicators, costs, **question, bitops=900))
    assert bits["block0.a"] == bits["block1.b"]
    assert len({bits[name][1] for name in NAMES}) == 1
    assert merged([["a", "b"], ["c", "d"], ["e"], ["d", "a"]]) == [["e"], ["a", "b", "c", "d"]]


def test_a_pattern_ties_all_layers_that_it_fits():
    bits = bits_of(search(*example(), tied="block1.*", bitops=900))
    assert bits["block1.a"] == bits["block1.b"]
    assert allowed(example()[1], bits, {"tied": ["block1"]})


def test_a_searchable_layer_gets_the_activation_bits_of_the_fixed_layer_that_reads_its_input():
    bits = bits_of(search(*example(fixed_shared=True), tie_shared_inputs=True, bitops=1000))
    assert bits["block0.a"][1] == 8
    indicators, costs = example(bits=(2, 4), fixed_shared=True)
    with pytest.raises(ValueError, match=r"need equal activation bits.*'block0.a': 2, 4; 'fc': 8"):
        search(indicators, costs, tie_shared_inputs=True)
    given = search(indicators, costs, tie_shared_inputs=True, fixed={"block0.a": (4, 8)})
    assert bits_of(given)["block0.a"] == (4, 8)


def test_activation_memory_ties_the_layers_that_read_one_tensor():
    indicators, costs = example(shared=(("block0.a", "block0.b"),))
    tensors = (LiveTensor(10, "block0.a", 0, 1), LiveTensor(100, "block1.a", 1, 2))
    costs = Costs(costs.layers, costs.fixed, shared_inputs=costs.shared_inputs, tensors=tensors)
    policy = search(indicators, costs, activation_memory=55)
    bits = policy.bits()
    assert bits["block0.a"][1] == bits["block0.b"][1]
    assert policy.budgets[0].used == costs.activation_memory_bits(bits) / 8 <= 55
    assert "shared inputs, for activation_memory" in policy.meta["restrictions"]


# ------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"fixed": {"block0.a": (2, 2), "block0": (4, 4)}},
            r"layer 'block0.a' has no bits left that fixed\['block0.a'\], fixed\['block0'\] allow",
        ),
        (
            {"fixed": {"block0.a": (2, 2), "block1.a": (4, 4)}, "tied": [["*.a"]]},
            r"tied\['\*.a'\] need equal bits, .* 'block0.a': W2A2; 'block1.a': W4A4",
        ),
        (
            {"fixed": {"block0.a": (2, 2), "block0.b": (2, 4)}, "tie_shared_inputs": True},
            r"tie_shared_inputs need equal activation bits.* 'block0.a': 2; 'block0.b': 4",
        ),
        (
            {"pairs": {"*": [(2, 2), (4, 4)]}, "min_bits": {"block1": 8}},
            r"layer 'block1.a' has no bits left that pairs\['\*'\], min_bits\['block1'\] allow",
        ),
        ({"weight_bits": 4, "min_bits": {"*": 8}}, r"weight_bits, min_bits\['\*'\] allow"),
        ({"pairs": {"block0.a": []}}, r"pairs\['block0.a'\] allows nothing"),
        ({"pairs": {"*": [(3, 8)]}}, r"pairs\['\*'\]: \(3, 8\) has 3 bits, .* \[2, 4, 8\]"),
        ({"pairs": {"conv*": [(4, 8)]}}, r"'conv\*' fits no searchable layer: no layer has such"),
        ({"fixed": {"fc": (4, 8)}}, r"'fc' fits no searchable layer: layer 'fc' is fixed by the c"),
        ({"fixed": {"block0.a": (1, 8)}}, r"fixed\['block0.a'\]: 1 bits is outside 2 to 16"),
        ({"min_bits": {"*": 17}}, r"min_bits\['\*'\]: 17 bits is outside 2 to 16"),
        ({"weight_bits": 1}, r"weight_bits: 1 bits is outside 2 to 16"),
        ({"tied": ["block0.a"]}, r"tied\['block0.a'\]: is one layer, 'block0.a': name two"),
        ({"tied": [[]]}, r"tied\[\]: is one layer, 'none'"),
    ],
)
def test_a_contradiction_names_restrictions_and_layers(question, message):
    with pytest.raises(ValueError, match=message):
        search(*example(shared=(("block0.a", "block0.b"),)), **question)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"pairs": [(4, 8)]}, "pairs must map patterns of layer names"),
        ({"pairs": {"*": (4, 8)}}, r"pairs\['\*'\] must be a list of \(weight bits, activation"),
        ({"pairs": {"*": 4}}, r"pairs\['\*'\] must be a list of"),
        ({"fixed": {"block0.a": 4}}, r"fixed\['block0.a'\] must be \(weight bits, activation"),
        ({"fixed": {"block0.a": (4.0, 8)}}, "bits must be an integer, got 4.0"),
        ({"min_bits": {"*": "4"}}, r"min_bits\['\*'\] must be \(weight bits, activation bits\)"),
        ({"tied": 3}, "tied must be a list of patterns"),
        ({"tied": [[3, 4]]}, "a pattern is a string, got 3"),
        ({"tie_shared_inputs": "no"}, "tie_shared_inputs must be True or False"),
        ({"weight_bits": 4.5}, "weight_bits: bits must be an integer"),
        ({"speed": 3}, "unexpected keyword argument 'speed'"),
    ],
)
def test_a_restriction_of_another_type_is_refused(question, message):
    with pytest.raises(TypeError, match=message):
        search(*example(), **question)


def test_a_ring_of_ties_holds_and_is_named_where_budgets_break_on_it():
    indicators, costs = example(shared=(("block0.b", "block1.a"),))
    question = {
        "pairs": {"block0.a": [(2, 8), (8, 2)], "block1.a": [(2, 2), (8, 8)]},
        "tied": [["block0.a", "block0.b"]],
        "tie_shared_inputs": True,
    }
    for limits in ({"mean_weight_bits": 4}, {"mean_activation_bits": 4}):
        assert allowed(costs, bits_of(search(indicators, costs, **question, **limits)), question)
    with pytest.raises(InfeasibleError) as caught:
        search(indicators, costs, **question, mean_weight_bits=3, mean_activation_bits=4)
    assert caught.value.conflict == (
        "mean_weight_bits",
        "mean_activation_bits",
        "pairs['block0.a']",
        "tied['block0.a', 'block0.b']",
    )
