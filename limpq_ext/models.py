"""Models by name, and their weights in files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .extras import require
from .files import FileFormatError, open_atomically


class CifarResNet(nn.Module):
    """The ResNet for small images of He et al. (arXiv 1512.03385, section 4.2).

    Three stages of basic blocks with 16, 32 and 64 channels; projections where the shape changes.

    Args:
        blocks: Basic blocks per stage; the depth is ``6 * blocks + 2``.
        num_classes: Outputs of the classifier.
        in_channels: Channels of the images.
        width: Channels of the first stage.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self, blocks: int = 2, *, num_classes: int = 10, in_channels: int = 3, width: int = 16
    ) -> None:
        super().__init__()
        given = {
            "blocks": blocks,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
        }
        for name, value in given.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Class scores ``[batch, num_classes]`` of images ``[batch, in_channels, H, W]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    block = require("torchvision.models.resnet", "train").BasicBlock
    downsample = None
    if stride != 1 or in_channels != channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )
    first = block(in_channels, channels, stride, downsample)
    return nn.Sequential(first, *(block(channels, channels) for _ in range(blocks - 1)))


def create_model(name: str, **options: Any) -> nn.Module:
    """A model with random weights.

    Args:
        name: ``cifar_resnet`` or the name of a torchvision classification model.
        **options: Arguments of its constructor, such as ``num_classes``.

    Raises:
        ValueError: The name is unknown, or an option does not fit.
        ImportError: torchvision is missing.
    """
    if name == "cifar_resnet":
        constructor: Any = CifarResNet
    else:
        models = require("torchvision.models", "train")
        if name not in models.list_models(module=models):
            raise ValueError(
                f"unknown model '{name}': expected 'cifar_resnet' or a torchvision classification"
                " model such as 'resnet50'"
            )
        constructor = models.get_model_builder(name)
        options = {"weights": None, **options}
        if name in ("googlenet", "inception_v3"):
            options.setdefault("init_weights", True)
    try:
        return constructor(**options)
    except TypeError as error:
        raise ValueError(f"model '{name}': {error}") from error


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's state_dict to a safetensors file, which is replaced once it is whole."""
    save = require("safetensors.torch", "train").save
    # Tied tensors are written once per name: safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    with open_atomically(path) as file:
        file.write(save(tensors))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a state_dict into a model: a safetensors file, or a checkpoint without foreign classes.

    Args:
        model: Gets the weights, in place.
        path: ``*.safetensors``, or a file of ``torch.save`` that ``weights_only`` can read: a
            state_dict, alone or under "state_dict" or "model".

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: It is no such file, or its names or shapes are not the model's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights '{os.fspath(path)}' do not exist")
    state = _read_state(path)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise FileFormatError(
            f"{os.fspath(path)}: {str(error).splitlines()[-1].strip()}"
        ) from error
    for problem, names in (("lacks", missing), ("has, unlike the model,", unexpected)):
        if names:
            raise FileFormatError(
                f"{os.fspath(path)}: {problem} '{names[0]}' and {len(names) - 1} more tensors"
                f" of {type(model).__name__}"
            )


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        safetensors = require("safetensors", "train")
        load_file = require("safetensors.torch", "train").load_file
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise FileFormatError(f"{os.fspath(path)}: not a safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise FileFormatError(
            f"{os.fspath(path)}: not a readable checkpoint: {first_line}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise FileFormatError(f"{os.fspath(path)}: holds no state_dict")
    return {name.removeprefix("module."): value for name, value in content.items()}
