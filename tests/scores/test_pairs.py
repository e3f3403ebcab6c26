"""Pairwise scores against slow, plain versions of their formulas in float64."""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.kernels.ops import lsq_fake_quantize, thresholds
from limpq_ext.nn.start_values import Distribution, Histogram
from limpq_ext.scores.pairs import block_of
from limpq_ext.values.indicators import Indicators, LayerIndicators

BITS = (2, 4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(5, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 5, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(x)))


class Residual(nn.Module):
    """Two blocks of two searchable layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.blocks(F.relu(self.stem(x)))).mean((2, 3)))


def network():
    torch.manual_seed(0)
    model = Residual().double().eval()
    for layer in (*model.blocks.modules(), model.head):
        if hasattr(layer, "weight"):
            layer.weight.data *= 4  # so that errors are seen at the output
    return model


def batches(count=2, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def with_quantized(model, data, tensors):
    """The model with some tensors at some bits, by the rule of least squared error."""
    changed = copy.deepcopy(model)
    for name, kind, bits in tensors:
        layer = changed.get_submodule(name)
        if kind == "weight":
            weight = model.get_submodule(name).weight.data
            levels = thresholds(bits, signed=True)
            scale = Distribution.of(weight).least_error(*levels)[0].float().double()
            layer.weight.data = lsq_fake_quantize(weight, scale, *levels)
            continue
        histogram, seen = Histogram(), []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0].clone())
        )
        for x, _ in data:
            model(x)
        handle.remove()
        for value in seen:
            histogram.add(value)
        levels = thresholds(bits, signed=histogram.lowest < 0)
        scale = histogram.distribution().least_error(*levels)[0].float().double()
        layer.register_forward_pre_hook(
            lambda _, inputs, scale=scale, levels=levels: (
                lsq_fake_quantize(inputs[0], scale, *levels),
            )
        )
    return changed


def outputs_of(model, name, data):
    """What a layer puts out for all batches."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, inputs, output: seen.append(output.clone())
    )
    for x, _ in data:
        model(x)
    handle.remove()
    return torch.cat(seen)


def correct_biases(changed, model, data):
    """No layer here feeds a batch normalisation; each sees its input corrected."""
    for name, layer in changed.named_modules():
        if hasattr(layer, "bias"):
            moved = outputs_of(model, name, data) - outputs_of(changed, name, data)
            layer.bias.data += moved.transpose(0, 1).flatten(1).mean(1)


@torch.no_grad()
def mean_of(measure, model, data, tensors, correct):
    changed = with_quantized(model, data, tensors)
    if correct:
        correct_biases(changed, model, data)
    whole = 0.0
    for x, target in data:
        before, after = model(x).softmax(1), changed(x).softmax(1)
        if measure == "kl":
            whole += float((before * (before / after).log()).sum())
        else:
            whole -= float(after[range(len(x)), target].log().sum())
    return whole / sum(len(x) for x, _ in data)


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("measure", ["kl", "loss"])
@pytest.mark.parametrize("kinds", [("weight",), ("weight", "activation")])
def test_interactions_are_both_less_each_alone_and_more_none(kinds, measure, correct):
    model, data = network(), batches(2, 2)
    options = {"measure": measure, "correct": correct}
    found = lq.scores.interactions(model, data, BITS, kinds=kinds, **options)
    mean = functools.partial(mean_of, measure, model, data, correct=correct)
    none = mean([])
    for pair in found.pairs[:6]:  # those of the first block
        for widths in itertools.product(BITS, repeat=2):
            one, other = ((*t, b) for t, b in zip(pair.tensors, widths, strict=True))
            expected = mean([one, other]) - mean([one]) - mean([other]) + none
            value = pair.values[widths[0]][widths[1]]
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(
        abs(value) > 1e-3 for row in found.pairs[0].values.values() for value in row.values()
    )


def pairs_of(found):
    return [pair.tensors for pair in found.pairs]


def test_weights_within_blocks_are_paired():
    found = lq.scores.interactions(network(), batches(1), BITS)
    assert pairs_of(found) == [
        ((f"blocks.{i}.conv1", "weight"), (f"blocks.{i}.conv2", "weight")) for i in range(2)
    ]
    assert found.meta == {
        "score": "interactions",
        "measure": "kl",
        "correct": True,
        "within": "block",
        "batches": 1,
    }


def scores(other=0.0):
    names = ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"]
    layers = [
        LayerIndicators(n, {2: 0.5 + i + other, 4: 0.25}, {2: 0.75, 4: 0.125})
        for i, n in enumerate(names)
    ]
    return Indicators(BITS, layers, {"score": "any"})


