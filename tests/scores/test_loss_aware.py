"""What errors add to the loss, against its formula with plain autograd in float64."""

import copy

import pytest
import torch
from small_classifiers import LAYERS, classifier, image_batches, layers_of, quantized
from torch.nn import functional as F

import limpq_ext as lq

BITS = (2, 4)
BIASES = ("biased", "proj", "mlp.0", "mlp.2")
"""The layers whose bias is corrected, which run once and feed no batch normalisation."""


def mean_kept(layer, inputs, output):
    """The output when its mean stays what it is in the float network."""
    axes = [axis for axis in range(output.dim()) if axis != channel(layer, output)]
    return output - output.mean(axes, keepdim=True) + output.detach().mean(axes, keepdim=True)


def channel(layer, output):
    return output.dim() - 1 if isinstance(layer, torch.nn.Linear) else 1


def statistics_kept(norm, inputs, output):
    """Batch normalisation whose statistics are corrected for what moves its input."""
    (x,) = inputs
    mean, variance = (
        moment.reshape(1, -1, 1, 1)
        for moment in (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
    )
    as_before = (x - mean) * (variance.detach() / variance).sqrt() + mean.detach()
    return F.batch_norm(
        as_before, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def gradients(network, name, x, target, correct):
    """Inputs and the gradients there of each call, the weights' gradient."""
    model = copy.deepcopy(classifier(network))
    if correct:
        for own, module in model.named_modules():
            if own in BIASES:
                module.register_forward_hook(mean_kept)
            if own == "norm" and network == "convolutions":
                module.register_forward_hook(statistics_kept)
    inputs = []

    def enter(module, given):
        inputs.append(given[0].clone())
        inputs[-1].retain_grad()
        return (inputs[-1],)

    model.get_submodule(name).register_forward_pre_hook(enter)
    F.cross_entropy(model(x), target, reduction="sum").backward()
    return [(x.detach(), x.grad) for x in inputs], model.get_submodule(name).weight.grad


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize(
    ("network", "name"), [(network, name) for network, names in LAYERS.items() for name in names]
)
def test_it_is_half_the_square_of_the_first_order_change(network, name, correct):
    found = lq.scores.loss_aware(classifier(network), image_batches(), BITS, correct=correct)
    own = next(layer for layer in found.layers if layer.name == name)
    layer = layers_of(network, BITS)[name]
    axis = -1 if isinstance(layer, torch.nn.Linear) else 1
    weight = classifier(network).get_submodule(name).weight.detach()
    for bits in BITS:
        of_weight = of_input = 0.0
        for x, target in image_batches():
            calls, grad = gradients(network, name, x, target, correct)
            error = quantized(layer, "weight", bits, weight) - weight
            for channel_error, channel_grad in zip(error, grad, strict=True):
                of_weight += float((channel_error * channel_grad).sum() ** 2)
            for index in range(calls[0][0].shape[axis]):
                change = sum(
                    ((quantized(layer, "activation", bits, each) - each) * slope)
                    .select(axis, index)
                    .sum()
                    for each, slope in calls
                )
                of_input += float(change**2)
        samples = sum(len(target) for _, target in image_batches())
        assert own.weight[bits] == pytest.approx(of_weight / (2 * samples), rel=1e-5, abs=1e-14)
        assert own.activation[bits] == pytest.approx(of_input / (2 * samples), rel=1e-5, abs=1e-14)


def test_what_moves_the_mean_alone_adds_nothing():
    model = classifier()
    with torch.no_grad():  # every weight at 2 bits but for one of the channel's constant input
        model.conv.weight.zero_()
        model.conv.bias.fill_(1.0)
    scores = {
        correct: lq.scores.loss_aware(model, image_batches(), BITS, correct=correct)
        for correct in (True, False)
    }
    weight = {correct: found.layers[0].weight[2] for correct, found in scores.items()}
    assert weight[True] == pytest.approx(0.0, abs=1e-20)
    assert scores[True].meta["correct"]
