# What people import, and where it is defined: read by type checkers, and by __init__.py.
from .bank import WeightBank as WeightBank
from .budgets import (
    ShareOf8Bit as ShareOf8Bit,
)
from .budgets import (
    UniformLevel as UniformLevel,
)
from .budgets import (
    of_8bit as of_8bit,
)
from .budgets import (
    uniform as uniform,
)
from .calibration import calibrate as calibrate
from .calibration import reestimate_batch_norm as reestimate_batch_norm
from .checkpoint import Checkpoint as Checkpoint
from .costs import Costs as Costs
from .costs import profile as profile
from .data import Data as Data
from .data import make_loader as make_loader
from .datasets import load_data as load_data
from .ends import Interrupted as Interrupted
from .evaluation import (
    Confusion as Confusion,
)
from .evaluation import (
    Evaluation as Evaluation,
)
from .evaluation import (
    confuse as confuse,
)
from .evaluation import (
    evaluate as evaluate,
)
from .explain import Explanation as Explanation
from .explain import explain as explain
from .failures import NonFiniteError as NonFiniteError
from .files import FileFormatError as FileFormatError
from .finetune import finetune as finetune
from .indicators import Indicators as Indicators
from .infeasible import InfeasibleError as InfeasibleError
from .joint import JointStep as JointStep
from .joint import JointTrainer as JointTrainer
from .latency import LatencyEntry as LatencyEntry
from .latency import LatencyTable as LatencyTable
from .layers import (
    QuantConv1d as QuantConv1d,
)
from .layers import (
    QuantConv2d as QuantConv2d,
)
from .layers import (
    QuantConv3d as QuantConv3d,
)
from .layers import (
    QuantConvTranspose1d as QuantConvTranspose1d,
)
from .layers import (
    QuantConvTranspose2d as QuantConvTranspose2d,
)
from .layers import (
    QuantConvTranspose3d as QuantConvTranspose3d,
)
from .layers import (
    QuantizedLayer as QuantizedLayer,
)
from .layers import (
    QuantLinear as QuantLinear,
)
from .layers import (
    SwitchableBatchNorm as SwitchableBatchNorm,
)
from .metrics import Journal as Journal
from .metrics import MetricsFile as MetricsFile
from .metrics import TensorBoard as TensorBoard
from .ops import (
    lsq_fake_quantize as lsq_fake_quantize,
)
from .ops import (
    lsq_fake_quantize_multi as lsq_fake_quantize_multi,
)
from .pareto import Curve as Curve
from .pareto import pareto as pareto
from .policy import Policy as Policy
from .prepare import (
    apply_policy as apply_policy,
)
from .prepare import (
    prepare as prepare,
)
from .prepare import (
    quantized_layers as quantized_layers,
)
from .prepare import (
    select_bits as select_bits,
)
from .quantizers import (
    ActivationQuantizer as ActivationQuantizer,
)
from .quantizers import (
    LsqQuantizer as LsqQuantizer,
)
from .quantizers import (
    WeightQuantizer as WeightQuantizer,
)
from .search import search as search
from .training import Recording as Recording

__version__: str
