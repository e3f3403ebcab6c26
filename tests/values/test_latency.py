from __future__ import annotations

import contextlib
import json
import math
from fractions import Fraction

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import latency_tables, problems

from limpq_ext.allocation.budgets import make_measure, of_8bit, uniform
from limpq_ext.allocation.search import search
from limpq_ext.values.costs import Costs, LayerCost
from limpq_ext.values.indicators import Indicators, LayerIndicators
from limpq_ext.values.latency import LatencyEntry, LatencyTable
from limpq_ext.values.reading import FileFormatError

HEADER = "layer,weight_bits,activation_bits,seconds\n"


def example(bits=(2, 3)):
    values = {b: 1 / b for b in bits}
    layers = [LayerIndicators(name, values, values) for name in "ab"]
    costs = Costs(
        tuple(LayerCost(name, "linear", 10, 10, 10) for name in "ab"),
        (LayerCost("first", "conv2d", 7, 5, 3),),
    )
    return Indicators(bits, tuple(layers)), costs


def table(bits=(2, 3), without=(), seconds=0.001):
    entries = [(name, bw, ba) for name in "ab" for bw in bits for ba in bits]
    return LatencyTable(tuple(LatencyEntry(*e, seconds) for e in entries if e not in without))


def test_a_table_survives_being_saved(tmp_path):
    table().save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == table()
    assert json.loads((tmp_path / "latency.json").read_text())["format"] == "limpq-latency"


def test_a_table_can_be_written_in_csv(tmp_path):
    path = tmp_path / "latency.CSV"
    path.write_text(
        '\ufefflayer, weight_bits,activation_bits,seconds\r\na,2,4,1.5e-3\n\n"b,c",3,3,0\n'
    )
    read = LatencyTable.load(path)
    assert read.entries == (LatencyEntry("a", 2, 4, 0.0015), LatencyEntry("b,c", 3, 3, 0.0))


def test_times_are_the_decimals_that_were_written():
    entries = (LatencyEntry("a", 2, 2, 0.1), LatencyEntry("b", 2, 2, 0.0025))
    read = LatencyTable(entries)
    assert sum(read.seconds.values()) == Fraction("0.1025")
    assert read.per_second == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 0: expected the header layer,weight_bits,activation_bits,seconds, got ''"),
        ("layer,seconds\na,1\n", r"line 1: expected the header"),
        (HEADER, r"latency table: there are no entries"),
        (HEADER + "a,2,2\n", r"line 2: 3 fields, expected 4"),
        (HEADER + "a,2,2,fast\n", r"line 2: 'fast' is not a number of seconds"),
        (HEADER + "a,2,2,0.1\na,two,2,0.1\n", r"line 3: 'two' is not a bit-width"),
        (HEADER + "a,2,32,0.1\n", r"line 2: .*activation_bits: 32 bits is outside 2 to 16"),
        (HEADER + "a,2,2,nan\n", r"line 2: latency of layer 'a' at W2A2 is nan"),
        (HEADER + "a,2,2,inf\n", r"line 2: latency of layer 'a' at W2A2 is inf"),
        (HEADER + "a,2,2,-1\n", r"line 2: latency of layer 'a' at W2A2 is -1"),
        (HEADER + "a,2,2,1e-300\n", r"is 1e-300: it is counted in seconds"),
        (HEADER + "a,2,2,1e30\n", r"is 1e\+30: it is counted in seconds"),
        (HEADER + "a,2,2,1\na,2,2,2\n", r"layer 'a' at W2A2 stands twice"),
        (HEADER + '"a,2,2,1\n', r"line 2: "),
    ],
)
def test_a_wrong_csv_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "latency.csv"
    path.write_text(text)
    with pytest.raises(FileFormatError, match=rf"latency\.csv: .*{message}"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"seconds": math.nan}, r"entries\[0\].*latency of layer 'a' at W2A2 is nan"),
        ({"seconds": -0.5}, "latency of layer 'a' at W2A2 is -0.5"),
        ({"seconds": "0.1"}, "seconds"),
        ({"weight_bits": 2.0}, "weight_bits"),
        ({"unit": "ms"}, "unit"),
    ],
)
def test_a_wrong_json_is_named_with_its_field(tmp_path, entry, message):
    whole = {"layer": "a", "weight_bits": 2, "activation_bits": 2, "seconds": 0.1, **entry}
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"format": "limpq-latency", "version": 1, "entries": [whole],
                                "meta": {}}))  # fmt: skip
    with pytest.raises(FileFormatError, match=message):
        LatencyTable.load(path)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".csv", ".json"]))
