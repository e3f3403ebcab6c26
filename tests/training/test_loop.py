import os
import signal

import pytest
import torch
from torch import nn

from limpq_ext import evaluate, finetune
from limpq_ext.nn.layers import quantize_layer
from limpq_ext.training.checkpoint import Checkpoint
from limpq_ext.training.loop import Recording
from limpq_ext.training.signals import Interrupted


def batches(count=3, batch=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * batch, 4, generator=generator)
    return list(zip(x.split(batch), (x.sum(1) > 0).long().split(batch), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="cannot train on an empty data set"):
        finetune(network(), [], epochs=1)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 0.01)])
def test_finetune_learns_and_reports(optimizer, lr):
    model, steps, epochs = network().eval(), [], []
    records = finetune(
        model,
        batches(8),
        epochs=10,
        optimizer=optimizer,
        lr=lr,
        warmup_epochs=1,
        label_smoothing=0.1,
        on_step=lambda done, total: steps.append((done, total)),
        on_epoch=epochs.append,
    )
    assert records == epochs
    assert [record["epoch"] for record in records] == list(range(1, 11))
    assert steps == [(done, 80) for done in range(1, 81)]
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    assert records[-1]["lr"] == pytest.approx(0, abs=1e-9)
    assert evaluate(model, batches(8)).accuracy > 0.9
    assert not model.training


def test_finetune_of_a_quantized_model_trains_weights_and_scales():
    model = network()
    model[3] = quantize_layer(model[3], (3,), (3,))
    finetune(model, batches(), epochs=1, lr=0.1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    finetune(model, batches(), epochs=1, lr=0.1)
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


def test_a_loss_that_becomes_nan_ends_the_training():
    data = [(x * float("nan"), t) for x, t in batches()]
    with pytest.raises(ValueError, match=r"step 1: the loss became nan; .* in the batch itself"):
        finetune(network(), data, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1, "optimizer": "adagrad"}, "optimizer is 'adagrad', expected one of sgd"),
        ({"epochs": 1, "distill_weight": 1.5}, "distill_weight is 1.5, expected 0 to 1"),
        ({"epochs": 1, "temperature": 0.0}, "temperature is 0.0, expected a positive"),
        ({"epochs": 1, "ema_decay": -0.5}, "ema_decay is -0.5, expected 0 to 1"),
        ({"epochs": 1, "reestimate_batches": -1}, "reestimate_batches is -1, expected 0 to any"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(network(), batches(), **options)


def test_a_loader_without_a_length_is_an_error():
    with pytest.raises(ValueError, match="the loader has no length"):
        finetune(network(), iter(batches()), epochs=1)


def test_a_teacher_alone_gives_the_gradient_of_the_divergence_from_its_scores():
    x, target = batches(1)[0]
    teacher = network()
    torch.nn.init.normal_(teacher[3].weight, generator=torch.Generator().manual_seed(5))
    teacher.train()
    model, twin = network(), network()
    finetune(
        model,
        [(x, target)],
        epochs=1,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        teacher=teacher,
        distill_weight=1.0,
        temperature=2.0,
    )
    assert teacher.training
    teacher.eval()
    with torch.no_grad():
        taught = (teacher(x) / 2).softmax(1)
    ours = (twin(x) / 2).log_softmax(1)
    loss = 4 * (taught * (taught.log() - ours)).sum(1).mean()
    loss.backward()
    for name, parameter in twin.named_parameters():
        stepped = parameter.detach() - 0.1 * parameter.grad
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), stepped)


def test_a_teacher_shares_the_loss_with_the_targets():
    data, teacher = batches(1), network()
    losses = [
        finetune(network(), data, epochs=1, teacher=teacher, distill_weight=w)[0]["loss"]
        for w in (0.0, 0.25, 1.0)
    ]
    assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2])
    assert losses[0] == finetune(network(), data, epochs=1)[0]["loss"]


def test_a_teacher_of_other_classes_is_an_error():
    with pytest.raises(ValueError, match=r"teacher's scores have shape \(8, 3\)"):
        finetune(network(), batches(), epochs=1, teacher=nn.Linear(4, 3))


