"""The tools around the benchmarks: what samples mean, files, comparisons. Nothing is timed."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is not installed

from bench import cases, compare, joint_step, peers, report, timing

RUN = {
    "kind": "some-cpu",
    "device": "cpu",
    "cpu": "Some CPU",
    "cpu_capability": "avx2",
    "threads": 2,
    "gpu": None,
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2.11.0", "cuda": ""},
    "keeps_freed_memory": True,
    "other_processes": 0.0,
}


def result(name="a case", ratio=2.0, spread=0.01, **changes):
    return report.Result(
        name=name,
        bytes=10**9,
        rounds=5,
        medians={"limpq_ext": 0.1, "eager": 0.1 * ratio, "floor": 0.08},
        ratios={"eager": ratio, "floor": 0.8},
        quartiles={"eager": (ratio - spread, ratio + spread), "floor": (0.79, 0.81)},
        targets={"eager": 1.5},
        **changes,
    )


# --- samples ------------------------------------------------------------------------------------


def test_ratios_are_paired_by_round():
    # The machine is ten times slower in the last two rounds; the medians alone would say 3 / 10.
    seconds = {"ours": [1.0, 1.0, 1.0, 10.0, 10.0], "peer": [3.0, 3.0, 3.0, 30.0, 30.0]}
    compared = timing.compare_samples(seconds)
    assert compared.ratios == {"peer": 3.0}
    assert compared.quartiles == {"peer": (3.0, 3.0)}
    assert compared.medians == {"ours": 1.0, "peer": 3.0}
    assert compared.rounds == 5


def test_samples_of_different_rounds_are_refused():
    with pytest.raises(ValueError):
        timing.compare_samples({"ours": [1.0], "peer": [1.0, 2.0]})


def test_one_round_has_a_ratio():
    assert timing.compare_samples({"ours": [2.0], "peer": [1.0]}).quartiles == {"peer": (0.5, 0.5)}


def test_contenders_take_turns_and_each_starts_a_round():
    order = []
    contenders = {name: timing.Contender(lambda _, n=name: order.append(n)) for name in "abc"}
    turns = timing.Turns(contenders, "cpu", calibrate=False)
    for _ in range(3):
        turns.round()
    assert "".join(order) == "abcbcacab"
    assert [len(samples) for samples in turns.seconds.values()] == [3, 3, 3]


def test_calibration_leaves_no_samples():
    turns = timing.Turns({"a": timing.Contender(lambda _: None)}, "cpu")
    assert turns.seconds == {"a": []}
    assert 5 <= turns.rounds_within(0.0) <= turns.rounds_within(1e9) == 100


def test_every_call_of_a_sample_gets_its_own_prepared_input():
    seen = []
    contender = timing.Contender(seen.append, prepare=lambda call: call * call)
    timing.Turns({"a": contender}, "cpu", calibrate=False)._sample(contender, 4)
    assert seen == [0, 1, 4, 9]


def test_the_share_of_other_processes_is_a_share():
    share = timing.OtherProcesses().share()
    assert share is None or 0 <= share <= 1
    assert report.contention(None) == report.contention(0.0) == ""
    assert "25 %" in report.contention(0.25)


# --- files and tables ---------------------------------------------------------------------------


def test_results_survive_their_file(tmp_path):
    step = result("a step", memory={"limpq_ext": 1, "float steps": 2})
    step = dataclasses.replace(
        step,
        medians={"limpq_ext": 3.0, "float steps": 2.0},
        ratios={"float steps": 0.5},
        targets={},
    )
    assert "| limpq_ext   | 3.000   | 2.00 " in report.step_table([step])
    results = [result(), step]
    report.save(tmp_path / "some-cpu.json", RUN, results)
    assert report.load(tmp_path / "some-cpu.json") == (RUN, results)
    assert (tmp_path / "some-cpu.md").read_text() == report.page(RUN, results)


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "limpq-policy", "version": 1}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        report.load(path)


def test_the_table_has_bandwidth_floor_and_ratios():
    head, _, row = report.table([result()]).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")][:4] == [
        "case",
        "time",
        "GB/s",
        "% of floor",
    ]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a case", "100 ms", "10.0", "80", "2.00", "", "", "", "met"]


def test_a_missed_target_is_named():
    assert result(ratio=1.2).missed() == ["eager"]
    assert "missed: 1.50 eager" in report.table([result(ratio=1.2)])


def test_a_target_without_its_contender_is_left_out():
    compared = timing.compare_samples({"limpq_ext": [1.0], "eager": [2.0]})
    made = report.Result.of("a case", 8, compared, {"eager": 1.5, "compiled": 1.0})
    assert made.targets == {"eager": 1.5}


def test_a_page_warns_of_other_processes_and_of_uncommitted_changes():
    page = report.page(RUN | {"other_processes": 0.5, "dirty": True}, [result()])
    assert "Careful: other processes took 50 %" in page
    assert "0123456789ab with changes" in page
    assert "Careful" not in report.page(RUN, [result()])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us")]
)
def test_times_have_a_unit_that_fits(seconds, shown):
    assert report.show_seconds(seconds) == shown


def test_a_run_names_its_machine_without_odd_characters():
    run = report.describe_run("cpu", quick=True)
    assert run["kind"] == report.machine_kind("cpu")
    assert set(run["kind"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert run["versions"]["torch"] == torch.__version__
    assert run["quick"] is True


# --- comparing ----------------------------------------------------------------------------------


def test_a_changed_ratio_is_found_and_judged():
    (change,) = compare.changes([result(ratio=2.0)], [result(ratio=1.5)])
    assert dataclasses.astuple(change) == ("a case", "eager", 2.0, 1.5)
    assert change.worse
    (change,) = compare.changes([result(ratio=2.0)], [result(ratio=3.0)])
    assert not change.worse


def test_what_lies_within_the_noise_is_no_change():
    assert compare.changes([result(ratio=2.0)], [result(ratio=2.05)]) == []
    noisy = [result(ratio=2.0, spread=0.5)], [result(ratio=1.5, spread=0.5)]
    assert compare.changes(*noisy) == []


def test_new_and_lost_cases_are_listed():
    assert compare.changes([result("a")], [result("b", ratio=9.0)]) == []
    assert compare.one_sided([result("a")], [result("b")]) == ["- a", "+ b"]


@pytest.mark.parametrize(("ratio", "status"), [(2.0, 0), (1.0, 1), (4.0, 0)])
def test_the_exit_status_tells_of_a_loss(tmp_path, capsys, ratio, status):
    report.save(tmp_path / "old.json", RUN, [result()])
    report.save(tmp_path / "new.json", RUN | {"threads": 4}, [result(ratio=ratio)])
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == status
    printed = capsys.readouterr().out
    assert "threads was 2 and is 4" in printed
    assert ("no ratio changed" in printed) == (ratio == 2.0)


def test_a_missing_file_is_an_error(tmp_path, capsys):
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json" in capsys.readouterr().err


# --- cases --------------------------------------------------------------------------------------


def test_case_names_are_unique_and_their_targets_name_contenders():
    for device in ("cpu", "cuda"):
        for quick in (False, True):
            found = cases.all_cases(device, quick=quick)
            assert len({case.name for case in found}) == len(found) > 0
            assert all(target > 0 for case in found for target in case.targets.values())


def test_the_weights_of_resnet18_are_those_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    convolutions = [
        module for module in models.resnet18().modules() if isinstance(module, torch.nn.Conv2d)
    ]
    found = sorted(tuple(module.weight.shape) for module in convolutions[1:])
    assert found == sorted(cases.RESNET18_WEIGHTS)
    assert len(found) == 19


@pytest.fixture(autouse=True)
def _same_data():
    """A peer may move one element in a hundred, of which small cases have less than one."""
    torch.manual_seed(0)


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("channel_axis", [None, 0])
def test_a_small_case_is_checked_and_runs(direction, channel_axis):
    work = cases._build_single(
        "cpu", (8, 9), torch.float32, True, channel_axis, direction, compile_eager=False
    )
    streams = {"forward": 2, "backward": 3, "forward+backward": 5}[direction]
    assert work.bytes == streams * 4 * 72
    assert list(work.contenders) == ["limpq_ext", "eager", "learnable", "floor"]
    for contender in work.contenders.values():
        contender.run(contender.prepare(0))


@pytest.mark.parametrize("direction", cases.DIRECTIONS[:2])
def test_many_bit_widths_are_checked_and_run(direction):
    work = cases._build_multi("cpu", (8, 9), torch.float32, True, direction)
    assert work.bytes == 4 * 72 * (6 if direction == "forward" else 7)
    for contender in work.contenders.values():
        contender.run(contender.prepare(0))


@pytest.mark.parametrize("wrong", ["y", "dx", "dscale"])
def test_a_wrong_result_is_not_timed(wrong):
    torch.manual_seed(0)
    x, grad, scale = torch.randn(1000), torch.randn(1000), torch.tensor([0.3])
    how = peers.Thresholds(-8, 7, 0.1)
    expected = peers.plain_chain(x, scale, grad, how)
    outcome = {name: getattr(expected, name).clone() for name in ("y", "dx", "dscale")}
    peers.assert_exact(list(outcome.values()), expected)
    peers.assert_close(list(outcome.values()), expected, scale, how)
    outcome[wrong] += 10 * math.sqrt(float(expected.terms))
    for check in (
        lambda: peers.assert_exact(list(outcome.values()), expected),
        lambda: peers.assert_close(list(outcome.values()), expected, scale, how),
    ):
        with pytest.raises(AssertionError, match=f"{wrong} "):
            check()


def test_the_original_way_takes_the_same_joint_step():
    pytest.importorskip("torchvision")
    # The losses of all branches are compared before anything is timed.
    shape = joint_step.Shape("cifar_resnet", 4, 16, targets={"eager": 1e-9})
    measured = joint_step.measure_steps(shape, device="cpu", rounds=1, compile_eager=False)
    assert list(measured.medians) == ["limpq_ext", "float steps", "eager"]
    assert set(measured.memory) == set(measured.medians)
    table = report.step_table([measured])
    assert "peak memory" in table
    assert "| met" in table
