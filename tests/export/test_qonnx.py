import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from mixed_policies import Dimensions, mixed_network, mixed_policy, with_powers_of_two
from networks import Attending, Depthwise, NoNorm, PreActivation, Shared, Upsampling
from torch import nn

from limpq_ext import quantized_layers
from limpq_ext.export.codes import layer_codes

pytest.importorskip("onnxscript", reason="the export extra is not installed")
import onnx_ir

from limpq_ext.export.qonnx import QONNX_DOMAIN, qonnx_model

NETWORKS = [Depthwise, NoNorm, Shared, PreActivation, Upsampling, Attending, Dimensions]
WEIGHTS = pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])


def sample(make):
    shape = (1, 4, 16, 16) if make is Dimensions else (1, 3, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def network_of(make, **options):
    return mixed_network(make, images=(4, *sample(make).shape[1:]), **options)


def exported(network, make):
    return qonnx_model(network, sample(make))


@cache
def case(make, per_channel=False):
    """A network and what it is in QONNX; tests leave both as they are."""
    options = {"per_channel_weights": per_channel, "symmetric_weights": per_channel}
    network = network_of(make, **options)
    return network, exported(network, make)


def quants(model):
    return {node.name: node for node in model.graph if node.op_type == "Quant"}


def values(node):
    """The inputs of a Quant but the first: scale, zero point and bits."""
    return [value.const_value.numpy() for value in node.inputs[1:]]


def flags(node):
    return node.attributes["signed"].as_int(), node.attributes["narrow"].as_int()


def in_qonnx(model, x):
    """All values of a graph by name, as qonnx's executor computes them, and its graph."""
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    wrapped = ModelWrapper(onnx_ir.to_proto(model)).transform(InferShapes())
    given = {wrapped.graph.input[0].name: x.numpy()}
    return execute_onnx(wrapped, given, return_full_exec_context=True), wrapped.graph


@WEIGHTS
@pytest.mark.parametrize("make", [Depthwise, Shared, PreActivation, Upsampling])
def test_qonnx_computes_exactly_what_the_network_does(make, per_channel):
    options = {"per_channel_weights": per_channel, "symmetric_weights": per_channel}
    network, x = with_powers_of_two(network_of(make, **options)), sample(make)
    found, graph = in_qonnx(exported(network, make), x)
    wanted = network(x).detach().numpy()
    assert wanted.std() > 0
    np.testing.assert_array_equal(found[graph.output[0].name], wanted)


@WEIGHTS
@pytest.mark.parametrize("make", NETWORKS)
def test_qonnx_rounds_exactly_as_every_quantizer_does(make, per_channel):
    network, model = case(make, per_channel)
    x = sample(make)
    found, graph = in_qonnx(model, x)
    layers = quantized_layers(network)
    inputs, weights = set(), set()
    for node in graph.node:
        if node.op_type != "Quant":
            continue
        given, put_out = (torch.tensor(found[name]) for name in (node.input[0], node.output[0]))
        if ".input" in node.name:
            name = node.name.rpartition(".input")[0]
            assert torch.equal(layers[name].input_quantizer(given), put_out)
            inputs.add(name)
        else:
            name = node.name.rpartition(".weight")[0]
            wanted = layers[name].quantized_weight()
            turned = "transposed" in node.name
            assert torch.equal(put_out, wanted.T if turned else wanted)
            assert torch.equal(given, put_out)
            weights.add(name)
    assert inputs == weights == set(layers)
    # Sums of float32 products depend on their order.
    wanted = network(x).detach().numpy()
    np.testing.assert_allclose(found[graph.output[0].name], wanted, atol=1e-6)


@WEIGHTS
@pytest.mark.parametrize("make", [Depthwise, NoNorm, PreActivation, Attending])
def test_qonnx_counts_the_costs_that_are_searched_with(make, per_channel):
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.inference_cost import inference_cost

    costs, policy = mixed_policy(make())
    model = onnx_ir.to_proto(case(make, per_channel)[1])
    found = inference_cost(ModelWrapper(model), discount_sparsity=False)["total_cost"]
    # Of queries and keys, which have no weights to search bits of.
    in_float = 32 * 32 * found.get("op_mac_FLOAT32_FLOAT32", 0)
    fixed = sum(layer.macs * 8 * 8 for layer in costs.fixed)
    assert found["total_bops"] - in_float == costs.bitops(policy.bits()) + fixed
    assert found["total_mem_w_bits"] == costs.size_bits(policy.bits())


def test_a_file_needs_qonnx_alone(tmp_path):
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    (network, model), x = case(Depthwise), sample(Depthwise)
    onnx_ir.save(model, tmp_path / "network.onnx")
    np.save(tmp_path / "x.npy", x.numpy())
    script = """
import sys
sys.modules["limpq_ext"] = sys.modules["torch"] = None
import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup
cleanup("network.onnx", out_file="clean.onnx")
model = ModelWrapper("clean.onnx")
found = execute_onnx(model, {model.graph.input[0].name: np.load("x.npy")})
np.save("y.npy", *found.values())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    wanted = network(x).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, atol=1e-6)


@WEIGHTS
@pytest.mark.parametrize("make", NETWORKS)
def test_every_quantizer_is_a_quant_node_of_its_grid(make, per_channel):
    network, model = case(make, per_channel)
    nodes, layers = quants(model), layer_codes(network)
    second_runs = 1 if make is Shared else 0
    assert len(nodes) == 2 * len(layers) + second_runs
    for name, layer in layers.items():
        weights = nodes.get(f"{name}.weight") or nodes[f"{name}.weight_transposed"]
        for node, grid in (
            (nodes[f"{name}.input"], layer.input_range),
            (weights, layer.weight_range),
        ):
            scale, zero_point, bits = values(node)
            np.testing.assert_array_equal(scale.reshape(-1), grid.scale.reshape(-1).numpy())
            assert (zero_point, bits) == (0, grid.bits)
            assert flags(node) == (grid.signed, grid.signed and grid.quant_min == -grid.quant_max)
            assert node.domain == QONNX_DOMAIN
        assert flags(weights) == (1, per_channel)
        codes = weights.inputs[0].const_value.numpy() / values(weights)[0]
        wanted = layer.weights.numpy()
        np.testing.assert_array_equal(codes.round(), wanted.T if "_t" in weights.name else wanted)


@pytest.mark.parametrize("make", [Depthwise, Attending])
def test_onnx_reads_what_is_written(make):
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class Quant(OpRun):
        """The definition in QONNX's documentation."""

        op_domain = QONNX_DOMAIN

        def _run(self, x, scale, zero_point, bits, signed, narrow, rounding_mode):
            assert (zero_point, rounding_mode) == (0, "ROUND")
            low = -(2 ** (bits - 1)) + narrow if signed else 0
            high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
            return ((x / scale).clip(low, high).round() * scale,)

    (network, model), x = case(make), sample(make)
    model = onnx_ir.to_proto(model)
    onnx.checker.check_model(model)
    run = ReferenceEvaluator(model, new_ops=[Quant])
    (found,) = run.run(None, {model.graph.input[0].name: x.numpy()})
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)


