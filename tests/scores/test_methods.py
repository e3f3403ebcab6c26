import inspect

import pytest
import torch
from torch import nn

from limpq_ext import scores
from limpq_ext.scores.methods import METHODS, method_named, methods_text


def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4),
        (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4),
    ]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    ).eval()


@pytest.mark.parametrize("name", METHODS)
def test_a_score_of_the_table_takes_what_recipes_give_it(name):
    found = method_named(name).function(
        network(),
        batches(),
        (2, 4),
        fixed=None,
        exclude=(),
        scale_start="mse",
        scale_max=float("inf"),
        per_channel_weights=True,
        symmetric_weights=False,
    )
    assert found.bits == (2, 4)
    assert [layer.name for layer in found.layers] == ["2", "5"]
    assert found.meta["score"] == name


@pytest.mark.parametrize("name", METHODS)
def test_a_score_of_the_table_has_its_name_in_the_room(name):
    assert getattr(scores, name) is METHODS[name].function
    assert list(inspect.signature(METHODS[name].function).parameters)[:3] == [
        "model", "batches", "bits"
    ]  # fmt: skip


def test_the_table_is_printed_with_a_line_for_each_score():
    head, *lines = methods_text().splitlines()
    assert head.split() == ["score", "needs", "cost", "source"]
    assert [line.split()[0] for line in lines] == list(METHODS)
    for line, method in zip(lines, METHODS.values(), strict=True):
        assert all(told in line for told in (method.source, method.needs, method.cost))


def test_a_score_that_is_not_there_is_told_which_are():
    with pytest.raises(ValueError, match="there is no score 'magic': it is one of layerwise, "):
        method_named("magic")
