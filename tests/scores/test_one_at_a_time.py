"""One tensor at a time, from the layer on, against plain loops of whole forwards in float64."""

import copy
import itertools

import pytest
import torch
from one_tensor import Residual, Twice, batches, changed, corrected, network
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

import limpq_ext as lq
from limpq_ext.values.indicators import KINDS

BITS = (2, 4)


class Sequence(nn.Module):
    """Samples lie on the second axis between the first and the last layer."""

    biases = ("embed", "mix.in_proj", "mix.out_proj", "up", "down", "head")

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(18, 8)
        self.mix = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x.reshape(len(x), 6, 18)).transpose(0, 1)
        x = x + self.mix(x, x, x, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(0))


class Positions(Twice):
    """One layer sees no samples, but what is the same for all of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.linspace(-1, 1, 8).reshape(4, 2))
        self.table = nn.Linear(2, 27)

    def forward(self, x):
        return super().forward(x + self.table(self.places).reshape(3, 6, 6))


class Centred(Twice):
    """Samples mix: each batch is centred."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Counting(Twice):
    """What a module keeps in itself is read behind the layers."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Identity()
        self.noting = Noting(self.memory)

    def forward(self, x):
        self.memory.seen = x.mean((1, 2, 3))[:, None]
        x = self.noting(x)
        return super().forward(x) * self.memory.noted


class Noting(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.memory = memory

    def forward(self, x):
        self.memory.noted = 1 + self.memory.seen.abs()
        return x * self.scale


NETWORKS = [Twice, Residual, Sequence, Positions, Centred, Counting]


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("measure", ["kl", "loss"])
@pytest.mark.parametrize("kind", [Twice, Residual])
@torch.no_grad()
def test_it_is_what_one_quantized_tensor_loses_at_the_output(kind, measure, correct):
    model, data = network(kind), batches()
    found = lq.scores.layerwise(model, data, BITS, measure=measure, correct=correct)
    x, target = (torch.cat(part) for part in zip(*data, strict=True))
    assert len(found.layers) == {Twice: 2, Residual: 6}[kind]
    for layer, tensor, bits in itertools.product(found.layers, KINDS, BITS):
        one = changed(model, layer.name, tensor, bits, data)
        if correct:
            one = corrected(one, model, x)
        p, q = model(x).softmax(1), one(x).softmax(1)
        if measure == "kl":
            expected = float((p * (p / q).log()).sum(1).mean())
        else:
            lost = (p.log() - q.log()).gather(1, target[:, None])
            expected = max(0.0, float(lost.mean()))
        assert getattr(layer, tensor)[bits] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def values(found):
    return torch.tensor(
        [[list(layer.weight.values()), list(layer.activation.values())] for layer in found.layers],
        dtype=torch.float64,
    )


def flops(run):
    counter = FlopCounterMode(display=False)
    with counter:
        found = run()
    return found, counter.get_total_flops()


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("kind", NETWORKS)
def test_forwards_from_the_layer_on_say_what_whole_ones_do(kind, correct):
    model, data = network(kind), batches()
    fast, less = flops(lambda: lq.scores.layerwise(model, data, BITS, correct=correct))
    plain, all_of_it = flops(
        lambda: lq.scores.layerwise(model, data, BITS, correct=correct, memory=0)
    )
    torch.testing.assert_close(values(fast), values(plain), rtol=1e-9, atol=1e-15)
    if kind is Counting:  # runs in full
        assert less >= all_of_it
    else:
        assert less < all_of_it


class Narrow(nn.Module):
    """ResNet-18 with an eighth of its channels: as much work in every stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.stages = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        for width in (16, 32, 64):
            short = nn.Sequential(
                nn.Conv2d(width // 2, width, 1, 2, bias=False), nn.BatchNorm2d(width)
            )
            self.stages.append(BasicBlock(width // 2, width, 2, short))
            self.stages.append(BasicBlock(width, width))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.stages(self.stem(x)))


def test_it_takes_at_most_half_of_the_work_of_whole_forwards():
    torch.manual_seed(0)
    model, bits = Narrow().eval(), (2, 3, 4, 5, 6)
    data = [(torch.randn(32, 3, 32, 32), None)]
    _, one = flops(lambda: model(data[0][0]))
    found, work = flops(lambda: lq.scores.layerwise(model, data, bits))
    forwards = len(found.layers) * len(KINDS) * len(bits)
    assert forwards == 190
    assert work <= forwards * one / 2


@pytest.mark.parametrize("memory", [1, 10_000, 30_000])
def test_with_little_memory_it_says_the_same(memory):
    model, data = network(Residual), batches()
    expected = lq.scores.layerwise(model, data, BITS)
    found = lq.scores.layerwise(model, data, BITS, memory=memory)
    torch.testing.assert_close(values(found), values(expected), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda data: [], {}, "there are no batches to measure scores on"),
        (
            lambda data: data,
            {"measure": "accuracy"},
            "measure is 'accuracy', expected one of kl, loss",
        ),
        (
            lambda data: [(x, None) for x, _ in data],
            {"measure": "loss"},
            "the targets are NoneType, expected a class index for each sample",
        ),
        (
            lambda data: [(x, target + 1) for x, target in data],
            {"measure": "loss"},
            "a target is not one of the 4 classes",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(change, options, message):
    with pytest.raises(ValueError, match=message):
        lq.scores.layerwise(network(), change(batches()), BITS, **options)


def test_targets_do_not_matter_for_the_divergence():
    model, data = network(), batches()
    expected = lq.scores.layerwise(model, data, BITS)
    assert lq.scores.layerwise(model, [(x, None) for x, _ in data], BITS) == expected


def test_one_class_is_refused():
    model = network()
    model.head = nn.Linear(6, 1).double()
    with pytest.raises(ValueError, match=r"puts out \(10, 1\), expected scores .* of 2 or more"):
        lq.scores.layerwise(model, batches(), BITS)


class Fragile(nn.Module):
    """Divides by what is not 0 in float."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(108, 6)
        self.middle = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.middle(self.first(x.flatten(1)))
        return self.head(x / x.abs())


def test_a_score_that_is_nan_names_its_layer():
    torch.manual_seed(0)
    model = Fragile().double()
    with torch.no_grad():
        model.middle.weight[0], model.middle.weight[1:] = 1.0, 1e-3  # the latter become 0
    with pytest.raises(ValueError, match="layer 'middle': weight indicator at 2 bits is nan"):
        lq.scores.layerwise(model, batches(), BITS)


def test_a_float_network_that_puts_out_nan_is_refused():
    model = network()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the float network puts out a NaN or an infinity"):
        lq.scores.layerwise(model, batches(), BITS)


class Interrupting(nn.Module):
    """Stops everything at one of its calls, in this model and in its copies."""

    calls = 0
    at = 0

    def forward(self, x):
        type(self).calls += 1
        if type(self).calls == self.at:
            raise KeyboardInterrupt
        return x + 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_an_interrupted_score_leaves_the_model_as_it_is(share, monkeypatch):
    model = nn.Sequential(network(), Interrupting()).eval()
    model[0].norm.train()
    before = copy.deepcopy(model.state_dict())
    held = [sorted(vars(module)) for module in model.modules()]
    monkeypatch.setattr(Interrupting, "calls", 0)
    lq.scores.layerwise(model, batches(), BITS)
    monkeypatch.setattr(Interrupting, "at", max(1, round(share * Interrupting.calls)))
    monkeypatch.setattr(Interrupting, "calls", 0)
    with pytest.raises(KeyboardInterrupt):
        lq.scores.layerwise(model, batches(), BITS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [sorted(vars(module)) for module in model.modules()] == held
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    training = [name for name, module in model.named_modules() if module.training]
    assert training == ["0.norm"]
    assert all(parameter.requires_grad for parameter in model.parameters())
