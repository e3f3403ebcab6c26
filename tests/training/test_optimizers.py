import math

import pytest
import torch
from torch import nn

from limpq_ext.nn.layers import quantize_layer
from limpq_ext.training.optimizers import cosine_with_warmup, make_optimizer


def test_weight_decay_spares_biases_norms_and_scales():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[2] = quantize_layer(model[2], (3,), (3,))
    groups = make_optimizer(model, lr=0.1, weight_decay=0.5).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "2.weight"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def undecayed(model):
    groups = make_optimizer(model, lr=0.1, weight_decay=0.5).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in spared}


class Transformer(nn.Module):
    """What a transformer has beside the weights of its layers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(5, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 3, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.layer_scale = nn.Parameter(torch.zeros(4, 1, 1))
        self.norms = nn.ModuleList([nn.LayerNorm((3, 4)), nn.GroupNorm(2, 4), nn.RMSNorm((3, 4))])
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.one_output = nn.Linear(4, 1)
        self.mixing = nn.Parameter(torch.zeros(3, 4))


def test_weight_decay_spares_embeddings_all_norms_and_what_has_one_dimension():
    model = Transformer()
    decayed = {name for name, _ in model.named_parameters()} - undecayed(model)
    layers = {"attention.in_proj_weight", "attention.out_proj.weight", "one_output.weight"}
    assert decayed == {*layers, "mixing"}


def test_weight_decay_spares_what_the_model_itself_names():
    model = Transformer()
    model.no_weight_decay = lambda: {"mixing", "attention.in_proj_weight"}
    assert {"mixing", "attention.in_proj_weight"} <= undecayed(model)


def test_weight_decay_reaches_the_weights_of_layers_alone_in_real_networks():
    models = pytest.importorskip("torchvision").models
    for name in ("vit_b_32", "swin_t", "convnext_tiny", "resnet18"):
        with torch.device("meta"):
            model = models.get_model(name)
        layers = {
            f"{path}.weight"
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }
        projections = {p for p, _ in model.named_parameters() if p.endswith("in_proj_weight")}
        everything = {p for p, _ in model.named_parameters()}
        assert undecayed(model) == everything - layers - projections, name


def test_learning_rate_rises_then_falls_along_a_cosine():
    optimizer = torch.optim.SGD(nn.Linear(4, 2).parameters(), lr=2.0)
    schedule = cosine_with_warmup(optimizer, steps=10, warmup_steps=3)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    expected = [1 + math.cos(math.pi * step / 7) for step in range(7)]
    assert rates[3:] == pytest.approx(expected)
