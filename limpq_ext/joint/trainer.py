"""Joint training of the importance indicators: all layers and all bit-widths in one training run.

One step on a batch runs every searchable layer at each candidate bit-width in turn and then once
more with bits drawn at random per layer; the gradients of these n + 1 branches add up to one
optimizer step (LIMPQ, arXiv 2203.08368, section 3.3).

What the branches have in common is computed once (`runner`): the quantized weights and whatever
comes before the first searchable layer. The gradients are those of the plain loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from limpq_ext.joint.runner import Bits, BranchRunner
from limpq_ext.joint.sensitivity import SensitivityMeter
from limpq_ext.nn.network import quantized_layers
from limpq_ext.nn.quantizers import LsqQuantizer, WeightQuantizer
from limpq_ext.training.cuda_graphs import Captured
from limpq_ext.training.model_state import device_of
from limpq_ext.training.update import Update
from limpq_ext.values.indicators import Indicators

RANDOM_BRANCH = "random"
"""Name of the branch whose layers draw their bits at random."""

LossesAndOutputs = tuple[dict[str, Tensor], dict[str, Any]]
"""What is left of a step's branches beside their gradients, by branch and detached."""

STEPS_BEFORE_CAPTURE = 3
"""Ordinary steps before a CUDA graph is captured: libraries choose their kernels in them."""


@dataclass(frozen=True)
class JointStep:
    """What one joint step did.

    Attributes:
        losses: The loss of every branch, detached scalars: "6", "5", ... and "random"; the mean
            over the processes.
        draw: The bit-width that each layer drew for the random branch.
    """

    losses: dict[str, Tensor]
    draw: dict[str, int]


