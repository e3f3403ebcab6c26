"""What profile() counts; test_profile_models.py holds it to torch and to published numbers."""

import pytest
import torch

pytest.importorskip("torchvision")

import torchvision
from networks import Depthwise, Shared
from torch import nn

from limpq_ext.graph.profile import profile

IMAGE = torch.zeros(2, 3, 8, 8)


def by_name(costs):
    return {layer.name: layer for layer in (*costs.layers, *costs.fixed)}


def test_profile_leaves_first_and_last_fixed_in_order_of_execution():
    costs = profile(Depthwise(), IMAGE)
    assert [layer.name for layer in costs.layers] == ["expand", "depthwise", "project"]
    assert [layer.name for layer in costs.fixed] == ["stem.0", "head"]


def test_profile_does_not_depend_on_the_batch_and_changes_nothing():
    model = Depthwise().train()
    model.stem.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert profile(model, IMAGE) == profile(model, torch.zeros(7, 3, 8, 8))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not model.stem.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_profile_of_a_model_without_memory():
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    costs = profile(model, torch.zeros(1, 3, 224, 224, device="meta"))
    assert len(costs.layers) == 52
    assert costs.all_weights == 25_502_912


def test_a_shared_module_is_one_layer_and_its_calls_add_up():
    costs = by_name(profile(Shared(), IMAGE))
    assert list(costs) == ["block.0", "first", "head"]
    assert costs["block.0"].macs == 2 * 6 * 64 * 6 * 9
    assert costs["block.0"].activations == 2 * 6 * 64
    assert costs["block.0"].weights == 6 * 6 * 9


def test_embeddings_norms_biases_and_excluded_layers_stay_in_float_each_counted_once():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(50, 8)
            self.body = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)], nn.LayerNorm(8))
            self.extra = nn.Linear(8, 8)
            self.head = nn.Linear(8, 50)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.extra(self.body(self.words(x))))

    model = Text()
    costs = profile(model, torch.zeros(1, 3, dtype=torch.int64), exclude=["extra"])
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    biases = 4 * 8 + 50
    assert costs.float_parameters == 50 * 8 + biases + 2 * 8 + (64 + 8)


def test_parametrized_weights_and_projections_of_attention_are_no_floats():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8, bias=False))
    layers = [nn.Linear(8, 8, bias=False), normed, nn.Linear(8, 8, bias=False)]
    assert profile(nn.Sequential(*layers), torch.zeros(1, 8)).float_parameters == 0
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    costs = profile(model, torch.zeros(1, 5, 8))
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    assert costs.parameters - costs.float_parameters == costs.all_weights
