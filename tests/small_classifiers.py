"""Small classifiers in float64, their batches, and what goes through their layers, plainly."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.scores.subject import Subject

CLASSES = 4


class Convolutions(nn.Module):
    """One that feeds a batch normalisation, one with a bias alone, a depthwise one, and a linear
    layer that runs twice; ReLUs in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.biased = nn.Conv2d(6, 6, 1)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.relu(self.biased(self.depthwise(x)), inplace=True).mean((2, 3))
        x = F.relu(self.hidden(x), inplace=True)
        return self.head(F.relu(self.hidden(x), inplace=True))


class Attention(nn.Module):
    """One block of a transformer on the pixels of an image, and a head on their mean."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.proj = nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.embed(x[:, :, ::2, ::2].flatten(2).transpose(1, 2))
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(*qkv)
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1))


NETWORKS = {"convolutions": Convolutions, "attention": Attention}
LAYERS = {
    "convolutions": ("conv", "depthwise", "biased", "hidden"),
    "attention": ("qkv", "proj", "mlp.0", "mlp.2"),
}
"""Those that are searched."""


@functools.cache
def layers_of(name, bits):
    """The quantized layers of a subject on the batches; they are not to be changed."""
    return Subject(classifier(name), image_batches(), bits).layers


def classifier(name="convolutions"):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    model.train()
    for _ in range(10):
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return model.eval()


def image_batches(sizes=(5, 3)):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def quantized(layer, kind, bits, x):
    """A tensor at a bit-width, with the step size that a quantized layer has."""
    quantizer = layer.weight_quantizer if kind == "weight" else layer.input_quantizer
    scale = quantizer.scale.detach()[quantizer.bits.index(bits)].double()
    scale = scale.reshape(-1, *[1] * (x.dim() - 1))
    low, high = quantizer.thresholds(bits)
    return (x / scale).clamp(low, high).round() * scale


def calls_of(model, name, x, target, reduction="sum"):
    """(input, output, gradient at the input, at the output) of each call; the weights' gradient."""
    model = copy.deepcopy(model)
    seen = []

    def enter(module, inputs):
        seen.append([inputs[0].clone().requires_grad_()])
        seen[-1][0].retain_grad()
        return (seen[-1][0],)

    def leave(module, inputs, output):
        output.retain_grad()
        seen[-1].append(output)
        return output.clone()

    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave)
    F.cross_entropy(model(x), target, reduction=reduction).backward()
    calls = [(a.detach(), b.detach(), a.grad, b.grad) for a, b in seen]
    return calls, layer.weight.grad


def output_with(model, layers, name, kind, bits, x):
    """What a layer of a float model puts out for an input, with one of its tensors quantized.

    ``layers`` are the quantized ones of a subject.
    """
    layer = copy.deepcopy(model.get_submodule(name)).requires_grad_(False)
    if kind == "weight":
        layer.weight.copy_(quantized(layers[name], kind, bits, layer.weight))
        return layer(x)
    return layer(quantized(layers[name], kind, bits, x))
