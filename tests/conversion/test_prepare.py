import copy

import pytest
import torch
from networks import Depthwise, NoNorm, Shared
from torch import nn

from limpq_ext import prepare, quantized_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.layers import QuantConv2d, QuantLinear

IMAGE = torch.zeros(2, 3, 8, 8)


def prepared(model, bits=(2, 4), **options):
    return prepare(model, bits, example_input=IMAGE, **options)


def test_names_of_the_float_model_are_kept():
    model = Depthwise()
    state = prepared(model).state_dict()
    assert set(model.state_dict()) <= set(state)
    for name, value in model.state_dict().items():
        rows = state[name] if state[name].dim() > value.dim() else [state[name]]
        assert all(torch.equal(row, value) for row in rows)


def test_the_float_model_stays_as_it_is():
    model = Depthwise().eval()
    before = copy.deepcopy(model.state_dict())
    result = prepared(model)
    result.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert type(model.expand) is nn.Conv2d
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_first_and_last_layer_and_the_norm_after_the_first_stay_float():
    model = prepared(Depthwise())
    assert list(quantized_layers(model)) == ["expand", "depthwise", "project"]
    assert type(model.stem[0]) is nn.Conv2d
    assert type(model.stem[1]) is nn.BatchNorm2d
    assert type(model.head) is nn.Linear
    assert isinstance(model.bn1, SwitchableBatchNorm)
    assert model.bn2.source == "depthwise"


def test_fixed_layers_can_be_chosen():
    model = prepared(NoNorm(), fixed=["head"])
    assert list(quantized_layers(model)) == ["features.a", "features.b", "hidden"]
    assert isinstance(model.features["a"], QuantConv2d)
    assert isinstance(model.hidden, QuantLinear)


def test_no_fixed_layer_at_all():
    model = prepared(NoNorm(), fixed=[])
    assert len(quantized_layers(model)) == 4


def test_excluded_layers_stay_float():
    assert list(quantized_layers(prepared(NoNorm(), fixed=[], exclude=["features"]))) == [
        "hidden",
        "head",
    ]


def test_shared_modules_stay_shared():
    model = prepared(Shared())
    assert model.again is model.block
    assert isinstance(model.block[0], QuantConv2d)
    assert isinstance(model.block[1], SwitchableBatchNorm)
    assert list(quantized_layers(model)) == ["block.0"]
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.block[0].weight_quantizer.scale.grad is not None


def test_a_model_that_is_one_layer_can_be_prepared():
    model = prepare(nn.Linear(3, 2), (4,), example_input=torch.zeros(1, 3), fixed=[])
    assert isinstance(model, QuantLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (1, 4)}, "1 bits is outside 2 to 16"),
        ({"bits": (4, 17)}, "17 bits is outside 2 to 16"),
        ({"bits": ()}, "bits is empty"),
        ({"fixed": ["stem"]}, "fixed: the model has no module 'stem'"),
        ({"exclude": ["nothing"]}, "exclude: the model has no module 'nothing'"),
        ({"fixed": ["*"]}, "no layer is left to search: the model runs 4 quantizable layers"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        prepared(NoNorm(), **options)


def test_layers_that_do_not_run_are_left_and_said():
    model = NoNorm()
    model.auxiliary = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="did not reach them: 'auxiliary'"):
        result = prepared(model)
    assert type(result.auxiliary) is nn.Linear
