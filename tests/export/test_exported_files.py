"""Files that are verified before they are written, and never half-written."""

import collections
import json

import deployed
import numpy as np
import pytest
import torch
from torch import nn

import limpq_ext as lq
from limpq_ext.export import files
from limpq_ext.export.verify import Verification

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")


@pytest.fixture(scope="module")
def network():
    return deployed.quantized("depthwise")


def test_what_was_written_is_told(network, tmp_path):
    model, batches = network
    path = tmp_path / "small.onnx"
    told = lq.export_onnx(
        model, path, batches[0][0][:1], verify=iter(batches), engines=["onnxruntime"]
    )
    assert (told.path, told.bytes) == (path, path.stat().st_size)
    parameters = sum(
        value.numel() for name, value in model.named_parameters() if "quantizer" not in name
    )
    statistics = 2 * (8 + 16 + 16)
    assert told.float_bytes == 4 * (parameters + statistics)
    assert told.ratio == told.bytes / told.float_bytes
    assert [own.engine.partition(" ")[2].partition(",")[2] for own in told.verified] == [
        " unoptimized", "",
    ]  # fmt: skip
    assert all(own.samples == 16 for own in told.verified)
    bits = {own.key: own.value for own in onnx.load(path).metadata_props}["limpq_ext.bits"]
    assert json.loads(bits) == {
        name: [layer.weight_bits, layer.activation_bits]
        for name, layer in lq.quantized_layers(model).items()
    }
    assert [own.name for own in tmp_path.iterdir()] == ["small.onnx"]


def test_equal_networks_have_equal_files(network, tmp_path):
    model, batches = network
    for name in ("a", "b"):
        lq.export_onnx(model, tmp_path / name, batches[0][0][:1])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_is_not_replaced_unasked(network, tmp_path):
    model, batches = network
    path = tmp_path / "mine.onnx"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine.onnx. exists and is not replaced"):
        lq.export_onnx(model, path, batches[0][0][:1])
    assert path.read_text() == "mine"
    lq.export_onnx(model, path, batches[0][0][:1], overwrite=True)
    onnx.checker.check_model(onnx.load(path))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"differing": 0.002}, r"0\.20% of the codes that come into layers differ, most in 'a'"),
        ({"farthest": 0.1}, r"from the same codes an output differs by 10\.00% of the largest"),
        ({"differing": 1e-6, "largest": 2}, "a code that comes into layer 'a' differs by 2 steps"),
    ],
)
def test_what_computes_something_else_is_not_written(
    found, message, network, tmp_path, monkeypatch
):
    told = {
        **{"layers": 5, "integer_kernels": 0, "worst": "a", "largest": 1, "agreement": 1.0},
        **{"differing": 0.0, "farthest": 0.0},
    }
    wrong = Verification(engine="onnxruntime 1", samples=16, **{**told, **found})
    monkeypatch.setattr(files, "verify_onnx", lambda *_, **__: wrong)
    model, batches = network
    with pytest.raises(
        ValueError, match=f"onnxruntime 1 does not compute what it should.*{message}"
    ):
        lq.export_onnx(model, tmp_path / "wrong.onnx", batches[0][0][:1], verify=batches)
    assert not list(tmp_path.iterdir())


def test_a_changed_file_is_seen(network, tmp_path):
    """One weight of a layer in the middle, changed by one code."""
    from limpq_ext.export.verify import verify_onnx

    model, batches = network
    lq.export_onnx(model, tmp_path / "a.onnx", batches[0][0][:1])
    proto = onnx.load(tmp_path / "a.onnx")
    stored = next(own for own in proto.graph.initializer if own.name == "expand.weight_scale")
    scale = onnx.numpy_helper.to_array(stored).copy()
    scale[3] *= 1.2
    stored.CopyFrom(onnx.numpy_helper.from_array(scale, stored.name))
    found = verify_onnx(proto.SerializeToString(), model, batches, "onnxruntime", optimized=False)
    assert found.worst == "depthwise"
    with pytest.raises(ValueError, match="'depthwise'"):
        found.check(1e-3)


