"""The measured loss of a policy against apply_policy, calibrate and a forward."""

import copy
import itertools

import pytest
import torch
from networks import Attending, Depthwise, NoNorm, PaddedConv2d, Shared
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.scores import measure
from limpq_ext.scores.measure import PolicyLoss
from limpq_ext.values.policy import LayerBits, Policy

NETWORKS = [Attending, Depthwise, NoNorm, Shared]


def network(kind=NoNorm):
    torch.manual_seed(0)
    model = kind().double()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    return model.eval()


def batches(count=2, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def policies(model, bits=(2, 3, 4)):
    """Two policies of many bits each; the fixed layers have 8."""
    costs = lq.profile(model, batches()[0][0])
    widths = itertools.cycle(bits)
    for _ in range(2):
        layers = [LayerBits(layer.name, next(widths), next(widths)) for layer in costs.layers]
        next(widths)
        yield Policy(tuple(layers), tuple(LayerBits(layer.name, 8, 8) for layer in costs.fixed))


def slow(model, policy, measured, calibration, **options):
    """Outputs of the float and of the quantized network, and all targets."""
    quantized = lq.apply_policy(model, policy, **{"scale_start": "mse", **options}).eval()
    lq.calibrate(quantized, calibration, reference=model)
    with torch.no_grad():
        both = [
            torch.cat([net(x).log_softmax(1) for x, _ in measured]) for net in (model, quantized)
        ]
    return *both, torch.cat([target for _, target in measured])


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("others", [False, True])
def test_it_is_what_apply_calibrate_and_a_forward_come_to(kind, others):
    model, data = network(kind), batches()
    measured = batches(3, 4, seed=2) if others else data
    calibration = {"calibration": data} if others else {}
    loss = PolicyLoss(model, measured, **calibration)
    for policy in policies(model):  # what the first one corrects is put back
        p, q, _ = slow(model, policy, measured, data)
        found = loss.measured(policy)
        assert found.loss == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
        assert found.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())
        assert loss(policy) == found.loss


def test_the_loss_is_the_cross_entropy_with_the_targets():
    model, data = network(), batches()
    policy = next(policies(model))
    _, q, target = slow(model, policy, data, data)
    expected = float(F.nll_loss(q, target))
    assert PolicyLoss(model, data, measure="loss")(policy) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_start": "max"},
        {"per_channel_weights": True, "symmetric_weights": True},
        {"scale_max": 0.05},
    ],
)
def test_options_of_apply_policy_are_taken(options):
    model, data = network(), batches()
    policy = next(policies(model))
    p, q, _ = slow(model, policy, data, data, **options)
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert PolicyLoss(model, data, **options)(policy) == pytest.approx(expected, rel=1e-6)


def test_without_the_correction_statistics_stay_as_they_are():
    model, data = network(Depthwise), batches()
    policy = next(policies(model))
    quantized = lq.apply_policy(model, policy, scale_start="mse").eval()
    kept = {name: value.clone() for name, value in quantized.state_dict().items()}
    lq.calibrate(quantized, data, reference=model)
    corrected = quantized.state_dict()
    started = {name: corrected[name] for name in kept if "quantizer" in name}
    quantized.load_state_dict({**kept, **started})
    x = torch.cat([x for x, _ in data])
    with torch.no_grad():
        p, q = (net(x).log_softmax(1) for net in (model, quantized))
    expected = float((p.exp() * (p - q)).sum(1).mean())
    found = PolicyLoss(model, data, correct=False)
    assert found(policy) == pytest.approx(expected, rel=1e-6)
    assert found(policy) != pytest.approx(PolicyLoss(model, data)(policy), rel=1e-3)


def test_weights_that_are_not_kept_are_quantized_again(monkeypatch):
    model, data = network(Depthwise), batches()
    expected = [PolicyLoss(model, data)(policy) for policy in policies(model)]
    monkeypatch.setattr(measure, "MOST_CACHED", 0)
    loss = PolicyLoss(model, data)
    assert [loss(policy) for policy in policies(model)] == expected
    assert len(loss._layers["head"]._weights._kept) == 1


def test_modules_that_are_excluded_stay_in_float():
    model, data = network(), batches()
    costs = lq.profile(model, data[0][0], exclude=["hidden"])
    assert "hidden" not in Policy.uniform(costs, 2, 2).bits()
    policy = Policy.uniform(costs, 2, 2)
    with pytest.warns(UserWarning, match="left in float"):
        p, q, _ = slow(model, policy, data, data)
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert PolicyLoss(model, data, exclude=["hidden"])(policy) == pytest.approx(expected, rel=1e-6)


def test_the_model_is_left_as_it_is():
    model, data = network(Depthwise), batches()
    model.bn1.train()
    before = copy.deepcopy(model.state_dict())
    loss = PolicyLoss(model, data)
    for policy in policies(model):
        loss(policy)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in (model, model.bn1, model.bn2)] == [False, True, False]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_a_measurement_corrects_is_put_back_when_it_is_interrupted(monkeypatch):
    model, data = network(Depthwise), batches()
    loss = PolicyLoss(model, data)
    policy = next(policies(model))
    expected = loss(policy)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loss._layers["head"].in_place, "forward", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        loss(policy)
    monkeypatch.undo()
    assert loss(policy) == expected


def test_a_subclass_with_a_forward_of_its_own_is_quantized_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), PaddedConv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 5)
    ).double()
    data = batches()
    policy = next(policies(model))
    p, q, _ = slow(model, policy, data, data)
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert PolicyLoss(model, data)(policy) == pytest.approx(expected, rel=1e-6)


def made(change=lambda data: data, model=None, **options):
    return PolicyLoss(model or network(), change(batches()), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": lambda data: []}, "there are no batches to measure the loss on"),
        ({"calibration": []}, "there are no batches to calibrate with"),
        ({"measure": "accuracy"}, "measure is 'accuracy', expected one of kl, loss"),
        ({"scale_start": "lsq"}, "scale_start is 'lsq', which begins at what the policy"),
        ({"scale_start": "best"}, "scale_start is 'best', expected one of"),
        (
            {"measure": "loss", "change": lambda data: [(x, t + 3) for x, t in data]},
            "a target is not one of the 5 classes",
        ),
        (
            {"measure": "loss", "change": lambda data: [(x, t.double()) for x, t in data]},
            r"the targets are \(\d+,\), expected a class index for each sample",
        ),
        (
            {"measure": "loss", "change": lambda data: [(x, None) for x, _ in data]},
            "the targets are NoneType, expected a class index for each sample",
        ),
        (
            {"change": lambda data: [(x * torch.nan, t) for x, t in data]},
            "layer 'features.a': input quantizer: a batch has a NaN",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_one_class_and_parts_that_cannot_be_quantized_are_refused():
    one = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 1))
    with pytest.raises(ValueError, match=r"the model puts out \(6, 1\), expected scores"):
        made(model=one.double())
    recurrent = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 4))
    with pytest.raises(ValueError, match="cannot quantize '1'"):
        made(model=recurrent.double())


def test_a_policy_of_other_layers_or_without_a_loss_is_refused():
    model = network()
    loss = made(model=model)
    policy = next(policies(model))
    with pytest.raises(ValueError, match="policy: the network has no layer 'other' to quantize"):
        loss(Policy((*policy.layers, LayerBits("other", 4, 4)), policy.fixed))
    with pytest.raises(ValueError, match=r"no bits for 'features\.a', 'head': exclude it"):
        loss(Policy(policy.layers))
    model.head.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="the loss of the policy is nan"):
        made(model=model)(policy)
