import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from mixed_policies import Dimensions, mixed_network, with_powers_of_two
from networks import (
    Attending,
    Depthwise,
    NoNorm,
    PaddedConv2d,
    PreActivation,
    Shared,
    Upsampling,
)
from torch import nn

from limpq_ext import Policy, apply_policy, quantized_layers
from limpq_ext.export.codes import layer_codes
from limpq_ext.export.program import aot_package, exported_program
from limpq_ext.values.policy import LayerBits

NETWORKS = [Depthwise, NoNorm, Shared, PreActivation, Upsampling, Attending, Dimensions]
WEIGHTS = pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
FEW_BITS = (2, 3, 4, 5, 6, 7)


def images(make, number=4):
    channels = 4 if make is Dimensions else 3
    return torch.randn(number, channels, 16, 16, generator=torch.Generator().manual_seed(1))


@cache
def case(make, per_channel=False):
    """A network and its program; tests leave both as they are."""
    options = {"per_channel_weights": per_channel, "symmetric_weights": per_channel}
    network = mixed_network(make, images=images(make).shape, **options)
    return network, exported_program(network, images(make, 1))


def calls(program):
    """The operators of a program, in their order."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class Branches(nn.Module):
    """Puts out what every quantizer does: a layer of one weight, which is 1, for each bit-width."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in FEW_BITS)
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, x):
        x = x.unsqueeze(-1)
        every_other = enumerate(self.layers)
        return torch.cat([layer(x if i % 2 else x.relu()) for i, layer in every_other], dim=-1)


def branches():
    """The network, and values in and beyond the ranges, among them ties and their neighbours."""
    torch.manual_seed(0)
    layers = [LayerBits(f"layers.{place}", 8, bits) for place, bits in enumerate(FEW_BITS)]
    network = apply_policy(Branches(), Policy(tuple(layers))).train()
    network(torch.randn(64, 64))
    ties = []
    for layer in quantized_layers(network).values():
        scale = layer.input_quantizer.scale.detach()
        halves = (torch.arange(-140, 140) + 0.5) * scale
        ties += [halves, halves.nextafter(scale * 1e3), halves.nextafter(scale * -1e3)]
    x = torch.cat([torch.randn(50_000) * 3, *ties, torch.tensor([0.0, -0.0, 1e4, -1e4])])
    return network.eval(), x[: len(x) // 8 * 8].reshape(8, -1)


@WEIGHTS
@pytest.mark.parametrize("make", NETWORKS)
def test_a_program_computes_exactly_what_the_network_does_for_any_batch(make, per_channel):
    network, program = case(make, per_channel)
    run = program.module()
    for number in (1, 2, 4, 7):
        x = images(make, number)
        assert torch.equal(run(x), network(x))


def test_codes_are_those_of_the_network_at_ties_too():
    network, x = branches()
    assert torch.equal(exported_program(network, x).module()(x), network(x))


@WEIGHTS
@pytest.mark.parametrize("make", NETWORKS)
def test_weights_are_8_bit_integers_and_there_are_no_others(make, per_channel):
    network, program = case(make, per_channel)
    state, layers = program.state_dict, layer_codes(network)
    for name, layer in layers.items():
        stored = state[f"{name}.weight_quantizer.codes"]
        assert stored.dtype == torch.int8
        assert torch.equal(stored, layer.weights)
        assert f"{name}.weight" not in state
        of_tensor = layer.weight_range.axis is None
        assert len(state[f"{name}.weight_quantizer.scales"].unique()) == 1 or not of_tensor


@pytest.mark.parametrize("make", NETWORKS)
def test_a_program_is_of_pytorchs_own_operators(make):
    _, program = case(make)
    kinds = {name.split(".")[0] for name in calls(program) if not name.startswith("<")}
    assert kinds == {"aten", "quantized_decomposed"}


def test_layers_with_a_forward_of_their_own():
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), PaddedConv2d(4, 4, 3), nn.Conv2d(4, 4, 3))

    network, x = mixed_network(make), images(make)
    assert torch.equal(exported_program(network, x).module()(x), network(x))


