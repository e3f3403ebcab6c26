"""Files of five networks at mixed bits: sizes, what engines compute of them, and times.

    python -m bench.exports --record bench/results/exports.json

ResNet-18, MobileNetV2, EfficientNet-Lite0, ViT-Tiny and a small U-Net, with random weights,
policies of 2 to 6 bits by chance, first and last layer at 8. Every engine takes its turn with the
same network in float32, a batch of one, one thread.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

import limpq_ext as lq
from limpq_ext.export.files import ExportedFile
from limpq_ext.values.files import open_atomically, write_json
from limpq_ext.values.policy import LayerBits, Policy

from .report import describe_run, markdown

BITS: Final = (2, 3, 4, 5, 6)
SIZE: Final = 224
IMAGES: Final = 16
ENGINES: Final = ("onnxruntime", "openvino")


class UNet(nn.Module):
    """A U-Net of three scales, whose outputs are classes of pixels."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), classes: int = 5) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.down = nn.ModuleList(_convolutions(*pair) for pair in pairs)
        turned = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(*pair, 2, stride=2) for pair in turned)
        self.merge = nn.ModuleList(_convolutions(2 * after, after) for _, after in turned)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[batch, classes, height, width]`` of images ``[batch, 3, height, width]``."""
        kept = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if kept else x)
            kept.append(x)
        for up, merge, beside in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([up(x), beside], 1))
        return self.head(x)


def _convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


NETWORKS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "ResNet-18": lambda: _torchvision("resnet18"),
    "MobileNetV2": lambda: _torchvision("mobilenet_v2"),
    "EfficientNet-Lite0": lambda: _timm("tf_efficientnet_lite0"),
    "ViT-Tiny": lambda: _timm("vit_tiny_patch16_224"),
    "U-Net": UNet,
}


def quantized(
    name: str, *, size: int = SIZE, images: int = IMAGES
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], lq.Costs, Policy]:
    """A network at bits by chance, calibrated, with its batches, costs and policy."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    # Images with edges and areas, as photographs have them.
    small = torch.randn(images, 3, 8, 8)
    x = nn.functional.interpolate(small, (size, size), mode="bicubic") + 0.1 * torch.randn(
        images, 3, size, size
    )
    with torch.no_grad():
        for part in x.split(8):  # statistics of batch normalisation
            model(part)
        for parameter in model.parameters():
            if not parameter.any():  # timm's heads begin at zero
                nn.init.normal_(parameter, std=0.02)
    model.eval()
    costs = lq.profile(model, x[:1])
    choose = random.Random(0).choice
    policy = Policy(
        tuple(LayerBits(layer.name, choose(BITS), choose(BITS)) for layer in costs.layers),
        tuple(LayerBits(layer.name, 8, 8) for layer in costs.fixed),
    )
    made = lq.apply_policy(model, policy, per_channel_weights=True)
    batches = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(8)]
    lq.calibrate(made, batches[:1])
    return made.eval(), batches, costs, policy


def measure(name: str, folder: Path, engines: Sequence[str] = ENGINES) -> dict[str, Any]:
    """Export a network in every format, verified and timed."""
    model, batches, costs, policy = quantized(name)
    x = batches[0][0][:1]
    options: dict[str, Any] = {"verify": batches, "timed": True, "engines": engines}
    onnx = lq.export_onnx(model, folder / "a.onnx", x, **options)
    residual = lq.export_onnx(
        model, folder / "b.onnx", x, residual_bits=8, calibration=batches[:1], **options
    )
    qonnx = lq.export_qonnx(model, folder / "c.onnx", x, verify=[(batches[0][0][:2], None)])
    lq.save(model, folder / "a.safetensors", policy=policy)
    restored = lq.load(folder / "a.safetensors", NETWORKS[name]()).eval()
    with torch.no_grad():
        same = torch.equal(restored(x), model(x))
    size = (folder / "a.safetensors").stat().st_size
    compressed = len(zlib.compress((folder / "a.onnx").read_bytes(), 9))
    return {
        "float_bytes": onnx.float_bytes,
        "policy_bytes": costs.size_bits(policy.bits()) / 8,
        "compressed_bytes": compressed,
        "onnx": _told(onnx),
        "onnx, residual": _told(residual),
        "qonnx": _told(qonnx),
        "packed": {"bytes": size, "same": same},
    }


def _told(file: ExportedFile) -> dict[str, Any]:
    return {"bytes": file.bytes, "verified": [asdict(own) for own in file.verified]}


def page(run: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables, as Markdown."""
    sizes = [
        ("network", "float32 MB", "policy", "packed", "ONNX", "compressed", "QONNX", "restored")
    ]
    engines = [("network", "file", "engine", "in integers", "codes that differ", "ms", "x float32")]
    for name, own in found.items():
        whole = own["float_bytes"]
        kinds = (own["policy_bytes"], own["packed"]["bytes"], own["onnx"]["bytes"])
        more = (own["compressed_bytes"], own["qonnx"]["bytes"])
        ratios = (f"{part / whole:.3f}" for part in (*kinds, *more))
        exact = "bit for bit" if own["packed"]["same"] else "differs"
        sizes.append((name, f"{whole / 1e6:.2f}", *ratios, exact))
        for kind in ("onnx", "onnx, residual"):
            for told in own[kind]["verified"]:
                timed = ("", "")
                if told["seconds"] is not None:
                    ratio = told["float_seconds"] / told["seconds"]
                    timed = (f"{1e3 * told['seconds']:.1f}", f"{ratio:.2f}")
                layers = f"{told['integer_kernels']} of {told['layers']}"
                differing = f"{told['differing']:.1e}"
                engines.append((name, kind, told["engine"], layers, differing, *timed))
    return f"""# Files of quantized networks

`python -m bench.exports`; {run["cpu"]}, commit {(run["commit"] or "")[:12]}, {run["date"]}. Random
weights, {SIZE} pixels, policies of 2 to 6 bits by chance, first and last layer at 8. Sizes are over
float32's; the policy's are of its weights alone.

{markdown(sizes)}

What engines make of the files: {IMAGES} images, every layer given what it was given in PyTorch; a
batch of one, one thread, medians in turn with the same network in float32. "residual": what enters
additions has 8 bits too.

{markdown(engines)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--record", type=Path, help="JSON file to write, and a page beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {}
    for name in options.network:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = measure(name, Path(folder))
        gc.collect()
        run = describe_run("cpu", images=IMAGES, size=SIZE)
        print(page(run, {name: found[name]}), flush=True)
        if options.record is not None:
            write_json(options.record, {"run": run, "results": found})
            with open_atomically(options.record.with_suffix(".md")) as file:
                file.write(page(run, found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
