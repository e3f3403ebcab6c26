"""ONNX files in standard operators: they compute what the network does, in a form for engines."""

import collections
import itertools
import subprocess
import sys

import deployed
import numpy as np
import pytest
import torch
from torch import nn

import limpq_ext as lq
from limpq_ext.export.codes import layer_codes

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")

from limpq_ext.export.qcdq import qcdq_model  # noqa: E402
from limpq_ext.export.verify import verify_onnx  # noqa: E402

ir = pytest.importorskip("onnx_ir", reason="the extra export is not installed")


def written(model, x, **options):
    proto = ir.to_proto(qcdq_model(model, x, **options))
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("name", deployed.MADE)
def test_the_file_computes_what_the_network_does(name, per_channel):
    model, batches = deployed.quantized(name, per_channel=per_channel)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = written(model, batches[0][0][:1]).SerializeToString()
    exact = verify_onnx(file, model, batches, "onnxruntime", optimized=False)
    assert exact.largest <= 1
    assert exact.differing <= 1e-3
    assert exact.layers >= len(layer_codes(model))
    assert exact.farthest <= 1e-5
    assert exact.agreement >= 15 / 16
    assert exact.samples == 16
    optimized = verify_onnx(file, model, batches, "onnxruntime")
    assert optimized.largest <= 1
    assert optimized.differing <= 1e-2
    assert optimized.farthest <= 1e-2
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


