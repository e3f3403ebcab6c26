"""Costs of torchvision's classifiers, held to torch's flop counter and to published numbers."""

import pytest
import torch

pytest.importorskip("torchvision")

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from zoo import TORCHVISION, full_model

from limpq_ext import profile

FAST = [
    "alexnet",
    "convnext_tiny",
    "efficientnet_b0",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_800mf",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_32",
]
WITH_WEIGHTS = {"aten.convolution", "aten.addmm", "aten.mm"}
ATTENTION = {"aten.bmm"}


def products(model, x):
    """Multiply-accumulates by torch's own counter: those with weights, and those of attention."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    flops = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    assert set(flops) <= WITH_WEIGHTS | ATTENTION
    total = {True: 0, False: 0}
    for operator, count in flops.items():
        total[operator in WITH_WEIGHTS] += count // 2
    return total[True], total[False]


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TORCHVISION],
)
def test_macs_and_weights_of_a_classifier_are_those_of_torch_and_those_published(name):
    model = full_model(name)
    published = next(
        weights for weights in models.get_model_weights(name) if "SWAG_E2E" not in weights.name
    )
    size = published.transforms.keywords["crop_size"]
    x = torch.zeros(1, 3, size, size, device="meta")
    costs = profile(model, x)
    layers = (*costs.layers, *costs.fixed)
    macs = sum(layer.macs for layer in layers)

    with_weights, of_attention = products(model, x)
    assert macs == with_weights

    # torchvision counts in units of 10^9 with three digits, the fixed layers and the products of
    # queries, keys and values included; those have no weights, so that no layer here has them.
    assert abs((macs + of_attention) / 1e9 - published.meta["_ops"]) <= 0.000501
    # Its attention is that of vision transformers, Swin and MaxViT.
    assert (of_attention > 0) == name.startswith(("vit", "swin", "maxvit"))

    # Parameters are the counted weights, and biases, norms, tokens and tables. torchvision counts
    # inception_v3 with its auxiliary classifier, which the forward that it counts does not reach.
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("AuxLogits.")}
    auxiliary = 3_326_696 if name == "inception_v3" else 0
    total = sum(parameter.numel() for parameter in parameters.values())
    assert total + auxiliary == published.meta["num_params"]
    kernels = (nn.Linear, nn.modules.conv._ConvNd)
    counted = sum(m.weight.numel() for m in model.modules() if isinstance(m, kernels))
    packed = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert costs.all_weights == counted + sum(m.in_proj_weight.numel() for m in packed)
    assert 0.9 * total < costs.all_weights < total


def test_all_eighty_are_profiled():
    assert len(TORCHVISION) >= 80
    assert set(FAST) < set(TORCHVISION)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2), (4, 7, 5)),
        (nn.ConvTranspose3d(2, 3, (1, 2, 3), bias=False), (2, 4, 4, 4)),
        (nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect"), (4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (4, 7, 5)),
        (nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate", dilation=2), (2, 6, 6, 6)),
        (nn.Conv2d(4, 4, 3, padding="same", groups=4), (4, 7, 5)),
        (nn.Linear(5, 7), (3, 2, 5)),
    ],
)
def test_macs_of_a_layer_equal_the_flop_counter_of_torch(layer, shape):
    costs = profile(nn.Sequential(layer), torch.zeros(2, *shape), fixed=[])
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, *shape))
    (counted,) = costs.layers
    assert counted.macs == counter.get_total_flops() // 2
    assert counted.weights == layer.weight.numel()
    assert counted.kind == type(layer).__name__.lower()


def test_macs_of_transformer_layers_equal_the_flop_counter_per_module():
    model = nn.Sequential(
        nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)
    )
    x = torch.zeros(1, 5, 6)
    costs = profile(model, x)
    with FlopCounterMode(display=False) as counter:
        model.train()(x)
    flops = counter.get_flop_counts()
    for layer in (*costs.layers, *costs.fixed):
        module, attention = f"Sequential.{layer.name}", "Sequential.1.self_attn"
        if layer.name.startswith("1.self_attn"):
            continue  # one module there, its two projections here
        assert sum(flops[module].values()) == 2 * layer.macs
    both = sum(layer.macs for layer in costs.layers if layer.name.startswith("1.self_attn"))
    assert 2 * both == sum(
        count for operator, count in flops[attention].items() if str(operator) in WITH_WEIGHTS
    )
