"""The pages of files in engines and of latency tables, and the small U-Net."""

import torch

from bench import exports, latency

RUN = {"cpu": "A processor", "commit": "0123456789abcdef", "date": "today"}


def verified(engine, seconds=None):
    return {
        "engine": engine,
        "layers": 5,
        "integer_kernels": 3,
        "differing": 2e-5,
        "seconds": seconds,
        "float_seconds": None if seconds is None else 3 * seconds,
    }


def test_the_page_of_files_has_sizes_over_float32_and_speed_over_it():
    file = {"bytes": 20, "verified": [verified("a, unoptimized"), verified("a", 0.002)]}
    found = {
        "Net": {
            "float_bytes": 100,
            "policy_bytes": 10.0,
            "compressed_bytes": 15,
            "onnx": file,
            "onnx, residual": file,
            "qonnx": {"bytes": 101},
            "packed": {"bytes": 12, "same": True},
        }
    }
    lines = exports.page(RUN, found).splitlines()
    row = next(line for line in lines if line.startswith("| Net ") and "bit for bit" in line)
    assert [cell.strip() for cell in row.split("|")[3:8]] == [
        "0.100", "0.120", "0.200", "0.150", "1.010",
    ]  # fmt: skip
    row = next(line for line in lines if " 2.0 " in line)
    assert [cell.strip() for cell in row.split("|")[2:8]] == [
        "onnx", "a", "3 of 5", "2.0e-05", "2.0", "3.00",
    ]  # fmt: skip


def test_the_page_of_latency_tables_has_predictions_beside_what_was_measured():
    meta = {
        "engine_version": "1",
        "predictions": [{"predicted": 0.011, "measured": 0.010, "error": 0.1}],
        "unattributed": {"seconds": 0.001},
        "notes": ["a note"],
    }
    text = latency.page(RUN, {"engine": meta})
    assert "| engine | mixed 1      | 11.00        | 10.00       | +10.0 % |" in text
    assert "- engine 1: a note" in text


def test_the_u_net_puts_out_classes_of_pixels_from_all_scales():
    torch.manual_seed(0)
    model = exports.UNet((4, 8, 16), classes=3)
    x = torch.randn(2, 3, 16, 24, requires_grad=True)
    y = model(x)
    assert y.shape == (2, 3, 16, 24)
    y.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
