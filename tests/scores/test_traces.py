"""Scores from traces, against whole Hessians and the gradients of single samples in float64."""

import copy
import math

import pytest
import torch
from small_classifiers import (
    LAYERS,
    calls_of,
    classifier,
    image_batches,
    layers_of,
    output_with,
    quantized,
)
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import limpq_ext as lq
from limpq_ext.scores.subject import Subject
from limpq_ext.scores.traces import _spread, layer_type

BITS = (2, 4)


def value(found, name, kind, bits):
    return getattr(next(layer for layer in found.layers if layer.name == name), kind)[bits]


def trace_of_weights(model, name, x, target):
    """The trace of the mean loss's Hessian."""
    weight = model.get_submodule(name).weight.detach()

    def loss(weight):
        scores = functional_call(model, {f"{name}.weight": weight}, (x,))
        return F.cross_entropy(scores, target)

    hessian = torch.autograd.functional.hessian(loss, weight)
    return hessian.reshape(weight.numel(), weight.numel()).trace()


def trace_of_input(model, name, x, target):
    """The sum over calls of the traces of one sample's loss's Hessian."""
    total = 0.0
    for place, (entered, *_) in enumerate(calls_of(model, name, x, target)[0]):

        def loss(moved_by, place=place):
            seen = []

            def enter(module, inputs):
                seen.append(module)
                return (inputs[0] + moved_by,) if len(seen) == place + 1 else None

            handle = model.get_submodule(name).register_forward_pre_hook(enter)
            scores = model(x)
            handle.remove()
            return F.cross_entropy(scores, target)

        start = torch.zeros_like(entered)
        hessian = torch.autograd.functional.hessian(loss, start)
        total += hessian.reshape(start.numel(), start.numel()).trace()
    return total


