"""A network's noise against plain sums, and the remedy of a layer against calibrated networks."""

import copy
import dataclasses
import itertools

import pytest
import torch
from one_tensor import Residual, batches, changed, corrected, network
from torch import nn

import limpq_ext as lq
from limpq_ext.scores.analysis import Remedy
from limpq_ext.values.indicators import KINDS
from limpq_ext.values.policy import LayerBits

BITS = (2, 4)
LAYERS = [f"blocks.{n}.{name}" for n in (0, 1) for name in ("body.1", "body.4", "short.0")]
ALL = ["stem.0", *LAYERS, "head.1"]


def ratio(moved, signal):
    return float((moved - signal).square().sum() / signal.square().sum())


def layer_and_network(model, name, x):
    """What a layer puts out, and the network; statistics that the forward corrects are put back."""
    model, seen = copy.deepcopy(model), []
    model.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[2].clone()))
    output = model(x)
    return seen[0], output


@pytest.mark.parametrize("correct", [True, False])
@torch.no_grad()
def test_noise_is_what_one_quantized_tensor_moves_over_what_is_there(correct):
    model, data = network(Residual), batches()
    found = lq.scores.analyse(model, data, BITS, correct=correct)
    x = torch.cat([x for x, _ in data])
    expected = list(itertools.product(LAYERS, KINDS, BITS))
    assert [(row.layer, row.kind, row.bits) for row in found.tensors] == expected
    for row in found.tensors:
        one = changed(model, row.layer, row.kind, row.bits, data)
        if correct:
            one = corrected(one, model, x)
        (local, output), (own, whole) = (
            layer_and_network(each, row.layer, x) for each in (one, model)
        )
        assert row.local == pytest.approx(ratio(local, own), rel=1e-6)
        assert row.output == pytest.approx(ratio(output, whole), rel=1e-6)
        assert row.gain == pytest.approx(row.output / row.local)


def test_shares_add_up_and_the_whole_is_compared_with_the_sum():
    found = lq.scores.analyse(network(Residual), batches(), BITS)
    assert [whole.bits for whole in found.wholes] == list(BITS)
    for whole in found.wholes:
        rows = [row for row in found.tensors if row.bits == whole.bits]
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert whole.total == pytest.approx(sum(row.output for row in rows))
        assert whole.additivity == pytest.approx(whole.output / whole.total)
        for row in rows:
            assert row.share == pytest.approx(row.output / whole.total)


def with_an_outlier(layer="blocks.0.body.4"):
    """A network in which one weight makes a layer's other weights coarse."""
    model = network(Residual)
    with torch.no_grad():
        model.get_submodule(layer).weight[0, 0, 0, 0] = 20.0
    return model


def calibrated(model, policy, data, found=None):
    quantized = lq.apply_policy(model, policy, example_input=data[0][0], scale_start="mse")
    if found is not None:
        found.apply(quantized)
    lq.calibrate(quantized, data, reference=model)
    return quantized


def policy_of(layer, own=(2, 8)):
    """8 bits in all layers but one."""
    return lq.Policy(tuple(LayerBits(name, *(own if name == layer else (8, 8))) for name in ALL))


@pytest.mark.parametrize("own", [(2, 8), (8, 2)])
@torch.no_grad()
def test_a_remedy_does_for_the_calibrated_network_what_it_says(own):
    model, data = with_an_outlier(), batches()
    policy = policy_of("blocks.0.body.1", own)
    found = lq.scores.analyse(model, data, policy)
    (remedy,) = found.remedies
    assert (remedy.layer, remedy.kind) == ("blocks.0.body.1", KINDS[own.index(2)])
    assert remedy.bits == 2
    assert remedy.whole_bits is None
    assert remedy.share > 0.5
    x = torch.cat([x for x, _ in data])
    (whole,) = found.wholes
    before = ratio(calibrated(model, policy, data)(x), model(x))
    assert whole.output == remedy.whole_before == pytest.approx(before, rel=1e-6)
    assert remedy.kept
    assert remedy.after < remedy.before
    assert remedy.whole_after < remedy.whole_before
    after = ratio(calibrated(model, policy, data, found)(x), model(x))
    assert remedy.whole_after == pytest.approx(after, rel=1e-6)


def test_a_remedy_that_does_not_help_changes_nothing():
    model, data = with_an_outlier(), batches()
    policy = policy_of("blocks.0.body.1")
    found = lq.scores.analyse(model, data, policy)
    (remedy,) = found.remedies
    unkept = dataclasses.replace(found, remedies=(dataclasses.replace(remedy, kept=False),))
    quantized = lq.apply_policy(model, policy, example_input=data[0][0], scale_start="mse")
    before = copy.deepcopy(quantized.state_dict())
    unkept.apply(quantized)
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, before[name])
    found.apply(quantized)
    quantizer = lq.quantized_layers(quantized)[remedy.layer].weight_quantizer
    assert quantizer.scale[0].tolist() == pytest.approx(remedy.scales[0], rel=1e-6)


