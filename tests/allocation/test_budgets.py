from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import BUDGETS, latency_tables, problems, uses

from limpq_ext.allocation.budgets import BUDGETS as ALL_BUDGETS
from limpq_ext.allocation.budgets import (
    ShareOf8Bit,
    UniformLevel,
    in_exact_words,
    in_short_words,
    in_words,
    make_budgets,
    make_measure,
    of_8bit,
    parse_budget,
    uniform,
)
from limpq_ext.values.costs import Costs, LayerCost, LiveTensor


@pytest.mark.parametrize("name", BUDGETS)
@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_the_use_is_that_of_the_definition_in_exact_fractions(name, problem, data):
    indicators, costs = problem
    table = data.draw(latency_tables(costs, indicators.bits))
    bit = st.sampled_from(indicators.bits)
    pairs = [data.draw(st.tuples(bit, bit)) for _ in costs.layers]
    names = [layer.name for layer in costs.layers]
    measure = make_measure(name, costs, table)
    use = measure.use(pairs)
    exact = uses(costs, dict(zip(names, pairs, strict=True)), table)[name]
    if measure.inverse or use:
        assert measure.exact(use) == exact
        # what is shown can be asked for again, and allows no more
        shown = Fraction(str(measure.shown(use)))
        assert measure.whole(shown) >= use
        assert measure.whole(measure.exact(use)) == use


@pytest.mark.parametrize("name", BUDGETS)
@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_the_rows_are_kept_exactly_where_the_use_is_within_the_limit(name, problem, data):
    indicators, costs = problem
    table = data.draw(latency_tables(costs, indicators.bits))
    columns = [[(bw, ba) for bw in indicators.bits for ba in indicators.bits]] * len(costs.layers)
    chosen = [data.draw(st.integers(0, len(column) - 1)) for column in columns]
    measure = make_measure(name, costs, table)
    use = measure.use([column[i] for column, i in zip(columns, chosen, strict=True)])
    limit = use + data.draw(st.integers(-3, 3))
    kept = all(row.use(chosen) <= row.limit for row in measure.rows(columns, limit))
    assert kept == (use <= limit)
    assert all(row.use(chosen) <= row.limit for row in measure.rows(columns, None))


def test_moments_at_which_less_is_held_than_at_another_are_left_out():
    layers = tuple(LayerCost(name, "linear", 1, 1, 1) for name in "ab")
    tensors = (
        LiveTensor(10, "a", 0, 3),
        LiveTensor(5, "b", 2, 2),
        LiveTensor(7, None, 1, 1),  # 224 bits, whatever is chosen
        LiveTensor(3, "first", 3, 3),  # 24 bits: above nothing that moment 1 holds
    )
    costs = Costs(layers, (LayerCost("first", "conv2d", 1, 1, 1),), tensors=tensors)
    measure = make_measure("activation_memory", costs)
    assert sorted(measure.constants) == [0, 224]
    assert measure.use([(2, 2), (2, 2)]) == costs.activation_memory_bits({"a": (2, 2), "b": (2, 2)})


def test_all_budgets_have_a_measure():
    layer = LayerCost("a", "linear", 2, 3, 4)
    costs = Costs((layer,), (), tensors=(LiveTensor(1, "a", 0, 0),), float_parameters=1)
    assert tuple(ALL_BUDGETS) == BUDGETS
    for name in set(BUDGETS) - {"latency"}:
        assert make_measure(name, costs).use([(3, 5)]) > 0
    with pytest.raises(ValueError, match="there is no budget 'speed': it is one of bitops, size"):
        make_measure("speed", costs)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("compression", LayerCost("a", "linear", 1, 0, 1), "the costs hold no weights"),
        ("bits_per_weight", LayerCost("a", "linear", 1, 0, 1), "layers have no weights"),
        ("bits_per_activation", LayerCost("a", "linear", 1, 1, 0), "layers have no activations"),
        ("activation_memory", LayerCost("a", "linear", 1, 1, 1), "the costs have no tensors"),
        ("total_size", LayerCost("a", "linear", 1, 1, 1), "do not say which parameters stay"),
    ],
)
def test_a_budget_of_something_that_is_not_there_is_refused(name, layer, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}|{message}"):
        make_budgets(Costs((layer,), ()), [[(2, 2)]], {name: 3}, None)


