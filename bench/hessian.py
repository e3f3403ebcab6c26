"""Scores of another kind to search with: HAWQ-V2's, from the trace of the Hessian.

A layer at b bits costs mean trace * ||Q_b(x) - x||^2, once for its weights and once for its input
(Dong et al., arXiv 1911.03852, equations 1 and 9); the traces are estimated by Hutchinson's method
with random signs. The quantizers have LSQ's start value, 2 mean|x| / sqrt(quant_max), for both
(Esser et al., arXiv 1902.08153, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpq_ext as lq
from limpq_ext.kernels.ops import thresholds


def hessian_scores(
    model: nn.Module,
    names: Sequence[str],
    bits: Sequence[int],
    x: Tensor,
    target: Tensor,
    *,
    probes: int = 8,
    seed: int = 0,
) -> lq.Indicators:
    """The scores of a float classifier's layers on one batch.

    Args:
        model: The float model; it is left as it is.
        names: Its searchable layers.
        bits: Candidate bit-widths.
        x: A batch of inputs.
        target: Their classes.
        probes: Random vectors that the traces are averaged over.
        seed: Of those.
    """
    layers = {name: model.get_submodule(name) for name in names}
    inputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return hook

    handles = [layer.register_forward_pre_hook(remember(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        loss = F.cross_entropy(model(x), target)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    variables = [layers[name].weight for name in names] + [inputs[name] for name in names]
    gradients = torch.autograd.grad(loss, variables, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    traces = torch.zeros(len(variables), dtype=torch.float64)
    for _ in range(probes):
        signs = [torch.randint(2, v.shape, generator=generator).to(v) * 2 - 1 for v in variables]
        # Products of other variables' signs have a mean of 0.
        inner = sum((g * s).sum() for g, s in zip(gradients, signs, strict=True))
        products = torch.autograd.grad(inner, variables, retain_graph=True)
        traces += torch.stack(
            [(p * s).sum().double() for p, s in zip(products, signs, strict=True)]
        )
    # A trace that comes out negative says that the layer does not matter to second order.
    means = [
        max(0.0, trace) / v.numel()
        for trace, v in zip((traces / probes).tolist(), variables, strict=True)
    ]
    scores = [
        {b: mean * _squared_error(v.detach(), b) for b in bits}
        for mean, v in zip(means, variables, strict=True)
    ]
    return lq.Indicators.from_table(
        dict(zip(names, scores[: len(names)], strict=True)),
        dict(zip(names, scores[len(names) :], strict=True)),
        meta={"score": "mean Hessian trace * squared quantization error"},
    )


def _squared_error(x: Tensor, bits: int) -> float:
    quant_min, quant_max = thresholds(bits, signed=bool((x < 0).any()), symmetric=False)
    scale = 2 * x.abs().mean() / quant_max**0.5
    y = lq.lsq_fake_quantize(x, scale.reshape(1), quant_min, quant_max)
    return float((y - x).double().square().sum())
