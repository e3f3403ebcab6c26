"""Scores of gradients at the layers' outputs, against one sample after the other in float64."""

import functools

import pytest
import torch
from small_classifiers import (
    LAYERS,
    calls_of,
    classifier,
    image_batches,
    layers_of,
    output_with,
)
from torch import nn

import limpq_ext as lq
from limpq_ext.scores.calls import Calls
from limpq_ext.scores.moved_output import OutputCorrection, corrections
from limpq_ext.scores.subject import Subject
from limpq_ext.training.correction import LEAST_RATIO, correct_statistics

BITS = (2, 4)
TENSORS = [
    (network, name, kind)
    for network, names in LAYERS.items()
    for name in names
    for kind in ("weight", "activation")
]
CORRECTED = {
    "conv": "mean and variance", "depthwise": "none", "biased": "mean", "hidden": "none",
    "qkv": "none", "proj": "mean", "mlp.0": "mean", "mlp.2": "mean",
}  # fmt: skip


@functools.cache
def scored(score, network, **options):
    return score(classifier(network), image_batches(), BITS, **options)


def value(found, name, kind, bits):
    return getattr(next(layer for layer in found.layers if layer.name == name), kind)[bits]


def by_channel(model, name, output):
    """One sample's output as [channels, n]."""
    linear = isinstance(model.get_submodule(name), nn.Linear)
    return (output[0].movedim(-1, 0) if linear else output[0]).flatten(1 if output.dim() > 2 else 0)


def samples_of(network, name, kind, bits):
    """Of every sample the calls' outputs in float, with the error, and gradients, by channel."""
    model, layers = classifier(network), layers_of(network, BITS)
    samples = []
    for x, target in image_batches():
        for one, label in zip(x.split(1), target.split(1), strict=True):
            calls, _ = calls_of(model, name, one, label)
            samples.append(
                [
                    tuple(
                        by_channel(model, name, each)
                        for each in (y, output_with(model, layers, name, kind, bits, inputs), g)
                    )
                    for inputs, y, _, g in calls
                ]
            )
    return samples


def errors_and_gradients(samples, corrected):
    """Of every sample the errors that a correction leaves, and the gradients, call by call."""
    if corrected == "none":
        return [[(moved - y, g) for y, moved, g in calls] for calls in samples]
    own, moved = (
        torch.cat([calls[0][place].reshape(len(calls[0][0]), -1) for calls in samples], dim=1)
        for place in (0, 1)
    )
    variances = [all_.var(dim=1, correction=0) for all_ in (own, moved)]
    factor = torch.ones(len(own), dtype=torch.float64)
    if corrected == "mean and variance":
        factor = (variances[1] / variances[0]).clamp(LEAST_RATIO, 1 / LEAST_RATIO) ** -0.5

    def right(y):
        shape = (-1, *[1] * (y.dim() - 1))
        middle, mean, scale = (
            each.reshape(shape) for each in (moved.mean(dim=1), own.mean(dim=1), factor)
        )
        return (y - middle) * scale + mean

    return [[(right(after) - y, g) for y, after, g in calls] for calls in samples]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(("network", "name", "kind"), TENSORS)
def test_fisher_is_half_the_second_moment_of_the_first_order_change(network, name, kind, correct):
    for bits in BITS:
        samples = samples_of(network, name, kind, bits)
        parts = errors_and_gradients(samples, CORRECTED[name] if correct else "none")
        whole = sum(sum((g * e).sum() for e, g in calls) ** 2 for calls in parts)
        apart = sum(sum((g * e).square().sum() for e, g in calls) for calls in parts)
        for form, total in (("per_sample", whole), ("diagonal", apart)):
            found = scored(lq.scores.fisher, network, form=form, correct=correct)
            expected = float(total) / (2 * len(samples))
            assert value(found, name, kind, bits) == pytest.approx(expected, rel=1e-5, abs=1e-14)


@pytest.mark.parametrize(("network", "name", "kind"), TENSORS)
def test_gradient_is_the_sum_of_squared_gradients_times_squared_errors(network, name, kind):
    model, layers = classifier(network), layers_of(network, BITS)
    for bits in BITS:
        total = 0.0
        for x, target in image_batches():
            calls, _ = calls_of(model, name, x, target, "mean")
            for inputs, y, _, g in calls:
                error = output_with(model, layers, name, kind, bits, inputs) - y
                total += float((g.square() * error.square()).sum())
        found = scored(lq.scores.gradient, network)
        assert value(found, name, kind, bits) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("network", LAYERS)
def test_what_calibration_corrects_is_known(network):
    subject = Subject(classifier(network), image_batches(), BITS)
    x, _ = subject.batches[0]
    with Calls(subject) as calls:
        subject.network(x)
    assert corrections(subject, calls) == {name: CORRECTED[name] for name in LAYERS[network]}