def test_a_level_that_uses_nothing_is_refused():
    costs = Costs((LayerCost("a", "linear", 0, 1, 1),), ())
    with pytest.raises(ValueError, match="bitops: nothing is used at W3A4: give a number"):
        make_budgets(costs, [[(2, 2)]], {"bitops": uniform(3, 4)}, None)
    with pytest.raises(ValueError, match="less than one unit"):
        make_budgets(costs, [[(2, 2)]], {"size": of_8bit(1e-6)}, None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.2e9", Decimal("1.2e9")),
        (" 12.2 ", Decimal("12.2")),
        ("w3a4", UniformLevel(3, 4)),
        ("W8A16", UniformLevel(8, 16)),
        ("25%", ShareOf8Bit(Fraction(1, 4))),
        ("12.5%", ShareOf8Bit(Fraction(1, 8))),
    ],
)
def test_a_budget_can_be_written_as_number_level_or_share(text, value):
    assert parse_budget("size", text) == value


@pytest.mark.parametrize("text", ["", "w3", "a4w3", "3 apples", "%", "w3a4%", "1e", "0x10"])
def test_other_texts_are_no_budgets(text):
    with pytest.raises(ValueError, match=r"size: .* is not a number, a level such as w3a4 or"):
        parse_budget("size", text)


@pytest.mark.parametrize(("text", "message"), [("0%", "positive"), ("nan%", "positive"),
    ("-5%", "positive"), ("w1a4", "outside 2 to 16"), ("w4a99", "outside 2 to 16")])  # fmt: skip
def test_levels_and_shares_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_budget("size", text)


@pytest.mark.parametrize("value", ["0.5", None, True])
def test_a_share_has_to_be_a_number(value):
    with pytest.raises(TypeError, match="share of 8 bits must be a number"):
        of_8bit(value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("size", 999, "999 bytes"),
        ("total_size", 15_840_000, "15,840,000 bytes (15.84 MB)"),
        ("size", 1234.5, "1,234.5 bytes (1.234 KB)"),
        ("latency", 0.0025, "2.5 ms"),
        ("latency", 12, "12 s"),
        ("latency", 3.2e-7, "320 ns"),
        ("latency", 0, "0 s"),
        ("bitops", 1_200_000, "1,200,000 BitOps"),
        ("mean_weight_bits", 3.5, "3.5 bits"),
        ("compression", 12.2, "12.2 times smaller"),
    ],
)
def test_amounts_are_said_in_one_unit_that_is_what_it_says(name, value, words):
    assert in_words(name, value) == words


@pytest.mark.parametrize(
    ("name", "value", "exact", "short"),
    [
        ("size", 12.5, "12.5 bytes", "12.5 bytes"),
        ("size", 1234567.125, "1,234,567.125 bytes (1.235 MB)", "1.2345671 MB"),
        ("bitops", 10814566400, "10,814,566,400 BitOps", "10.814566 GBitOps"),
        ("bitops", 12, "12 BitOps", "12 BitOps"),
        ("latency", 0.002512345678912, "0.002512345678912 s (2.51235 ms)", "2.5123457 ms"),
        ("mean_weight_bits", 3.1234567890123, "3.1234567890123 bits", "3.1234568 bits"),
        ("compression", 12.2, "12.2 times smaller", "12.2 times smaller"),
    ],
)
def test_a_limit_is_said_with_every_digit_or_as_short_as_a_table_wants(name, value, exact, short):
    assert in_exact_words(name, value) == exact
    assert in_short_words(name, value) == short
