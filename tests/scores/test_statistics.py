"""Scores from weights and activations alone, against plain sums in float64."""

import pytest
import torch
from small_classifiers import LAYERS, calls_of, classifier, image_batches, layers_of, quantized
from torch import nn

import limpq_ext as lq
from limpq_ext.scores.subject import Subject

BITS = (2, 4)
TENSORS = [(network, name) for network, names in LAYERS.items() for name in names]


def value(found, name, kind, bits):
    return getattr(next(layer for layer in found.layers if layer.name == name), kind)[bits]


def seen_by(network, name):
    """The weights, all inputs as [channels, n], and a layer with its step sizes."""
    model = classifier(network)
    layer = model.get_submodule(name)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    inputs = [
        call[0].movedim(axis, 0).flatten(1)
        for x, target in image_batches()
        for call in calls_of(model, name, x, target)[0]
    ]
    return layer.weight.detach(), torch.cat(inputs, dim=1), layers_of(network, BITS)[name]


@pytest.mark.parametrize(("network", "name"), TENSORS)
def test_weight_error_is_the_share_of_the_squared_error(network, name):
    weight, inputs, layer = seen_by(network, name)
    model, data = classifier(network), image_batches()
    relative = lq.scores.weight_error(model, data, BITS)
    absolute = lq.scores.weight_error(model, data, BITS, relative=False)
    assert relative.meta == {"score": "weight_error", "batches": 2, "relative": True}
    for kind, x, samples in (("weight", weight, 1), ("activation", inputs, 8)):
        for bits in BITS:
            error = float((quantized(layer, kind, bits, x) - x).square().sum())
            assert value(relative, name, kind, bits) == pytest.approx(error / x.square().sum())
            assert value(absolute, name, kind, bits) == pytest.approx(error / samples)


STATISTICS = {
    "mean_variance": lambda x: x.var(dim=1, correction=0).mean(),
    "max_variance": lambda x: x.var(dim=1, correction=0).max(),
    "mean_magnitude": lambda x: x.abs().amax(dim=1).mean() ** 2,
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("network", "name"), TENSORS)
def test_activation_variance_is_a_statistic_times_the_squared_error(network, name, statistic):
    weight, inputs, layer = seen_by(network, name)
    found = lq.scores.activation_variance(
        classifier(network), image_batches(), BITS, statistic=statistic
    )
    for bits in BITS:
        error = (quantized(layer, "weight", bits, weight) - weight).square().sum() / len(weight)
        expected = float(STATISTICS[statistic](inputs) * error)
        assert value(found, name, "weight", bits) == pytest.approx(expected)
        moved = (quantized(layer, "activation", bits, inputs) - inputs).square().mean()
        expected = float(weight.square().sum() / len(weight) * moved)
        assert value(found, name, "activation", bits) == pytest.approx(expected)


def test_activation_variance_is_the_error_of_an_output_element_where_inputs_are_independent():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    x = torch.randn(20000, 6, dtype=torch.float64)
    found = lq.scores.activation_variance(model, [(x, None)], (3,))
    layer = Subject(model, [(x, None)], (3,)).layers["1"]
    x = model[0](x).detach()
    x = x - x.mean(0)
    moved = quantized(layer, "weight", 3, layer.weight.detach()) - layer.weight.detach()
    assert value(found, "1", "weight", 3) == pytest.approx(
        float((x @ moved.T).square().mean()), rel=0.03
    )


def test_channels_of_transposed_convolutions_are_the_second_axis_of_their_weight():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Conv1d(6, 2, 1)
    ).double()
    data = [(torch.randn(3, 2, 8, dtype=torch.float64), None)]
    found = lq.scores.activation_variance(model, data, (4,))
    layer = Subject(model, data, (4,)).layers["1"]
    weight = layer.weight.detach()
    error = (quantized(layer, "weight", 4, weight) - weight).square().sum() / 6
    variance = model[0](data[0][0]).detach().var(dim=(0, 2), correction=0).mean()
    assert value(found, "1", "weight", 4) == pytest.approx(float(variance * error))


def test_a_statistic_that_is_none_is_refused():
    message = "statistic is 'mean', expected one of mean_variance, max_variance, mean_magnitude"
    with pytest.raises(ValueError, match=message):
        lq.scores.activation_variance(classifier(), image_batches(), BITS, statistic="mean")