def test_the_average_of_the_parameters_is_what_a_training_ends_with():
    seen, decay = [], 0.75
    plain, averaged = network(), network()
    finetune(
        plain,
        batches(),
        epochs=2,
        lr=0.1,
        on_step=lambda *_: seen.append([p.detach().clone() for p in plain.parameters()]),
    )
    finetune(averaged, batches(), epochs=2, lr=0.1, ema_decay=decay)
    expected = seen[0]
    for parameters in seen[1:]:
        expected = [
            decay * mean + (1 - decay) * now for mean, now in zip(expected, parameters, strict=True)
        ]
    for ours, mean in zip(averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), mean)
    assert torch.equal(averaged[1].running_mean, plain[1].running_mean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_learns_in_float32_weights(dtype):
    model, kinds = network(), set()
    model[0].register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    records = finetune(model, batches(8), epochs=10, lr=0.1, autocast=dtype)
    assert kinds == {dtype}
    assert model[0].weight.dtype == torch.float32
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]


def test_batch_norm_is_estimated_from_the_last_weights_where_that_is_asked_for():
    model, data = network(), batches()
    finetune(model, data, epochs=2, lr=0.5, reestimate_batches=2)
    with torch.no_grad():
        inputs = [model[0](x) for x, _ in data[:2]]
    means = torch.stack([x.mean(0) for x in inputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)


def test_fine_tuning_leaves_a_frozen_batch_norm_frozen():
    model, teacher = network().train(), network().train()
    model[1].eval()
    teacher[1].eval()
    before = [[module.training for module in m.modules()] for m in (model, teacher)]
    statistics = model[1].running_mean.clone()
    finetune(model, batches(), epochs=1, lr=0.1, teacher=teacher, reestimate_batches=2)
    assert [[module.training for module in m.modules()] for m in (model, teacher)] == before
    assert torch.equal(model[1].running_mean, statistics)
    assert model[1].num_batches_tracked == 0


def test_fine_tuning_puts_modes_back_where_it_raises():
    model = network().eval()
    model[2].train()
    with pytest.raises(ValueError, match="in the batch itself"):
        finetune(model, [(x * torch.nan, t) for x, t in batches()], epochs=1)
    assert [module.training for module in model.modules()] == [False, False, False, True, False]


class Loader:
    """Batches, numbered, and a length that may be wrong."""

    def __init__(self, counts, length):
        self.counts, self.length, self.given = list(counts), length, []

    def __len__(self):
        return self.length

    def __iter__(self):
        self.given.append([])
        count = self.counts[len(self.given) - 1]
        for number, batch in enumerate(batches(count) if count else []):
            self.given[-1].append(number)
            yield batch


def test_a_loader_that_gives_fewer_batches_than_its_length_begins_every_epoch_at_its_first():
    loader = Loader([3, 2, 5], length=5)
    with pytest.warns(UserWarning, match=r"the loader gave") as warned:
        records = finetune(network(), loader, epochs=3, lr=0.01)
    assert [str(warning.message) for warning in warned] == [
        "epoch 1: the loader gave 3 batches, but its length is 5, by which the learning rate falls"
    ]
    assert loader.given == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4]]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 5), (3, 10)]


def test_a_loader_that_gives_more_batches_than_its_length_begins_every_epoch_at_its_first():
    loader = Loader([4, 4], length=2)
    records = finetune(network(), loader, epochs=2, lr=0.01)
    assert loader.given == [[0, 1], [0, 1]]
    assert [record["step"] for record in records] == [2, 4]


@pytest.mark.filterwarnings("ignore:epoch .* the loader gave")
@pytest.mark.parametrize("log_steps", [0, 1, 3])
@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_training_with_short_epochs_goes_on_where_it_was_stopped(tmp_path, stop, log_steps):
    def train(counts, recording=None, on_step=None):
        model = network()
        options = {"recording": recording, "on_step": on_step, "lr": 0.1}
        records = finetune(model, Loader(counts, length=4), epochs=3, **options)
        return [r["loss"] for r in records], [r["step"] for r in records], model.state_dict()

    def interrupt(done, total):
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    recording = Recording(Checkpoint(tmp_path / "checkpoint"), log_steps=log_steps)
    whole = train([3, 2, 4])
    with pytest.raises(Interrupted):
        train([3, 2, 4], recording, interrupt)
    # The loader starts anew in the epoch that was stopped.
    losses, steps, state = train([3, 2, 4][stop > 3 :], recording)
    assert losses == pytest.approx(whole[0], rel=1e-12)
    assert steps == whole[1] == [3, 5, 9]
    assert all(torch.equal(whole[2][name], value) for name, value in state.items())


def test_an_epoch_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match="epoch 2: the loader gave no batches"):
        finetune(network(), Loader([2, 0], length=2), epochs=2)
