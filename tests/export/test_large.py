"""Networks that people have, at bits by chance, in the formats of ONNX and packed."""

import pytest
import torch

import limpq_ext as lq

pytest.importorskip("onnx", reason="the extra export is not installed")
pytest.importorskip("timm", reason="the extra timm is not installed")

exports = pytest.importorskip("bench.exports", reason="the benchmarks are not beside the tests")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:left in float")]


@pytest.mark.parametrize("name", exports.NETWORKS)
def test_files_of_a_network_compute_what_it_does(name, tmp_path):
    model, batches, _, policy = exports.quantized(name)
    x = batches[0][0][:1]
    told = lq.export_onnx(
        model, tmp_path / "a.onnx", x, verify=batches, engines=["onnxruntime", "openvino"]
    )
    exact, *engines = told.verified
    assert exact.differing <= 1e-5
    assert all(own.differing <= 1e-2 for own in engines)
    assert all(own.integer_kernels >= own.layers / 4 for own in engines)
    residual = lq.export_onnx(
        model,
        tmp_path / "b.onnx",
        x,
        residual_bits=8,
        calibration=batches[:1],
        verify=batches,
    )
    assert residual.verified[1].integer_kernels >= engines[0].integer_kernels
    lq.save(model, tmp_path / "a.safetensors", policy=policy)
    restored = lq.load(tmp_path / "a.safetensors", exports.NETWORKS[name]()).eval()
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
    lq.export_qonnx(model, tmp_path / "c.onnx", x)
