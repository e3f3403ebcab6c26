"""Relevance scores against slow, plain versions of their formulas in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.kernels.ops import lsq_fake_quantize, thresholds
from limpq_ext.nn.start_values import Distribution, Histogram
from limpq_ext.scores.propagation import propagate

BITS = (2, 4)
SCORES = [lq.scores.relevance, lq.scores.relevance_sensitivity]
LAYERS = ["conv", "gate", "hidden"]
KINDS = ("weight", "activation")


class Branching(nn.Module):
    """Three searchable layers: of a residual, of a gate, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.gate = nn.Linear(6, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        y = self.norm(self.conv(x))
        y += x
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[..., None, None]
        y = F.relu(self.hidden(y.mean((2, 3))), inplace=True)
        return self.head(F.relu(self.hidden(y), inplace=True))


def network():
    torch.manual_seed(0)
    model = Branching().double().train()
    for _ in range(10):
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return model.eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 4, (5,), generator=generator),
        )
        for _ in range(2)
    ]


def values_of(model, name, kind, data):
    """The weights of a layer, or all that comes into it."""
    layer = model.get_submodule(name)
    if kind == "weight":
        return [layer.weight.detach()]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    handle.remove()
    return seen


def outputs_of(model, name, data):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, y: seen.append(y.clone()))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    handle.remove()
    return seen


def quantizer_of(model, name, kind, bits, data):
    """What quantizes the weights or the input of a layer of the float model."""
    values = values_of(model, name, kind, data)
    if kind == "weight":
        found, signed = Distribution.of(values[0]), True
    else:
        histogram = Histogram()
        for value in values:
            histogram.add(value)
        found, signed = histogram.distribution(), histogram.lowest < 0
    levels = thresholds(bits, signed=signed)
    scale = found.least_error(*levels)[0].float().double()
    return lambda value: lsq_fake_quantize(value, scale, *levels)


def importance(data, *, predicted=False):
    """The shares of |R|, sample by sample."""
    model, totals = network(), dict.fromkeys(LAYERS, 0.0)
    for x, target in data:
        for one, label in zip(x.split(1), target.split(1), strict=True):

            def start(output, label=label):
                place = output.argmax(1) if predicted else label
                return F.one_hot(place, 4) * output

            def visit(name, relevance):
                totals[name] += float(relevance.abs().sum())

            propagate(model, {name: getattr(model, name) for name in LAYERS}, one, start, visit)
    return {name: total / sum(totals.values()) for name, total in totals.items()}


def by_name(indicators):
    return {layer.name: layer for layer in indicators.layers}


def test_relevance_is_the_share_of_the_layers_outputs_times_a_power_of_four():
    shares = importance(batches())
    found = lq.scores.relevance(network(), [(x, t.int()) for x, t in batches()], BITS)
    for name, layer in by_name(found).items():
        for bits in BITS:
            assert layer.weight[bits] == pytest.approx(shares[name] / 4**bits, rel=1e-9)
            assert layer.activation[bits] == layer.weight[bits]
    assert sum(layer.weight[2] for layer in found.layers) == pytest.approx(1 / 16)
    assert found.meta == {"score": "relevance", "batches": 2, "error": "power"}


def test_without_targets_relevance_begins_at_the_predicted_class():
    shares = importance(batches(), predicted=True)
    found = lq.scores.relevance(network(), [(x, None) for x, _ in batches()], BITS)
    for name, layer in by_name(found).items():
        assert layer.weight[2] == pytest.approx(shares[name] / 16, rel=1e-9)
    assert shares != pytest.approx(importance(batches()), rel=1e-3)


def test_batches_are_one_sum():
    data = batches()
    joined = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    first, second = (by_name(lq.scores.relevance(network(), d, BITS)) for d in (data, joined))
    for name in LAYERS:
        assert first[name].weight == pytest.approx(second[name].weight)


def test_the_measured_error_is_the_squared_one_over_the_squares():
    model, data = network(), batches()
    shares = importance(data)
    found = by_name(lq.scores.relevance(model, data, BITS, error="measured"))
    for name, kind, bits in itertools.product(LAYERS, KINDS, BITS):
        values = values_of(model, name, kind, data)
        quantize = quantizer_of(model, name, kind, bits, data)
        error = sum(float((quantize(value) - value).square().sum()) for value in values)
        relative = error / sum(float(value.square().sum()) for value in values)
        score = getattr(found[name], kind)[bits]
        assert score == pytest.approx(shares[name] * relative, rel=1e-3)


