"""Networks quantized at bits that differ from layer to layer, calibrated on random images."""

import itertools
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext import Policy, apply_policy, profile, quantized_layers
from limpq_ext.values.policy import LayerBits

IMAGES = (4, 3, 16, 16)
PAIRS = ((2, 3), (4, 5), (3, 8), (8, 2), (6, 7), (5, 4))
"""(weight bits, activation bits) of the layers, in turn."""


class Dimensions(nn.Module):
    """Convolutions of one and three dimensions, transposed, in groups; linear layers in between."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(1, 4, (3, 3, 3), padding=1)
        self.grouped = nn.Conv3d(4, 4, (3, 1, 1), groups=2, bias=False)
        self.back = nn.ConvTranspose3d(4, 2, (1, 2, 2), stride=(1, 2, 2))
        self.line = nn.Conv1d(2, 6, 5, stride=4)
        self.longer = nn.ConvTranspose1d(6, 4, 3, groups=2)
        self.sequence = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.volume(x[:, None]))))
        x = F.relu(self.line(F.relu(self.back(x)).flatten(2)))
        x = F.relu(self.sequence(F.relu(self.longer(x)).transpose(1, 2)))
        return self.head(x.mean(1))


def mixed_policy(model, pairs=PAIRS, images=IMAGES):
    """The costs of a model, and a policy of these bits in turn; the fixed layers at 8 bits."""
    costs = profile(model, torch.zeros(images))
    layers = zip(costs.layers, itertools.cycle(pairs), strict=False)
    searched = tuple(LayerBits(layer.name, *bits) for layer, bits in layers)
    return costs, Policy(searched, tuple(LayerBits(layer.name, 8, 8) for layer in costs.fixed))


def mixed_network(make, pairs=PAIRS, images=IMAGES, without=(), **options):
    """A network of a policy of these bits, for evaluation; layers of `without` are in float."""
    torch.manual_seed(0)
    model = make()
    _, policy = mixed_policy(model, pairs, images)
    layers, fixed = (
        tuple(layer for layer in part if layer.name not in without)
        for part in (policy.layers, policy.fixed)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = apply_policy(model, Policy(layers, fixed), **options).train()
    for _ in range(3):
        network(torch.randn(images))
    return network.eval()


@torch.no_grad()
def with_powers_of_two(network):
    """The same with step sizes and normalisations that are powers of two, and few bits in biases.

    Sums of products are then exact in float32, in any order.
    """
    for layer in quantized_layers(network).values():
        for quantizer in (layer.input_quantizer, layer.weight_quantizer):
            quantizer.scale.copy_(quantizer.scale.log2().round().exp2())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 2.0**-16
            variance = module.running_var.log2().div(2).round().mul(2).exp2()
            module.running_var.copy_(variance.clamp(min=2.0**-14) - module.eps)
            module.running_mean.copy_(module.running_mean.mul(8).round().div(8))
            module.weight.copy_(module.weight.log2().round().exp2())
        if isinstance(getattr(module, "bias", None), torch.Tensor):
            module.bias.copy_(module.bias.mul(8).round().div(8))
    return network