class JointTrainer:
    """Trains a prepared model's step sizes for all bit-widths jointly.

    Args:
        model: What :func:`limpq_ext.prepare` returned.
        optimizer: Over the model's parameters, all step sizes among them. A parameter that got no
            gradient is not touched.
        loss_fn: ``loss_fn(output, target)``, a scalar.
        distill: The highest bit-width learns from the target and teaches the other branches by
            cross entropy with its softmax (in-place distillation); outputs must be class scores.
        clip_value: Gradients are clipped to ``[-clip_value, clip_value]`` after they added up.
        seed: Of the random branch. The draw depends on the seed and the step alone, so it is the
            same in every process.
        weight_bank: Quantize all weights once per step instead of in every branch. It takes memory
            for each weight at each bit-width, see :class:`WeightBank`.
        share_stem: Compute what comes before the first searchable layer once per step.
        drop_relu: Let unsigned quantizers take over the ReLU or ReLU6 in front of them.
        autocast: The dtype of the branches' autocast, torch.bfloat16 or torch.float16; None: they
            compute in the model's own. With float16 a gradient scaler guards against underflow: a
            step whose scaled gradients overflow is skipped and the scale halved.
        compile_forward: Compiles what a branch runs, for example ``torch.compile``. One graph
            serves all branches and draws. A model that is compiled already is compiled its way.
        cuda_graph: Capture a step in CUDA graphs after three ordinary ones: all branches, forward
            and backward, are one graph; after the exchange between processes and ``on_branch``,
            the look for what is not finite, clipping and the optimizer's step are another, if the
            optimizer is a fused one. Batches of another shape run without them. ``loss_fn`` must
            not wait for the device. A batch is one input tensor and one target tensor.
        check_steps: Look for a NaN or an infinity after this many steps; 0: every step on the CPU,
            every 50 elsewhere, so that the host seldom waits for the device.
        sensitivity_every: Measure in every so-manieth step, from the second on, what the errors of
            all bit-widths add to the loss, for :meth:`sensitivities`; 0: never. ``loss_fn`` then
            has to be the mean over the samples of the batch, or say so by its ``reduction``. The
            highest branch of such a step runs uncompiled, and all of them without a CUDA graph.
        on_branch: Called with (branch, output, target) after every branch, its gradients done; the
            output is detached.

    A part that cannot be shared is computed in every branch; the first step warns and says why.

    In a run of several processes (torchrun, with torch.distributed initialised) each passes its
    share of the batch; all start with what process 0 has, and the gradients of all branches are
    averaged once per step, before they are clipped.

    Raises:
        ValueError: The model is not prepared or wrapped for several processes, its layers have
            different candidates, the optimizer does not hold all its step sizes, or an argument is
            out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        distill: bool = False,
        clip_value: float = 1.0,
        seed: int = 0,
        weight_bank: bool = True,
        share_stem: bool = True,
        drop_relu: bool = True,
        autocast: torch.dtype | None = None,
        compile_forward: Callable[[nn.Module], Any] | None = None,
        cuda_graph: bool = False,
        check_steps: int = 0,
        sensitivity_every: int = 0,
        on_branch: Callable[[str, Any, Any], None] | None = None,
    ) -> None:
        original = getattr(model, "_orig_mod", None)
        if isinstance(original, nn.Module):  # what torch.compile returned
            compile_forward = compile_forward or cast(Any, model).dynamo_ctx
            model = original
        _refuse_wrapped(model)
        self.layers = quantized_layers(model)
        if not self.layers:
            raise ValueError(
                f"{type(model).__name__} has no quantized layers: pass it through limpq_ext.prepare"
            )
        candidates = {
            quantizer.bits
            for layer in self.layers.values()
            for quantizer in (layer.weight_quantizer, layer.input_quantizer)
        }
        if len(candidates) > 1:
            raise ValueError(
                f"the layers' candidate bits differ, joint training needs the same: {candidates}"
            )
        if not clip_value > 0:
            raise ValueError(f"clip_value is {clip_value}, expected a positive number")
        if sensitivity_every < 0:
            raise ValueError(f"sensitivity_every is {sensitivity_every}, expected 0 or more")
        reduction = getattr(loss_fn, "reduction", "mean")
        if sensitivity_every and reduction not in ("mean", "sum"):
            raise ValueError(
                f"the loss's reduction is {reduction!r}: sensitivities need a mean or a sum over"
                " the samples"
            )
        _check_optimizer(model, optimizer)
        device = device_of(model)
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a model on a CUDA device, this one is on {device}")
        if cuda_graph and compile_forward is not None:
            raise ValueError("cuda_graph and compile_forward exclude each other")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.distill = distill
        self.seed = seed
        self.autocast = autocast
        self.cuda_graph = cuda_graph
        self.on_branch = on_branch
        self.scaler = torch.amp.GradScaler(device.type) if autocast == torch.float16 else None
        self._update = Update(
            model,
            optimizer,
            self._repeat,
            clip_value=clip_value,
            check_steps=check_steps,
            scaler=self.scaler,
        )
        self._runner = BranchRunner(
            model,
            self.layers,
            weight_bank=weight_bank,
            share_stem=share_stem,
            drop_relu=drop_relu,
            compile_forward=compile_forward,
        )
        self._sensitivity_every = sensitivity_every
        self._loss_is_mean = reduction == "mean"
        self._meter = SensitivityMeter(self.layers)
        self._captured: Captured[LossesAndOutputs] | None = None
        self._eager_steps = 0
        # From the highest down: the teacher of in-place distillation comes first.
        self.bits = tuple(sorted(candidates.pop(), reverse=True))

    def step(self, x: Any, target: Any) -> JointStep:
        """Take one joint step on a batch; the model is put into training mode.

        Args:
            x: What the model takes: one input, a tuple or list of them, or a dict of keyword ones.
            target: What ``loss_fn`` compares its output with.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite.
            ValueError: A layer finds no start value in the batch, the loss depends on nothing that
                the optimizer holds, or ``cuda_graph`` meets a batch of several inputs.
        """
        if not self.model.training:
            self.model.train()
        if self.cuda_graph and not (isinstance(x, Tensor) and isinstance(target, Tensor)):
            raise ValueError(
                "cuda_graph needs batches of one input tensor and one target tensor, this one has"
                f" {type(x).__name__} and {type(target).__name__}: train without it"
            )
        if isinstance(x, Mapping):
            x = dict(x)  # whose tensors are found
        if self._eager_steps == 0:
            self._start_weights()
        self.optimizer.zero_grad(set_to_none=True)
        draw = self.draw(self.steps)
        captured = None
        if self.cuda_graph:
            self._runner.set_selection(draw)
            captured = None if self._measures() else self._capture(x, target, draw)
        if captured is not None:
            losses, outputs = captured.replay(x, target)
            x, target = captured.inputs
        else:
            # A captured graph reads the random branch's bits from a tensor, and so does any step
            # beside it, except for the first, which gives quantizers their start values.
            by_tensor = self.cuda_graph and self._eager_steps > 0
            losses, outputs = self._run_branches(x, target, draw, by_tensor=by_tensor)
            self._eager_steps += 1
        if self.on_branch is not None:
            for branch, output in outputs.items():
                self.on_branch(branch, output, target)
        losses = self._update.take(losses, x, target, capture=captured is not None)
        return JointStep(losses, draw)

    @property
    def shared(self) -> dict[str, bool | int]:
        """What the branches share since the first step: "weight_bank", "stem", "dropped_relus"."""
        return self._runner.shared

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._update.steps

    def check(self) -> None:
        """Make sure that all steps so far were finite; this waits for the device.

        Raises:
            NonFiniteError: One was not; it names the step, the branch and the layer.
        """
        self._update.watch.check()

    def state_dict(self) -> dict[str, Any]:
        """What the rest of the training depends on: model, optimizer and steps.

        Raises:
            NonFiniteError: A step so far was not finite.
        """
        return {
            "update": self._update.state_dict(),
            "seed": self.seed,
            "bits": list(self._runner.candidates),
            "scale_bounds": {
                name: [module.scale_min, module.scale_max]
                for name, module in self.model.named_modules()
                if isinstance(module, LsqQuantizer)
            },
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sensitivities": self._meter.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Go on from a state of :meth:`state_dict`, of the same model, bits and seed.

        It is also the way on after a NonFiniteError.

        Raises:
            ValueError: The state is of a training with another seed or other candidates.
            RuntimeError: The state is of another model.
        """
        if state_dict["seed"] != self.seed:
            raise ValueError(f"seed is {self.seed}, but the state is of seed {state_dict['seed']}")
        if state_dict["bits"] != list(self._runner.candidates):
            raise ValueError(
                f"the candidates are {list(self._runner.candidates)}, but the state is of"
                f" {state_dict['bits']}"
            )
        self.model.load_state_dict(state_dict["model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self._update.load_state_dict(state_dict["update"])
        self._meter.load_state_dict(state_dict.get("sensitivities"))

    def draw(self, step: int) -> dict[str, int]:
        """The bits that every layer draws for the random branch of a step."""
        places = np.random.default_rng([self.seed, step]).integers(
            len(self.bits), size=len(self.layers)
        )
        return {
            name: self.bits[place] for name, place in zip(self.layers, places.tolist(), strict=True)
        }

    def indicators(self) -> Indicators:
        """The step sizes as they stand now: the importance of every layer at every bit-width.

        Raises:
            ValueError: A step size is NaN or infinite; the message names its layer.
        """
        return Indicators.from_model(self.model, {"steps": self.steps, "seed": self.seed})

    def sensitivities(self) -> Indicators:
        """What the errors of every bit-width add to the loss, in the unit of the loss.

        Half the sum over channels of ``<G, e_b>**2 / N``, with the gradient G of the summed loss of
        a batch of N samples at a layer's weights or input in the highest branch, and the error
        ``e_b`` there at b bits and the step size of the time. The batch is that of all processes,
        which have the same.

        Raises:
            ValueError: Nothing was measured: ``sensitivity_every`` is 0, or no such step was taken
                yet or was finite.
        """
        meta = {"score": "loss_aware", "steps": self.steps, "seed": self.seed}
        return self._meter.indicators(meta)

    def _measures(self) -> bool:
        """Whether the next step measures sensitivities; the first gives step sizes their start."""
        every = self._sensitivity_every
        return every > 0 and self.steps > 0 and (self.steps - 1) % every == 0

    def _start_weights(self) -> None:
        """Give weights that were all 0 before their start values, which no weight bank does."""
        for layer in self.layers.values():
            if isinstance(layer.weight_quantizer, WeightQuantizer):
                layer.weight_quantizer.start(layer.weight)

    def _run_branches(
        self, x: Any, target: Any, draw: Bits, *, by_tensor: bool = False
    ) -> LossesAndOutputs:
        """Run all branches, forward and backward; their gradients add up."""
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Any] = {}
        selected = draw if by_tensor else None
        with self._autocast(), self._runner.step(x, len(self.bits) + 1, by_tensor=selected) as run:
            passes = self._passes(draw, target, run)

            def finish(branch: str, output: Any, loss: Tensor) -> None:
                with torch.autocast(loss.device.type, enabled=False):
                    (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                losses[branch] = loss.detach()
                outputs[branch] = tree_map(_detached, output)

            if self._measures():
                with self._watched(x):
                    finish(*next(passes))
            for each in passes:
                finish(*each)
        return losses, outputs

    @contextmanager
    def _watched(self, x: Any) -> Iterator[None]:
        """Measure the highest branch, which is the first: no other one has left gradients yet."""
        scale: Tensor | float = 1.0
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones((), device=device_of(self.model)))
        ready = partial(self._runner.ready_gradient, bits=self.bits[0])
        mean = self._loss_is_mean
        with (
            self._runner.uncompiled(),
            self._meter.watching(x, ready, mean=mean, loss_scale=scale),
        ):
            yield

    def _capture(self, x: Tensor, target: Tensor, draw: Bits) -> Captured[LossesAndOutputs] | None:
        """All branches of a step as one CUDA graph, once there is one and where it fits."""
        if self._captured is None and self._eager_steps >= STEPS_BEFORE_CAPTURE:
            parameters = [p for p in self.model.parameters() if p.requires_grad]

            def compute(x: Tensor, target: Tensor) -> LossesAndOutputs:
                return self._run_branches(x, target, draw, by_tensor=True)

            self._captured = Captured(compute, (x, target), parameters=parameters)
        fits = self._captured is not None and self._captured.fits(x, target)
        return self._captured if fits else None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        # No cache: the quantized weights change within the block.
        device = device_of(self.model).type
        return torch.autocast(device, dtype=self.autocast, cache_enabled=False)

    def _passes(
        self, draw: Bits, target: Any, run: Callable[[Bits], Any]
    ) -> Iterator[tuple[str, Any, Tensor]]:
        """Every branch run forward: its name, its output and its loss."""
        teacher: Tensor | None = None
        for branch, bits in self._branches(draw):
            output = run(bits)
            if teacher is not None:
                loss = F.cross_entropy(output, teacher)
            else:
                loss = self.loss_fn(output, target)
                if self.distill:
                    teacher = output.detach().softmax(dim=1)
            yield branch, output, loss

    def _repeat(self, step: int, branch: str, x: Any, target: Any) -> None:
        """Run one branch of a step again, in distillation after its teacher."""
        with self._autocast():
            draw = self.draw(step - 1)
            for name, _, loss in self._passes(draw, target, partial(self._runner.run_alone, x)):
                if name == branch:
                    loss.backward()
                    return

    def _branches(self, draw: Bits) -> Iterator[tuple[str, Bits]]:
        for bits in self.bits:
            yield str(bits), dict.fromkeys(self.layers, bits)
        yield RANDOM_BRANCH, draw


def _refuse_wrapped(model: nn.Module) -> None:
    """A joint step exchanges gradients itself, once, and needs whole tensors for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported where a model is of its classes
    sharded = [fsdp.FSDPModule, fsdp.FullyShardedDataParallel] if fsdp else []
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, *sharded)
    for module in model.modules():
        kind = next((wrapper for wrapper in wrappers if isinstance(module, wrapper)), None)
        if kind is not None:
            inside = "before it was sharded" if kind in sharded else "inside, .module"
            raise ValueError(
                f"JointTrainer does not take a model in {kind.__name__}: pass the model {inside};"
                " in processes that torchrun starts it averages their gradients itself"
            )


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make sure that the optimizer trains the step sizes, which are what is learned here."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    scales = {
        name: module.scale
        for name, module in model.named_modules()
        if isinstance(module, LsqQuantizer)
    }
    lacking = [name for name, scale in scales.items() if id(scale) not in held]
    if lacking:
        raise ValueError(
            f"the optimizer does not hold {len(lacking)} of the model's {len(scales)} step sizes,"
            f" such as '{lacking[0]}.scale': make it over the parameters of the prepared model"
        )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
