import pytest
import torch
from networks import Depthwise

from limpq_ext import prepare, quantized_layers, select_bits

IMAGE = torch.zeros(2, 3, 8, 8)


def prepared(model, bits=(2, 4), **options):
    return prepare(model, bits, example_input=IMAGE, **options)


def test_bits_are_selected_for_layers_and_norms():
    model = prepared(Depthwise())
    layers = quantized_layers(model)
    assert {layer.weight_bits for layer in layers.values()} == {4}
    select_bits(model, 2)
    assert {layer.activation_bits for layer in layers.values()} == {2}
    select_bits(model, {"expand": (2, 4), "depthwise": (4, 2), "project": (4, 4)})
    assert (model.expand.weight_bits, model.expand.activation_bits) == (2, 4)
    assert model.bn1._row == 0
    assert model.bn2._row == 1


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (3, "3 bits is not a candidate"),
        ({"expand": (2, 2)}, "nothing is given for 'depthwise', 'project'"),
        ({"expansion": (2, 2)}, "no quantized layer 'expansion'"),
    ],
)
def test_wrong_selections_are_named(bits, message):
    with pytest.raises(ValueError, match=message):
        select_bits(prepared(Depthwise()), bits)
