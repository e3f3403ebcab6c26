import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import Attending, Depthwise, PaddedConv2d
from torch import nn

from limpq_ext import JointTrainer, Policy, apply_policy, prepare, quantized_layers, select_bits
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.values.policy import LayerBits

IMAGE = torch.zeros(2, 3, 8, 8)


def prepared(model, bits=(2, 4), **options):
    return prepare(model, bits, example_input=IMAGE, **options)


def test_a_policy_gives_every_layer_its_bits():
    policy = Policy(
        (LayerBits("expand", 2, 3), LayerBits("depthwise", 4, 5), LayerBits("project", 6, 7)),
        (LayerBits("stem.0", 8, 8), LayerBits("head", 8, 8)),
    )
    model = apply_policy(Depthwise(), policy)
    layers = quantized_layers(model)
    assert {n: (x.weight_bits, x.activation_bits) for n, x in layers.items()} == policy.bits()
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(layer.input_quantizer.scale.grad is not None for layer in layers.values())
    assert len(model.expand.weight_quantizer(model.expand.weight).unique()) <= 4
    assert type(model.bn1) is nn.BatchNorm2d


def test_a_policy_of_another_network_is_an_error_that_names_the_layer():
    with pytest.raises(ValueError, match=r"policy: Depthwise has no layer 'layer1\.conv'"):
        apply_policy(Depthwise(), Policy((LayerBits("layer1.conv", 4, 4),)))
    with pytest.raises(ValueError, match="no quantizable layer, but BatchNorm2d, 'bn1'"):
        apply_policy(Depthwise(), Policy((LayerBits("bn1", 4, 4),)))


def test_layers_without_bits_in_the_policy_are_said():
    with pytest.warns(UserWarning, match=r"no bits for them: 'stem\.0', 'depthwise'"):
        apply_policy(Depthwise(), Policy((LayerBits("expand", 4, 4),)))


def trained(bits=(2, 4), **options):
    """A prepared model whose scales and statistics differ from bit-width to bit-width."""
    torch.manual_seed(0)
    model = prepared(Depthwise(), bits, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = JointTrainer(model, optimizer, nn.functional.cross_entropy)
    for _ in range(2):
        trainer.step(torch.randn(8, 3, 8, 8), torch.randint(5, (8,)))
    return model


def mixed(model):
    """A policy of 2 and 4 bits in turn."""
    pairs = itertools.cycle([(2, 4), (4, 2), (4, 4)])
    layers = zip(quantized_layers(model), pairs, strict=False)
    return Policy(tuple(LayerBits(name, *bits) for name, bits in layers))


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_jointly_trained_model_gives_its_scales_and_norms_at_the_bits_of_a_policy(per_channel):
    model = trained(per_channel_weights=per_channel)
    policy = mixed(model)
    with pytest.warns(UserWarning, match="left in float"):
        result = apply_policy(model, policy).eval()
    model.eval()
    select_bits(model, {layer.name: policy.bits()[layer.name] for layer in policy.layers})
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(result(x), model(x))
    norms = [module for module in result.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(isinstance(norm, SwitchableBatchNorm) for norm in norms)
    result.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in result.parameters())
    assert all(layer.weight_quantizer.bits == (2, 4) for layer in quantized_layers(model).values())


def test_its_state_is_that_of_the_policy_of_the_float_model():
    model = trained()
    names = [name for name, _ in Depthwise().named_modules()]
    fixed = (LayerBits("stem.0", 8, 8), LayerBits("head", 8, 8))
    policy = Policy(mixed(model).layers, tuple(layer for layer in fixed if layer.name in names))
    result, fresh = apply_policy(model, policy), apply_policy(Depthwise(), policy)
    fresh.load_state_dict(result.state_dict())
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh.train()(x), result.train()(x))


def test_bits_that_a_model_was_not_prepared_for_and_layers_without_bits_are_named():
    model = trained()
    layers = mixed(model).layers
    wrong = LayerBits(layers[0].name, 3, 4)
    with pytest.raises(ValueError, match=f"{layers[0].name}.*3 bits is not a candidate"):
        apply_policy(model, Policy((wrong, *layers[1:])))
    with pytest.raises(ValueError, match=f"no bits for the quantized layer '{layers[0].name}'"):
        apply_policy(model, Policy(layers[1:]))


@pytest.mark.parametrize("listed_first", [True, False])
def test_a_norm_without_bits_for_its_layer_is_an_error_that_names_the_layer(listed_first):
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            parts = [("norm", nn.BatchNorm2d(4)), ("conv", nn.Conv2d(4, 4, 1))]
            for name, part in parts if listed_first else parts[::-1]:
                setattr(self, name, part)
            self.last = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.norm(self.conv(self.first(x))))

    policy = Policy((LayerBits("first", 4, 4),))
    with pytest.raises(
        ValueError, match="policy: there are no bits for the quantized layer 'conv'"
    ):
        apply_policy(prepared(Norms()), policy)


class OwnForward(nn.Sequential):
    """A layer whose class has no quantized form of its own, and a batch norm after it."""

    def __init__(self):
        layers = [nn.Conv2d(3, 4, 1), PaddedConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten()]
        super().__init__(*layers, nn.Linear(4 * 64, 5))


def test_prepared_models_are_copied_and_saved_whole(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    for number, network in enumerate((Depthwise(), OwnForward(), Attending())):
        model = prepared(network).train()
        model(x)
        model.eval()
        expected = model(x).detach()
        assert torch.equal(copy.deepcopy(model)(x), expected)
        torch.save((model, as_policy(model), x, expected), tmp_path / f"{number}.pt")
    # A process in which none of the classes was made yet.
    program = """if True:
        import torch
        for number in range(3):
            *models, x, expected = torch.load(f"{number}.pt", weights_only=False)
            assert all(torch.equal(model(x), expected) for model in models), number
    """
    paths = [str(Path(__file__).parents[1]), *sys.path]
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=120,
    )


def as_policy(model):
    """The prepared model at its selected bits and no others."""
    layers = quantized_layers(model).items()
    policy = Policy(tuple(LayerBits(n, x.weight_bits, x.activation_bits) for n, x in layers))
    with pytest.warns(UserWarning, match="left in float"):
        return apply_policy(model, policy).eval()
