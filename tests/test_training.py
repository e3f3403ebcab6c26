import math

import pytest
import torch
from torch import nn

from limpq_ext import evaluate, finetune
from limpq_ext.layers import quantize_layer
from limpq_ext.training import cosine_with_warmup, make_optimizer


def batches(count=3, batch=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * batch, 4, generator=generator)
    return list(zip(x.split(batch), (x.sum(1) > 0).long().split(batch), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_evaluate_counts_and_keeps_the_mode():
    model = network().train()
    data = batches()
    result = evaluate(model, data)
    assert model.training
    model.eval()
    scores = torch.cat([model(x) for x, _ in data])
    target = torch.cat([t for _, t in data])
    assert result.samples == 24
    assert result.accuracy == float((scores.argmax(1) == target).float().mean())
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(scores, target)))


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="cannot evaluate on an empty data set"):
        evaluate(network(), [])
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


def test_weight_decay_spares_biases_norms_and_scales():
    model = network()
    model[3] = quantize_layer(model[3], (3,), (3,))
    groups = make_optimizer(model, lr=0.1, weight_decay=0.5).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "3.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = torch.optim.SGD(network().parameters(), lr=2.0)
    schedule = cosine_with_warmup(optimizer, steps=10, warmup_steps=3)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [1 + math.cos(math.pi * step / 7) for step in range(7)]
    assert rates[3:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1, "optimizer": "adagrad"}, "optimizer is 'adagrad', expected one of sgd"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(network(), batches(), **options)


def test_a_loader_without_a_length_is_an_error():
    with pytest.raises(ValueError, match="the loader has no length"):
        finetune(network(), iter(batches()), epochs=1)