@pytest.mark.parametrize(
    ("within", "expected"),
    [
        ("block", [(0, 1)]),
        (1, [(0, 1), (1, 2)]),
        (2, [(0, 1), (0, 2), (1, 2)]),
        (["*.conv1"], [(0, 2)]),
        (["blocks.0", "*.conv1"], [(0, 1), (0, 2)]),
    ],
)
def test_layers_are_paired_by_block_places_or_patterns(within, expected):
    names = [layer.name for layer in scores().layers]
    found = pairs_of(lq.scores.products(scores(), within=within))
    assert found == [((names[i], "weight"), (names[j], "weight")) for i, j in expected]


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("layer1.0.downsample.0", "layer1.0"),
        ("features.3.conv.0.0", "features.3"),
        ("blocks.1.0.conv_pw", "blocks.1.0"),
        ("stages.1.blocks.2.mlp.fc1", "stages.1.blocks.2"),
        ("encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0"),
        ("body.hidden.fc", "body.hidden"),
        ("conv1", ""),
    ],
)
def test_a_block_is_the_first_numbered_module(layer, block):
    assert block_of(layer) == block


def test_products_are_those_of_the_scores():
    found = lq.scores.products(scores(), within=1, kinds=("weight", "activation"), scale=2.0)
    table = {pair.tensors: pair.values for pair in found.pairs}
    one, two = ("blocks.0.conv1", "weight"), ("blocks.0.conv2", "activation")
    assert table[one, two] == {
        2: {2: 2 * 0.5 * 0.75, 4: 2 * 0.5 * 0.125},
        4: {2: 2 * 0.25 * 0.75, 4: 2 * 0.25 * 0.125},
    }
    assert table[("blocks.0.conv1", "weight"), ("blocks.0.conv1", "activation")][2][2] == 0.75
    assert len(table) == 3 + 2 * 4
    assert found.meta == {"score": "products", "scale": 2.0, "of": [{"score": "any"}] * 2}


def test_products_of_two_scores_are_the_same_both_ways():
    found = lq.scores.products(scores(), scores(other=1.0))
    (pair,) = found.pairs
    assert pair.values[2][2] == (0.5 * 2.5 + 1.5 * 1.5) / 2
    turned = lq.scores.products(scores(other=1.0), scores())
    assert turned.pairs == found.pairs


def test_the_model_is_left_as_it_is():
    model = network().float()
    model.blocks.train()
    data = [(x.float(), t) for x, t in batches(1)]
    before = copy.deepcopy(model.state_dict())
    lq.scores.interactions(model, data, BITS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.children()] == [False, True, False]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_search_takes_scores_with_their_interactions(tmp_path):
    model, data = network(), batches()
    indicators = lq.scores.layerwise(model, data, BITS)
    lq.scores.interactions(model, data, BITS).save(tmp_path / "interactions.json")
    policy = lq.search(
        indicators,
        lq.profile(model, data[0][0]),
        size=lq.uniform(3, 3),
        non_monotone="keep",
        interactions=lq.Interactions.load(tmp_path / "interactions.json"),
    )
    assert policy.meta["interactions"]["measure"] == "kl"
    assert policy.gap == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ()}, r"kinds is \(\), expected some of weight, activation"),
        ({"kinds": "weight"}, "kinds is 'weight', expected some of weight, activation"),
        ({"measure": "top1"}, "measure is 'top1', expected kl or loss"),
        ({"within": 0}, "within is 0, expected 1 or more places"),
        ({"within": "stage"}, "within is 'stage', expected block, a number or patterns"),
        ({"within": 1.5}, "within is 1.5, expected block, a number or patterns"),
        ({"within": ["stem"]}, r"within=\['stem'\] pairs no layers of 'blocks.0.conv1', "),
        ({"scale_start": "lsq"}, "scale_start is 'lsq', which needs a training"),
    ],
)
def test_what_cannot_be_paired_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        lq.scores.interactions(network(), batches(1), BITS, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "there are no batches to measure scores on"),
        (lambda data: [(x, t + 4) for x, t in data], "a target is not one of the 4 classes"),
        (lambda data: [(x, t.double()) for x, t in data], "expected a class index for each sample"),
    ],
)
def test_batches_without_what_the_loss_needs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lq.scores.interactions(network(), change(batches(1)), BITS, measure="loss")


def test_products_of_different_or_infinite_scores_are_refused():
    fewer = Indicators(BITS, scores().layers[:2])
    with pytest.raises(ValueError, match="the two indicators are of different layers or bits"):
        lq.scores.products(scores(), fewer)
    with pytest.raises(ValueError, match="at 2 and 2 bits is inf"):
        lq.scores.products(scores(), scale=math.inf)