def test_bits_above_8_are_exact():
    network = with_powers_of_two(network_of(PreActivation, pairs=((9, 10), (16, 3), (3, 16))))
    model = exported(network, PreActivation)
    assert {int(values(node)[2]) for node in quants(model).values()} == {3, 8, 9, 10, 16}
    found, graph = in_qonnx(model, sample(PreActivation))
    weights = {name: layer.quantized_weight() for name, layer in quantized_layers(network).items()}
    for node in graph.node:
        if node.name.endswith(".weight"):
            wanted = weights[node.name.rpartition(".")[0]]
            assert torch.equal(torch.tensor(found[node.output[0]]), wanted)


def test_normalisations_stay_and_the_batch_is_one_sample():
    model = qonnx_model(network_of(Depthwise), torch.zeros(4, 3, 16, 16))
    assert [node.op_type for node in model.graph].count("BatchNormalization") == 3
    assert list(model.graph.inputs[0].shape) == [1, 3, 16, 16]
    assert list(model.graph.outputs[0].shape) == [1, 5]


@pytest.mark.parametrize(("make", "opset"), [(Depthwise, 18), (Upsampling, 19)])
def test_the_operators_are_the_oldest_that_hold_the_network(make, opset):
    assert case(make)[1].opset_imports == {"": opset, QONNX_DOMAIN: 1}


def test_layers_without_bits_stay_in_float():
    model = exported(network_of(Depthwise, without=("project",)), Depthwise)
    assert not [name for name in quants(model) if name.startswith("project")]
    ((conv, _),) = model.graph.initializers["project.weight"].uses()
    assert conv.op_type == "Conv"


def test_the_network_is_left_as_it_is():
    network, x = network_of(Attending).train(), sample(Attending)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    exported(network, Attending)
    assert network.training
    assert network.head.input_quantizer.training
    for name, value in network.state_dict().items():
        assert torch.equal(before[name], value)
    network(x)


def test_a_network_that_torch_cannot_export_is_one_sentence():
    class Deciding(Depthwise):
        decides = False

        def forward(self, x):
            return super().forward(-x if self.decides and x.sum() < 0 else x)

    network = network_of(Deciding)
    network.decides = True
    with (
        warnings.catch_warnings(record=True) as told,
        pytest.raises(ValueError, match=r"^Deciding cannot be exported: .*data-dependent") as error,
    ):
        exported(network, Deciding)
    assert "\n" not in str(error.value)
    assert not told


def test_a_float_network_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no quantized layers"):
        qonnx_model(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
