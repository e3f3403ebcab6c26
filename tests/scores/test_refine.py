"""Refined policies: better by measurement, within every budget and restriction."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from networks import Depthwise

import limpq_ext as lq
from limpq_ext.allocation.problem import make_problem
from limpq_ext.scores.measure import PolicyLoss
from limpq_ext.scores.refine import _Expectations
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import LayerBits, Policy

BITS = (2, 3, 4)
EVER = {"patience": 10_000, "deviations": 0.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Depthwise()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(8, 3, 8, 8))
    return model.eval()


def batches(seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    return [(x, torch.arange(8) % 5) for x in images.split(8)]


@pytest.fixture(scope="module")
def data():
    return batches()


@pytest.fixture(scope="module")
def costs(model, data):
    return lq.profile(model, data[0][0])


@pytest.fixture(scope="module")
def indicators(costs):
    generator = np.random.default_rng(1)
    tables = [
        {
            layer.name: dict(zip(BITS, sorted(generator.random(len(BITS)))[::-1], strict=True))
            for layer in costs.layers
        }
        for _ in range(2)
    ]
    return Indicators.from_table(*tables)


@pytest.fixture(scope="module")
def policy(indicators, costs):
    return lq.search(indicators, costs, bitops=lq.uniform(3, 3))


@pytest.fixture(scope="module")
def refined(policy, model, data, costs, indicators):
    return lq.refine(policy, model, data, costs, indicators=indicators, **EVER)


def used(policy, costs):
    return costs.bitops(
        {name: pair for name, pair in policy.bits().items() if name in names(costs)}
    )


def names(costs):
    return [layer.name for layer in costs.layers]


def test_the_loss_is_lower_and_the_budget_kept(policy, refined, model, data, costs):
    loss = PolicyLoss(model, data)
    told = refined.meta["refined"]
    assert told["before"] == loss(policy)
    assert told["after"] == loss(refined) < told["before"]
    assert used(refined, costs) <= used(Policy.uniform(costs, 3, 3), costs)
    assert [(b.name, b.limit, b.used, b.kept) for b in refined.budgets] == [
        ("bitops", policy.budgets[0].limit, used(refined, costs), True)
    ]
    assert refined.meta["check"][0]["used"] == used(refined, costs)
    assert refined.fixed == policy.fixed


def test_it_ends_where_no_neighbour_is_better(refined, model, data, costs):
    """Every raise, exchange and swap of two layers, found without the package's neighbours."""
    assert refined.meta["refined"]["stopped_by"] == "exhausted"
    loss = PolicyLoss(model, data)
    limit = used(Policy.uniform(costs, 3, 3), costs)
    bits = {name: refined.bits()[name] for name in names(costs)}
    for first, second in itertools.combinations(bits, 2):
        for weights_first, weights_second in itertools.product(BITS, BITS):
            other = {
                **bits,
                first: (weights_first, bits[first][1]),
                second: (weights_second, bits[second][1]),
            }
            if costs.bitops(other) <= limit:
                layers = tuple(LayerBits(name, *pair) for name, pair in other.items())
                assert loss(Policy(layers, refined.fixed)) >= refined.meta["refined"]["after"]


def test_the_record_leads_from_the_first_policy_to_the_last(policy, refined):
    told = refined.meta["refined"]
    bits, loss = policy.bits(), told["before"]
    for step in told["record"]:
        assert step["before"] == loss
        assert all(tuple(pair) != bits[name] for name, pair in step["bits"].items())
        assert step["accepted"] == (step["after"] < loss)
        if step["accepted"]:
            loss = step["after"]
            bits = {**bits, **{name: tuple(pair) for name, pair in step["bits"].items()}}
    assert (bits, loss) == (refined.bits(), told["after"])
    assert 0 < sum(step["accepted"] for step in told["record"]) < len(told["record"])


@pytest.mark.parametrize("deviations", [0.5, 2.0])
def test_what_may_be_chance_is_not_accepted(deviations, policy, model, data, costs, indicators):
    own = lq.refine(
        policy, model, data, costs, indicators=indicators, steps=30, deviations=deviations
    )
    told = own.meta["refined"]
    assert told["deviations"] == deviations
    loss = PolicyLoss(model, data)
    now, decided = policy, []
    for step in told["record"]:
        bits = {**now.bits(), **{name: tuple(pair) for name, pair in step["bits"].items()}}
        layers = tuple(LayerBits(name, *bits[name]) for name in names(costs))
        tried = dataclasses.replace(now, layers=layers)
        change = loss.losses(tried) - loss.losses(now)
        mean, error = float(change.mean()), float(change.std()) / math.sqrt(len(change))
        assert mean == pytest.approx(step["after"] - step["before"], abs=1e-12)
        assert step["accepted"] == (mean < -deviations * error)
        decided.append((mean < 0, step["accepted"]))
        now = tried if step["accepted"] else now
    assert (True, deviations < 1) in decided