class Chain(nn.Module):
    """Convolutions, each of which an engine can run in integers but the last."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 16, 32, 16)
        self.features = nn.Sequential()
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            self.features.append(nn.Conv2d(before, after, 3, padding=1, bias=i % 2 == 0))
            self.features.append(nn.BatchNorm2d(after))
            self.features.append(nn.ReLU())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    """At 2, 4, 6 and 8 bits, so that all forms of weights are there."""
    torch.manual_seed(0)
    model = Chain()
    batches = [(torch.randn(8, 3, 24, 24), torch.arange(8) % 5) for _ in range(4)]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    names = [n for n, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    bits = dict(zip(names, [(8, 8), (4, 5), (2, 8), (6, 3), (8, 8)], strict=True))
    layers = tuple(lq.values.policy.LayerBits(n, *bits[n]) for n in names[1:-1])
    fixed = tuple(lq.values.policy.LayerBits(n, *bits[n]) for n in (names[0], names[-1]))
    made = lq.apply_policy(model.eval(), lq.Policy(layers, fixed), per_channel_weights=True)
    lq.calibrate(made, batches)
    return made.eval(), batches


def test_the_file_has_the_form_that_engines_take(chain):
    model, batches = chain
    proto = written(model, batches[0][0][:1])
    counts = collections.Counter(node.op_type for node in proto.graph.node)
    assert counts["Conv"] == 4
    assert "BatchNormalization" not in counts
    assert "Constant" not in counts
    assert [(own.domain, own.version) for own in proto.opset_import] == [("", 21)]
    constants = {value.name: value for value in proto.graph.initializer}
    kinds = {value.name: value.data_type for value in proto.graph.initializer}
    for name, codes in layer_codes(model).items():
        stored = constants[next(n for n in constants if n.startswith(f"{name}.weight_codes"))]
        small = codes.weight_range.bits <= 4
        assert stored.data_type == (onnx.TensorProto.INT4 if small else onnx.TensorProto.INT8)
        assert stored.raw_data
        assert len(stored.raw_data) == -(-codes.weights.numel() // (2 if small else 1))
        assert kinds[f"{name}.input_zero_point"] == onnx.TensorProto.UINT8
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3
        if node.op_type == "DequantizeLinear":
            assert kinds.get(node.input[0]) != onnx.TensorProto.INT4
        if node.op_type == "Clip":
            assert [kinds[end] for end in node.input[1:]] == [onnx.TensorProto.UINT8] * 2
    text = proto.SerializeToString()
    assert b".py" not in text
    assert b"limpq::" not in text
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_codes_stay_what_they_are_when_norms_are_folded(chain):
    """The scale takes the factor, the codes a power of two at most."""
    model, batches = chain
    constants = {
        value.name: onnx.numpy_helper.to_array(value)
        for value in written(model, batches[0][0][:1], shift=False).graph.initializer
    }
    modules = dict(model.named_modules())
    for index in (0, 3, 6, 9):
        name, norm = f"features.{index}", modules[f"features.{index + 1}"]
        layer = layer_codes(model)[name]
        assert np.array_equal(constants[f"{name}.weight_codes"].astype(int), layer.weights.numpy())
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        expected = layer.weight_range.scale.numpy() * factor
        assert constants[f"{name}.weight_scale"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.25])
def test_a_relu6_is_in_the_range_of_the_codes(scale):
    """15 steps of 0.5 are beyond 6, which has the code 12; 15 steps of 0.25 end before it."""
    model, batches = deployed.quantized("depthwise", bits=(4,))
    with torch.no_grad():
        for layer in (model.expand, model.depthwise, model.project):
            layer.input_quantizer.scale.fill_(scale)
        model.bn1.weight.fill_(9)
    proto = written(model, batches[0][0][:1])
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    constants = {v.name: onnx.numpy_helper.to_array(v) for v in proto.graph.initializer}
    assert [int(constants[node.input[2]]) for node in clips] == [12 if scale == 0.5 else 15] * 3
    exact = verify_onnx(proto.SerializeToString(), model, batches, "onnxruntime", optimized=False)
    assert exact.differing <= 1e-3
    assert exact.largest <= 1


def test_a_relu6_that_something_else_reads_stays():
    model, batches = deployed.quantized("depthwise", bits=(4,), seed=1)

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            x = torch.nn.functional.relu6(self.model.stem(x))
            return self.model.expand(x), x.mean()

    proto = written(Beside().eval(), batches[0][0][:1])
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Clip") == 2  # that in float, and that of expand's codes


def test_layers_run_in_integers(chain):
    """Every convolution does; the head follows a mean and puts out what is not quantized."""
    model, batches = chain
    file = written(model, batches[0][0][:1]).SerializeToString()
    assert verify_onnx(file, model, batches, "onnxruntime").integer_kernels == 3
    assert verify_onnx(file, model, batches, "onnxruntime", optimized=False).integer_kernels == 0


def test_shifted_codes_are_exact_and_cut_the_rounding_of_biases(chain):
    model, batches = chain
    files = [
        written(model, batches[0][0][:1], shift=shift).SerializeToString()
        for shift in (True, False)
    ]
    from limpq_ext.export.engines import OnnxRuntime

    x = batches[0][0].numpy()
    exact = [OnnxRuntime(file, optimized=False).run({"x": x}) for file in files]
    assert all(np.array_equal(exact[0][name], exact[1][name]) for name in exact[0])
    shifted, plain = (verify_onnx(file, model, batches, "onnxruntime") for file in files)
    assert shifted.differing < plain.differing / 4
    assert shifted.differing < 1e-3


def test_openvino_computes_the_same_in_integers(chain):
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    model, batches = chain
    found = verify_onnx(
        written(model, batches[0][0][:1]).SerializeToString(), model, batches, "openvino"
    )
    assert found.largest <= 1
    assert found.differing <= 1e-3
    assert found.integer_kernels >= 4


@pytest.mark.parametrize("name", deployed.MADE)
def test_what_multiplies_is_called_after_its_layer(name):
    model, batches = deployed.quantized(name)
    graph = qcdq_model(model, batches[0][0][:1]).graph
    products = [
        node.name
        for node in graph
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and not node.name.startswith("node_")
    ]
    runs_twice = ["block.0.2"] if name == "shared" else []
    assert sorted(products) == sorted([*lq.quantized_layers(model), *runs_twice])
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)


def _to_int4_at_once(proto):
    """4-bit weights go into DequantizeLinear as they are."""
    made_by = {output: node for node in proto.graph.node for output in node.output}
    small = {v.name for v in proto.graph.initializer if v.data_type == onnx.TensorProto.INT4}
    for node in proto.graph.node:
        source = node.input[0]
        while node.op_type == "DequantizeLinear" and source in made_by and source not in small:
            source = made_by[source].input[0]
        if node.op_type == "DequantizeLinear" and source in small:
            node.input[0] = source
            node.input[2] = _constant(proto, f"{source}_zero", 0, node.input[2])
    return proto


def _constant(proto, name, value, like):
    """A 4-bit zero point of the shape of another."""
    shape = next(v.dims for v in proto.graph.initializer if v.name == like)
    count = int(np.prod(shape, dtype=np.int64))
    raw = bytes(-(-count // 2))
    made = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, shape, raw, raw=True)
    proto.graph.initializer.append(made)
    return name


def _clip_in_float(proto):
    """The cut to the range of the bits comes before the quantization."""
    constants = {v.name: onnx.numpy_helper.to_array(v) for v in proto.graph.initializer}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    for node in list(proto.graph.node):
        if node.op_type != "Clip":
            continue
        before = made_by[node.input[0]]
        scale, zero = (constants[name] for name in before.input[1:])
        ends = []
        for end in node.input[1:]:
            value = (constants[end].astype(np.float32) - np.float32(zero)) * scale
            made = onnx.numpy_helper.from_array(value.astype(np.float32), f"{end}_float")
            proto.graph.initializer.append(made)
            ends.append(made.name)
        source, codes = before.input[0], node.output[0]
        node.input[:] = [source, *ends]
        node.output[0] = f"{source}_cut_{codes}"
        before.input[0], before.output[0] = node.output[0], codes
        place = list(proto.graph.node).index(before)
        proto.graph.node.remove(node)
        proto.graph.node.insert(place, node)
    return proto


def _signed_codes(proto):
    """What comes in has codes from -128 to 127."""
    for value in proto.graph.initializer:
        if ".input_zero_point" in value.name or ".input_m" in value.name:
            codes = onnx.numpy_helper.to_array(value).astype(np.int16) - 128
            value.CopyFrom(onnx.numpy_helper.from_array(codes.astype(np.int8), value.name))
    for value in proto.graph.value_info:
        if value.name.endswith("input_codes"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    return proto


@pytest.mark.parametrize("change", [_to_int4_at_once, _clip_in_float, _signed_codes])
def test_other_forms_that_mean_the_same_stay_in_float(change, chain):
    """Why the file has the form that it has: engines fuse no other."""
    from limpq_ext.export.engines import OnnxRuntime

    model, batches = chain
    proto = written(model, batches[0][0][:1], shift=False)
    x = {"x": batches[0][0].numpy()}
    whole = OnnxRuntime(proto.SerializeToString())
    exact = OnnxRuntime(proto.SerializeToString(), optimized=False).run(x)
    changed = change(proto).SerializeToString()
    same = OnnxRuntime(changed, optimized=False).run(x)
    for name, value in exact.items():
        assert same[name] == pytest.approx(value, abs=1e-4)
    assert OnnxRuntime(changed).integer_kernels < whole.integer_kernels


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_run_the_file_by_themselves(engine, chain, tmp_path):
    pytest.importorskip(engine, reason=f"the extra for {engine} is not installed")
    model, batches = chain
    (tmp_path / "a.onnx").write_bytes(written(model, batches[0][0][:1]).SerializeToString())
    np.save(tmp_path / "x.npy", batches[0][0].numpy())
    script = """
import sys
for module in ("limpq_ext", "torch"):
    sys.modules[module] = None
import numpy as np
x = np.load("x.npy")
if sys.argv[1] == "onnxruntime":
    import onnxruntime
    y = onnxruntime.InferenceSession("a.onnx").run(None, {"x": x})[0]
else:
    import openvino
    y = next(iter(openvino.Core().compile_model("a.onnx", "CPU")(x).values()))
np.save("y.npy", y)
"""
    subprocess.run([sys.executable, "-c", script, engine], check=True, cwd=tmp_path)
    with torch.no_grad():
        expected = model(batches[0][0]).numpy()
    assert (np.load(tmp_path / "y.npy").argmax(1) == expected.argmax(1)).mean() >= 7 / 8
