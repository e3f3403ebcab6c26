"""Every torchvision classifier, and timm's of different kind, at the smallest inputs they take."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

from limpq_ext.nn.named import create_shapes

CLASSES = 8
TORCHVISION = models.list_models(module=models)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        size: Height and width of the smallest images it takes.
        bits: Candidate bit-widths.
        options: Arguments of its constructor.
        build: Builds it instead of its constructor, where that has no argument for its depth and
            the whole network needs more than 6 GiB to train.
    """

    size: int = 32
    bits: tuple[int, ...] = (2, 4)
    options: dict[str, Any] = field(default_factory=dict)
    build: Any = None


def _shallow_vit(patch, heads, width):
    return lambda: VisionTransformer(
        image_size=2 * patch,
        patch_size=patch,
        num_layers=3,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=CLASSES,
    )


def _shallow_convnext():
    widths = (192, 384, 768, 1536, None)
    stages = [CNBlockConfig(widths[i], widths[i + 1], 1) for i in range(4)]
    return ConvNeXt(stages, num_classes=CLASSES)


def _shallow_regnet():
    parameters = BlockParams.from_init_params(
        depth=9, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
    )
    return RegNet(parameters, num_classes=CLASSES)


def _tiny_vit():
    return VisionTransformer(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


def _tiny_swin(**options):
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[3, 3],
        num_classes=CLASSES,
        **options,
    )


def _tiny_swin_v2():
    return _tiny_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


TINY = {
    "tiny vit": Entry(16, build=_tiny_vit),
    "tiny swin": Entry(16, build=_tiny_swin),
    "tiny swin v2": Entry(16, build=_tiny_swin_v2),
}

SPECIAL = {
    **TINY,
    "alexnet": Entry(63),
    "convnext_large": Entry(build=_shallow_convnext),
    "inception_v3": Entry(75, options={"init_weights": False, "aux_logits": False}),
    "googlenet": Entry(options={"init_weights": False, "aux_logits": False}),
    "maxvit_t": Entry(224, options={"input_size": (224, 224)}),
    "regnet_y_128gf": Entry(build=_shallow_regnet),
    # Weights of 2 bits, -2 to 1, are negative on average, so that few positive values come out of
    # these with random weights; where none is in a quantizer's range, no gradient is passed on.
    "regnet_y_400mf": Entry(bits=(4, 6)),
    "vgg11_bn": Entry(bits=(4, 6)),
    "vgg13_bn": Entry(bits=(4, 6)),
    "squeezenet1_0": Entry(48),
    "swin_v2_t": Entry(64),
    "swin_v2_s": Entry(64),
    "swin_v2_b": Entry(64),
    "vit_b_16": Entry(options={"image_size": 32}),
    "vit_b_32": Entry(64, options={"image_size": 64}),
    "vit_l_16": Entry(build=_shallow_vit(16, 16, 1024)),
    "vit_l_32": Entry(64, build=_shallow_vit(32, 16, 1024)),
    "vit_h_14": Entry(28, build=_shallow_vit(14, 16, 1280)),
}

TIMM = {
    # convolutions
    "mobilenetv1_100": Entry(),
    "tf_efficientnet_lite0": Entry(),
    "ghostnet_100": Entry(),
    "convnext_atto": Entry(),
    # attention
    "vit_tiny_patch16_224": Entry(options={"img_size": 32}),
    "beit_base_patch16_224": Entry(options={"img_size": 32, "depth": 2}),
    "eva02_tiny_patch14_224": Entry(28, options={"img_size": 28}),
    "swin_tiny_patch4_window7_224": Entry(options={"img_size": 32, "window_size": 2}),
    "swinv2_tiny_window8_256": Entry(64, options={"img_size": 64}),
    "xcit_nano_12_p16_224": Entry(),
    "cait_xxs24_224": Entry(options={"img_size": 32}),
    # MLPs
    "mixer_s32_224": Entry(64, options={"img_size": 64}),
    "gmlp_ti16_224": Entry(options={"img_size": 32}),
    # hybrids
    "mobilevit_xxs": Entry(64),
    "levit_128s": Entry(224),
    "coatnet_nano_rw_224": Entry(64, options={"img_size": 64}),
    "poolformer_s12": Entry(),
    "edgenext_xx_small": Entry(),
}


def small_model(name):
    """The model of that name, random; a batch of the smallest images it takes; candidate bits."""
    entry = SPECIAL.get(name) or TIMM.get(name) or Entry()
    torch.manual_seed(0)
    if entry.build is not None:
        model = entry.build()
    elif name in TIMM:
        timm = pytest.importorskip("timm")
        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **entry.options)
    else:
        model = models.get_model(name, weights=None, num_classes=CLASSES, **entry.options)
    # A block that is dropped for the whole batch, or what starts at zero or is scaled by 1e-6,
    # would pass no gradient on.
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() <= 1e-4:
                parameter.normal_(std=0.1)
    return model, torch.randn(4, 3, entry.size, entry.size), entry.bits


def full_model(name):
    """The model of that name as torchvision publishes it, without memory for its weights."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return create_shapes(name, **options).eval()
