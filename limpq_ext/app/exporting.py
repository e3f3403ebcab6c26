"""Networks of a recipe as files to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from torch import nn

from limpq_ext.app.session import Session
from limpq_ext.app.trainings import first_batches, validation_batches
from limpq_ext.data.loading import make_loader
from limpq_ext.export.codes import float_bytes
from limpq_ext.export.engines import OnnxRuntime
from limpq_ext.export.files import ExportedFile, export_onnx, export_program, export_qonnx
from limpq_ext.export.packed import load, save
from limpq_ext.export.verify import verify_outputs
from limpq_ext.training.batches import Batches
from limpq_ext.training.distributed import from_main
from limpq_ext.training.loop import StepDone
from limpq_ext.values.policy import Policy

Format = Literal["onnx", "safetensors", "qonnx", "pt2", "aoti"]

FORMATS: Final = get_args(Format)

BATCH = 32
"""Images that engines are given at once."""

NOT_TRAINED: Final = "what enters additions has 8 bits: this is not the network that was trained"
"""What is said of a file with residual bits."""

CALIBRATION = 8
"""Batches that the ranges of what enters additions are found with."""


def export_network(
    session: Session,
    model: nn.Module,
    path: Path,
    form: Format = "onnx",
    *,
    shift: bool = True,
    residual_bits: int | None = None,
    images: int = 256,
    engines: Sequence[str] | None = None,
    threads: int = 1,
    policy: Policy | None = None,
    overwrite: bool = False,
) -> ExportedFile:
    """Write a quantized network as a file of a format, verified.

    Args:
        session: The recipe that it is of.
        model: The network.
        path: The file.
        form: "onnx", "safetensors", "qonnx", "pt2" for torch.export, "aoti" for that compiled.
        shift: As for :func:`limpq_ext.export_onnx`; of "onnx" alone, as the next.
        residual_bits: As there; ranges are those of training images.
        images: How many validation images it is verified with, training images where there are
            none of these; 0: it is not verified.
        engines: What runs "onnx", by name, and is timed; None: those that are installed.
        threads: How many they compute with.
        policy: What "safetensors" keeps as a whole.
        overwrite: Whether a file that exists is replaced.

    Raises:
        FileExistsError: There is such a file already.
        ValueError: As in `export_onnx`; or what "safetensors" gives back is not the same.
        ImportError: As there.
    """
    batches = _images(session, images) if images else None
    example = session.example_input()
    if form == "safetensors":
        save(model, path, policy=policy, name=session.recipe.model.name, overwrite=overwrite)
        return _restored(session, model, path, batches)
    if form == "qonnx":
        return export_qonnx(model, path, example, verify=batches, overwrite=overwrite)
    if form in ("pt2", "aoti"):
        compiled = form == "aoti"
        return export_program(
            model, path, example, verify=batches, package=compiled, overwrite=overwrite
        )
    return export_onnx(
        model,
        path,
        example,
        shift=shift,
        residual_bits=residual_bits,
        calibration=first_batches(session, BATCH, CALIBRATION) if residual_bits else None,
        verify=batches,
        timed=True,
        engines=engines,
        threads=threads,
        overwrite=overwrite,
    )


def _images(session: Session, images: int) -> list[Any]:
    count = -(-images // BATCH)
    if len(session.data.val):
        return validation_batches(session, BATCH, count, 0)
    return first_batches(session, BATCH, count)


def _restored(
    session: Session, model: nn.Module, path: Path, batches: Batches | None
) -> ExportedFile:
    """What a packed file gives back, beside the network that was saved."""
    verified = []
    if batches is not None:
        restored = load(path, session.create_model()).eval()

        def run(inputs: Any) -> Any:
            with torch.no_grad():
                return restored(inputs).numpy()

        verified.append(verify_outputs(f"torch {torch.__version__}", run, model, batches))
    return ExportedFile(path, path.stat().st_size, float_bytes(model), tuple(verified))


def accuracy_of_file(
    session: Session,
    path: Path,
    *,
    threads: int = 1,
    on_step: StepDone | None = None,
) -> float:
    """The accuracy of an ONNX file on the test images, in onnxruntime; process 0 runs it.

    Args:
        session: The recipe that it is of.
        path: The file.
        threads: How many the engine computes with.
        on_step: Called after every batch.
    """

    def measured() -> float:
        engine = OnnxRuntime(path.read_bytes(), threads=threads)
        workers = session.recipe.data.workers
        loader = make_loader(session.data.test, batch_size=BATCH, train=False, workers=workers)
        right = 0
        for done, (x, target) in enumerate(loader, start=1):
            found = next(iter(engine.run({engine.inputs[0]: x.numpy()}).values()))
            right += int((found.argmax(1) == target.numpy()).sum())
            if on_step is not None:
                on_step(done, len(loader))
        return right / len(session.data.test)

    return from_main(measured)
