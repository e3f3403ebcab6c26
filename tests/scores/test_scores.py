"""Scores against slow, plain versions of their formulas in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.kernels.ops import lsq_fake_quantize, thresholds
from limpq_ext.nn.start_values import Distribution, Histogram

BITS = (2, 4)
SCORES = [lq.scores.fisher, lq.scores.layerwise]


class Small(nn.Module):
    """Two searchable layers, one of which runs twice, ReLUs in place, and a batch normalisation."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3))
        x = F.relu(self.hidden(x), inplace=True)
        return self.head(F.relu(self.hidden(x), inplace=True))


def network():
    torch.manual_seed(0)
    model = Small().double()
    model.train()
    for _ in range(10):
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return model.eval()


def batches(count=2, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def inputs_of(model, name, x):
    """What comes into a layer, call by call."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    model(x)
    handle.remove()
    return seen


def scale_of(model, name, kind, bits, data):
    if kind == "weight":
        found, signed = Distribution.of(model.get_submodule(name).weight), True
    else:
        histogram = Histogram()
        for x, _ in data:
            for value in inputs_of(model, name, x):
                histogram.add(value)
        found, signed = histogram.distribution(), histogram.lowest < 0
    levels = thresholds(bits, signed=signed)
    return found.least_error(*levels)[0].float(), levels


CASES = list(itertools.product(["conv", "hidden"], ["weight", "activation"], BITS))


@pytest.mark.parametrize(("name", "kind", "bits"), CASES)
def test_fisher_is_half_the_mean_square_of_each_samples_gradient_times_the_error(name, kind, bits):
    model, data = network(), batches()
    found = lq.scores.fisher(model, data, BITS)
    scale, levels = scale_of(model, name, kind, bits, data)
    total = 0.0
    for x, target in data:
        for one, label in zip(x.split(1), target.split(1), strict=True):
            own = copy.deepcopy(model)
            calls = []

            def note(_, inputs, calls=calls):
                value = inputs[0].clone().requires_grad_() + 0
                value.retain_grad()
                calls.append(value)
                return (value,)

            layer = own.get_submodule(name)
            layer.register_forward_pre_hook(note)
            F.cross_entropy(own(one), label).backward()
            if kind == "weight":
                pairs = [(layer.weight.grad, layer.weight.detach())]
            else:
                pairs = [(value.grad, value.detach()) for value in calls]
            total += float(
                sum(
                    (g * (lsq_fake_quantize(v, scale.double(), *levels) - v)).sum()
                    for g, v in pairs
                )
                ** 2
            )
    layer = next(layer for layer in found.layers if layer.name == name)
    assert getattr(layer, kind)[bits] == pytest.approx(total / 20, rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("score", SCORES)
def test_a_score_leaves_the_model_as_it_is_and_falls_with_bits(score):
    model = network().float()
    model.norm.train()
    data = [(x.float(), t) for x, t in batches()]
    before = copy.deepcopy(model.state_dict())
    found = score(model, data, (2, 4, 8))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [module.training for module in model.children()] == [False, False, True, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert [layer.name for layer in found.layers] == ["conv", "hidden"]
    assert found.meta["score"] == score.__name__
    assert found.meta["batches"] == 2
    for layer in found.layers:
        assert layer.weight[2] > layer.weight[8]
        assert layer.activation[2] > layer.activation[8]


@pytest.mark.parametrize("score", SCORES)
def test_a_search_takes_a_score(score, tmp_path):
    model, data = network(), batches()
    score(model, data, BITS).save(tmp_path / "indicators.json")
    costs = lq.profile(model, data[0][0])
    policy = lq.search(
        lq.Indicators.load(tmp_path / "indicators.json"),
        costs,
        bitops=lq.uniform(3, 3),
        non_monotone="keep",
    )
    assert set(policy.bits()) == {"first", "conv", "hidden", "head"}


@pytest.mark.parametrize("score", SCORES)
def test_options_of_prepare_are_taken(score):
    model, data = network(), batches()
    found = score(model, data, BITS, fixed=["head"], exclude=["hidden"], per_channel_weights=True)
    assert [layer.name for layer in found.layers] == ["first", "conv"]


@pytest.mark.parametrize("score", SCORES)
def test_frozen_parameters_do_not_matter(score):
    model, data = network(), batches()
    expected = score(model, data, BITS)
    model.requires_grad_(False)
    assert score(model, data, BITS) == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("score", "change", "message"),
    [
        *(
            (score, lambda data: [], "there are no batches to measure scores on")
            for score in SCORES
        ),
        (
            lq.scores.fisher,
            lambda data: [(x, t.double()) for x, t in data],
            r"the targets are \(5,\), expected a class index for each sample",
        ),
        (
            lq.scores.fisher,
            lambda data: [(x, t + 4) for x, t in data],
            "a target is not one of the 4 classes",
        ),
        *(
            (
                score,
                lambda data: [(x * torch.nan, t) for x, t in data],
                "layer 'conv': input quantizer: a batch has a NaN",
            )
            for score in SCORES
        ),
    ],
)
def test_batches_that_cannot_be_used_are_refused(score, change, message):
    with pytest.raises(ValueError, match=message):
        score(network(), change(batches()), BITS)


@pytest.mark.parametrize("score", SCORES)
def test_a_rule_that_needs_training_and_an_output_that_is_no_table_are_refused(score):
    with pytest.raises(ValueError, match="scale_start is 'lsq', which needs a training"):
        score(network(), batches(), BITS, scale_start="lsq")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).double()
    with pytest.raises(ValueError, match=r"the model puts out \(\d+, 4, 6, 6\), expected scores"):
        score(model, batches(), BITS)
