"""The study on real networks: its crops, tasks, policies and tables, without downloads."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from limpq_ext import scores

pytest.importorskip("highspy")
pytest.importorskip("torchvision")
pytest.importorskip("PIL")

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is not installed

from PIL import Image

from bench import (
    networks,
    photographs,
    real_networks,
    real_networks_report,
    real_networks_study,
)
from bench.accuracy import random_scores
from bench.real_networks_report import DEFAULT, NotThereYet, Results
from limpq_ext import Indicators, profile

RUN = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "cpu": "a processor",
    "date": "2026-01-02",
    "versions": {"torch": "2"},
    "bits": (2, 4),
    "calibration_images": 128,
    "loss_aware_images": 512,
    "refining_images": 256,
}


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def noise(path, size, colours=256, mode="RGB"):
    random = np.random.default_rng(0)
    channels = len(mode)
    pixels = random.integers(0, colours, (size[1], size[0], channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)


# --- photographs --------------------------------------------------------------------------------


def test_photographs_are_told_from_drawings_and_small_pictures(tmp_path):
    noise(tmp_path / "a" / "photo.png", (120, 100))
    noise(tmp_path / "a" / "cartoon" / "photo.png", (120, 100))
    noise(tmp_path / "a" / "flat.png", (120, 100), colours=2)
    noise(tmp_path / "a" / "small.png", (120, 90))
    assert photographs.find_photographs(tmp_path) == [tmp_path / "a" / "photo.png"]


def test_a_wallpaper_in_many_sizes_counts_once(tmp_path):
    sizes = tmp_path / "sea" / "contents" / "images"
    noise(sizes / "100x100.png", (100, 100))
    noise(sizes / "140x100.png", (140, 100))
    assert photographs.find_photographs(tmp_path) == [sizes / "140x100.png"]


def test_what_is_tested_on_shares_no_photograph_with_the_rest():
    paths = [Path(str(number)) for number in range(21)]
    first, second = photographs.split_photographs(paths, 0.25, seed=0)
    assert len(second) == 5
    assert sorted(first + second) == sorted(paths)
    assert (first, second) == photographs.split_photographs(paths, 0.25, seed=0)
    assert (first, second) != photographs.split_photographs(paths, 0.25, seed=1)


def test_crops_are_the_same_for_a_seed_and_begin_in_the_middle(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    noise(paths[0], (96, 96))
    noise(paths[1], (140, 96))
    crops = photographs.draw_crops(paths, 5, 96, seed=0)
    assert crops.photographs == 2
    whole = torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1)
    assert torch.equal(crops.pixels[0], whole)
    middle = torch.from_numpy(np.array(Image.open(paths[1]))).permute(2, 0, 1)[..., 22:118]
    assert torch.equal(crops.pixels[1], middle)
    assert len({tuple(crop.flatten().tolist()) for crop in crops.pixels}) == 5
    assert torch.equal(crops.pixels, photographs.draw_crops(paths, 5, 96, seed=0).pixels)
    assert torch.equal(crops.pixels[:3], photographs.draw_crops(paths, 3, 96, seed=0).pixels)
    assert not torch.equal(crops.pixels[2], photographs.draw_crops(paths, 5, 96, seed=1).pixels[2])


def test_what_is_transparent_becomes_light_grey(tmp_path):
    Image.new("RGBA", (100, 100), (10, 20, 30, 0)).save(tmp_path / "a.png")
    picture = photographs.read_photograph(tmp_path / "a.png")
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (236, 236, 236)


# --- networks -----------------------------------------------------------------------------------


def test_weights_are_taken_in_the_order_of_definition():
    theirs = {f"their.{name}": value + 1 for name, value in small().state_dict().items()}
    own = small()
    own.load_state_dict(networks.in_order(theirs, own.state_dict()))
    assert torch.equal(own[0].weight, theirs["their.0.weight"])


def test_weights_of_another_network_are_refused():
    own = small().state_dict()
    fewer = dict(list(own.items())[:-1])
    with pytest.raises(ValueError, match=f"{len(fewer)} tensors"):
        networks.in_order(fewer, own)
    with pytest.raises(ValueError, match=r"'0\.weight' is \(1,\), '0\.weight' in its place"):
        networks.in_order({**own, "0.weight": torch.ones(1)}, own)


def test_without_the_downloads_the_setup_script_is_named(tmp_path):
    (tmp_path / "unpacked").mkdir()
    with pytest.raises(FileNotFoundError, match="real_networks_setup"):
        networks.photographs(tmp_path)
    pytest.importorskip("timm")
    with pytest.raises(FileNotFoundError, match="real_networks_setup"):
        networks.efficientnet_lite(tmp_path, 0)


def test_the_transformer_is_quantized_in_every_block():
    model = networks.SmallTransformer(5, dim=12, depth=2, heads=3)
    costs = profile(model, torch.randn(2, 3, 32, 32))
    names = {layer.name for layer in costs.layers}
    assert names == {
        f"blocks.{i}.{part}" for i in range(2) for part in ("qkv", "proj", "fc1", "fc2")
    }


@pytest.mark.parametrize("budget", real_networks_study.BUDGETS, ids=lambda budget: budget.name)
@pytest.mark.parametrize("draw", range(3))
def test_random_policies_use_nearly_all_of_a_budget(budget, draw):
    study = object.__new__(real_networks_study.Study)
    study.costs = profile(small(), torch.zeros(1, 3, 16, 16))
    policy = study.policy(f"random {draw}", budget)
    bits = policy.bits()
    used = sum(
        budget.used(study.costs, bits[layer.name])[place]
        for place, layer in enumerate(study.costs.layers)
    )
    limit = budget.limit(study.costs)
    assert real_networks_study.KEPT * limit <= used <= limit


def test_random_policies_differ_between_budgets_and_draws():
    study = object.__new__(real_networks_study.Study)
    study.costs = profile(small(), torch.zeros(1, 3, 16, 16))
    found = [study.policy(f"random {draw}", real_networks_study.BUDGETS[2]) for draw in range(6)]
    assert len({policy.layers for policy in found}) > 1
    assert found[0] == study.policy("random 0", real_networks_study.BUDGETS[2])


# --- tasks --------------------------------------------------------------------------------------


def test_every_task_has_a_key_of_its_own():
    tasks = real_networks_study.all_tasks(networks.NETWORKS, random_draws=3)
    assert len({task.key for task in tasks}) == len(tasks)
    assert sum(task.score.startswith("random") for task in tasks) == 3 * 5 * 4
    assert {task.what for task in tasks if task.network == "resnet50"} == {"float", "score"}


def test_every_score_of_the_table_is_one_of_the_package():
    for function, _ in real_networks_study.SCORES.values():
        assert callable(getattr(scores, function))


class Fake:
    """In the place of a study: a result that says which it is."""

    def __init__(self, name, folder, results):
        pass

    def run(self, task):
        if task.score == "second best":
            raise NotThereYet("no scores yet")
        return {"agreement": 0.5, "kl": 1.0}


def test_a_run_goes_on_where_it_was_stopped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(real_networks, "Study", Fake)
    tasks = real_networks_study.all_tasks(["lite0"], random_draws=1)
    results = Results(tmp_path / "results.jsonl")
    real_networks.run(tasks[:3], tmp_path, results, within=100)
    again = Results(tmp_path / "results.jsonl")
    left = real_networks.missing(tasks, again, "")
    assert left == tasks[3:]
    real_networks.run(left, tmp_path, again, within=100)
    assert "left out: no scores yet" in capsys.readouterr().out
    assert {task.score for task in real_networks.missing(tasks, again, "")} == {"second best"}


def test_nothing_begins_after_the_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(real_networks, "Study", Fake)
    results = Results(tmp_path / "results.jsonl")
    real_networks.run(real_networks_study.all_tasks(["lite0"]), tmp_path, results, within=-1)
    assert results.lines() == []
    assert "no time is left" in capsys.readouterr().out


def test_only_picks_tasks_by_their_names(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    tasks = real_networks_study.all_tasks(["lite0", "lite1"])
    picked = real_networks.missing(tasks, results, "lite1: calibrated: uniform")
    assert {(task.network, task.score) for task in picked} == {("lite1", "uniform")}


def test_the_plan_says_the_time_of_what_was_measured(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    tasks = real_networks_study.all_tasks(["lite0"], random_draws=0)
    results.add(tasks[0].key, {"cpu_seconds": 3.0})
    calibrated = [task for task in tasks if task.what == "calibrated"]
    results.add(calibrated[0].key, {"cpu_seconds": 36.0})
    told = real_networks.plan(calibrated[1:101], results)
    assert f"lite0: calibrated: {len(calibrated[1:101])} left, 36 s each" in told
    assert "not measured yet" in real_networks.plan(
        [task for task in tasks if task.what == "tuned"], results
    )


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of a tiny network on few images."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4)]
    parts = [part for conv in convolutions for part in (conv, nn.BatchNorm2d(6), nn.ReLU())]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    x = torch.randn(48, 3, 8, 8)
    labels = model(x).argmax(1)
    images = networks.Images(x[:32], labels[:32], x[24:40], x[32:], labels[32:])
    monkeypatch.setattr(real_networks_study, "network", lambda name, folder: (model, images))
    for name, value in (
        ("SCORE_BATCH", 8), ("CALIBRATION_IMAGES", 16), ("CHOICE_IMAGES", 8), ("JOINT_STEPS", 5),
        ("TUNED_STEPS", 6), ("REFINE_STEPS", 2),
    ):  # fmt: skip
        monkeypatch.setattr(real_networks_study, name, value)
    tuning = real_networks_study.Tuning(batch=8, size=6, lr=0.01)
    monkeypatch.setitem(real_networks_study.TUNING, "tiny", tuning)
    results = Results(tmp_path / "results.jsonl")
    return real_networks_study.Study("tiny", tmp_path, results)


def test_a_network_goes_through_all_that_is_measured(study):
    budget = real_networks_study.BUDGETS[2].name
    for score in ("fisher", "layerwise", "learned"):
        assert study.run(real_networks_study.Task("tiny", "score", score))["seconds"] > 0
    assert study.indicators("learned, normalised") == study.indicators("learned").normalised()
    ways = ("uniform", "fisher", "layerwise", "learned", "negated fisher", "random 0")
    assert set(ways) <= set(real_networks_study.ways(real_networks_study.BUDGETS[2], 1))
    for way in ways:
        for own in real_networks_study.BUDGETS[2:]:
            task = real_networks_study.Task("tiny", "calibrated", way, own.name)
            result = study.run(task)
            assert 0 <= result["agreement"] <= 1
            assert result["kl"] > 0
            study.results.add(task.key, result)
    told = {way: r["bitops"] for way, r in study.results.of("tiny", "calibrated", budget).items()}
    assert max(told.values()) <= told["uniform"]
    for way in ("uniform", "best", "second best"):
        result = study.run(real_networks_study.Task("tiny", "tuned", way, budget, 1))
        assert result["steps"] == 8
        assert result["accuracy"] <= 1
    assert {"fisher", "layerwise"} == set(study.results.best_scores("tiny", budget))


def test_policies_that_need_a_score_wait_for_it(study):
    with pytest.raises(NotThereYet, match="no score 'fisher' of tiny"):
        study.run(
            real_networks_study.Task(
                "tiny", "calibrated", "fisher", real_networks_study.BUDGETS[0].name
            )
        )


def test_start_values_differ_by_rule_and_treatment(study):
    budget = real_networks_study.BUDGETS[2].name
    found = {
        (start, treatment): study.run(
            real_networks_study.Task("tiny", "start", f"{start}, {treatment}", budget)
        )["kl"]
        for start in ("mse", "lsq")
        for treatment in real_networks_study.TREATMENTS
    }
    assert len(set(found.values())) == len(found)
    calibrated = study.run(real_networks_study.Task("tiny", "calibrated", "uniform", budget))["kl"]
    assert found["mse", "corrected"] == pytest.approx(calibrated, rel=1e-5)


def test_start_values_are_found_once(study, monkeypatch):
    scales = [p for name, p in study.prepared.named_parameters() if name.endswith("scale")]
    again = real_networks_study.Study("tiny", study.folder, study.results)
    monkeypatch.setattr(real_networks_study.lq, "calibrate", None)
    kept = [p for name, p in again.prepared.named_parameters() if name.endswith("scale")]
    assert all(torch.equal(one, other) for one, other in zip(scales, kept, strict=True))


# --- results ------------------------------------------------------------------------------------


def test_results_survive_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    Results(path).add(("a", "float", "float", "", "0"), {"kl": 0.0})
    with path.open("a") as file:
        file.write('{"key": ["b", "flo')
    again = Results(path)
    again.add(("c", "float", "float", "", "0"), {"kl": 1.0})
    assert Results(path).networks() == ["a", "c"]


def test_best_scores_are_chosen_on_other_images_than_the_test(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    found = {
        "uniform": (0, 0), "learned": (0, 0), "negated fisher": (0, 0), "random 0": (0, 0),
        "refined fisher": (0, 0), "fisher": (1, 3), "layerwise": (2, 2), "gradient": (3, 1),
    }  # fmt: skip
    for way, (kl, choice) in found.items():
        results.add(("a", "calibrated", way, "B", "0"), {"kl": kl, "choice_kl": choice})
    assert results.best_scores("a", "B") == ["gradient", "layerwise", "fisher"]
    with pytest.raises(NotThereYet, match="a has policies of 0 scores at C"):
        results.best_scores("a", "C")


def test_rank_correlation_is_that_of_ranks():
    x = [0.1, 0.9, 0.3, 40.0, 0.5, 0.5, 2.0]
    y = [1.0, 3.0, 3.0, 9.0, -7.0, 2.0, 2.5]
    r, low, high = real_networks_report.rank_correlation(x, y)
    slow = np.corrcoef(
        [sum(b < a for b in x) + (x.count(a) + 1) / 2 for a in x],
        [sum(b < a for b in y) + (y.count(a) + 1) / 2 for a in y],
    )[0, 1]
    assert r == pytest.approx(slow)
    assert low < r < high
    assert real_networks_report.rank_correlation(x, [1.0] * 7) is None
    assert real_networks_report.rank_correlation(x[:4], y[:4]) is None
    doubled = [2 * value for value in x]
    assert real_networks_report.rank_correlation(x, doubled) == pytest.approx((1, 1, 1))


def filled(tmp_path, costs, scores, *, kl=0.2, agreement=0.6):
    """Results of a network of which policies are worth what the scores say."""
    results = Results(tmp_path / "results.jsonl")
    layers = [layer.name for layer in (*costs.layers, *costs.fixed)]
    told = {"layers": layers, "mean_largest_probability": 0.7, "agreement": 1.0, "kl": 0.0}
    results.add(("lite0", "float", "float", "", "0"), told)
    results.add(("lite0", "score", DEFAULT, "", "0"), {"seconds": 12.3})
    budget = real_networks_study.BUDGETS[2]
    study = object.__new__(real_networks_study.Study)
    study.costs = costs
    for draw in range(8):
        policy = study.policy(f"random {draw}", budget)
        told = {**study.told(policy), "agreement": 0.3}
        told["kl"] = 1 + real_networks_report.predicted(scores, layers, told)
        results.add(("lite0", "calibrated", f"random {draw}", budget.name, "0"), told)
    told = {"agreement": 0.5, "kl": 0.4, "choice_kl": 0.4}
    results.add(("lite0", "calibrated", "uniform", budget.name, "0"), told)
    told = {"agreement": agreement, "kl": kl, "choice_kl": kl}
    results.add(("lite0", "calibrated", DEFAULT, budget.name, "0"), told)
    for seed in range(2):
        for way, share in (("uniform", 0.60 + 0.01 * seed), ("best", 0.70 + 0.01 * seed)):
            key = ("lite0", "tuned", way, budget.name, str(seed))
            results.add(key, {"agreement": share, "kl": 1.0})
    return results


@pytest.fixture
def costs():
    return profile(small(), torch.zeros(1, 3, 16, 16))


def test_targets_are_met_by_a_score_that_predicts(tmp_path, costs):
    scores = random_scores(costs, real_networks_study.BITS, 3)
    results = filled(tmp_path, costs, scores)
    rows = real_networks_report.targets(results, {"lite0": {DEFAULT: scores}})
    assert [row[0].split(": ")[1] for row in rows] == [
        "KL over uniform's", "random policies that are as good", "equal classes",
        "rank correlation over random policies", "the best score's over uniform",
    ]  # fmt: skip
    assert all(met for *_, met in rows)


def test_targets_are_missed_by_a_policy_like_uniform(tmp_path, costs):
    scores = random_scores(costs, real_networks_study.BITS, 3)
    other = random_scores(costs, real_networks_study.BITS, 4)
    results = filled(tmp_path, costs, other, kl=0.3, agreement=0.49)
    rows = {row[0]: row for row in real_networks_report.targets(results, {"lite0": {}})}
    where = "lite0, BitOps of 4 bits"
    assert rows[f"{where}: KL over uniform's"][1:] == ("<= 0.55", "0.75", False)
    assert rows[f"{where}: equal classes"][1:] == (">= 50%", "49.0%", False)
    assert scores != other


def test_the_page_has_every_number_in_its_place(tmp_path, costs):
    scores = random_scores(costs, real_networks_study.BITS, 3)
    results = filled(tmp_path, costs, scores)
    text = real_networks_report.page(RUN, results, {"lite0": {DEFAULT: scores}})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [DEFAULT, "12", "60.0; 0.200"] in rows
    assert ["uniform", "", "50.0; 0.400"] in rows
    assert [DEFAULT, "1.00 (1.00 to 1.00)"] in rows
    assert ["best", "70.5 ± 0.7"] in rows
    assert not any("random 0" in line for line in text.splitlines())
    assert "commit 0123456789ab," in text


def test_a_network_of_scores_alone_has_their_times(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for score, seconds in (("fisher", 12.3), ("hessian", 45.6)):
        results.add(("resnet50", "score", score, "", "0"), {"seconds": seconds})
    text = real_networks_report.page(RUN, results, {})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows.index(["fisher", "hessian"]) == rows.index(["12", "46"]) - 2


def test_results_are_recorded_with_their_page(tmp_path, costs):
    scores = random_scores(costs, real_networks_study.BITS, 3)
    filled(tmp_path, costs, scores)
    scores.save(tmp_path / f"lite0-{DEFAULT}.json")
    path = tmp_path / "out" / "real_networks.json"
    path.parent.mkdir()
    assert real_networks.main(["--folder", str(tmp_path), "--record", str(path)]) == 0
    recorded = json.loads(path.read_text())
    assert recorded["run"]["tuned_steps"] == real_networks_study.TUNED_STEPS
    assert len(recorded["results"]) == len(Results(tmp_path / "results.jsonl").lines())
    assert "1.00 (1.00 to 1.00)" in path.with_suffix(".md").read_text()


def test_a_recorded_file_is_gone_on_from(tmp_path, costs):
    scores = random_scores(costs, real_networks_study.BITS, 3)
    filled(tmp_path, costs, scores)
    scores.save(tmp_path / f"lite0-{DEFAULT}.json")
    path, other = tmp_path / "recorded.json", tmp_path / "other"
    other.mkdir()
    Results(other / "results.jsonl").add(("lite0", "float", "float", "", "0"), {"kl": 0.5})
    assert real_networks.main(["--folder", str(tmp_path), "--record", str(path)]) == 0
    assert real_networks.main(["--folder", str(other), "--resume", str(path)]) == 0
    ours, theirs = (Results(folder / "results.jsonl") for folder in (tmp_path, other))
    assert theirs.of("lite0", "float") == {"float": {"kl": 0.5}}  # stays as it was
    assert len(theirs.lines()) == len(ours.lines())
    again = Indicators.load(other / f"lite0-{DEFAULT}.json")
    for one, two in zip(again.layers, scores.layers, strict=True):
        assert one.name == two.name
        assert one.weight == pytest.approx(two.weight, rel=1e-4)
        assert one.activation == pytest.approx(two.activation, rel=1e-4)


def test_budgets_count_what_a_uniform_policy_uses(costs):
    for budget in real_networks_study.BUDGETS:
        bits = int(budget.bits)
        pair = (bits, budget.activation_bits if budget.by_size else bits)
        assert sum(budget.used(costs, pair)) == budget.limit(costs)
        assert budget.bits == Fraction(bits)
