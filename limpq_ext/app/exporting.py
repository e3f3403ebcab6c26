"""Networks of a recipe as files to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from limpq_ext.app.session import Session
from limpq_ext.app.trainings import first_batches, validation_batches
from limpq_ext.data.loading import make_loader
from limpq_ext.export.engines import OnnxRuntime
from limpq_ext.export.onnx_files import ExportedFile, export_onnx
from limpq_ext.training.distributed import from_main
from limpq_ext.training.loop import StepDone

BATCH = 32
"""Images that engines are given at once."""

CALIBRATION = 8
"""Batches that the ranges of what enters additions are found with."""


def export_network(
    session: Session,
    model: nn.Module,
    path: Path,
    *,
    shift: bool = True,
    residual_bits: int | None = None,
    images: int = 256,
    engines: Sequence[str] = ("onnxruntime",),
    threads: int = 1,
) -> ExportedFile:
    """Write a quantized network as an ONNX file, verified and timed; a file there is replaced.

    Args:
        session: The recipe that it is of.
        model: The network.
        path: The file.
        shift: As for :func:`limpq_ext.export_onnx`.
        residual_bits: As there; ranges are those of training images.
        images: How many validation images it is verified with, training images where there are
            none of these; 0: it is not verified.
        engines: What runs it, by name.
        threads: How many they compute with.

    Raises:
        ValueError: As in `export_onnx`.
        ImportError: As there.
    """
    batches = None
    if images:
        count = -(-images // BATCH)
        if len(session.data.val):
            batches = validation_batches(session, BATCH, count, 0)
        else:
            batches = first_batches(session, BATCH, count)
    return export_onnx(
        model,
        path,
        session.example_input(),
        shift=shift,
        residual_bits=residual_bits,
        calibration=first_batches(session, BATCH, CALIBRATION) if residual_bits else None,
        verify=batches,
        timed=True,
        engines=engines,
        threads=threads,
        overwrite=True,
    )


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
