"""Mixed-precision quantization by learned layer-wise importance (LIMPQ, arXiv 2203.08368).

The pipeline, in the order of the names: ``prepare`` a float model with several bit-widths per
layer, train its importance indicators with ``JointTrainer``, count costs with ``profile``, find the
bits of every layer with ``search``, put them in place with ``apply_policy``, and ``finetune``.
"""

from __future__ import annotations

from importlib import metadata

from .bank import WeightBank
from .budgets import ShareOf8Bit, UniformLevel, of_8bit, uniform
from .calibration import calibrate, reestimate_batch_norm
from .checkpoint import Checkpoint, Interrupted
from .costs import Costs, profile
from .data import Data, make_loader
from .datasets import load_data
from .evaluation import Confusion, Evaluation, confuse, evaluate
from .explain import Explanation, explain
from .failures import NonFiniteError
from .files import FileFormatError
from .finetune import finetune
from .indicators import Indicators
from .infeasible import InfeasibleError
from .joint import JointStep, JointTrainer
from .latency import LatencyEntry, LatencyTable
from .layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantizedLayer,
    QuantLinear,
    SwitchableBatchNorm,
)
from .metrics import Journal, MetricsFile, TensorBoard
from .ops import lsq_fake_quantize, lsq_fake_quantize_multi
from .pareto import Curve, pareto
from .policy import Policy
from .prepare import apply_policy, prepare, quantized_layers, select_bits
from .quantizers import ActivationQuantizer, LsqQuantizer, WeightQuantizer
from .search import search
from .training import Recording

__version__ = metadata.version("limpq_ext")

__all__ = [
    "ActivationQuantizer",
    "Checkpoint",
    "Confusion",
    "Costs",
    "Curve",
    "Data",
    "Evaluation",
    "Explanation",
    "FileFormatError",
    "Indicators",
    "InfeasibleError",
    "Interrupted",
    "JointStep",
    "JointTrainer",
    "Journal",
    "LatencyEntry",
    "LatencyTable",
    "LsqQuantizer",
    "MetricsFile",
    "NonFiniteError",
    "Policy",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLinear",
    "QuantizedLayer",
    "Recording",
    "ShareOf8Bit",
    "SwitchableBatchNorm",
    "TensorBoard",
    "UniformLevel",
    "WeightBank",
    "WeightQuantizer",
    "apply_policy",
    "calibrate",
    "confuse",
    "evaluate",
    "explain",
    "finetune",
    "load_data",
    "lsq_fake_quantize",
    "lsq_fake_quantize_multi",
    "make_loader",
    "of_8bit",
    "pareto",
    "prepare",
    "profile",
    "quantized_layers",
    "reestimate_batch_norm",
    "search",
    "select_bits",
    "uniform",
]