def test_no_policy_is_measured_twice(policy, refined):
    bits, seen = policy.bits(), {tuple(policy.bits().items())}
    for step in refined.meta["refined"]["record"]:
        tried = {**bits, **{name: tuple(pair) for name, pair in step["bits"].items()}}
        assert tuple(tried.items()) not in seen
        seen.add(tuple(tried.items()))
        bits = tried if step["accepted"] else bits


def test_what_it_says_of_its_objective_is_no_proof(policy, refined, indicators, tmp_path):
    tables = {layer.name: layer for layer in indicators.layers}
    total = math.fsum(
        tables[layer.name].weight[layer.weight_bits]
        + tables[layer.name].activation[layer.activation_bits]
        for layer in refined.layers
    )
    assert refined.objective == pytest.approx(total, rel=1e-12)
    assert refined.objective > policy.objective
    assert refined.bound is None
    assert refined.gap is None
    assert refined.meta["stopped_by"] == "exhausted"
    assert refined.meta["solver"] == "measured swaps"
    assert refined.meta["refined"]["from"] == {
        "objective": policy.objective,
        "bound": policy.bound,
        "stopped_by": "optimal",
    }
    refined.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == refined


def test_the_step_that_promises_most_comes_first(policy, model, data, costs, indicators):
    own = lq.refine(policy, model, data, costs, indicators=indicators, steps=1)
    (step,) = own.meta["refined"]["record"]
    tables = {layer.name: layer for layer in indicators.layers}

    def rise(bits):
        return math.fsum(
            tables[n].weight[bw] + tables[n].activation[ba] for n, (bw, ba) in bits.items()
        )

    bits = {name: policy.bits()[name] for name in names(costs)}
    first = rise({**bits, **{n: tuple(p) for n, p in step["bits"].items()}}) - rise(bits)
    limit = used(Policy.uniform(costs, 3, 3), costs)
    for name in bits:  # of the exchanges within a layer at least
        for pair in itertools.product(BITS, BITS):
            other = {**bits, name: pair}
            some_rise = pair[0] > bits[name][0] or pair[1] > bits[name][1]
            if some_rise and costs.bitops(other) <= limit:
                assert rise(other) - rise(bits) >= first - 1e-12


def test_what_a_step_changed_is_shared_by_the_terms_of_its_new_bits(costs, indicators):
    problem = make_problem(indicators, costs)
    start = ((3, 3),) * 3
    expected = _Expectations(problem, start, problem.objective(start))  # the unit is 1
    steps = [{0: (4, 3), 1: (2, 3)}, {0: (4, 3), 2: (2, 3)}, {0: (3, 4), 1: (3, 2)}]

    def change(step):
        return sum(
            problem.objective(tuple(pair if i == place else (3, 3) for i in range(3)))
            - problem.objective(start)
            for place, pair in step.items()
        )

    known = [change(step) for step in steps]
    expected.about(start, steps)
    assert expected.best() == min(range(3), key=known.__getitem__)
    expected.learn(start, steps[0], known[0] + 6.0)  # of which half goes to layer 0 at 4 bits
    known = [known[0] + 6, known[1] + 3, known[2]]
    assert expected.best() == min(range(3), key=known.__getitem__)
    expected.learn(start, steps[1], known[1] + 0.0)
    expected.learn(start, steps[2], known[2] + 100.0)
    assert expected.best() == 1
    expected.leave_out(1)
    assert expected.best() == 0
    expected.leave_out(0)
    expected.leave_out(2)
    assert expected.best() is None


def test_without_scores_steps_come_by_chance(policy, model, data, costs):
    own = lq.refine(policy, model, data, costs, bits=BITS, **EVER)
    assert own.meta["refined"]["after"] < own.meta["refined"]["before"]
    assert own.objective is None


def test_equal_seeds_take_equal_steps(policy, model, data, costs):
    def record(seed):
        own = lq.refine(policy, model, data, costs, bits=BITS, steps=5, seed=seed)
        return own.meta["refined"]["record"]

    assert record(0) == record(0) != record(1)


def test_where_no_step_helps_it_is_the_policy_with_its_proof(
    refined, model, data, costs, indicators
):
    proven = dataclasses.replace(refined, bound=0.5, gap=0.25)
    again = lq.refine(proven, model, data, costs, indicators=indicators, **EVER)
    told = again.meta.pop("refined")
    assert told["before"] == told["after"]
    assert not any(step["accepted"] for step in told["record"])
    expected = {name: value for name, value in proven.meta.items() if name != "refined"}
    assert again == dataclasses.replace(proven, meta=expected)