def sensitivity(model, data, name, kind, bits, base, correct):
    changed = copy.deepcopy(model)
    for layer, other in itertools.product(LAYERS, KINDS):
        width = bits if (layer, other) == (name, kind) else base
        quantize = quantizer_of(model, layer, other, width, data)
        own = changed.get_submodule(layer)
        if other == "weight":
            own.weight.data = quantize(own.weight.data)
        else:
            own.register_forward_pre_hook(lambda _, inputs, q=quantize: (q(inputs[0]),))
    if correct:
        variances, means = zip(
            *(
                torch.var_mean(torch.cat(outputs_of(m, "conv", data)), (0, 2, 3), correction=0)
                for m in (model, changed)
            ),
            strict=True,
        )
        changed.norm.running_mean += means[1] - means[0]
        changed.norm.running_var *= variances[1] / variances[0]
        for layer in ("gate", "head"):
            before, after = (torch.cat(outputs_of(m, layer, data)) for m in (model, changed))
            changed.get_submodule(layer).bias.data += before.mean(0) - after.mean(0)
    total = 0.0
    with torch.no_grad():
        for x, _ in data:
            p, q = model(x).softmax(1), changed(x).softmax(1)
            total += float((p * (p / q).log()).sum())
    return total / 10


@pytest.mark.parametrize(("base", "correct"), [(8, True), (8, False), (4, True)])
def test_sensitivity_is_the_divergence_with_all_others_at_the_base(base, correct):
    model, data = network(), batches()
    shares = importance(data)
    found = lq.scores.relevance_sensitivity(model, data, BITS, base_bits=base, correct=correct)
    assert found.bits == BITS
    for name, kind, bits in itertools.product(LAYERS, KINDS, BITS):
        expected = shares[name] * sensitivity(model, data, name, kind, bits, base, correct)
        score = getattr(by_name(found)[name], kind)[bits]
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert found.meta == {
        "score": "relevance_sensitivity",
        "batches": 2,
        "base_bits": base,
        "mix": "product",
        "correct": correct,
    }


def test_a_number_mixes_the_two_by_their_means():
    model, data = network(), batches()
    relevance = lq.scores.relevance(model, data, BITS, error="measured").normalised()
    options = {"correct": False}  # is fast
    product = lq.scores.relevance_sensitivity(model, data, BITS, **options)
    shares = importance(data)
    alone = lq.Indicators.from_table(
        *(
            {
                layer.name: {b: v / shares[layer.name] for b, v in getattr(layer, kind).items()}
                for layer in product.layers
            }
            for kind in KINDS
        )
    ).normalised()
    for mix in (0, 0.25, 1):
        options |= {"mix": mix, "error": "measured"}
        found = lq.scores.relevance_sensitivity(model, data, BITS, **options)
        assert found.meta["mix"] == mix
        assert found.meta["error"] == "measured"
        for mixed, one, other in zip(found.layers, relevance.layers, alone.layers, strict=True):
            for kind in KINDS:
                for bits in BITS:
                    first, second = getattr(one, kind)[bits], getattr(other, kind)[bits]
                    expected = mix * first + (1 - mix) * second
                    assert getattr(mixed, kind)[bits] == pytest.approx(expected, rel=1e-6)


