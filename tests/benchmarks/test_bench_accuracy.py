"""The study of accuracy: its policies cost the same, what is finished is kept."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("highspy")
pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is not installed

from bench import accuracy
from limpq_ext import profile
from limpq_ext.values.indicators import Indicators, LayerIndicators


def costs_of(network):
    return profile(accuracy.NETWORKS[network](), torch.zeros(1, 1, accuracy.SIZE, accuracy.SIZE))


def falling(costs, seed):
    """Indicators that fall with the bits, other ones for each layer."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer in costs.layers:
        size = torch.rand(2, generator=generator).tolist()
        layers.append(
            LayerIndicators(layer.name, *({b: s / b**2 for b in accuracy.BITS} for s in size))
        )
    return Indicators(accuracy.BITS, tuple(layers))


@pytest.mark.parametrize("network", list(accuracy.NETWORKS))
@pytest.mark.parametrize("budget", accuracy.BUDGETS, ids=lambda budget: budget.name)
def test_all_ways_of_choosing_use_a_budget_to_the_same_share(network, budget):
    costs = costs_of(network)
    learned, hessian = falling(costs, 0), falling(costs, 1)
    if budget.by_size:
        limit = budget.bits * sum(layer.weights for layer in costs.layers)
    else:
        limit = budget.bits**2 * sum(layer.macs for layer in costs.layers)
    found = {}
    for way in accuracy.WAYS:
        policy = accuracy.policy_of(way, budget, learned, hessian, costs, seed=0)
        if policy is None:
            assert (way, budget.bits) == ("uniform", Fraction(5, 2))
            continue
        pairs = list(zip(costs.layers, policy.layers, strict=True))
        if budget.by_size:
            used = sum(cost.weights * bits.weight_bits for cost, bits in pairs)
            assert {bits.activation_bits for _, bits in pairs} == {4}
        else:
            used = costs.bitops(policy.bits())
        assert accuracy.KEPT * limit <= used <= limit
        found[way] = policy.layers
    assert found["learned"] != found["negated"]
    assert len(set(found.values())) > 4


def test_a_study_keeps_what_is_finished_and_the_table_has_means_and_deviations(
    tmp_path, monkeypatch
):
    for name, value in {
        "FLOAT_EPOCHS": 1, "JOINT_EPOCHS": 1, "TUNE_EPOCHS": 1, "TUNE": 64,
        "BUDGETS": accuracy.BUDGETS[1:2], "WAYS": ("learned", "uniform", "random 0", "hessian"),
    }.items():  # fmt: skip
        monkeypatch.setattr(accuracy, name, value)
    train, test = accuracy.draw("train", 68, tmp_path), accuracy.draw("test", 68, tmp_path)
    for seed in (0, 1):
        accuracy.Study("resnet", seed, tmp_path, train, test).run()
    before = (tmp_path / "resnet-0.json").read_bytes()
    monkeypatch.setattr(accuracy.Study, "_tuned", lambda *_: pytest.fail("computed again"))
    accuracy.Study("resnet", 0, tmp_path, train, test).run()
    assert (tmp_path / "resnet-0.json").read_bytes() == before
    results = [json.loads((tmp_path / f"resnet-{seed}.json").read_text()) for seed in (0, 1)]
    shares = [100 * result["BitOps of 3 bits: learned"]["accuracy"] for result in results]
    deviation = abs(shares[0] - shares[1]) / 2**0.5
    lines = accuracy.table(tmp_path).splitlines()
    row = next(line for line in lines if line.startswith("| resnet | BitOps of 3 bits"))
    assert f"| {sum(shares) / 2:.2f} ± {deviation:.2f} |" in row
    assert not any(line.startswith("| mobilenet") for line in lines)
    accuracy.record(tmp_path, tmp_path / "all.json")
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["studies"] == {"resnet-0": results[0], "resnet-1": results[1]}
    assert written["run"]["epochs"] == {"float": 1, "joint": 1, "finetune": 1}