REMEDY = Remedy(
    layer="blocks.1.body.1",
    kind="weight",
    bits=4,
    whole_bits=4,
    share=0.6,
    clip=0.5,
    scales=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    signed=True,
    before=0.2,
    after=0.1,
    whole_before=0.3,
    whole_after=0.2,
    kept=True,
)


def test_a_prepared_network_gets_the_step_sizes_of_every_channel_at_their_bit_width():
    prepared = lq.prepare(
        network(Residual), BITS, example_input=batches()[0][0], per_channel_weights=True
    )
    quantizer = lq.quantized_layers(prepared)[REMEDY.layer].weight_quantizer
    before = quantizer.scale[0].clone()
    lq.scores.LayerwiseAnalysis((), (), (REMEDY,)).apply(prepared)
    assert torch.equal(quantizer.scale[0], before)
    assert tuple(quantizer.scale[1].tolist()) == REMEDY.scales


def test_a_remedy_of_another_network_or_granularity_is_refused():
    prepared = lq.prepare(network(Residual), BITS, example_input=batches()[0][0])
    found = lq.scores.LayerwiseAnalysis((), (), (REMEDY,))
    with pytest.raises(ValueError, match=r"layer 'blocks.1.body.1' has 1 step sizes .* has 6"):
        found.apply(prepared)
    other = dataclasses.replace(found, remedies=(dataclasses.replace(REMEDY, layer="conv"),))
    with pytest.raises(ValueError, match="the network has no quantized layer 'conv'"):
        other.apply(prepared)


def test_it_is_a_file_and_a_text(tmp_path):
    model, data = with_an_outlier(), batches()
    found = lq.scores.analyse(model, data, policy_of("blocks.0.body.1"))
    found.save(tmp_path / "analysis.json")
    assert lq.scores.LayerwiseAnalysis.load(tmp_path / "analysis.json") == found
    assert found.meta == {"batches": 2, "correct": True}
    lines = found.text().splitlines()
    assert len(lines) == 2 + 2 * len(ALL) + 2 + 1
    assert lines[1].split() == ["layer", "tensor", "bits", "local", "output", "gain", "share"]
    assert lines[2].split()[:3] == ["stem.0", "weight", "8"]
    assert lines[-2].startswith("policy ")
    assert lines[-1].startswith("policy: blocks.0.body.1 has ")
    assert lines[-1].endswith(", kept")


def test_the_model_stays_as_it_is():
    model, data = with_an_outlier(), batches()
    model.blocks[0].train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    held = [sorted(vars(module)) for module in model.modules()]
    lq.scores.analyse(model, data, BITS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == held


class Pair(Residual):
    def forward(self, x):
        return super().forward(x), x


class Nothing(Residual):
    def forward(self, x):
        return super().forward(x) * 0


class Quotient(nn.Module):
    """Divides by what is not 0 in float."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(108, 6)
        self.middle = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.middle.weight[0], self.middle.weight[1:] = 1.0, 1e-3  # at 2 bits the latter are 0

    def forward(self, x):
        x = self.middle(self.first(x.flatten(1)))
        return self.head(x / x.abs())


@pytest.mark.parametrize(
    ("model", "change", "bits", "options", "message"),
    [
        (Residual, lambda data: [], BITS, {}, "there are no batches to measure scores on"),
        (
            Residual,
            lambda data: data,
            policy_of("head.1"),
            {"fixed": ["head.1"]},
            "fixed is given, which the policy says itself",
        ),
        (
            Residual,
            lambda data: data,
            lq.Policy.uniform(["conv"], 4, 4),
            {},
            "policy: Residual has no quantizable layer 'conv'",
        ),
        (Pair, lambda data: data, BITS, {}, "the model puts out tuple, expected one tensor"),
        (Nothing, lambda data: data, BITS, {}, "the float network puts out nothing but zeros"),
        (
            Quotient,
            lambda data: data,
            BITS,
            {},
            r"layer 'middle': weight noise at 2 bits is .* and nan at the network's",
        ),
    ],
)
def test_what_cannot_be_analysed_is_refused(model, change, bits, options, message):
    torch.manual_seed(0)
    model = model().double().eval()
    with pytest.raises(ValueError, match=message):
        lq.scores.analyse(model, change(batches()), bits, **options)


def test_a_float_network_that_puts_out_nan_is_refused():
    model = network(Residual)
    model.head[1].bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the float network puts out a NaN or an infinity"):
        lq.scores.analyse(model, batches(), BITS)
