"""Optimizers that decay the weights of layers only, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LambdaLR

from limpq_ext.nn.quantizers import LsqQuantizer
from limpq_ext.training.model_state import device_of

OPTIMIZERS = ("sgd", "adamw")


def make_optimizer(
    model: nn.Module,
    optimizer: str = "sgd",
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer that decays the weights of layers only.

    As is usual, weight decay does not reach what normalisation has, embeddings, tensors of at most
    one dimension (others of size 1 aside, as in a layer scale ``[channels, 1, 1]``), biases of any
    shape, tokens and position embeddings by their name, and what the model's own
    ``no_weight_decay()`` names, as timm's do. Step sizes have none either.

    Args:
        model: Whose parameters that need a gradient it takes.
        optimizer: "sgd" or "adamw".
        lr: Learning rate, at least 0.
        momentum: Of SGD.
        weight_decay: At least 0.

    Raises:
        ValueError: The name is unknown or a number is out of range.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    own_names = getattr(model, "no_weight_decay", None)
    named = set(own_names()) if callable(own_names) else set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            full_name = f"{path}.{name}" if path else name
            spared = full_name in named or _has_no_decay(module, name, parameter)
            (plain if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # On a GPU one kernel for all parameters, which can also be told on the device to hold back.
    fused = device_of(model).type == "cuda"
    if optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused or None)
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=fused or None)
    raise ValueError(f"optimizer is '{optimizer}', expected one of {', '.join(OPTIMIZERS)}")


_WITHOUT_DECAY = (
    *(LsqQuantizer, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.Embedding, nn.EmbeddingBag),
)
_NAMED_WITHOUT_DECAY = ("bias", "embed", "token", "position")


def _has_no_decay(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _WITHOUT_DECAY) or parameter.dim() <= 1:
        return True
    if name == "weight":  # of one output, perhaps
        return False
    axes = sum(size > 1 for size in parameter.shape)
    return axes <= 1 or any(part in name for part in _NAMED_WITHOUT_DECAY)


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, *, steps: int, warmup_steps: int = 0
) -> LambdaLR:
    """The learning rate rises linearly over the warm-up, then falls to 0 along half a cosine.

    Args:
        optimizer: Whose learning rate is the highest value.
        steps: Optimizer steps in all; call ``step()`` after each.
        warmup_steps: How many of them are the warm-up.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
