"""LSQ in plain PyTorch, the reference that the fused quantizers and the joint step are held to."""

import copy
import math

import torch
from torch import nn

from limpq_ext.kernels.ops import thresholds
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.network import quantized_layers


def eager_fake_quantize(x, scale, quant_min, quant_max, grad_factor):
    """The chain of autograd operations with straight-through rounding by detach()."""
    scale = scale * grad_factor + (scale - scale * grad_factor).detach()
    v = (x / scale).clamp(quant_min, quant_max)
    return (v + (v.round() - v).detach()) * scale


class EagerQuantizer(nn.Module):
    """One bit-width after another, each with a parameter of its own."""

    def __init__(self, fused):
        super().__init__()
        self.bits = fused.bits
        self.signed = fused.signed is None or fused.signed
        self.scales = nn.ParameterList([nn.Parameter(s.detach().clone()) for s in fused.scale])
        self.axis = fused.channel_axis
        self.selected = 0

    def select(self, bits):
        self.selected = self.bits.index(bits)

    def forward(self, x):
        quant_min, quant_max = thresholds(self.bits[self.selected], signed=self.signed)
        scale = self.scales[self.selected]
        factor = 1 / math.sqrt(x.numel() // scale.numel() * quant_max)
        if self.axis is not None:
            shape = [1] * x.dim()
            shape[self.axis] = -1
            scale = scale.reshape(shape)
        return eager_fake_quantize(x, scale, quant_min, quant_max, factor)


class EagerNorms(nn.Module):
    """A batch normalisation module per bit-width."""

    def __init__(self, switchable, float_norm):
        super().__init__()
        self.bits = switchable.bits
        self.source = switchable.source
        self.norms = nn.ModuleList([copy.deepcopy(float_norm) for _ in self.bits])
        self.selected = 0

    def forward(self, x):
        return self.norms[self.selected](x)


def eager_twin(prepared, float_model):
    """The same network, quantized by autograd operations and with separate batch norms."""
    twin = copy.deepcopy(prepared)
    norms = {
        name: module
        for name, module in twin.named_modules()
        if isinstance(module, SwitchableBatchNorm)
    }
    for layer in quantized_layers(twin).values():
        layer.weight_quantizer = EagerQuantizer(layer.weight_quantizer)
        layer.input_quantizer = EagerQuantizer(layer.input_quantizer)
    for name, norm in norms.items():
        parent, _, child = name.rpartition(".")
        twin.get_submodule(parent)._modules[child] = EagerNorms(
            norm, float_model.get_submodule(name)
        )
    return twin


def eager_select(twin, bits):
    """Run the twin at these bits per layer."""
    for name, layer in quantized_layers(twin).items():
        layer.weight_quantizer.select(bits[name])
        layer.input_quantizer.select(bits[name])
    for module in twin.modules():
        if isinstance(module, EagerNorms):
            module.selected = module.bits.index(bits[module.source])


def start_activations(prepared, x):
    """Give every activation scale its start value, one bit-width after another."""
    from limpq_ext import select_bits

    prepared.train()
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    with torch.no_grad():
        for bits in next(iter(quantized_layers(prepared).values())).input_quantizer.bits:
            select_bits(prepared, bits)
            prepared(x)
    # The statistics of batch normalisation are put back.
    for name, value in prepared.state_dict().items():
        if "running" in name or "num_batches" in name:
            value.copy_(state[name])