def learned(model, data):
    """A few steps, after which the loss is curved upwards."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        sum(F.cross_entropy(model(x), target, reduction="sum") for x, target in data).backward()
        optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("network", "name"),
    [("convolutions", "biased"), ("convolutions", "hidden"), ("attention", "proj")],
)
def test_hessian_is_the_mean_trace_times_the_squared_error(network, name):
    model, data = classifier(network), image_batches((3, 2))
    learned(model, data)
    found = lq.scores.hessian(model, data, BITS, probes=300)
    layers = Subject(model, data, BITS).layers
    weight = model.get_submodule(name).weight.detach()
    weights = inputs = moved = 0.0
    elements = 0
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for x, target in data:
            weights += float(trace_of_weights(model, name, x, target)) * len(x) / 5
            for one, label in zip(x.split(1), target.split(1), strict=True):
                inputs += float(trace_of_input(model, name, one, label)) / 5
                for entered, *_ in calls_of(model, name, one, label)[0]:
                    error = quantized(layers[name], "activation", 2, entered) - entered
                    moved += float(error.square().sum()) / 5
                    elements += entered.numel() / 5
    error = float((quantized(layers[name], "weight", 2, weight) - weight).square().sum())
    assert weights > 0 < inputs
    expected = weights / weight.numel() * error
    assert value(found, name, "weight", 2) == pytest.approx(expected, rel=0.2)
    assert value(found, name, "activation", 2) == pytest.approx(inputs / elements * moved, rel=0.2)


def test_traces_of_a_hessian_depend_on_the_seed_and_are_not_negative():
    model, data = classifier(), image_batches()
    found = [lq.scores.hessian(model, data, BITS, probes=1, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    few = [value(found[0], name, "activation", 2) for name in LAYERS["convolutions"]]
    assert min(few) >= 0


def divergence(model, data, layers, name, kind, corrected):
    """The mean divergence of the outputs with one tensor at 2 bits, batch by batch."""
    total = 0.0
    for x, _ in data:
        changed = copy.deepcopy(model).requires_grad_(False)
        layer = changed.get_submodule(name)

        def leave(module, inputs, output):
            moved = output_with(model, layers, name, kind, 2, inputs[0])
            axes = (0, 2, 3) if output.dim() == 4 else tuple(range(output.dim() - 1))
            means = [each.mean(axes, keepdim=True) for each in (output, moved)]
            factor = 1.0
            if corrected == "mean and variance":
                stds = [each.std(axes, correction=0, keepdim=True) for each in (output, moved)]
                factor = stds[0] / stds[1]
            if corrected == "none":
                return moved
            return (moved - means[1]) * factor + means[0]

        layer.register_forward_hook(leave)
        p, q = (each(x).detach().softmax(1) for each in (model, changed))
        total += float((p * (p / q).log()).sum())
    return total / sum(len(x) for x, _ in data)


CORRECTED = {
    "conv": "mean and variance", "biased": "mean", "proj": "mean", "mlp.0": "mean", "mlp.2": "mean"
}  # fmt: skip


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("network", LAYERS)
def test_lampq_is_the_trace_times_what_layers_of_the_type_lose(network, correct):
    model, data = classifier(network), image_batches()
    # Two types of two layers each, of which the first is measured alone, or both.
    names = LAYERS[network]
    types = {name: "ab"[place // 2] for place, name in enumerate(names)}
    for sampled in (1, 2):
        found = lq.scores.lampq(
            model,
            data,
            BITS,
            gamma=3.0,
            sampled=sampled,
            type_of=lambda name, layer: types[name],
            correct=correct,
        )
        for kind in ("weight", "activation"):
            traces, lost = {}, {}
            for name in names:
                traces[name] = 0.0
                for x, target in data:
                    for one, label in zip(x.split(1), target.split(1), strict=True):
                        calls, weight = calls_of(model, name, one, label)
                        parts = [weight] if kind == "weight" else [call[2] for call in calls]
                        traces[name] += sum(float(g.square().sum()) for g in parts) / 8
                how = CORRECTED.get(name, "none") if correct else "none"
                lost[name] = divergence(model, data, layers_of(network, BITS), name, kind, how)
            for of_type in (names[:2], names[2:]):
                chosen = of_type[:sampled]
                factor = sum(map(lost.get, chosen)) / sum(map(traces.get, chosen))
                assert found.meta["factors"][types[of_type[0]]][kind] == pytest.approx(
                    factor, rel=1e-5
                )
                for name in of_type:
                    at = [value(found, name, kind, bits) for bits in BITS]
                    assert at[0] == pytest.approx(factor * traces[name], rel=1e-5)
                    assert at[1] == pytest.approx(at[0] / 9)


def test_a_type_has_layers_of_one_shape_or_of_one_place_in_a_block():
    convolution = nn.Conv2d(4, 8, 3)
    assert layer_type("layer1.0.conv1", convolution) == "Conv2d"
    assert layer_type("layer4.1.conv2", nn.Conv2d(8, 8, 3, groups=2)) == "Conv2d"
    assert layer_type("up", nn.ConvTranspose2d(4, 8, 3)) == "ConvTranspose2d"
    assert layer_type("layer1.0.downsample.0", nn.Conv2d(4, 8, 1, stride=2)) == "pointwise"
    assert layer_type("features.1.conv.0.0", nn.Conv2d(8, 8, 3, groups=8)) == "depthwise"
    linear = nn.Linear(4, 4)
    assert layer_type("blocks.3.attn.qkv", linear) == "qkv"
    assert layer_type("blocks.0.mlp.fc1", linear) == "fc1"
    assert layer_type("encoder.layers.encoder_layer_3.mlp.0", linear) == "mlp.0"
    assert layer_type("0", linear) == "0"


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "a"), (2, "ag"), (3, "adg"), (7, "abcdefg"), (9, "abcdefg")]
)
def test_the_layers_of_a_type_are_sampled_from_its_first_to_its_last(count, expected):
    assert "".join(_spread("abcdefg", count)) == expected


def test_a_type_without_gradients_scores_nothing():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used, self.beside = (nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.used(self.first(x))
            self.beside(x)
            return self.head(x)

    torch.manual_seed(0)
    data = [(torch.randn(4, 6), torch.arange(4) % 2)]
    model = Beside()
    for score, options in ((lq.scores.hessian, {"probes": 100}), (lq.scores.lampq, {})):
        used, beside = score(model, data, BITS, **options).layers
        assert min(used.weight[2], used.activation[2]) > 0
        assert set(beside.weight.values()) | set(beside.activation.values()) == {0.0}


@pytest.mark.parametrize(
    ("score", "option", "message"),
    [
        (lq.scores.hessian, {"probes": 0}, "probes is 0, expected 1 or more"),
        (lq.scores.lampq, {"gamma": 1.0}, "gamma is 1.0, expected more than 1"),
        (lq.scores.lampq, {"gamma": math.nan}, "gamma is nan, expected more than 1"),
        (lq.scores.lampq, {"sampled": 0}, "sampled is 0, expected 1 or more layers"),
    ],
)
def test_options_out_of_range_are_refused(score, option, message):
    with pytest.raises(ValueError, match=message):
        score(classifier(), image_batches(), BITS, **option)


def test_a_network_that_cannot_be_differentiated_twice_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(), nn.Linear(3, 3), nn.Linear(3, 3))
    data = [(torch.randn(4, 3), torch.arange(4) % 3)]
    with pytest.raises(ValueError, match="Sequential cannot be differentiated twice: derivative"):
        lq.scores.hessian(model, data, BITS, fixed=["3"])


def test_lampq_takes_a_layer_whose_output_has_no_samples():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.joined, self.head = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.head(x + self.joined(self.first(x[:1] * 0 + 1)))

    torch.manual_seed(0)
    [layer] = lq.scores.lampq(Joined(), [(torch.randn(5, 3), torch.arange(5) % 3)], BITS).layers
    assert layer.weight[2] >= layer.weight[4]