class Interrupting(nn.Module):
    """Ends the program's patience at one of its calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        COUNT.append(None)
        if len(COUNT) == self.calls:
            raise KeyboardInterrupt
        return x * self.scale


COUNT = []


def untouched(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("score", SCORES)
def test_a_score_leaves_the_model_as_it_is_and_falls_with_bits(score):
    model = network()
    model.norm.train()
    data = batches()
    before, inputs = copy.deepcopy(model.state_dict()), [x.clone() for x, _ in data]
    found = score(model, data, (2, 4, 8))
    untouched(model, before)
    assert [name for name, module in model.named_modules() if module.training] == ["norm"]
    assert all(torch.equal(x, kept) for (x, _), kept in zip(data, inputs, strict=True))
    for kind in KINDS:  # in sum: the correction can make up for one tensor's error
        at = {bits: sum(getattr(layer, kind)[bits] for layer in found.layers) for bits in (2, 8)}
        assert at[2] > at[8]


@pytest.mark.parametrize("score", SCORES)
def test_a_score_that_is_interrupted_leaves_the_model_as_it_is(score):
    COUNT.clear()
    model = nn.Sequential(network(), Interrupting(calls=10**9)).train()
    score(model, batches(), BITS)
    last = len(COUNT)
    for calls in (last - 1, last):
        COUNT.clear()
        model[1].calls = calls
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            score(model, batches(), BITS)
        untouched(model, before)
        assert all(module.training for module in model.modules() if module is not model[0].norm)


@pytest.mark.parametrize("score", SCORES)
def test_a_search_takes_a_score_and_options_of_prepare_are_taken(score):
    model, data = network(), batches()
    found = score(model, data, BITS, fixed=["head"], exclude=["hidden"], per_channel_weights=True)
    assert [layer.name for layer in found.layers] == ["first", "conv", "gate"]
    costs = lq.profile(model, data[0][0])
    policy = lq.search(score(model, data, BITS), costs, bitops=lq.uniform(3, 3))
    assert set(policy.bits()) == {"first", *LAYERS, "head"}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "there are no batches to measure scores on"),
        (
            lambda data: [(x, t.double()) for x, t in data],
            r"the targets are \(5,\), expected a class index for each sample",
        ),
        (lambda data: [(x, "cat") for x, t in data], "the targets are str, expected a class"),
        (lambda data: [(x, t[:3]) for x, t in data], r"the targets are \(3,\), expected a class"),
        (lambda data: [(x, t + 4) for x, t in data], "a target is not one of the 4 classes"),
        (
            lambda data: [(x * torch.nan, t) for x, t in data],
            "layer 'conv': input quantizer: a batch has a NaN",
        ),
    ],
)
def test_batches_that_cannot_be_used_are_refused(score, change, message):
    with pytest.raises(ValueError, match=message):
        score(network(), change(batches()), BITS)


class Ending(nn.Module):
    """The network, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.body = network()
        self.function = function

    def forward(self, x):
        return self.function(self.body(x))


def one_class(output):
    return output[:, :1]


def a_pair(output):
    return output, output


def unmoved(output):
    return torch.ones_like(output)


def not_a_number(output):
    return output * torch.nan


def nothing(output):
    return output * 0


def adding_up(output):
    return output.cumsum(1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (one_class, r"the model puts out \(\d+, 1\), expected scores \[batch, classes\] of 2 or"),
        (a_pair, "the model puts out tuple, expected scores"),
        (unmoved, "no layer gets any relevance: .* or come from no layer"),
        (not_a_number, "the model puts out a NaN or an infinity"),
        (nothing, "no layer gets any relevance: the scores that it begins at are 0"),
        (adding_up, r"no rule for aten.cumsum, which the model itself \(Ending\) runs"),
    ],
)
def test_networks_that_cannot_be_used_are_refused(score, function, message):
    with pytest.raises(ValueError, match=message):
        score(Ending(function), batches(), BITS)


@pytest.mark.parametrize("score", SCORES)
def test_choices_that_there_are_not_are_refused(score):
    with pytest.raises(ValueError, match="error is 'least', expected one of power, measured"):
        score(network(), batches(), BITS, error="least")
    with pytest.raises(ValueError, match="scale_start is 'lsq', which needs a training"):
        score(network(), batches(), BITS, scale_start="lsq")


@pytest.mark.parametrize("mix", ["sum", -0.1, 1.5, None])
def test_a_mix_is_product_or_a_share(mix):
    with pytest.raises(ValueError, match=r"mix is .*, expected 'product' or a number from 0 to 1"):
        lq.scores.relevance_sensitivity(network(), batches(), BITS, mix=mix)


def test_a_base_that_is_no_bit_width_is_refused():
    with pytest.raises(ValueError, match="17"):
        lq.scores.relevance_sensitivity(network(), batches(), BITS, base_bits=17)
