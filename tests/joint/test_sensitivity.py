"""What a joint step says errors add to the loss, against a slow version of the formula."""

import copy

import pytest
import torch
from networks import Attending, Depthwise, NoNorm, Shared
from torch import nn
from torch.nn import functional as F

from limpq_ext import JointTrainer, lsq_fake_quantize, prepare, quantized_layers, select_bits

BITS = (2, 4, 6)
NETWORKS = {"depthwise": Depthwise, "shared": Shared, "attending": Attending, "no_norm": NoNorm}


def compiled(model):
    return torch.compile(model, backend="aot_eager")


NOTHING_SHARED = {"weight_bank": False, "share_stem": False, "drop_relu": False}
EXECUTIONS = {
    "everything shared": {},
    "nothing shared": NOTHING_SHARED,
    "compiled": {"compile_forward": compiled},
}


def batch(step=0, size=4):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (size,), generator=generator)


def trainer_of(network="depthwise", *, loss_fn=F.cross_entropy, every=1, double=True, **options):
    torch.manual_seed(0)
    per_channel = options.pop("per_channel", False)
    model = NETWORKS[network]()
    x, _ = batch()
    model, x = (model.double(), x) if double else (model, x.float())
    prepared = prepare(model, BITS, example_input=x, per_channel_weights=per_channel).to(x.dtype)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02, momentum=0.9)
    return JointTrainer(prepared, optimizer, loss_fn, sensitivity_every=every, **options)


def slowly(model, x, target):
    """Scores of (kind, layer, bits), of the model as it stands, from whole errors and gradients."""
    model = copy.deepcopy(model).train()
    layers = quantized_layers(model)
    select_bits(model, max(BITS))
    calls = {(kind, name): [] for name in layers for kind in ("weight", "activation")}
    quantizers = {}
    for name, layer in layers.items():
        layer.input_quantizer.relu_max = None  # the model has its ReLUs
        for kind, quantizer in (
            ("weight", layer.weight_quantizer),
            ("activation", layer.input_quantizer),
        ):
            quantizers[kind, name] = quantizer

            def note(_, inputs, output, key=(kind, name)):
                output.retain_grad()
                calls[key].append((inputs[0].detach().clone(), output))

            quantizer.register_forward_hook(note)
    F.cross_entropy(model(x), target, reduction="sum").backward()
    scores = {}
    for (kind, name), seen in calls.items():
        quantizer = quantizers[kind, name]
        for place, bits in enumerate(quantizer.bits):
            low, high = quantizer.thresholds(bits)
            terms = []
            for value, output in seen:
                y = lsq_fake_quantize(
                    value,
                    quantizer.scale.detach()[place],
                    low,
                    high,
                    channel_axis=quantizer.channel_axis,
                )
                terms.append(output.grad * (y - value))
            if kind == "activation":
                axis = -1 if isinstance(layers[name], nn.Linear) else 1
                channels = sum(term.movedim(axis, 0).flatten(1).sum(1) for term in terms)
                score = channels.square().sum()
            else:
                score = sum(terms).flatten(1).sum(1).square().sum()
            scores[kind, name, bits] = score.item() / (2 * len(target))
    return scores


def table(indicators):
    return {
        (kind, layer.name, bits): value
        for layer in indicators.layers
        for kind in ("weight", "activation")
        for bits, value in getattr(layer, kind).items()
    }


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_sensitivities_are_half_the_square_of_the_first_order(network, execution, per_channel):
    trainer = trainer_of(network, per_channel=per_channel, **EXECUTIONS[execution])
    trainer.step(*batch(0))  # gives step sizes their start
    expected = []
    for step in (1, 2):
        expected.append(slowly(trainer.model, *batch(step)))
        trainer.step(*batch(step))
    found = table(trainer.sensitivities())
    assert found.keys() == expected[0].keys()
    for key, value in found.items():
        mean = (expected[0][key] + expected[1][key]) / 2
        assert value == pytest.approx(mean, rel=1e-6), key


def test_measuring_changes_nothing_of_the_training():
    ours, plain = trainer_of(), trainer_of(every=0)
    for step in range(3):
        ours.step(*batch(step))
        plain.step(*batch(step))
    for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_so_manieth_step_from_the_second_on_is_measured():
    trainer = trainer_of(every=3)
    counts = []
    for step in range(6):
        trainer.step(*batch(step))
        counts.append(0 if step == 0 else trainer.sensitivities().meta["measured_steps"])
    assert counts == [0, 1, 1, 1, 2, 2]


def test_a_loss_that_is_a_sum_says_so():
    mean = trainer_of(loss_fn=nn.CrossEntropyLoss())
    total = trainer_of(loss_fn=nn.CrossEntropyLoss(reduction="sum"))
    for trainer in (mean, total):
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        for step in range(2):
            trainer.step(*batch(step))
    others = table(total.sensitivities())
    for key, value in table(mean.sensitivities()).items():
        assert value == pytest.approx(others[key], rel=1e-9)


def test_a_resumed_training_has_the_same_sensitivities_to_the_bit():
    whole = trainer_of(every=2)
    for step in range(3):
        whole.step(*batch(step))
    resumed = trainer_of(every=2)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for trainer in (whole, resumed):
        for step in range(3, 6):
            trainer.step(*batch(step))
    assert whole.sensitivities() == resumed.sensitivities()
    assert whole.sensitivities().meta["measured_steps"] == 3


def test_a_state_without_sensitivities_begins_anew():
    trainer = trainer_of()
    for step in range(2):
        trainer.step(*batch(step))
    state = trainer.state_dict()
    del state["sensitivities"]
    trainer.load_state_dict(state)
    with pytest.raises(ValueError, match="no step's sensitivities were measured yet"):
        trainer.sensitivities()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_its_gradient_scaler_are_taken_out(dtype):
    half = trainer_of(double=False, autocast=dtype)
    plain = trainer_of(double=False)
    for trainer in (half, plain):
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        for step in range(2):
            x, target = batch(step, size=16)
            trainer.step(x.float(), target)
    ours, others = (table(trainer.sensitivities()) for trainer in (half, plain))
    for key in ours:
        assert ours[key] == pytest.approx(others[key], rel=0.5, abs=1e-5), key


def test_a_step_that_overflowed_does_not_count():
    trainer = trainer_of()
    for step in range(2):
        trainer.step(*batch(step))
    before = trainer.sensitivities()
    x, _ = batch()
    with trainer._meter.watching(
        x, lambda name: torch.full_like(_weight(trainer, name), torch.inf)
    ):
        pass
    assert trainer.sensitivities() == before


def _weight(trainer, name):
    return trainer.layers[name].weight.detach()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": -1}, "sensitivity_every is -1"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "reduction is 'none'"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        trainer_of(**options)


def test_without_being_asked_for_there_are_none():
    trainer = trainer_of(every=0)
    for step in range(2):
        trainer.step(*batch(step))
    with pytest.raises(ValueError, match="no step's sensitivities were measured yet"):
        trainer.sensitivities()