def test_other_budgets_and_restrictions_are_kept(model, data, costs, indicators):
    question = {
        "bitops": lq.uniform(3, 3),
        "size": "w3a3",
        "tied": [["expand", "depthwise"]],
        "min_bits": {"project": (3, 2)},
    }
    policy = lq.search(indicators, costs, **question)
    own = lq.refine(policy, model, data, costs, indicators=indicators, **EVER, **question)
    assert own.meta["refined"]["record"]
    for step in own.meta["refined"]["record"]:
        bits = {**policy.bits(), **{name: tuple(pair) for name, pair in step["bits"].items()}}
        if not step["accepted"]:
            continue
        policy = dataclasses.replace(
            policy, layers=tuple(LayerBits(name, *bits[name]) for name in names(costs))
        )
        assert bits["expand"] == bits["depthwise"]
        assert bits["project"][0] >= 3
        uniform = Policy.uniform(costs, 3, 3)
        assert used(policy, costs) <= used(uniform, costs)
        assert costs.size_bits(policy.bits()) <= costs.size_bits(uniform.bits())
    assert own.meta["restrictions"] == ["min_bits['project']", "tied['expand', 'depthwise']"]
    with pytest.raises(ValueError, match=r"was searched under min_bits\['project'\], tied\["):
        lq.refine(policy, model, data, costs, indicators=indicators)


def test_bits_that_still_fit_are_raised(model, data, costs, indicators):
    low = Policy.uniform(costs, 2, 2)
    own = lq.refine(low, model, data, costs, indicators=indicators, bitops=1e9, **EVER)
    assert {(layer.weight_bits, layer.activation_bits) for layer in own.layers} != {(2, 2)}
    assert own.meta["refined"]["after"] < own.meta["refined"]["before"]
    assert "from" in own.meta["refined"]


def test_held_out_batches_are_measured_under_the_same_calibration(
    policy, model, data, costs, indicators
):
    other = batches(seed=2)
    own = lq.refine(
        policy, model, data, costs, indicators=indicators, held_out=iter(other), measure="loss"
    )
    loss = PolicyLoss(model, other, measure="loss", calibration=data)
    told = own.meta["refined"]
    assert told["measure"] == "loss"
    assert told["held_out"] == {"before": loss(policy), "after": loss(own)}


def test_it_stops_where_it_is_told(policy, model, data, costs, indicators):
    def stopped(**limits):
        seen = []
        own = lq.refine(
            policy, model, data, costs, indicators=indicators,
            on_measured=lambda done, loss: seen.append((done, loss)), **limits,
        )  # fmt: skip
        told = own.meta["refined"]
        assert [done for done, _ in seen] == [i + 1 for i in range(len(told["record"]))]
        assert not seen or seen[-1][1] == told["after"]
        return told["stopped_by"], [step["accepted"] for step in told["record"]]

    reason, accepted = stopped(patience=2)
    assert reason == "patience"
    assert accepted[-2:] == [False, False]
    assert stopped(steps=3)[0] == "steps"
    assert len(stopped(steps=3)[1]) == 3
    assert stopped(seconds=1e-9) == ("time", [])


def test_the_model_is_left_as_it_is(policy, model, data, costs, indicators):
    before = copy.deepcopy(model.state_dict())
    lq.refine(policy, model, data, costs, indicators=indicators, steps=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience is 0, expected a positive number"),
        ({"seconds": -1}, ValueError, "seconds is -1, expected a positive number"),
        ({"deviations": -1}, ValueError, "deviations is -1, expected 0 or more"),
        ({"deviations": math.nan}, ValueError, "deviations is nan, expected 0 or more"),
        ({"steps": 0}, ValueError, "steps is 0, expected a positive number"),
        ({"bitops": "w2a2"}, ValueError, "the policy does not keep bitops <= "),
        ({"batches": []}, ValueError, "there are no batches to measure the loss on"),
        ({"measure": "kld"}, ValueError, "measure is 'kld', expected one of kl, loss"),
        ({"fixed": {"expand": (8, 8)}}, ValueError, r"the policy does not keep fixed\['expand'\]"),
        ({"fastest": 1}, TypeError, "there is no budget or option 'fastest'"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    change, error, message, policy, model, data, costs, indicators
):
    given = {"model": model, "batches": data, "costs": costs, "indicators": indicators, **change}
    with pytest.raises(error, match=message):
        lq.refine(policy, **given)


def test_policies_without_budgets_or_of_other_layers_or_bits_are_refused(
    policy, model, data, costs, indicators
):
    with pytest.raises(ValueError, match="the policy carries no budgets: give one"):
        lq.refine(dataclasses.replace(policy, budgets=()), model, data, costs)
    other = dataclasses.replace(policy, layers=(*policy.layers[1:], LayerBits("other", 3, 3)))
    with pytest.raises(ValueError, match="different layers: 'expand', 'other'"):
        lq.refine(other, model, data, costs)
    odd = Policy.uniform(costs, 2, 5)
    with pytest.raises(ValueError, match="the policy does not keep the bits of the indicators"):
        lq.refine(odd, model, data, costs, indicators=indicators, bitops=1e9)
