"""Float networks by name: torchvision's, timm's, a small one of this package, and one's own."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from limpq_ext.values.names import listed
from limpq_ext.values.optional import require
from limpq_ext.values.reading import first_line


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


def create_model(name: str, *, weights: str | None = None, **options: Any) -> nn.Module:
    """A model by name.

    Args:
        name: ``cifar_resnet``; a torchvision classification model, such as ``resnet50``;
            ``timm/NAME`` for one of timm (the extra ``timm``); or ``package.module:function`` for
            a function or class that returns a model. That imports the module from where Python
            finds modules, and so runs its code.
        weights: None: random weights. Else published weights, which are downloaded where they were
            not before: the name of an entry in torchvision's enumeration, such as ``DEFAULT``,
            ``IMAGENET1K_V2`` or ``ResNet50_Weights.DEFAULT``; for timm ``DEFAULT``, where a tag in
            its name says which. Where ``num_classes`` is not theirs, all but the classifier is
            theirs; a warning says so.
        **options: Arguments of its constructor, such as ``num_classes``. googlenet and inception_v3
            come without auxiliary classifiers unless ``aux_logits`` asks for them, and take images
            normalised as the other networks do (``transform_input``).

    Raises:
        ValueError: The name is unknown, or an option or ``weights`` does not fit.
        TypeError: A function of one's own returns no torch.nn.Module.
        ImportError: torchvision, timm, or the module of one's own is missing.
        ConnectionError: The weights could not be downloaded.
    """
    if ":" in name:
        return _own_model(name, weights, options)
    if name.startswith("timm/"):
        constructor, chosen = _of_timm(name, weights)
    elif name == "cifar_resnet":
        if weights is not None:
            raise ValueError(f"there are no published weights of '{name}', got '{weights}'")
        constructor, chosen = CifarResNet, {}
    else:
        constructor, chosen = _of_torchvision(name, weights)
    try:
        return _built(constructor, chosen, options)
    except TypeError as error:
        raise ValueError(f"model '{name}': {error}") from error
    except (OSError, RuntimeError) as error:
        if weights is None:
            raise
        raise ConnectionError(
            f"weights '{weights}' of '{name}' could not be downloaded ({first_line(error)}); give a"
            " local file instead"
        ) from error


def _built(
    constructor: Callable[..., Any], chosen: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    """The model; where its published weights are of other classes, with a random classifier."""
    published = chosen.get("weights")
    if published is None:
        return constructor(**{**chosen, **options})
    theirs = len(published.meta["categories"])
    classes = options.get("num_classes", theirs)
    if classes == theirs:
        return constructor(**{**chosen, **options})
    model = constructor(**{**chosen, **{k: v for k, v in options.items() if k != "num_classes"}})
    own = constructor(**{**chosen, **options, "weights": None})
    before = model.state_dict()
    heads = {
        name.rpartition(".")[0]
        for name, value in own.state_dict().items()
        if name in before
        and before[name].shape == (theirs, *value.shape[1:])
        and value.shape[0] == classes
    }
    for head in heads:
        model.set_submodule(head, own.get_submodule(head))
    if hasattr(model, "num_classes"):
        model.num_classes = classes
    _warn_of_random(sorted(heads), theirs, classes)
    return model


def _warn_of_random(heads: Sequence[str], theirs: int, classes: int) -> None:
    warnings.warn(
        f"the published weights are of {theirs} classes: all of them but those of {listed(heads)}"
        f" are taken, which starts from random weights for {classes} classes",
        stacklevel=4,
    )


def is_published(weights: str) -> bool:
    """Whether weights are published ones by name, and no file.

    A name is ``DEFAULT``, ``IMAGENET1K_V2`` or ``ResNet50_Weights.DEFAULT``: without a suffix, or
    with that of an enumeration. What exists is a file.
    """
    is_name = not Path(weights).suffix or re.fullmatch(r"\w+_Weights\.\w+", weights)
    return bool(is_name) and not Path(weights).exists()


def create_shapes(name: str, **options: Any) -> nn.Module:
    """A model by name whose parameters have shapes but no memory, to be profiled.

    Args:
        name: As for :func:`create_model`.
        **options: As there, but for ``weights``.

    Returns:
        The model, on the meta device.

    Raises:
        ValueError: As there.
        ImportError: As there.
    """
    # Not torch.device("meta"): constructors compute with small tensors, which need their values.
    with _LayersWithoutMemory():
        return create_model(name, **options).to("meta")


class _LayersWithoutMemory(TorchFunctionMode):
    """Puts what layers allocate for their weights on the meta device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _of_torchvision(name: str, weights: str | None) -> tuple[Callable[..., Any], dict[str, Any]]:
    models = require("torchvision.models", "train")
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown model '{name}': expected 'cifar_resnet', a torchvision classification model"
            f" such as 'resnet50', 'timm/NAME' or 'package.module:function'{_similar(name, known)}"
        )
    chosen: dict[str, Any] = {"weights": None}
    if weights is not None:
        published = models.get_model_weights(name)
        enumeration, _, entry = weights.rpartition(".")
        if enumeration not in ("", published.__name__) or entry not in published.__members__:
            raise ValueError(
                f"model '{name}' has no weights '{weights}', those are"
                f" {', '.join(published.__members__)}"
            )
        chosen["weights"] = published[entry]
    if name in ("googlenet", "inception_v3"):
        # Outputs of auxiliary classifiers are no class scores that a loss takes. The published
        # weights want images normalised in a way of their own, to which the network takes them:
        # always, for a network has to be the same before and after weights are loaded from a file.
        chosen |= {"aux_logits": False, "transform_input": True}
        if weights is None:
            chosen["init_weights"] = True
        else:
            return partial(_without_auxiliary, models.get_model_builder(name)), chosen
    return models.get_model_builder(name), chosen


