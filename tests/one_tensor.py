"""One tensor quantized at a time: networks, and what it does to them in plain, slow steps."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.kernels.ops import lsq_fake_quantize, thresholds
from limpq_ext.nn.start_values import Distribution, Histogram


class Twice(nn.Module):
    """One layer runs twice, ReLUs are in place, and one convolution feeds a normalisation."""

    biases = ("first", "head")

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.norm(self.conv(x)), inplace=True).mean((2, 3))
        x = F.relu(self.hidden(x), inplace=True)
        return self.head(F.relu(self.hidden(x), inplace=True))


class Block(nn.Module):
    """A residual block before whose first layer a ReLU changes in place what it is given."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.short = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        body = self.body(x)
        return self.short(x) + body


class Residual(nn.Module):
    biases = ("stem.0", "blocks.0.body.4", "blocks.1.body.4", "head.1")

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Identity())
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(96, 4))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


def network(kind=Twice):
    torch.manual_seed(0)
    model = kind().double()
    model.train()
    for _ in range(10):
        model(torch.randn(8, 3, 6, 6, dtype=torch.float64))
    return model.eval()


def batches(count=2, size=5):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def inputs_of(model, name, x):
    """What comes into a layer, call by call."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].clone())
    )
    model(x)
    handle.remove()
    return seen


def scale_of(model, name, kind, bits, data):
    if kind == "weight":
        found, signed = Distribution.of(model.get_submodule(name).weight), True
    else:
        histogram = Histogram()
        for x, _ in data:
            for value in inputs_of(model, name, x):
                histogram.add(value)
        found, signed = histogram.distribution(), histogram.lowest < 0
    levels = thresholds(bits, signed=signed)
    return found.least_error(*levels)[0].float(), levels


def changed(model, name, kind, bits, data):
    """The model with the weights or the input of one layer quantized, and nothing else."""
    scale, levels = scale_of(model, name, kind, bits, data)
    model = copy.deepcopy(model)
    layer = model.get_submodule(name)
    if kind == "weight":
        layer.weight.data = lsq_fake_quantize(layer.weight.data, scale.double(), *levels)
    else:
        layer.register_forward_pre_hook(
            lambda _, inputs: (lsq_fake_quantize(inputs[0], scale.double(), *levels),)
        )
    return model


def by_channel(x, layer):
    axes = [axis for axis in range(x.dim()) if axis != (x.dim() - 1 if layer else 1)]
    return x.mean(axes), x.var(axes, correction=0)


def corrected(model, reference, x):
    """Statistics and biases of a changed model corrected in one forward, by what x moves."""
    told = {}
    named = dict(reference.named_modules())
    norms = [name for name, module in named.items() if isinstance(module, nn.BatchNorm2d)]
    handles = [
        named[name].register_forward_hook(
            lambda module, given, out, name=name: told.update(
                {
                    name: by_channel(
                        given[0] if name in norms else out, isinstance(module, nn.Linear)
                    )
                }
            )
        )
        for name in (*norms, *reference.biases)
    ]
    reference(x)
    for handle in handles:
        handle.remove()
    for name in norms:

        def correct(norm, given, name=name):
            (mean, variance), (float_mean, float_variance) = by_channel(given[0], False), told[name]
            norm.running_mean += mean - float_mean
            norm.running_var *= variance / float_variance

        model.get_submodule(name).register_forward_pre_hook(correct)
    for name in reference.biases:

        def shift(layer, _, out, name=name):
            moved = told[name][0] - by_channel(out, isinstance(layer, nn.Linear))[0]
            return out + (moved if isinstance(layer, nn.Linear) else moved[:, None, None])

        model.get_submodule(name).register_forward_hook(shift)
    return model