def test_no_file_breaks_the_reader(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("latency") / f"latency{suffix}"
    path.write_bytes((HEADER.encode() if suffix == ".csv" else b"") + data)
    with contextlib.suppress(FileFormatError):
        assert LatencyTable.load(path).entries


def test_missing_entries_are_listed_and_counted():
    indicators, costs = example()
    holes = [("a", 2, 3), ("b", 2, 2)]
    with pytest.raises(ValueError, match=r"2 entries are missing: 'a' at W2A3, 'b' at W2A2$"):
        search(indicators, costs, latency=1, latency_table=table(without=holes))
    many = [("a", bw, ba) for bw in (2, 3) for ba in (2, 3)] + [("b", 2, 2), ("b", 3, 3)]
    with pytest.raises(ValueError, match=r"6 entries are missing: 'a' at W2A2, .*W2A2, \.\.\.$"):
        search(indicators, costs, latency=1, latency_table=table(without=many))


def test_only_pairs_that_can_be_chosen_have_to_be_measured():
    indicators, costs = example()
    policy = search(
        indicators, costs, latency=1, latency_table=table(without=[("a", 2, 3)]),
        pairs={"a": [(2, 2), (3, 3)]},
    )  # fmt: skip
    assert policy.budgets[0].used == 0.002


@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_a_table_with_holes_gives_an_error_that_counts_them(problem, data):
    indicators, costs = problem
    whole = data.draw(latency_tables(costs, indicators.bits))
    holes = data.draw(st.sets(st.sampled_from(whole.entries), min_size=1))
    kept = tuple(entry for entry in whole.entries if entry not in holes)
    holes = {entry for entry in holes if entry.layer != "first"}  # measured or not counted
    if not kept or not holes:
        return
    with pytest.raises(ValueError, match=rf"latency table: {len(holes)} entries are missing: "):
        search(indicators, costs, latency=1, latency_table=LatencyTable(kept), non_monotone="keep")


def test_fixed_layers_count_where_the_table_has_them():
    indicators, costs = example()
    entries = (*table().entries, LatencyEntry("first", 8, 8, 0.5))
    policy = search(indicators, costs, latency=1, latency_table=LatencyTable(entries))
    assert policy.budgets[0].used == 0.502
    wrong = LatencyTable((*table().entries, LatencyEntry("first", 4, 4, 0.5)))
    with pytest.raises(ValueError, match="1 entries are missing: 'first' at W8A8"):
        search(indicators, costs, latency=1, latency_table=wrong)


def test_a_layer_that_is_not_in_the_network_is_refused():
    indicators, costs = example()
    odd = LatencyTable((*table().entries, LatencyEntry("conv9", 2, 2, 1.0)))
    with pytest.raises(ValueError, match="layer 'conv9' is not in the network"):
        search(indicators, costs, latency=1, latency_table=odd)


def test_levels_and_shares_are_looked_up():
    indicators, costs = example()
    policy = search(indicators, costs, latency=uniform(2, 3), latency_table=table())
    assert policy.budgets[0].limit == 0.002
    with pytest.raises(ValueError, match="2 entries are missing: 'a' at W8A8, 'b' at W8A8"):
        search(indicators, costs, latency=of_8bit(0.5), latency_table=table())
    both = LatencyTable(
        (*table().entries, LatencyEntry("a", 8, 8, 0.003), LatencyEntry("b", 8, 8, 0.005))
    )
    policy = search(indicators, costs, latency=of_8bit(0.5), latency_table=both)
    assert policy.budgets[0].limit == 0.004


@pytest.mark.parametrize(
    ("given", "missing"),
    [({"latency": 1}, "latency_table"), ({"latency_table": table()}, "latency")],
)
def test_latency_and_table_go_together(given, missing):
    with pytest.raises(ValueError, match=rf"go together: {missing} is missing"):
        search(*example(), **given)


@pytest.mark.parametrize(("seconds", "error"), [("0.1", TypeError), (None, TypeError),
    (True, TypeError), (math.nan, ValueError), (-1e-3, ValueError)])  # fmt: skip
def test_an_entry_that_is_no_time_is_refused(seconds, error):
    with pytest.raises(error, match="latency of layer 'a' at W2A2"):
        LatencyEntry("a", 2, 2, seconds)


def test_a_latency_is_counted_in_a_unit_that_has_a_name():
    for second, unit in ((2.0, "s"), (0.0025, "µs"), (0.004, "ms"), (3e-8, "ns")):
        table = LatencyTable((LatencyEntry("a", 2, 2, second),))
        costs = Costs((LayerCost("a", "linear", 1, 1, 1),), ())
        measure = make_measure("latency", costs, table)
        assert measure.unit == unit
        assert measure.exact(measure.use([(2, 2)])) == Fraction(str(second))
