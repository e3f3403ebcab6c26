"""Small quantized networks to export, with the batches that they were calibrated on."""

import random

import networks
import torch
from torch import nn

import limpq_ext as lq
from limpq_ext.values.policy import LayerBits, Policy


class Signal(nn.Module):
    """Convolutions in one dimension, a transposed one among them, and a norm with odd factors."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1)
        self.norm2 = nn.BatchNorm1d(6)
        self.hidden = nn.Linear(6, 7, bias=False)
        self.norm3 = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -0.7, 0.0, 2.0, 1e-12, -1.5, 0.3, 1.0]))
            self.norm.bias.normal_()
            self.norm2.weight.mul_(-1)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.tanh(self.norm2(self.up(x)))
        return self.head(torch.relu(self.norm3(self.hidden(x.mean(2)))))


class Volume(nn.Module):
    """Convolutions in three dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(2, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 6, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm3d(6)
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(self.up(x).mean((2, 3, 4)))


class Subclasses(nn.Module):
    """Layers with a forward of their own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.padded = networks.PaddedConv2d(6, 6, 3)
        self.standardized = networks.StandardizedConv2d(6, 6, 3)  # which stays in float
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.padded(torch.relu(self.first(x))))
        return self.head(torch.relu(self.standardized(x)).mean((2, 3)))


IMAGE = (3, 16, 16)
MADE = {
    "depthwise": (networks.Depthwise, IMAGE),
    "without norms": (networks.NoNorm, IMAGE),
    "shared": (networks.Shared, IMAGE),
    "pre-activation": (networks.PreActivation, IMAGE),
    "upsampling": (networks.Upsampling, IMAGE),
    "attending": (networks.Attending, IMAGE),
    "subclasses": (Subclasses, IMAGE),
    "signal": (Signal, (3, 24)),
    "volume": (Volume, (2, 8, 8, 8)),
}


def float_network(name):
    """A float network, its normalisations with statistics, and batches for it."""
    torch.manual_seed(0)
    make, shape = MADE[name]
    model = make()
    batches = [(torch.randn(8, *shape), torch.arange(8) % 5) for _ in range(2)]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    return model.eval(), batches


def quantized(name, *, per_channel=True, seed=0, bits=(2, 3, 4, 5, 6, 7, 8), **options):
    """A network at bits by chance, calibrated, and its batches."""
    model, batches = float_network(name)
    exclude = ["standardized"] if name == "subclasses" else []
    costs = lq.profile(model, batches[0][0][:1], exclude=exclude)
    choose = random.Random(seed).choice
    layers = tuple(LayerBits(layer.name, choose(bits), choose(bits)) for layer in costs.layers)
    fixed = tuple(LayerBits(layer.name, 8, 8) for layer in costs.fixed)
    made = lq.apply_policy(model, Policy(layers, fixed), per_channel_weights=per_channel, **options)
    lq.calibrate(made, batches)
    return made.eval(), batches