def _without_auxiliary(
    constructor: Callable[..., Any], *, weights: Any, aux_logits: bool, **options: Any
) -> nn.Module:
    """A googlenet or inception_v3, whose published weights have auxiliary classifiers."""
    if weights is None:
        return constructor(**{"init_weights": False, **options, "aux_logits": aux_logits})
    if aux_logits:
        return constructor(weights=weights, aux_logits=True, **options)
    model = constructor(weights=weights, **options)
    model.aux_logits = False
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)
    return model


def _of_timm(name: str, weights: str | None) -> tuple[Callable[..., Any], dict[str, Any]]:
    timm = require("timm", "timm")
    own_name = name.removeprefix("timm/")
    if not timm.is_model(own_name):
        similar = _similar(own_name, timm.list_models())
        raise ValueError(f"unknown model '{name}': timm has no such model{similar}")
    if weights not in (None, "DEFAULT"):
        raise ValueError(
            f"weights of '{name}' are None or 'DEFAULT', got '{weights}': a tag after the name says"
            " which, as in 'timm/resnet50.a1_in1k'"
        )
    if weights is None:
        return partial(timm.create_model, own_name), {"pretrained": False}

    def pretrained(**options: Any) -> nn.Module:
        model = timm.create_model(own_name, pretrained=True, **options)  # drops the head itself
        theirs, classes = model.pretrained_cfg.get("num_classes"), model.num_classes
        if theirs != classes:
            heads = model.pretrained_cfg.get("classifier", ())
            _warn_of_random([heads] if isinstance(heads, str) else list(heads), theirs, classes)
        return model

    return pretrained, {}


def _own_model(name: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if weights is not None:
        raise ValueError(f"there are no published weights of '{name}', got '{weights}'")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(f"model '{name}': cannot import '{module_name}': {error}") from error
    constructor = getattr(module, attribute, None)
    if not callable(constructor):
        raise ValueError(f"model '{name}': module '{module_name}' has no function '{attribute}'")
    try:
        inspect.signature(constructor).bind(**options)
    except TypeError as error:
        raise ValueError(f"model '{name}': {error}") from error
    model = constructor(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model '{name}': returned a {type(model).__name__}, expected a torch.nn.Module"
        )
    return model


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; similar: {', '.join(close)}" if close else ""
