"""Proof that what is called quantized is: when it is asked for, and what is said where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from limpq_ext.graph.watch import UnfollowedError, Watch, fakes_only, with_probes
from limpq_ext.nn.attention import with_layers
from limpq_ext.nn.swapping import float_class


def check_quantized(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    """Prove that every quantized layer of a model computes with what its quantizers put out.

    Follows one forward on fake tensors.

    Args:
        model: With layers that have quantizers; it is not changed.
        inputs: What its forward takes; only shapes matter.
        keywords: What it takes by keyword.

    Raises:
        UnfollowedError: The forward raised something.
        ValueError: Layers would compute in float; the message names them and says why.
    """
    modules = dict(model.named_modules())
    # A copy: a forward may keep what it computed, and fake tensors must not stay in the model.
    model = with_layers(model, lambda name: False).eval()
    _forget_check(model)
    model = with_probes(model, lambda name: True)
    watch = Watch(model, lambda name: True)
    with fakes_only() as fake_mode:
        fakes = tree_map_only(
            Tensor,
            lambda value: fake_mode.from_tensor(value.detach()),
            (inputs, dict(keywords)),
        )
        with fake_mode:
            watch.follow(model, *fakes)
    bypassed = watch.bypassed()
    if bypassed:
        raise ValueError(
            f"layers with quantizers would compute in float: {_reasons(modules, bypassed)}"
        )


def check_at_first_forward(model: nn.Module) -> None:
    """Let the next forward of a model begin with :func:`check_quantized`, until one succeeds.

    It raises ValueError for layers that would compute in float. A forward that is being compiled or
    exported is not checked.
    """
    model.register_forward_pre_hook(_check_now, with_kwargs=True)


def _check_now(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((inputs, keywords))):
        return
    try:
        check_quantized(model, inputs, keywords)
    except UnfollowedError as error:
        warnings.warn(f"it is not proven that every layer runs quantized: {error}", stacklevel=2)
    _forget_check(model)


def _forget_check(model: nn.Module) -> None:
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _check_now:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def refusal(modules: Mapping[str, nn.Module], refused: Mapping[str, str]) -> str:
    """The sentence that names all refused modules, each reason once, and what leaves them out.

    Args:
        modules: The model's, by name.
        refused: Why each cannot be quantized, by name.
    """
    them = "it" if len(refused) == 1 else "them"
    return (
        f"cannot quantize {_reasons(modules, refused)}; exclude={list(refused)} leaves {them} in"
        " float"
    )


def _reasons(modules: Mapping[str, nn.Module], refused: Mapping[str, str]) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in refused.items():
        groups.setdefault((float_class(modules[name]).__name__, reason), []).append(name)
    return "; ".join(
        f"{', '.join(repr(name) if name else 'the model itself' for name in names)} ({kind}):"
        f" {reason}"
        for (kind, reason), names in groups.items()
    )
