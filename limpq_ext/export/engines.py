"""The engines that run ONNX files on a CPU: onnxruntime and OpenVINO."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np

from limpq_ext.values.optional import require
from limpq_ext.values.reading import first_line

Feeds = Mapping[str, np.ndarray[Any, Any]]

_INTEGER_OPS: Final = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
)
"""onnxruntime's operators that multiply integers."""


class Engine(Protocol):
    """A file that an engine has loaded.

    Attributes:
        name: Of the engine, as the user gives it.
        version: Of the engine.
        inputs: The names of the graph's inputs.
        outputs: Those of its outputs.
        integer_kernels: How many layers it multiplies in integers.
    """

    name: str
    version: str
    inputs: list[str]
    outputs: list[str]
    integer_kernels: int

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs by name, for its inputs by name."""
        ...


class OnnxRuntime:
    """A model in onnxruntime on a CPU.

    Args:
        model: The bytes of an ONNX file.
        threads: How many it computes with.
        optimized: Whether it may put kernels of its own in the place of nodes; without, it computes
            node by node what the file says.
        profile: A folder for its profile, which says how long each node of each run took; None:
            there is none.

    Raises:
        ValueError: The engine refuses the model: its first reason.
        ImportError: onnxruntime is not installed.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: bytes,
        *,
        threads: int = 1,
        optimized: bool = True,
        profile: Path | None = None,
    ) -> None:
        engine = require("onnxruntime", "export")
        self.version: str = engine.__version__
        options = engine.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "run")
        level = engine.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        with tempfile.TemporaryDirectory() as folder:
            as_run = Path(folder) / "optimized.onnx"
            options.optimized_model_filepath = str(as_run)
            self._session = _loaded(
                lambda: engine.InferenceSession(model, options, ["CPUExecutionProvider"]), self.name
            )
            onnx = require("onnx", "export")
            graph = onnx.load(as_run, load_external_data=False).graph
        self.integer_kernels = sum(node.op_type in _INTEGER_OPS for node in graph.node)
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs by name, for its inputs by name."""
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))

    def end_profile(self) -> Path:
        """Write the profile of the runs so far, and no more of it."""
        return Path(self._session.end_profiling())


class OpenVino:
    """A model in OpenVINO on a CPU, which computes in float32 what it does not in integers.

    Args:
        model: The bytes of an ONNX file.
        threads: How many it computes with.
        counters: Whether it counts how long each node takes.

    Raises:
        ValueError: The engine refuses the model: its first reason.
        ImportError: OpenVINO is not installed.
    """

    name = "openvino"

    def __init__(self, model: bytes, *, threads: int = 1, counters: bool = False) -> None:
        engine = require("openvino", "openvino")
        self.version: str = engine.__version__.split("-")[0]
        core = _core()
        config = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERF_COUNT": counters,
        }
        self._model = _loaded(
            lambda: core.compile_model(core.read_model(model), "CPU", config), self.name
        )
        self.inputs = [value.get_any_name() for value in self._model.inputs]
        self.outputs = [value.get_any_name() for value in self._model.outputs]
        self._request = self._model.create_infer_request()
        ops = self._model.get_runtime_model().get_ordered_ops()
        self.integer_kernels = sum(_is_integer(op.get_rt_info()) for op in ops)
        self._fused = {
            op.get_friendly_name(): op.get_rt_info()["originalLayersNames"].astype(str).split(",")
            for op in ops
        }

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs by name, for its inputs by name."""
        found = self._request.infer(dict(feeds), share_inputs=True)
        return {name: found[name] for name in self.outputs}

    def counters(self) -> list[tuple[tuple[str, ...], float]]:
        """Of each node in the last run its name, those of what it is fused from, and seconds."""
        return [
            ((own.node_name, *self._fused.get(own.node_name, ())), own.real_time.total_seconds())
            for own in self._request.profiling_info
            if own.real_time
        ]


class Qonnx:
    """A QONNX model in the executor of qonnx, node by node.

    Args:
        model: The bytes of a QONNX file.

    Raises:
        ImportError: qonnx is not installed.
    """

    name = "qonnx"
    integer_kernels = 0

    def __init__(self, model: bytes) -> None:
        wrapper = require("qonnx.core.modelwrapper", "qonnx").ModelWrapper
        self._execute = require("qonnx.core.onnx_exec", "qonnx").execute_onnx
        shapes = require("qonnx.transformation.infer_shapes", "qonnx").InferShapes
        self.version = metadata.version("qonnx")
        self._model = wrapper(require("onnx", "export").load_from_string(model)).transform(shapes())
        self.inputs = [value.name for value in self._model.graph.input]
        self.outputs = [value.name for value in self._model.graph.output]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        """The graph's outputs by name, for its inputs by name."""
        found: dict[str, np.ndarray[Any, Any]] = self._execute(self._model, dict(feeds))
        return found


@functools.cache
def _core() -> Any:
    """OpenVINO's core, one for the process.

    Its CPU plugin gives the thread a stack for signals and takes it away with itself: the next
    signal would end the process.
    """
    return require("openvino", "openvino").Core()


ENGINES: Final[Mapping[str, Callable[..., Engine]]] = {
    "onnxruntime": cast("Callable[..., Engine]", OnnxRuntime),
    "openvino": cast("Callable[..., Engine]", OpenVino),
}
"""The engines by name; each takes the bytes of a file and ``threads``."""


def installed_engines() -> tuple[str, ...]:
    """The names of the engines that are installed."""
    return tuple(name for name in ENGINES if importlib.util.find_spec(name))


def check_engine(name: str) -> None:
    """Refuse an engine that there is not.

    Raises:
        ValueError: There is none of this name.
        ImportError: It is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {', '.join(ENGINES)}")
    require(name, "openvino" if name == "openvino" else "export")


def make_engine(name: str, model: bytes, *, threads: int = 1) -> Engine:
    """Load a file into an engine.

    Raises:
        ValueError: There is no such engine, or it refuses the model.
        ImportError: It is not installed.
    """
    check_engine(name)
    return ENGINES[name](model, threads=threads)


def _loaded(load: Callable[[], Any], name: str) -> Any:
    try:
        return load()
    except Exception as error:  # whatever the engine raises
        raise ValueError(f"{name} does not load the network: {first_line(error)}") from error


def _is_integer(told: Any) -> bool:
    kind, precision = (told[key].astype(str) for key in ("layerType", "runtimePrecision"))
    return kind in ("Convolution", "FullyConnected", "MatMul", "Deconvolution") and precision in (
        "i8",
        "u8",
    )
