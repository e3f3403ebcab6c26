"""Times from inside whole networks: by layer, one value within the noise, checked by prediction."""

import json
import statistics
import subprocess
import sys

import deployed
import pytest
import torch
from torch import nn

import limpq_ext as lq
from limpq_ext.export import latency
from limpq_ext.export.node_times import layer_of, nodes_in_profile
from limpq_ext.export.pooling import pool
from limpq_ext.values.costs import LayerCost

SEARCHABLE = ("middle", "middle.2")
LAYERS = (*SEARCHABLE, "first", "last")
MICRO = 1e-6


@pytest.fixture(scope="module")
def costs():
    made = [LayerCost(name, "linear", 10, 10, 10) for name in LAYERS]
    return lq.Costs(tuple(made[:2]), tuple(made[2:]))


class Fake:
    """A network of known times in microseconds; the first run of each pair of runs is slower."""

    rest = 50.0
    loads = ()

    def __init__(self, bits, with_nodes):
        self.bits, self.with_nodes, self.runs = bits, with_nodes, 0
        Fake.loads += ((bits, with_nodes),)

    def parts(self):
        weight, activation = self.bits["middle"]
        second_weight, _ = self.bits["middle.2"]
        return [
            (("first/WithoutBiases", "first", "middle.quantize"), 7.0),
            (("Reorder_12", "middle.quantize_abcd"), 2.0),
            (("middle_token_4",), 10.0 * weight + activation),
            (("middle.2.clip",), 1.0),
            (("middle.2",), 100.0 if second_weight == 4 else 100.5),
            (("node_add",), 20.0),
            (("last",), 5.0),
        ]

    def run(self):
        self.runs += 1
        cold = 1000.0 if self.runs % 2 else 0.0
        return MICRO * (sum(seconds for _, seconds in self.parts()) + Fake.rest + cold)

    def nodes(self):
        assert self.with_nodes
        cold = [(names, MICRO * 1000) for names, _ in self.parts()]
        warm = [(names, MICRO * seconds) for names, seconds in self.parts()]
        return [cold, warm] * (self.runs // 2)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(latency, "loader", lambda *_: Fake)
    monkeypatch.setattr(Fake, "loads", ())


def measured(costs, **options):
    return lq.measure_latency(nn.Identity(), torch.zeros(2, 3), costs=costs, rounds=4, **options)


def test_nodes_belong_to_layers_by_name_and_the_rest_to_none(fake, costs):
    table = measured(costs)
    half = MICRO / 2  # two samples in a forward
    expected = {
        (name, *pair): half * seconds
        for pair in ((4, 4), (4, 8), (8, 4), (8, 8))
        for name, seconds in {
            "middle": 2 + 10 * pair[0] + pair[1],
            "middle.2": 1 + 100.25,  # half a microsecond apart, which the clock does not tell
        }.items()
    }
    expected |= {("first", 8, 8): half * 7, ("last", 8, 8): half * 5}
    found = {
        (entry.layer, entry.weight_bits, entry.activation_bits): entry.seconds
        for entry in table.entries
    }
    assert found == pytest.approx(expected, abs=1e-9)
    rest = table.meta["unattributed"]
    assert rest["seconds"] == pytest.approx(half * (20 + Fake.rest), abs=half)
    wholes = [2 + 10 * w + a + 101 + (w == 8) / 2 + 12 + 70 for w in (4, 8) for a in (4, 8)]
    assert rest["share"] == pytest.approx(70 / statistics.median(wholes), rel=0.01)


def test_pairs_within_the_noise_have_one_value_and_it_is_said(fake, costs):
    table = measured(costs)
    assert table.meta["groups"] == {
        "middle": [["W4A4"], ["W4A8"], ["W8A4"], ["W8A8"]],
        "middle.2": [["W4A4", "W4A8", "W8A4", "W8A8"]],
    }
    assert "in 1 of 2 layers all 4 pairs, in 0 some" in table.meta["notes"][0]
    assert "no difference" not in table.meta["notes"][0]
    before = table.meta["measured"]["middle.2"]
    assert before["W8A8"]["median"] - before["W4A4"]["median"] == pytest.approx(MICRO / 4)


def test_mixed_policies_are_predicted_and_measured(fake, costs):
    table = measured(costs)
    told = table.meta["predictions"]
    assert len(told) == 5
    assert len({json.dumps(own["bits"]) for own in told}) == 5
    by_layer = table.seconds
    for own in told:
        bits = {name: tuple(pair) for name, pair in own["bits"].items()}
        assert set(bits) == set(LAYERS)
        assert own["measured"] == pytest.approx(
            MICRO / 2 * (sum(s for _, s in Fake(bits, False).parts()) + Fake.rest)
        )
        entries = float(sum(by_layer[(name, *pair)] for name, pair in bits.items()))
        assert own["predicted"] == pytest.approx(entries + table.meta["unattributed"]["seconds"])
        assert own["error"] == pytest.approx(own["predicted"] / own["measured"] - 1)
        assert own["fastest"] == {key: pytest.approx(own[key]) for key in own["fastest"]}
    errors = [abs(own["error"]) for own in told]
    assert table.meta["median_error"] == statistics.median(errors)
    assert max(errors) < 0.005


def test_other_work_on_the_machine_is_told_from_what_no_layer_takes(fake, costs, monkeypatch):
    whole = Fake.run

    def run_beside_others(self):
        seconds = whole(self)
        return seconds if self.runs == 6 else seconds + 100 * MICRO

    quiet = measured(costs).meta
    monkeypatch.setattr(Fake, "run", run_beside_others)
    busy = measured(costs).meta
    assert busy["unattributed"]["fastest"] == pytest.approx(quiet["unattributed"]["fastest"])
    assert busy["unattributed"]["seconds"] - quiet["unattributed"]["seconds"] == pytest.approx(
        50 * MICRO
    )
    assert "other work on this machine" in busy["notes"][-1]
    assert not any("other work" in note for note in quiet["notes"])
    assert max(abs(own["fastest"]["error"]) for own in busy["predictions"]) < 0.005


def test_a_layer_that_waits_for_another_one_makes_the_error(fake, costs, monkeypatch):
    whole = Fake.run

    def slower_where_bits_change(self):
        changes = self.bits["middle"] != self.bits["middle.2"]
        return whole(self) + 60 * MICRO * changes

    monkeypatch.setattr(Fake, "run", slower_where_bits_change)
    told = measured(costs).meta["predictions"]
    for own in told:
        changes = own["bits"]["middle"] != own["bits"]["middle.2"]
        missing = 30 * MICRO / own["measured"] if changes else 0
        assert own["error"] == pytest.approx(-missing, abs=0.005)


def test_all_networks_are_loaded_anew_and_run_in_turn(fake, costs):
    steps = []
    measured(costs, bits=(8, 2), on_step=lambda *step: steps.append(step))
    once = len(Fake.loads) // latency.LOADS
    assert once == 4 + 4 + 5
    assert Fake.loads == Fake.loads[:once] * latency.LOADS
    assert steps == [(done, 12) for done in range(1, 13)]


def test_the_machine_and_the_settings_are_in_the_meta(fake, costs, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    table = measured(costs, threads=2, seed=3)
    for key, value in {
        "engine": "onnxruntime", "threads": 2, "batch": 2, "bits": [4, 8], "rounds": 4, "seed": 3,
    }.items():  # fmt: skip
        assert table.meta[key] == value
    assert table.meta["cpu"]
    assert table.meta["engine_version"][0].isdigit()
    table.save(tmp_path / "latency.json")
    assert lq.LatencyTable.load(tmp_path / "latency.json") == table


def test_one_pair_is_fine(fake, costs):
    table = measured(costs, bits=[8])
    assert len(table.entries) == 4
    assert len(table.meta["predictions"]) == 1
    assert not any("differ" in note for note in table.meta["notes"])


def test_where_bits_cost_the_same_that_is_said(fake, costs, monkeypatch):
    monkeypatch.setattr(Fake, "parts", lambda _: [((name,), 50.0) for name in LAYERS])
    note = measured(costs).meta["notes"][0]
    assert "in 2 of 2 layers all 4 pairs" in note
    assert "bits make no difference to the time here" in note


def test_layers_that_add_up_to_more_than_the_network_are_told(fake, costs, monkeypatch):
    monkeypatch.setattr(Fake, "rest", -40.0)
    table = measured(costs)
    assert table.meta["unattributed"]["seconds"] < 0
    assert "longer together than the whole network" in table.meta["notes"][-1]


@pytest.mark.parametrize(
    ("names", "layer"),
    [
        (("middle",), "middle"),
        (("middle.2_token_3",), "middle.2"),
        (("middle.20",), "middle"),
        (("middles",), None),
        (("node_relu", "first.quantize"), "first"),
        (("Transpose_token_1",), None),
        ((), None),
    ],
)
def test_names_that_engines_give(names, layer):
    assert layer_of(names, LAYERS) == layer


def test_a_profile_is_told_apart_by_runs():
    def event(name, ts, dur, cat="Node"):
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    profile = [
        event("session_initialization", 0, 90, "Session"),
        event("a_kernel_time", 101, 4),
        event("a_fence_before", 101, 4),
        event("b_kernel_time", 106, 3),
        event("model_run", 100, 10, "Session"),
        event("a_kernel_time", 201, 5),
        event("model_run", 200, 10, "Session"),
    ]
    assert nodes_in_profile(profile) == [
        [(("a",), 4 * MICRO), (("b",), 3 * MICRO)],
        [(("a",), 5 * MICRO)],
    ]


PAIRS = [(2, 2), (2, 4), (4, 2), (4, 4)]


def times(*of_pairs):
    """Of each pair what it took in three loads."""
    return dict(zip(PAIRS, of_pairs, strict=True))


def test_no_two_values_differ_by_less_than_the_noise():
    found = pool(
        {"a": times([10, 10.25, 50], [12, 11, 11.25], [20.25, 20.25, 20], [99, 20.75, 20.5])}
    )["a"]
    assert found.noise == 0.75
    assert found.groups == (((2, 2),), ((2, 4),), ((4, 2), (4, 4)))
    assert [found.seconds[pair] for pair in PAIRS] == [10, 11, 20.25, 20.25]


def test_a_pair_that_no_two_loads_agree_on_differs_from_none():
    steady = [[10, 10, 10], [11, 11, 11], [20, 20, 20]]
    found = pool({"a": times(*steady, [30, 80, 90])})["a"]
    assert found.groups == (tuple(PAIRS),)
    assert set(found.seconds.values()) == {15.5}
    assert len(pool({"a": times(*steady, [30, 30, 90])})["a"].groups) == 4


def test_noise_is_no_less_than_a_typical_layer_has():
    quiet = times(*([level] * 3 for level in (1000, 1100, 1200, 1300)))
    loud = times(*([level, level + 50, level + 60] for level in (1000, 1100, 1200, 1300)))
    found = pool({"quiet": quiet, "loud": loud, "loud too": loud})
    assert len(found["quiet"].groups) == 1
    assert len(pool({"quiet": quiet})["quiet"].groups) == 4


def test_a_chain_of_small_steps_is_one_value():
    found = pool({"a": times(*([level] * 3 for level in (10, 10.5, 11, 11.5)))}, tick=0.6)["a"]
    assert found.groups == (tuple(PAIRS),)
    assert set(found.seconds.values()) == {10.75}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "tvm"}, "engine is 'tvm', expected one of onnxruntime, openvino, torch"),
        ({"bits": (4, 9)}, "bits: 9 is measured by no engine, expected 2 to 8"),
        ({"bits": (1, 8)}, "candidate: 1 bits is outside 2 to 16"),
        ({"bits": ()}, "bits is empty"),
        ({"threads": 0}, "threads is 0, expected 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(options, message, fake, costs):
    with pytest.raises(ValueError, match=message):
        measured(costs, **options)
    assert not Fake.loads


def test_a_missing_engine_is_named_with_its_extra(fake, costs, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'limpq_ext\[openvino\]'"):
        measured(costs, engine="openvino")
    assert not Fake.loads


class Bessel(nn.Module):
    """Computes what ONNX has no operator for."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.middle(torch.special.bessel_j0(self.first(x))))


def test_a_network_that_pytorch_does_not_export_is_refused():
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    with pytest.raises(ValueError, match="Bessel cannot be exported: "):
        lq.measure_latency(Bessel(), torch.randn(1, 3))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch"])
def test_a_real_table_has_all_layers_and_pairs_and_is_searched_with(engine):
    if engine != "torch":
        pytest.importorskip("onnxscript", reason="the extra export is not installed")
        pytest.importorskip(engine, reason=f"{engine} is not installed")
    model, batches = deployed.float_network("depthwise")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = batches[0][0]
    costs = lq.profile(model, x)
    threads = torch.get_num_threads()
    table = lq.measure_latency(model, x, bits=(2, 8), engine=engine, rounds=2)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    pairs = [(2, 2), (2, 8), (8, 2), (8, 8)]
    expected = {(own.name, *pair) for own in costs.layers for pair in pairs}
    assert set(table.seconds) == expected | {(own.name, 8, 8) for own in costs.fixed}
    assert all(entry.seconds >= 0 for entry in table.entries)
    assert all(table.meta["measured"][own.name]["W8A8"]["highest"] > 0 for own in costs.layers)
    assert all(own["measured"] > 0 for own in table.meta["predictions"])
    scores = {own.name: {2: 1.0, 8: 0.0} for own in costs.layers}
    indicators = lq.Indicators.from_table(scores, scores)
    most = max(table.meta["whole"].values()) + sum(entry.seconds for entry in table.entries)
    policy = lq.search(indicators, costs, latency=most, latency_table=table)
    assert set(policy.bits().values()) == {(8, 8)}


def test_signals_are_heard_after_openvino(tmp_path):
    """It gives a thread a stack for signals and takes it away with itself."""
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    script = """
import os, signal
import torch
from torch import nn
import limpq_ext as lq

model = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
)
lq.measure_latency(model, torch.randn(1, 3, 8, 8), bits=(8,), engine="openvino", rounds=1)
heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
os.kill(os.getpid(), signal.SIGTERM)
assert heard == [signal.SIGTERM]
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
