"""Small networks with the shapes of trouble: depthwise, shared, nested, without batch norm."""

import torch
from torch import nn
from torch.nn import functional as F


class Depthwise(nn.Module):
    """An inverted residual with a depthwise convolution."""

    def __init__(self, activation=F.relu6):
        super().__init__()
        self.activation = activation
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.expand = nn.Conv2d(8, 16, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.activation(self.stem(x))
        x = self.depthwise(self.activation(self.bn1(self.expand(x))))
        x = self.activation(self.bn2(x))
        return self.head(self.project(x).mean((2, 3)))


class NoNorm(nn.Module):
    """Convolutions with biases, one linear layer within, no batch norm."""

    def __init__(self):
        super().__init__()
        self.features = nn.ModuleDict(
            {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")}
        )
        self.hidden = nn.Linear(6, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.features["b"](F.relu(self.features["a"](x))))
        return self.head(torch.tanh(self.hidden(x.mean((2, 3)))))


class Shared(nn.Module):
    """One convolution and its batch norm used twice, standing under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.again = self.block
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.block(x))
        return self.head(F.relu(self.again(x)).mean((2, 3)))


class PreActivation(nn.Module):
    """Batch norms that a sum of two layers, or a pooled output, reaches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        y = self.conv1(F.relu(self.bn1(x)))
        z = x + self.conv2(F.relu(self.bn2(F.max_pool2d(y, 3, 1, 1))))
        return self.head(F.relu(self.bn3(z)).mean((2, 3)))


class Upsampling(nn.Module):
    """Transposed convolutions, one in groups and one to a given size, with a batch norm between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="circular")
        self.up2 = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = F.relu(self.bn(self.up1(F.relu(self.first(x)))))
        y = self.up2(F.relu(self.down(y)), output_size=x.shape[-2:])
        return self.head(F.relu(y).mean((2, 3)))


class Attending(nn.Module):
    """Attention over patches, with and without its weights, and an MLP."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 4, batch_first=True, add_bias_kv=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.first(y, y, y)[0]
        y = self.norm(x)
        x = x + self.second(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x))).mean(1))


class PaddedConv2d(nn.Conv2d):
    """A subclass with a forward of its own that uses its weight as it is."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


class StandardizedConv2d(nn.Conv2d):
    """A subclass that changes its weight before it multiplies by it."""

    def forward(self, x):
        weight = self.weight - self.weight.mean()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)
