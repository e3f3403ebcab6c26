"""What a check of scores measures, says, keeps and refuses."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from networks import Depthwise
from torch import nn

import limpq_ext as lq
from limpq_ext.scores.check import CheckedPolicy, CheckedScore, Correlation, ScoreCheck
from limpq_ext.scores.measure import PolicyLoss
from limpq_ext.scores.ranks import rank_correlation
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import LayerBits, Policy
from limpq_ext.values.reading import FileFormatError

BITS = (2, 3, 4, 6)
BUDGET = {"bitops": "w3a3"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Depthwise()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(8, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    return [(x, torch.arange(8) % 5) for x in images.split(8)]


@pytest.fixture(scope="module")
def costs(model, data):
    return lq.profile(model, data[0][0])


def falling(costs, seed, bits=BITS):
    generator = np.random.default_rng(seed)
    tables = [
        {
            layer.name: dict(zip(bits, sorted(generator.random(len(bits)))[::-1], strict=True))
            for layer in costs.layers
        }
        for _ in range(2)
    ]
    return Indicators.from_table(*tables)


@pytest.fixture(scope="module")
def scores(costs):
    return {"one": falling(costs, 0), "two": falling(costs, 1)}


@pytest.fixture(scope="module")
def found(scores, model, data, costs):
    return lq.check_scores(scores, model, data, costs, random=8, neighbours=4, **BUDGET)


def bits_of(point, found):
    pairs = zip(point.weight_bits, point.activation_bits, strict=True)
    return dict(zip(found.layers, pairs, strict=True))


def test_every_policy_is_measured_and_predicted(found, scores, model, data, costs):
    loss = PolicyLoss(model, data)
    for point in found.policies:
        bits = bits_of(point, found)
        layers = tuple(LayerBits(name, *pair) for name, pair in bits.items())
        measured = loss.measured(Policy(layers, Policy.uniform(costs, 2, 2).fixed))
        assert (point.loss, point.agreement) == (measured.loss, measured.agreement)
        for name, own in scores.items():
            tables = {layer.name: layer for layer in own.layers}
            total = math.fsum(
                tables[layer].weight[bw] + tables[layer].activation[ba]
                for layer, (bw, ba) in bits.items()
            )
            assert point.predicted[name] == pytest.approx(total, rel=1e-12)


def test_there_are_optima_neighbours_uniform_and_random_policies(found, scores, costs):
    kinds = [point.kind for point in found.policies]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "optimum": 2,
        "neighbour": 8,
        "uniform": 3,
        "random": 8,
    }
    limit = costs.bitops(Policy.uniform(costs, 3, 3).bits())
    for point in found.policies:
        assert costs.bitops(bits_of(point, found)) <= limit
    for name, own in scores.items():
        policy = lq.search(own, costs, **BUDGET)
        best = found.optimum(name)
        assert bits_of(best, found).items() <= policy.bits().items()
        assert best.predicted[name] == policy.objective
        near = [p for p in found.policies if p.kind == "neighbour" and p.score == name]
        for point in near:
            ours, theirs = bits_of(point, found), bits_of(best, found)
            assert 1 <= sum(ours[layer] != theirs[layer] for layer in ours) <= 2
    levels = {point.level for point in found.policies if point.kind == "uniform"}
    assert levels == {"W3A3", "W2A4", "W4A2"}
    drawn = {(p.weight_bits, p.activation_bits) for p in found.random}
    assert len(drawn) == 8
    for point in found.random:
        assert costs.bitops(bits_of(point, found)) >= 0.99 * limit


def test_random_policies_depend_on_the_seed_and_not_on_the_scores(
    found, scores, model, data, costs
):
    def drawn(**options):
        own = lq.check_scores(
            {"two": scores["two"]}, model, data, costs, random=8, neighbours=0, **BUDGET, **options
        )
        return {(p.weight_bits, p.activation_bits) for p in own.random}

    expected = {(p.weight_bits, p.activation_bits) for p in found.random}
    assert drawn() == expected
    assert drawn(seed=1) != expected


def test_correlations_are_over_the_random_policies_and_near_the_optimum(found):
    for score in found.scores:
        groups = (found.random, [p for p in found.policies if p.score == score.name])
        for told, own in zip((score.random, score.near), groups, strict=True):
            predicted = [point.predicted[score.name] for point in own]
            assert told.value == rank_correlation(predicted, [point.loss for point in own])
            assert told.policies == len(own)
            assert -1 <= told.low <= told.value <= told.high <= 1


def test_progress_and_options_of_the_measurement(scores, model, data, costs):
    seen = []
    own = lq.check_scores(
        scores,
        model,
        data,
        costs,
        random=3,
        neighbours=1,
        measure="loss",
        measuring={"correct": False, "per_channel_weights": True},
        on_measured=lambda done, total: seen.append((done, total)),
        **BUDGET,
    )
    different = {(p.weight_bits, p.activation_bits) for p in own.policies}
    assert seen == [(i + 1, len(different)) for i in range(len(different))]
    loss = PolicyLoss(model, data, measure="loss", correct=False, per_channel_weights=True)
    policy = lq.search(scores["one"], costs, **BUDGET)
    assert own.optimum("one").loss == loss(policy)
    assert own.measure == "loss"


def test_bits_that_a_score_forbids_have_their_values_all_the_same(scores, model, data, costs):
    rising = {layer.name: dict.fromkeys(BITS, 1.0) | {2: 0.5} for layer in costs.layers}
    own = {"rising": Indicators.from_table(rising, rising)}
    found = lq.check_scores(own, model, data, costs, random=6, neighbours=2, **BUDGET)
    assert 2 not in found.optimum("rising").weight_bits
    assert any(2 in point.weight_bits for point in found.random)
    for point in found.policies:
        twos = [*point.weight_bits, *point.activation_bits].count(2)
        assert point.predicted["rising"] == 6 - 0.5 * twos


def test_restrictions_hold_for_all_policies(scores, model, data, costs):
    found = lq.check_scores(
        scores, model, data, costs, random=4, neighbours=2, activation_bits=8, size="w4a4",
        min_bits={"depthwise": (4, 2)},
    )  # fmt: skip
    for point in found.policies:
        assert set(point.activation_bits) == {8}
        assert bits_of(point, found)["depthwise"][0] >= 4
    assert found.meta == {
        "budgets": {"size": 456},
        "restrictions": ["activation_bits", "min_bits['depthwise']"],
        "alpha": 1.0,
        "seed": 0,
    }


def point(kind, loss, score=None, bits=(3, 3)):
    return CheckedPolicy(kind, score, (bits[0],), (bits[1],), {"a": loss, "b": 1.0}, loss, 0.5)


def example(optima=(0.2, 0.4), uniform=(0.3, 0.35), random=(0.5, 0.25, 0.6)):
    none = Correlation(None, None, None, 0)
    return ScoreCheck(
        "kl",
        ("layer",),
        (CheckedScore("a", Correlation(0.5, -0.25, 0.75, 3), none), CheckedScore("b", none, none)),
        (
            *(point("optimum", loss, name) for name, loss in zip("ab", optima, strict=True)),
            *(point("uniform", loss, bits=(3, 4 + i)) for i, loss in enumerate(uniform)),
            *(point("random", loss) for loss in random),
        ),
    )


def test_the_best_score_regret_and_warnings():
    check = example()
    assert check.best == "a"
    assert check.uniform.level == "W3A4"
    assert (check.regret("a"), check.regret("b")) == (0, pytest.approx(0.2))
    assert check.warning("a") is None
    sentence = (
        "the policy of b (0.4) is not better than uniform W3A4 (0.3) and than 1 of 3 random"
        " policies (the best 0.25)"
    )
    assert check.warning("b") == sentence
    assert check.warnings() == (sentence,)
    alone = example(optima=(0.2, 0.35), uniform=())
    assert alone.uniform is None
    assert alone.warnings() == (
        "the policy of b (0.35) is not better than 1 of 3 random policies (the best 0.25)",
    )
    assert (
        example(optima=(0.3, 0.1))
        .warning("a")
        .endswith("uniform W3A4 (0.3) and than 1 of 3 random policies (the best 0.25)")
    )  # as good is not better
    assert example(optima=(0.3, 0.1)).best == "b"


def test_the_table():
    expected = """\
