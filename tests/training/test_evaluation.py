import contextlib

import pytest
import torch
from torch import nn

from limpq_ext import confuse, evaluate
from limpq_ext.training.evaluation import evaluate_beside


class Table(nn.Module):
    """Scores by the number of the sample."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores, dtype=torch.float32))

    def forward(self, x):
        return self.scores[x]


def samples(targets, batch=2):
    return list(
        zip(
            torch.arange(len(targets)).split(batch),
            torch.tensor(targets).split(batch),
            strict=True,
        )
    )


def one_hot(*places, classes):
    return torch.eye(classes)[list(places)].tolist()


def test_evaluate_counts_and_keeps_the_mode():
    generator = torch.Generator().manual_seed(0)
    model = Table(torch.randn(24, 7, generator=generator).tolist()).train()
    targets = torch.randint(7, (24,), generator=generator)
    result = evaluate(model, samples(targets.tolist(), batch=5))
    assert model.training
    scores = model.scores.detach()
    assert result.samples == 24
    assert result.accuracy == float((scores.argmax(1) == targets).double().mean())
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(scores, targets)))
    best = scores.argsort(1, descending=True)[:, :5]
    assert result.top5 == float((best == targets[:, None]).any(1).double().mean())


def test_each_class_has_its_own_accuracy():
    model = Table(one_hot(0, 0, 1, 1, 0, classes=3))
    result = evaluate(model, samples([0, 0, 0, 1, 1]))
    assert result.class_accuracy == (2 / 3, 1 / 2, None)
    assert result.top5 is None


def test_confusion_counts_what_both_say_and_who_is_right():
    model = Table(one_hot(0, 1, 2, 2, 0, classes=3)).train()
    reference = Table(one_hot(0, 0, 2, 1, 1, classes=3))
    result = confuse(model, reference, samples([0, 1, 1, 1, 2]))
    assert result.counts == ((1, 1, 0), (1, 0, 1), (0, 0, 1))
    assert (result.samples, result.agreement) == (5, 2 / 5)
    assert (result.gained, result.lost) == (1 / 5, 1 / 5)
    assert model.training


def test_one_pass_gives_what_both_do():
    model = Table(one_hot(0, 1, 2, 1, 0, classes=3))
    reference = Table(one_hot(0, 2, 1, 1, 2, classes=3))
    batches = samples([0, 1, 1, 1, 2])
    passes = []
    found = evaluate_beside(model, reference, batches, on_step=lambda *step: passes.append(step))
    assert found == (evaluate(model, batches), confuse(model, reference, batches))
    assert len(passes) == len(batches)
    with pytest.raises(ValueError, match="empty data set"):
        evaluate_beside(model, reference, [])


def test_nothing_to_evaluate_or_compare_is_an_error():
    model = Table([[0.0, 1.0]])
    with pytest.raises(ValueError, match="cannot evaluate on an empty data set"):
        evaluate(model, [])
    with pytest.raises(ValueError, match="cannot evaluate on an empty data set"):
        confuse(model, model, [])
    with pytest.raises(ValueError, match=r"scores of shape \(1, 2\) and \(1, 3\)"):
        confuse(model, Table([[0.0, 1.0, 2.0]]), samples([0]))


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("no such sample")


@pytest.mark.parametrize("tail", [nn.Identity, Failing])
@pytest.mark.parametrize(
    "function", [evaluate, lambda model, loader: confuse(model, model, loader)]
)
def test_every_module_keeps_its_own_mode(function, tail):
    model = nn.Sequential(Table([[0.0, 1.0]]), nn.BatchNorm1d(2), tail()).train()
    model[1].eval()
    with contextlib.suppress(RuntimeError):
        function(model, samples([0]))
    assert [module.training for module in model.modules()] == [True, True, False, True]
