"""The trainings of a recipe: its sections as calls of what trains and calibrates."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional as F

from limpq_ext.app.recipe import TrainingSection
from limpq_ext.app.session import Session
from limpq_ext.data.loading import ImageSet, make_loader
from limpq_ext.joint.trainer import JointTrainer
from limpq_ext.training.batches import batches_of_epoch
from limpq_ext.training.calibration import calibrate
from limpq_ext.training.distributed import broadcast_state, from_main, rank
from limpq_ext.training.finetune import FinetuneOptions, finetune
from limpq_ext.training.loop import Recording, StepDone, run_epochs
from limpq_ext.training.metrics import Meter, Record
from limpq_ext.training.optimizers import make_optimizer
from limpq_ext.values.indicators import Indicators
from limpq_ext.values.policy import Policy

_NOT_OF_TRAINING: Final = {"batch_size", "autocast", "init", "calibrate", "calibration_batches"}
"""What sections have beside the options of `finetune`."""


def train_float(
    session: Session,
    *,
    on_step: StepDone | None = None,
    recording: Recording | None = None,
) -> nn.Module:
    """The float model, trained from its random start."""
    model = session.create_model().to(session.device)
    _finetune(session, model, session.recipe.float_training, on_step=on_step, recording=recording)
    return model


def train_indicators(
    session: Session,
    model: nn.Module,
    *,
    on_step: StepDone | None = None,
    recording: Recording | None = None,
) -> tuple[Indicators, nn.Module]:
    """The indicators of a float model, and the prepared model that they were trained in."""
    options = session.recipe.joint
    prepared = session.prepare(model)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    prepared.to(session.device).to(memory_format=layout).train()
    meter = Meter(session.device)
    trainer = make_joint_trainer(session, prepared, meter)

    def take_step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = trainer.step(x.contiguous(memory_format=layout), target).losses
        for branch, loss in losses.items():
            meter.add(f"loss {branch}", loss)
        return torch.stack(list(losses.values())).mean()

    run_epochs(
        take_step,
        trainer.optimizer,
        _seeded_loader(session, options, session.recipe.data.fraction),
        model=prepared,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        parts={"trainer": trainer},
        meter=meter,
        check=trainer.check,
        observe=lambda: {"indicators": _by_layer(trainer.indicators())},
        recording=recording,
        on_step=on_step,
    )
    sensitive = options.indicators == "sensitivities"
    return trainer.sensitivities() if sensitive else trainer.indicators(), prepared


def make_joint_trainer(session: Session, prepared: nn.Module, meter: Meter) -> JointTrainer:
    """What trains a prepared model as the recipe says."""
    options = session.recipe.joint
    optimizer = make_optimizer(
        prepared,
        options.optimizer,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, label_smoothing=options.label_smoothing)

    return JointTrainer(
        prepared,
        optimizer,
        loss_fn,
        distill=options.distill,
        seed=session.recipe.seed,
        autocast=_dtype(options.autocast),
        compile_forward=torch.compile if options.compile else None,
        cuda_graph=options.cuda_graph,
        weight_bank=options.weight_bank,
        share_stem=options.share_stem,
        drop_relu=options.drop_relu,
        on_branch=meter.add_branch,
        sensitivity_every=int(options.indicators == "sensitivities"),
    )


def finetune_policy(
    session: Session,
    model: nn.Module,
    policy: Policy,
    *,
    on_step: StepDone | None = None,
    recording: Recording | None = None,
    joint_weights: Path | None = None,
) -> nn.Module:
    """The quantized model of a policy, calibrated as the recipe says, and fine-tuned.

    Args:
        session: The recipe.
        model: The float model, which it starts from, and which teaches it if the recipe says.
        policy: The bits.
        on_step: Called after every step.
        recording: Checkpoints and records.
        joint_weights: Start from the prepared model that was saved here instead; process 0
            reads the file.
    """
    start = model
    if joint_weights is not None:
        start = session.prepare(model)
        from_main(lambda: session.load(start, joint_weights))
        broadcast_state(start)
    quantized = session.quantize(start, policy).to(session.device)
    options = session.recipe.finetune
    if session.recipe.calibration != "off":
        corrected = session.recipe.calibration == "correct"
        # Statistics are estimated from images as training has them.
        images = session.data.train.unaugmented() if corrected else session.data.train
        session.seed(rank())
        epoch = batches_of_epoch(_loader(session, images, options.batch_size), 0)
        batches = list(itertools.islice(epoch, options.calibration_batches))
        calibrate(quantized, batches, reference=model if corrected else None)
    teacher = model if options.distill_weight else None
    _finetune(session, quantized, options, on_step=on_step, recording=recording, teacher=teacher)
    return quantized


def calibrated_indicators(
    session: Session, model: nn.Module, batches: int
) -> tuple[Indicators, nn.Module]:
    """The start values of the step sizes, from a float model and a few batches: a first look.

    Returns:
        They, and the prepared model that has them.
    """
    prepared = session.prepare(model)
    calibrate(prepared, _some_batches(session, batches), reference=model)
    return Indicators.from_model(prepared, {"calibrated_batches": batches}), prepared


def calibrated_network(session: Session, weights: Path, policy: Policy, batches: int) -> nn.Module:
    """The network of a policy from float weights, calibrated with a few batches: a first look."""
    original = session.float_model(weights)
    model = session.quantize(original, policy).to(session.device)
    calibrate(model, _some_batches(session, batches), reference=original)
    return model


def _some_batches(session: Session, count: int) -> list[Any]:
    """The first training batches of the joint stage, whatever the number of processes."""
    return first_batches(session, session.recipe.joint.batch_size, count)


def first_batches(session: Session, batch_size: int, count: int, skipped: int = 0) -> list[Any]:
    """Batches of the images that indicators come from, without augmentation.

    Args:
        session: The recipe.
        batch_size: Samples in a batch, over all processes.
        count: The most that there are.
        skipped: Batches before them. Images come again where two epochs do not have so many.
    """
    session.seed(rank())
    part = session.data.train.part(session.recipe.data.fraction, session.recipe.data.seed)
    loader = _loader(session, part.unaugmented(), batch_size)
    batches = (batch for epoch in range(2) for batch in batches_of_epoch(loader, epoch))
    return list(itertools.islice(batches, skipped, skipped + count))


def validation_batches(session: Session, batch_size: int, count: int, skipped: int) -> list[Any]:
    """Batches of validation images in a random order, each image once.

    Args:
        session: The recipe; its data have validation images.
        batch_size: Samples in a batch, over all processes.
        count: The most that there are.
        skipped: Batches before them.
    """
    session.seed(rank())
    loader = _loader(session, session.data.val, batch_size)
    return list(itertools.islice(batches_of_epoch(loader, 0), skipped, skipped + count))


def _seeded_loader(session: Session, options: TrainingSection, fraction: float = 1.0) -> Any:
    """The batches of a training that begins; every process drops out other activations."""
    session.seed(rank())
    return train_loader(session, options, fraction)


def train_loader(session: Session, options: TrainingSection, fraction: float = 1.0) -> Any:
    """The batches of a training.

    Raises:
        ValueError: A batch cannot be shared equally by the processes.
    """
    part = session.data.train.part(fraction, session.recipe.data.seed)
    return _loader(session, part, options.batch_size)


def _loader(session: Session, images: ImageSet, batch_size: int) -> Any:
    return make_loader(
        images,
        batch_size=batch_size,
        train=True,
        seed=session.recipe.seed,
        workers=session.recipe.data.workers,
    )


def _finetune(
    session: Session,
    model: nn.Module,
    options: TrainingSection,
    *,
    on_step: StepDone | None,
    recording: Recording | None,
    teacher: nn.Module | None = None,
) -> None:
    finetune(
        model,
        _seeded_loader(session, options),
        FinetuneOptions(**options.model_dump(exclude=_NOT_OF_TRAINING)),
        recording=recording,
        on_step=on_step,
        teacher=teacher,
        autocast=_dtype(options.autocast),
    )


def _dtype(autocast: str) -> torch.dtype | None:
    return None if autocast == "off" else getattr(torch, autocast)


def _by_layer(indicators: Indicators) -> Record:
    return {
        layer.name: {
            "weight": {str(bits): value for bits, value in layer.weight.items()},
            "activation": {str(bits): value for bits, value in layer.activation.items()},
        }
        for layer in indicators.layers
    }
