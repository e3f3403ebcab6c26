"""One tensor quantized at a time, all others float: what it moves at the output.

The layer-wise analysis of Gluska and Grobman (arXiv 2012.08420) with ZeroQ's measure, the
Kullback-Leibler divergence of the outputs (arXiv 2001.00281, equation 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.nn.inputs import call
from limpq_ext.scores.subject import Subject, log_probabilities
from limpq_ext.training.batches import Batches
from limpq_ext.values.indicators import Indicators, Kind


@torch.no_grad()
def layerwise(
    model: nn.Module, batches: Batches, bits: Sequence[int] = (2, 3, 4, 5, 6), **options: Any
) -> Indicators:
    """The divergence from the float network where one tensor alone is quantized.

    It needs no targets and no gradients, and ``1 + 2 * layers * len(bits)`` forwards of each batch.

    Args:
        model: The float classifier: maps a batch to scores ``[batch, classes]``. It is left as it
            is, and runs in evaluation mode.
        batches: Some batches of inputs and targets, on any device; the targets do not matter.
        bits: Candidate bit-widths.
        **options: ``scale_start`` ("mse", "max" or "percentile"), ``fixed``, ``exclude``,
            ``per_channel_weights`` and ``symmetric_weights``, as for :func:`limpq_ext.prepare`.

    Returns:
        For each layer the mean of KL(float || quantized) over the samples, in nats.

    Raises:
        ValueError: There are no batches, the output is no table of scores, or the model cannot be
            prepared.
    """
    subject = Subject(model, batches, bits, **options)
    references = [log_probabilities(call(subject.network, x)) for x, _ in subject.batches]
    samples = sum(len(reference) for reference in references)

    def score(layer: str, kind: Kind, width: int) -> float:
        with subject.quantized(layer, kind, width):
            divergences = [
                F.kl_div(
                    log_probabilities(call(subject.network, x)),
                    reference,
                    reduction="sum",
                    log_target=True,
                )
                for (x, _), reference in zip(subject.batches, references, strict=True)
            ]
        # Below 0 by rounding only.
        return max(0.0, float(torch.stack(divergences).sum())) / samples

    return subject.scores("layerwise", bits, score)