def test_layers_without_bits_stay_in_float():
    network, x = mixed_network(Depthwise, without=("project",)), images(Depthwise)
    program = exported_program(network, x)
    assert program.state_dict["project.weight"].dtype == torch.float32
    assert torch.equal(program.module()(x), network(x))


def test_a_file_needs_pytorch_alone(tmp_path):
    (network, program), x = case(Attending), images(Attending)
    torch.export.save(program, tmp_path / "network.pt2")
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys
sys.modules["limpq_ext"] = None
import torch
import torch.ao.quantization.fx._decomposed
program = torch.export.load("network.pt2")
torch.save(program.module()(torch.load("x.pt")).detach(), "y.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "y.pt"), network(x))


def test_compiled_the_codes_are_the_networks():
    network, x = branches()
    run = exported_program(network, x).module()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        found = torch.compile(run)(x)
    assert torch.equal(found, network(x))


@pytest.mark.slow
def test_compiled_by_aotinductor_the_codes_are_the_networks(tmp_path):
    network, x = branches()
    path = aot_package(exported_program(network, x), tmp_path / "network.pt2")
    assert path == tmp_path / "network.pt2"
    torch.save(x, tmp_path / "x.pt")
    script = """
import sys
sys.modules["limpq_ext"] = None
import torch
run = torch._inductor.aoti_load_package("network.pt2")
x = torch.load("x.pt")
torch.save([run(x), run(x[:1])], "y.pt")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    found, of_one = torch.load(tmp_path / "y.pt")
    assert torch.equal(found, network(x))
    assert torch.equal(of_one, network(x[:1]))


def test_inductors_integer_kernels_keep_ranges_below_8_bits():
    quantizer = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
    pytest.importorskip(quantizer, reason="torchao, which has them, is not installed")

    def make():
        layers = [
            layer
            for place in range(len(FEW_BITS) + 2)
            for layer in (nn.Conv2d(6 if place else 3, 6, 3, padding=1), nn.ReLU())
        ]
        return nn.Sequential(*layers)

    pairs = [(4, bits) for bits in FEW_BITS]
    network = mixed_network(make, pairs)
    with_powers_of_two(network)
    x = images(make)
    run = exported_program(network, x).module()
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True, force_disable_caches=True):
        found, code = torch._inductor.utils.run_and_get_code(torch.compile(run), x)
    assert "qconv_pointwise" in "".join(code)
    wanted = network(x)
    assert wanted.std() > 0
    assert torch.equal(found, wanted)


def test_more_than_8_bits_are_an_error_that_names_the_layers():
    network = mixed_network(PreActivation, pairs=((9, 4), (4, 4)))
    with pytest.raises(
        ValueError, match=r"torch\.export holds at most 8 bits, but W9A4 is asked for in 'conv1'"
    ):
        exported_program(network, images(PreActivation))


def test_the_network_is_left_as_it_is():
    network = mixed_network(Attending).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    exported_program(network, images(Attending))
    assert network.training
    assert network.head.input_quantizer.training
    assert list(before) == list(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(before[name], value)
    network(images(Attending))


def test_a_network_that_torch_cannot_export_is_one_sentence():
    class Deciding(Depthwise):
        decides = False

        def forward(self, x):
            return super().forward(-x if self.decides and x.sum() < 0 else x)

    network = mixed_network(Deciding)
    network.decides = True
    with (
        warnings.catch_warnings(record=True) as told,
        pytest.raises(ValueError, match=r"^Deciding cannot be exported: .*data-dependent") as error,
    ):
        exported_program(network, images(Deciding))
    assert "\n" not in str(error.value)
    assert not told


def test_a_package_of_another_name_is_an_error():
    with pytest.raises(ValueError, match=r"packages end in \.pt2, got network\.so"):
        aot_package(case(Depthwise)[1], Path("network.so"))
