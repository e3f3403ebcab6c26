"""Quantized networks whose batch size is free: exported once, compiled once."""

import subprocess
import sys

import pytest
import torch
from networks import Attending
from torch import nn

from limpq_ext import apply_policy, lsq_fake_quantize, prepare, select_bits
from limpq_ext.values.policy import LayerBits, Policy


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def quantized_network():
    x = torch.rand(4, 3, 8, 8)
    model = prepare(network(), bits=(2, 4), example_input=x)
    for bits in (2, 4):
        select_bits(model, bits)
        model(x)
    return model


def applied_network():
    layers = [LayerBits(name, 4, 4) for name in ("2",)]
    fixed = [LayerBits(name, 8, 8) for name in ("0", "6")]
    model = apply_policy(network(), Policy(tuple(layers), tuple(fixed)))
    model(torch.rand(4, 3, 8, 8))
    return model


def attending_network():
    x = torch.rand(4, 3, 8, 8)
    torch.manual_seed(0)
    model = prepare(Attending(), bits=(4,), example_input=x)
    model(x)
    return model


@pytest.mark.parametrize("make", [quantized_network, applied_network, attending_network])
def test_a_quantized_network_is_exported_with_a_free_batch_size(make):
    model = make().eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    program = torch.export.export(model, (torch.rand(4, 3, 8, 8),), dynamic_shapes=shapes)
    for batch in (2, 7):
        x = torch.rand(batch, 3, 8, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def test_training_compiles_once_for_all_batch_sizes():
    model = quantized_network().train()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=True)
    for batch in (5, 6, 9):  # no other axis has this size: equal ones are taken for the same
        compiled(torch.rand(batch, 3, 8, 8)).square().mean().backward()
    assert len(graphs) == 1


def test_the_gradient_factor_follows_the_batch_in_a_compiled_graph():
    def gradient(function, x):
        scale = torch.tensor(0.3, requires_grad=True)
        return torch.autograd.grad(function(x, scale).square().sum(), scale)[0]

    def quantize(x, scale):
        return lsq_fake_quantize(x, scale, -4, 3)

    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 5, 8):
        x = torch.randn(batch, 7)
        torch.testing.assert_close(gradient(compiled, x), gradient(quantize, x))


def test_an_exported_file_names_the_package_to_import(tmp_path):
    path = tmp_path / "network.pt2"
    program = torch.export.export(quantized_network().eval(), (torch.rand(4, 3, 8, 8),))
    torch.export.save(program, path)
    load = f"import torch; torch.export.load({str(path)!r})"
    alone = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    assert alone.returncode != 0
    assert "limpq_ext" in alone.stderr
    with_package = [sys.executable, "-c", f"import limpq_ext.kernels.ops; {load}"]
    subprocess.run(with_package, capture_output=True, text=True, check=True)
