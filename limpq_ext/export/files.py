"""Files of quantized networks in the formats that others run, verified before they are written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from limpq_ext.export.codes import float_bytes
from limpq_ext.export.engines import Qonnx, installed_engines, make_engine
from limpq_ext.export.onnx_graph import finish, onnx_graph, serialized
from limpq_ext.export.program import aot_package, exported_program
from limpq_ext.export.qcdq import forget_types, qcdq_model
from limpq_ext.export.qonnx import qonnx_model
from limpq_ext.export.residual import quantize_additions
from limpq_ext.export.timing import seconds_in_turn
from limpq_ext.export.tracing import exporting, input_arrays
from limpq_ext.export.verify import (
    MOST_DIFFERING,
    MOST_ROUNDED,
    Verification,
    verify_onnx,
    verify_outputs,
)
from limpq_ext.nn.inputs import Inputs, call
from limpq_ext.nn.network import quantized_layers
from limpq_ext.training.batches import Batches
from limpq_ext.values.files import open_atomically, refuse_existing

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class ExportedFile:
    """A file that was written.

    Attributes:
        path: Where it is.
        bytes: Its size.
        float_bytes: The size of the same network's parameters in float32.
        verified: What engines compute of it; none where that was not asked for.
    """

    path: Path
    bytes: int
    float_bytes: int
    verified: tuple[Verification, ...] = ()

    @property
    def ratio(self) -> float:
        """Its size over that in float32."""
        return self.bytes / self.float_bytes


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Inputs,
    *,
    shift: bool = True,
    residual_bits: int | None = None,
    calibration: Batches | None = None,
    verify: Batches | None = None,
    timed: bool = False,
    engines: Sequence[str] | None = None,
    threads: int = 1,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a quantized network as an ONNX file of standard operators (opset 21).

    Inputs of layers are QuantizeLinear, Clip and DequantizeLinear to 8-bit integers, weights are
    4-bit or 8-bit integers with a scale, batch normalisation is in the scales. The batch may have
    any size. onnxruntime, OpenVINO and others run it, in integers where they can.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained, at 2 to 8 bits; it is left
            as it is.
        path: The file to write.
        example_input: What the model's forward takes, likewise.
        shift: Store codes of weights times a power of two and scales over it where 8 bits have
            room, which is exact and cuts what onnxruntime loses by rounding biases.
        residual_bits: 8: quantize what enters additions as well, with ranges from ``calibration``.
            onnxruntime then computes in integers throughout, and the file is no longer the network
            that was trained. None: not.
        calibration: Some batches of inputs and targets; the targets do not matter.
        verify: Some batches of inputs and targets. With them the file is written only if
            onnxruntime without optimizations, and every engine, computes from them what the network
            does: each code that comes into a layer within a step, and no more than 1 % of them
            another one (0.1 % without optimizations). With ``residual_bits`` engines are compared
            with the file, computed node by node, and that without them with the network.
        timed: Whether every engine is timed on the first sample, in turn with the same network in
            float32.
        engines: "onnxruntime", "openvino"; None: those that are installed.
        threads: How many engines compute with.
        overwrite: Whether a file that exists is replaced.

    Returns:
        What was written, and what the engines computed.

    Raises:
        FileExistsError: There is such a file already.
        ValueError: A layer has more than 8 bits or no step sizes yet, PyTorch cannot export the
            network, an engine refuses it or computes something else, or ``residual_bits`` is
            another number or without ``calibration``; nothing is written then.
        OSError: The file cannot be written.
        ImportError: What comes with the extra ``export`` is not installed.
    """
    if not overwrite:
        refuse_existing(path)
    if residual_bits not in (None, 8):
        raise ValueError(f"residual_bits is {residual_bits}, expected 8 or None")
    if residual_bits is not None and calibration is None:
        raise ValueError("residual_bits needs batches to find ranges with: give calibration")
    made = qcdq_model(model, example_input, shift=shift)
    bits = {
        name: [layer.weight_bits, layer.activation_bits]
        for name, layer in quantized_layers(model).items()
    }
    made.metadata_props["limpq_ext.bits"] = json.dumps(bits)
    exact = file = _written(made)
    if residual_bits is not None and calibration is not None:
        quantize_additions(made, model, calibration)
        made.metadata_props["limpq_ext.residual_bits"] = str(residual_bits)
        file = _written(made)
    verified = []
    if verify is not None:
        batches = list(verify)
        engines = installed_engines() if engines is None else engines
        own = verify_onnx(exact, model, batches, "onnxruntime", optimized=False, threads=threads)
        own.check(MOST_DIFFERING)
        verified.append(own)
        for engine in engines:
            own = verify_onnx(
                file, model, batches, engine, by_itself=file is not exact, threads=threads
            )
            own.check(MOST_ROUNDED)
            verified.append(own)
        if timed:
            files = (file, float_onnx(model, example_input))
            inputs = input_arrays(model, batches[0][0])
            verified[1:] = [
                _timed(found, name, files, inputs, threads)
                for found, name in zip(verified[1:], engines, strict=True)
            ]
    return _kept(path, file, model, verified, overwrite=overwrite)