class Branching(nn.Module):
    """What it does depends on the values that come."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.head(self.second(x) if x.abs().sum() > 0 else x)


def bad_networks():
    model, batches = deployed.float_network("depthwise")
    x = batches[0][0][:1]
    names = ["expand", "depthwise", "project"]
    policy = lq.Policy.uniform(names, 4, 4, fixed=["stem.0", "head"])
    wide = lq.apply_policy(model, lq.Policy.uniform(names, 4, 9, fixed=["stem.0", "head"]))
    lq.calibrate(wide, batches)
    broken = lq.apply_policy(model, policy)
    lq.calibrate(broken, batches)
    with torch.no_grad():
        broken.expand.input_quantizer.scale.fill_(float("nan"))
    torch.manual_seed(0)
    branching = Branching()
    quantized = lq.apply_policy(branching, lq.Policy.uniform(["second"], 4, 4, fixed=["first"]))
    y = torch.rand(4, 6)
    quantized.train()(y)
    return {
        "float": (model, x, "Depthwise has no quantized layers: give it a policy first"),
        "not calibrated": (lq.apply_policy(model, policy), x, "no step size yet: calibrate or"),
        "wide": (wide, x, "ONNX holds at most 8 bits, but W4A9 is asked for in 'expand', 'depthw"),
        "broken": (broken, x, "layer 'expand': input quantizer has step sizes that are NaN"),
        "branching": (quantized.eval(), y, "Branching cannot be exported: "),
        "no tensor": (quantized, [], "example_input is a list that holds no tensor"),
    }


@pytest.mark.parametrize(
    "which", ["float", "not calibrated", "wide", "broken", "branching", "no tensor"]
)
@pytest.mark.filterwarnings("ignore:left in float")
@pytest.mark.filterwarnings("ignore:it is not proven")
def test_what_cannot_be_exported_is_one_sentence(which, tmp_path):
    model, x, message = bad_networks()[which]
    with pytest.raises(ValueError, match=message) as error:
        lq.export_onnx(model, tmp_path / "never.onnx", x)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unknown_engines_and_no_batches_are_refused(network, tmp_path):
    model, batches = network
    x = batches[0][0][:1]
    with pytest.raises(ValueError, match="engine is 'tvm', expected one of onnxruntime, openvino"):
        lq.export_onnx(model, tmp_path / "a.onnx", x, verify=batches, engines=["tvm"])
    with pytest.raises(ValueError, match="there are no batches to verify the file with"):
        lq.export_onnx(model, tmp_path / "a.onnx", x, verify=[])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(network, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    model, batches = network
    with pytest.raises(OSError, match="No space left"):
        lq.export_onnx(model, tmp_path / "a.onnx", batches[0][0][:1])
    assert not list(tmp_path.iterdir())


def test_the_float_file_is_the_network_without_quantizers(network):
    from limpq_ext.export.engines import OnnxRuntime

    model, batches = network
    file = files.float_onnx(model, batches[0][0][:1])
    ops = collections.Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
    assert not ops.keys() & {"QuantizeLinear", "DequantizeLinear"}
    float_model, _ = deployed.float_network("depthwise")
    x = batches[0][0]
    found = next(iter(OnnxRuntime(file).run({"x": x.numpy()}).values()))
    # Normalisations of the quantized network are corrected.
    for norm in ("stem.1", "bn1", "bn2"):
        own, other = (dict(m.named_modules())[norm] for m in (float_model, model))
        own.load_state_dict(other.state_dict())
    float_model.project.bias.data.copy_(model.project.bias)
    float_model.head.bias.data.copy_(model.head.bias)
    with torch.no_grad():
        assert found == pytest.approx(float_model(x).numpy(), abs=1e-4)


def test_what_enters_additions_is_quantized_where_it_is_asked_for(tmp_path):
    model, batches = deployed.quantized("pre-activation")
    x = batches[0][0][:1]
    plain = lq.export_onnx(model, tmp_path / "plain.onnx", x, verify=batches)
    told = lq.export_onnx(
        model, tmp_path / "a.onnx", x, residual_bits=8, calibration=batches, verify=batches
    )
    proto = onnx.load(tmp_path / "a.onnx")
    made_by = {output: node for node in proto.graph.node for output in node.output}
    additions = [node for node in proto.graph.node if node.op_type == "Add"]
    assert len(additions) == 1
    for operand in additions[0].input:
        assert made_by[operand].op_type == "DequantizeLinear"
        quantize = made_by[made_by[operand].input[0]]
        assert quantize.op_type == "QuantizeLinear"
        assert quantize.output[0] == f"{quantize.input[0]}.residual_codes"
    stored = {own.key: own.value for own in proto.metadata_props}
    assert stored["limpq_ext.residual_bits"] == "8"
    # The layers before the addition no longer stay in float.
    assert told.verified[1].integer_kernels > plain.verified[1].integer_kernels
    assert told.verified[1].agreement >= 14 / 16


def test_ranges_of_additions_hold_all_values(tmp_path):
    from limpq_ext.export.qcdq import qcdq_model
    from limpq_ext.export.residual import _ranges

    model, batches = deployed.quantized("pre-activation")
    made = qcdq_model(model, batches[0][0][:1])
    addition = next(node for node in made.graph if node.op_type == "Add")
    names = [value.name for value in addition.inputs]
    seen = []
    model.conv2.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    found = _ranges(made, names, model, batches)
    values = torch.cat(seen)
    ends = (float(values.min()), float(values.max()))
    assert any(own == pytest.approx(ends, rel=0.05) for own in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residual_bits": 7}, "residual_bits is 7, expected 8 or None"),
        ({"residual_bits": 8}, "residual_bits needs batches to find ranges with"),
    ],
)
def test_other_bits_for_additions_are_refused(options, message, network, tmp_path):
    model, batches = network
    with pytest.raises(ValueError, match=message):
        lq.export_onnx(model, tmp_path / "a.onnx", batches[0][0][:1], **options)


def test_a_changed_last_layer_is_seen(network, tmp_path):
    from limpq_ext.export.verify import verify_onnx

    model, batches = network
    lq.export_onnx(model, tmp_path / "a.onnx", batches[0][0][:1])
    proto = onnx.load(tmp_path / "a.onnx")
    stored = next(own for own in proto.graph.initializer if own.name == "head.weight_scale")
    scale = onnx.numpy_helper.to_array(stored) * np.float32(1.05)
    stored.CopyFrom(onnx.numpy_helper.from_array(np.asarray(scale), stored.name))
    found = verify_onnx(proto.SerializeToString(), model, batches, "onnxruntime", optimized=False)
    assert found.differing <= 1e-3
    with pytest.raises(ValueError, match="from the same codes an output differs by"):
        found.check(1e-3)


def test_what_is_installed_verifies_where_nothing_is_said(network, tmp_path, monkeypatch):
    from limpq_ext.export import engines

    model, batches = network
    told = lq.export_onnx(model, tmp_path / "a.onnx", batches[0][0][:1], verify=batches)
    assert [own.engine.split()[0] for own in told.verified[1:]] == list(engines.installed_engines())
    found = engines.importlib.util.find_spec
    monkeypatch.setattr(
        engines.importlib.util, "find_spec", lambda name: name != "openvino" and found(name)
    )
    assert engines.installed_engines() == ("onnxruntime",)
