"""Joint training as a score, each kind against its formula."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpq_ext as lq

BITS = (2, 4)


class Small(nn.Module):
    """Two searchable layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.head(torch.tanh(self.last(F.relu(self.hidden(x)))))


def network():
    torch.manual_seed(0)
    return Small().double()


def batches(count=2, size=6):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(steps, *, every=0, lr=0.01):
    """A joint training of ones own, batch after batch."""
    data = batches()
    prepared = lq.prepare(network(), BITS, example_input=data[0][0], scale_start="mse")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=lr, momentum=0.9)
    trainer = lq.JointTrainer(prepared, optimizer, F.cross_entropy, sensitivity_every=every)
    for step in range(steps):
        trainer.step(*data[step % len(data)])
    return trainer


def values(indicators):
    return {
        (layer.name, kind, bits): value
        for layer in indicators.layers
        for kind in ("weight", "activation")
        for bits, value in getattr(layer, kind).items()
    }


def test_raw_indicators_are_the_step_sizes_of_a_joint_training():
    found = lq.scores.learned(network(), batches(), BITS, kind="raw", steps=5)
    assert values(found) == values(trained(5).indicators())
    assert found.meta["score"] == "learned"
    assert found.meta["kind"] == "raw"
    assert found.meta["steps"] == 5


def test_normalised_indicators_are_relative_to_the_mean_magnitude():
    found = lq.scores.learned(network(), batches(), BITS, kind="normalised", steps=5)
    trainer = trained(5)
    model, x = trainer.model, torch.cat([x for x, _ in batches()])
    hidden = F.relu(F.linear(x, model.first.weight, model.first.bias))
    last = F.relu(F.linear(hidden, model.hidden.weight, model.hidden.bias))
    inputs = {"hidden": hidden, "last": last}
    for (name, kind, bits), step in values(trainer.indicators()).items():
        whole = model.get_submodule(name).weight if kind == "weight" else inputs[name]
        expected = step / whole.abs().mean().item()
        assert values(found)[name, kind, bits] == pytest.approx(expected, rel=1e-9)


def test_loss_aware_indicators_are_half_the_square_of_the_first_order():
    # Without a rate the network stays: two measured steps, one on each batch.
    found = lq.scores.learned(network(), batches(), BITS, steps=3, lr=1e-30)
    model = trained(1, lr=0.0).model
    lq.select_bits(model, max(BITS))
    layers = {"hidden": model.hidden, "last": model.last}
    sums, samples = {}, 0  # a channel of a batch each
    for x, target in batches():
        samples += len(x)
        for name, layer in layers.items():
            kept = {}

            def note(_, inputs, output, kept=kept):
                output.retain_grad()
                kept["x"], kept["y"] = inputs[0].detach(), output

            handle = layer.input_quantizer.register_forward_hook(note)
            F.cross_entropy(model(x), target, reduction="sum").backward()
            handle.remove()
            quantizer = layer.input_quantizer
            for place, bits in enumerate(quantizer.bits):
                step, (low, high) = quantizer.scale[place].item(), quantizer.thresholds(bits)
                error = (kept["x"] / step).clamp(low, high).round() * step - kept["x"]
                moved_by = (kept["y"].grad * error).sum(0)
                key = name, bits
                sums[key] = sums.get(key, 0.0) + moved_by.square().sum().item()
    for (name, bits), total in sums.items():
        expected = total / (2 * samples)
        assert values(found)[name, "activation", bits] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["raw", "normalised", "loss_aware"])
def test_the_model_is_left_as_it_is(kind):
    model = network()
    for parameter in model.hidden.parameters():
        parameter.requires_grad_(False)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    lq.scores.learned(model, batches(), BITS, kind=kind, steps=3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not model.hidden.weight.requires_grad
    assert model.first.weight.requires_grad
    assert model.first.weight.grad is None
    assert not model.training
    assert type(model.hidden) is nn.Linear


def test_a_trainers_own_indicators_leave_it_as_it_is():
    trainer = trained(3, every=1)
    before = copy.deepcopy(trainer.state_dict()["model"])
    data = batches()
    loss_aware = lq.scores.learned_by(trainer)
    assert loss_aware == trainer.sensitivities()
    assert values(lq.scores.learned_by(trainer, kind="raw")) == values(trainer.indicators())
    lq.scores.learned_by(trainer, kind="normalised", batches=data)
    assert trainer.model.training
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])
    trainer.step(*data[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "best"}, "kind is 'best': not one of raw, normalised, loss_aware"),
        ({"steps": 1}, "steps is 1, expected 2 or more"),
        ({"steps": 0, "kind": "raw"}, "steps is 0, expected 1 or more"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lq.scores.learned(network(), batches(), BITS, **options)


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="there are no batches to train on"):
        lq.scores.learned(network(), [], BITS)
    with pytest.raises(ValueError, match="layer 'hidden': no batch came through it"):
        lq.scores.learned_by(trained(1), kind="normalised")


def test_a_trainer_that_measured_nothing_has_no_loss_aware_indicators():
    with pytest.raises(ValueError, match="no step's sensitivities were measured yet"):
        lq.scores.learned_by(trained(2))
    with pytest.raises(ValueError, match="kind is 'other'"):
        lq.scores.learned_by(trained(1), kind="other")