def export_qonnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Inputs,
    *,
    verify: Batches | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a quantized network as a QONNX file, for FINN and hls4ml.

    Inputs and weights have Quant nodes, at 2 to 16 bits, weights are in float32, and normalisation
    stays as it is. The batch is one sample.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained; it is left as it is.
        path: The file to write.
        example_input: What the model's forward takes.
        verify: Some batches of inputs and targets. With them the file is written only if qonnx,
            which has to be installed, gives nine in ten of the samples the network's class.
        overwrite: Whether a file that exists is replaced.

    Raises:
        FileExistsError: There is such a file already.
        ValueError: As in `export_onnx`.
        OSError: The file cannot be written.
        ImportError: What comes with the extra ``export``, or with ``qonnx``, is not installed.
    """
    if not overwrite:
        refuse_existing(path)
    file = serialized(qonnx_model(model, example_input))
    verified = []
    if verify is not None:
        engine = Qonnx(file)
        names = engine.inputs

        def run(inputs: Inputs) -> Any:
            values = input_arrays(model, inputs)
            samples = [
                engine.run({n: v[i : i + 1] for n, v in zip(names, values, strict=True)})
                for i in range(len(values[0]))
            ]
            return np.concatenate([next(iter(own.values())) for own in samples])

        verified.append(verify_outputs(f"{engine.name} {engine.version}", run, model, verify))
    return _kept(path, file, model, verified, overwrite=overwrite)


def export_program(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Inputs,
    *,
    verify: Batches | None = None,
    package: bool = False,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a quantized network as a program of torch.export, or compiled by AOTInductor.

    Args:
        model: Of :func:`limpq_ext.apply_policy`, calibrated or trained, at 2 to 8 bits; it is left
            as it is.
        path: The file to write, with ".pt2" at its end. ``torch.export.load`` reads it after
            ``torch.ao.quantization.fx._decomposed`` was imported, which has its operators.
        example_input: What the model's forward takes; its first axis becomes the batch.
        verify: Some batches of inputs and targets. With them the file is written only if what was
            read back gives nine in ten of the samples the network's class.
        package: Compile it for processors like this one; ``torch._inductor.aoti_load_package``
            loads that. It takes a C++ compiler.
        overwrite: Whether a file that exists is replaced.

    Raises:
        FileExistsError: There is such a file already.
        ValueError: As in `export_onnx`; the path has another ending, or there is no compiler.
        OSError: The file cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ValueError(f"'{path}' is no name for a program of torch.export: it ends in .pt2")
    if not overwrite:
        refuse_existing(path)
    program = exported_program(model, example_input)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "program.pt2"
        if package:
            with exporting(model):
                aot_package(program, made)
        else:
            torch.export.save(program, made)
        verified = []
        if verify is not None:
            loaded: Any
            if package:
                loaded, engine = torch._inductor.aoti_load_package(str(made)), "AOTInductor"
            else:
                loaded, engine = torch.export.load(made).module(), "torch.export"

            def run(inputs: Inputs) -> Any:
                with torch.no_grad():
                    output = call(loaded, inputs)
                return next(v for v in tree_leaves(output) if isinstance(v, Tensor)).numpy()

            name = f"{engine} {torch.__version__}"
            verified.append(verify_outputs(name, run, model, verify))
        return _kept(path, made.read_bytes(), model, verified, overwrite=overwrite)


def float_onnx(model: nn.Module, example_input: Inputs) -> bytes:
    """The bytes of an ONNX file of the same network with its weights in float32.

    Args:
        model: A quantized network; its weights before their quantization are taken.
        example_input: What its forward takes.

    Raises:
        ValueError: PyTorch cannot export the network.
        ImportError: onnxscript is not installed.
    """
    made = onnx_graph(model, example_input, quantized=False)
    finish(made)
    return serialized(made)


def _kept(
    path: str | os.PathLike[str],
    file: bytes,
    model: nn.Module,
    verified: Sequence[Verification],
    *,
    overwrite: bool,
) -> ExportedFile:
    with open_atomically(path, overwrite=overwrite) as out:
        out.write(file)
    return ExportedFile(Path(path), len(file), float_bytes(model), tuple(verified))


def _written(made: ir.Model) -> bytes:
    """A file of a model, which keeps the types that say more than the file has to."""
    brief = made.clone()
    forget_types(brief.graph)
    return serialized(brief)


def _timed(
    found: Verification, engine: str, files: tuple[bytes, bytes], inputs: list[Any], threads: int
) -> Verification:
    loaded = [make_engine(engine, file, threads=threads) for file in files]
    first = dict(zip(loaded[0].inputs, (value[:1] for value in inputs), strict=True))
    seconds = seconds_in_turn(loaded, first)
    return replace(found, seconds=seconds[0], float_seconds=seconds[1])
