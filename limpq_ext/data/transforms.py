"""What happens to an image between its file and the network, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from limpq_ext.values.optional import require

Augment = Literal["none", "crop", "crop_flip", "resized_crop_flip"]
"""What is random in training. crop: padded by an eighth and cut at random, as is usual for CIFAR;
resized_crop_flip: as is usual for ImageNet."""

Transform = Callable[[Tensor], Tensor]


def training_transform(
    augment: Augment,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: bool,
    crop_share: float = 1.0,
) -> Transform:
    """The random transform of training images, which draws from torch's global generator.

    Args:
        augment: What is random.
        size: Height and width that come out.
        mean: Per channel, of pixels from 0 to 1.
        std: Likewise.
        resize: Whether images come in other sizes than ``size``.
        crop_share: Of the evaluation, which "none" is the same as.

    Raises:
        ImportError: torchvision is missing.
    """
    v2 = require("torchvision.transforms.v2", "train")
    if augment == "none":
        return evaluation_transform(size, mean, std, resize=resize, crop_share=crop_share)
    if augment == "resized_crop_flip":
        steps: list[Any] = [v2.RandomResizedCrop(size, antialias=True)]
    else:
        steps = _squared(size, size) if resize else []
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8)))
    if augment.endswith("_flip"):
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, *_normalised(mean, std)])


def evaluation_transform(
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    resize: bool,
    crop_share: float = 1.0,
) -> Transform:
    """The transform of images for evaluation: the shorter side resized, the centre cut out.

    Args:
        size: Height and width that come out.
        mean: Per channel, of pixels from 0 to 1.
        std: Likewise.
        resize: Whether images come in other sizes than ``size``.
        crop_share: Of the shorter side, what is cut out: 0.875 is ImageNet's 224 of 256.

    Raises:
        ImportError: torchvision is missing.
    """
    v2 = require("torchvision.transforms.v2", "train")
    steps = _squared(size, round(size / crop_share)) if resize else []
    return v2.Compose([*steps, *_normalised(mean, std)])


def _squared(size: int, shorter: int) -> list[Any]:
    v2 = require("torchvision.transforms.v2", "train")
    return [v2.Resize(shorter, antialias=True), v2.CenterCrop(size)]


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    v2 = require("torchvision.transforms.v2", "train")
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