def test_a_norm_that_runs_twice_or_has_no_statistics_is_not_corrected():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.once, self.again, self.fresh = (nn.Conv1d(6, 6, 1) for _ in range(4))
            self.norm = nn.BatchNorm1d(6)
            self.own = nn.BatchNorm1d(6, track_running_stats=False)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.norm(self.again(self.norm(self.once(self.first(x)))))
            return self.head(self.own(self.fresh(x)).mean(2))

    data = [(torch.randn(4, 6, 5), torch.arange(4) % 2)]
    subject = Subject(Twice(), data, BITS)
    with Calls(subject) as calls:
        subject.network(data[0][0])
    # A norm is known by the layer that first feeds it; the other one has a bias of its own.
    assert corrections(subject, calls) == {"once": "none", "again": "mean", "fresh": "none"}


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_the_corrected_output_is_what_a_corrected_norm_makes_of_it(kind):
    model, data = classifier(), image_batches((8,))
    (x, _) = data[0]
    model.norm.eps = 1e-12
    seen = []
    handle = model.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(x)
    handle.remove()
    with torch.no_grad():
        model.norm.running_mean.copy_(seen[0].mean((0, 2, 3)))
        model.norm.running_var.copy_(seen[0].var((0, 2, 3), correction=0))
    subject = Subject(model, data, BITS)
    with torch.no_grad(), Calls(subject) as calls:
        subject.network(x)
    correction = OutputCorrection(subject, calls)
    with torch.no_grad(), subject.quantized("conv", kind, 2):
        plain = subject.network(x)
        with correction.of("conv"):
            corrected = subject.network(x)
        correct_statistics(subject.network, model, data)
        expected = subject.network(x)
    torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-7)
    assert (plain - expected).abs().max() > 1e-4


def test_per_channel_weights_and_several_parts_of_a_sample_are_taken():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Linear(3, 6), nn.Linear(6, 6)
            self.conv, self.head = nn.Conv1d(6, 6, 1, bias=False), nn.Linear(6, 3)

        def forward(self, x):  # [batch, 4, 9, 3], the windows on the batch axis within
            windows = torch.tanh(self.middle(torch.tanh(self.first(x.flatten(0, 1)))))
            windows = self.conv(windows.transpose(1, 2)).mean(2)
            return self.head(windows.unflatten(0, (-1, 4)).mean(1))

    torch.manual_seed(0)
    model = Windows().double()
    data = [(torch.randn(5, 4, 9, 3, dtype=torch.float64), torch.arange(5) % 3)]
    options = {"per_channel_weights": True}
    found = lq.scores.fisher(model, data, BITS, correct=False, **options)
    layers = Subject(model, data, BITS, **options).layers
    for name in ("middle", "conv"):
        total = 0.0
        for x, label in zip(data[0][0].split(1), data[0][1].split(1), strict=True):
            [(inputs, y, _, g)], _ = calls_of(model, name, x, label)
            error = output_with(model, layers, name, "weight", 2, inputs) - y
            total += float((g * error).sum()) ** 2
        assert value(found, name, "weight", 2) == pytest.approx(total / 10, rel=1e-5)
    assert lq.scores.fisher(model, data, BITS, **options) != found


def test_a_layer_that_the_loss_does_not_depend_on_scores_nothing():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.used, self.beside = (nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.used(self.first(x))
            self.beside(x)
            return self.head(x)

    data = [(torch.randn(4, 6), torch.arange(4) % 2)]
    for form in ("per_sample", "diagonal"):
        used, beside = lq.scores.fisher(Beside(), data, BITS, form=form).layers
        assert min(used.weight[2], used.activation[2]) > 0
        assert set(beside.weight.values()) | set(beside.activation.values()) == {0.0}


def test_a_form_that_is_none_and_an_output_without_samples_are_refused():
    with pytest.raises(ValueError, match="form is 'full', expected one of per_sample, diagonal"):
        lq.scores.fisher(classifier(), image_batches(), BITS, form="full")

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.joined, self.head = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            x = self.joined(self.first(x).mean(0, keepdim=True))
            return self.head(x.expand(5, -1))

    data = [(torch.randn(5, 3), torch.arange(5) % 3)]
    message = r"layer 'joined' puts out \(1, 3\), which does not begin with the 5 samples"
    with pytest.raises(ValueError, match=message):
        lq.scores.fisher(Joined(), data, BITS)


def test_meta_says_how_it_was_measured():
    found = scored(lq.scores.fisher, "convolutions", form="diagonal", correct=True)
    assert found.meta == {"score": "fisher", "batches": 2, "form": "diagonal", "correct": True}
