import pytest
import torch
from classifiers import batches, network
from torch import nn

from limpq_ext import evaluate, finetune
from limpq_ext.nn.layers import quantize_layer


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1, "optimizer": "adagrad"}, "optimizer is 'adagrad', expected one of sgd"),
        ({"epochs": 1, "distill_weight": 1.5}, "distill_weight is 1.5, expected at most 1"),
        ({"epochs": 1, "temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"epochs": 1, "ema_decay": -0.5}, "ema_decay is -0.5, expected at least 0"),
        ({"epochs": 1, "reestimate_batches": -1}, "reestimate_batches is -1, expected at least 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(network(), batches(), **options)


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