policy             KL, nats  same class  regret  correlation, random  near the optimum
a                       0.2       50.0%       0   0.50 [-0.25, 0.75]              none
b                       0.4       50.0%     0.2                 none              none
uniform W3A4            0.3       50.0%
random, best of 3      0.25       50.0%
random, median          0.5       50.0%"""
    assert str(example()) == expected


def test_a_file_holds_it_and_what_is_wrong_in_one_is_said(found, tmp_path):
    path = tmp_path / "check.json"
    found.save(path)
    assert ScoreCheck.load(path) == found
    path.write_text(path.read_text().replace('"kind": "uniform"', '"kind": "best"', 1))
    with pytest.raises(FileFormatError, match="policies"):
        ScoreCheck.load(path)


@pytest.mark.parametrize("loss", [0.25, 0.0])
def test_the_plot_is_a_picture(loss, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "check.png"
    example(random=(0.5, loss, 0.6)).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": ()}, "there are no scores"),
        ({"policies": example().policies[1:]}, "'a' is not there once, with one optimum"),
        ({"scores": example().scores[:1] * 2}, "'a' is not there once"),
        ({"scores": example().scores[:1]}, "'b' is not there once"),
        ({"layers": ("one", "two")}, "a policy has bits for 1 layers, expected 2"),
        (
            {
                "policies": (
                    *example().policies,
                    dataclasses.replace(example().policies[0], kind="random", predicted={"a": 1.0}),
                )
            },
            "a policy has predictions of a, expected a, b",
        ),
    ],
)
def test_a_check_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(example(), **change)


def test_an_unknown_score_is_named():
    with pytest.raises(ValueError, match="there is no score 'c', those are a, b"):
        example().optimum("c")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": {}}, ValueError, "there are no scores to check"),
        ({"scores": {"a": [1.0]}}, TypeError, "score 'a' is list, expected Indicators"),
        ({"random": 2}, ValueError, "random is 2, expected 3 or more"),
        ({"neighbours": -1}, ValueError, "neighbours is -1, expected 0 or more"),
        ({"bitops": None}, ValueError, "there is no budget"),
        (
            {"bitops": "w2a2"},
            ValueError,
            r"random policies cannot spread under bitops <= .* BitOps: 1 of 20 came to be at the"
            " budget and different",
        ),
        ({"bitops": 1e12}, ValueError, "random policies cannot spread under .* 0 of 20 came"),
        ({"bitops": 1}, lq.InfeasibleError, "bitops"),
        ({"batches": []}, ValueError, "there are no batches to measure the loss on"),
        ({"measure": "accuracy"}, ValueError, "measure is 'accuracy', expected one of kl, loss"),
    ],
)
def test_what_cannot_be_checked_is_refused(change, error, message, scores, model, data, costs):
    given = {"scores": scores, "model": model, "batches": data, "costs": costs, **BUDGET, **change}
    with pytest.raises(error, match=message):
        lq.check_scores(**given)


def test_scores_of_other_bits_or_layers_are_refused(scores, model, data, costs):
    other = {**scores, "other": falling(costs, 2, (2, 3))}
    with pytest.raises(ValueError, match=r"'other' is of \[2, 3\] bits, 'one' of \[2, 3, 4, 6\]"):
        lq.check_scores(other, model, data, costs, **BUDGET)
    fewer = dataclasses.replace(scores["one"], layers=scores["one"].layers[1:])
    with pytest.raises(ValueError, match="score 'fewer': indicators and costs do not match"):
        lq.check_scores({"fewer": fewer}, model, data, costs, **BUDGET)
    table = {layer.name: dict.fromkeys(BITS, math.nan) for layer in costs.layers}
    with pytest.raises(ValueError, match="weight indicator at 2 bits is nan"):
        Indicators.from_table(table)


def test_a_model_with_one_class_is_refused(scores):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 1))
    x = torch.randn(8, 4)
    costs = lq.profile(model, x)
    with pytest.raises(ValueError, match=r"the model puts out \(8, 1\), expected scores"):
        lq.check_scores({"a": falling(costs, 0)}, model, [(x, None)], costs, **BUDGET)
