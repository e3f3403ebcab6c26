"""What quantization moved, put right without training: batch normalisation and biases.

Quantization shifts and scales what a layer puts out. Re-estimating batch normalisation from a few
images would replace statistics of the whole training set by theirs; what is corrected here is the
difference alone that quantization makes on the same images,

    mean + (mean_q - mean_f)    and    var * var_q / var_f,

and where no batch normalisation follows, bias + (mean_f - mean_q) of the layer's output (Nagel et
al., arXiv 1906.04721, section 4.2). One layer after the other in one forward, so that each sees its
input corrected.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from limpq_ext.graph.trace import trace
from limpq_ext.nn.attention import with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import call, moved
from limpq_ext.nn.layers import QuantizedLayer, channel_axis, quantizable_base
from limpq_ext.nn.network import quantized_layers
from limpq_ext.training.batches import Batches
from limpq_ext.training.distributed import broadcast_state
from limpq_ext.training.model_state import device_of, modes_kept

LEAST_RATIO: Final = 0.01
"""The least and the inverse of the largest factor that a variance is corrected by: a channel that
quantization makes constant would else be blown up on other images."""


@torch.no_grad()
def correct_statistics(model: nn.Module, reference: nn.Module, batches: Batches) -> None:
    """Correct a quantized network's batch normalisation and biases on a few batches.

    Batch normalisation is corrected in its running statistics, of a prepared model those at the
    selected bits. Of layers that feed none, the bias is, where they have one and one bit-width. A
    module that runs several times in a forward stays as it is. In a run of several processes all
    get what process 0 comes to.

    Args:
        model: What :func:`limpq_ext.apply_policy` or :func:`limpq_ext.prepare` returned, its scales
            started; its modules are put back into the modes that they had.
        reference: The float model that it was made from; it is left as it is.
        batches: Some batches of images as in training, without augmentation best; their targets do
            not matter. They are run as one: about 100 images are enough.

    Raises:
        ValueError: There are no batches, they have inputs of different shapes, or the reference is
            another network.
    """
    Correction(reference, batches, device_of(model)).apply(model)
    broadcast_state(model)


class Correction:
    """What a float network says of a few batches, and so how to correct those made from it.

    Args:
        reference: The float model; it is left as it is.
        batches: Some batches, run as one; their targets do not matter.
        device: Where to run them.

    Raises:
        ValueError: There are no batches.
    """

    @torch.no_grad()
    def __init__(self, reference: nn.Module, batches: Batches, device: torch.device) -> None:
        self._inputs = joined_inputs(batches, device)
        # The same layers as in the quantized network, in attention too.
        reference = with_layers(reference, lambda _: True)
        self._norm_sources = trace(reference, self._inputs).norm_sources
        modules = dict(reference.named_modules())
        self._names = set(modules)
        told = FloatMoments(
            {
                name: module
                for name, module in modules.items()
                if isinstance(module, _BatchNorm) or quantizable_base(module) is not None
            }
        )
        with modes_kept(reference), told.listening():
            reference.eval()
            call(reference, self._inputs)
        self._moments = told.once()

    @torch.no_grad()
    def apply(self, model: nn.Module) -> Any:
        """Correct a quantized network, as :func:`correct_statistics` does in one process.

        Returns:
            What the corrected network puts out for the batches.

        Raises:
            ValueError: It is made from another network.
        """
        single = {name for name, layer in quantized_layers(model).items() if _is_single(layer)}
        chosen = correctable(model, single, self._norm_sources)
        for name in chosen:
            if name not in self._names:
                raise ValueError(f"the reference has no module '{name}': it is another network")
        modules = dict(model.named_modules())
        handles = []
        try:
            for name in chosen:
                module: Any = modules[name]
                moments = self._moments.get(name)
                if moments is None:
                    continue
                if isinstance(module, _BatchNorm):
                    handles.append(module.register_forward_pre_hook(_norm_hook(moments)))
                else:
                    handles.append(module.register_forward_hook(_bias_hook(moments)))
            with modes_kept(model):
                model.eval()
                return call(model, self._inputs)
        finally:
            for handle in handles:
                handle.remove()


Moments = tuple[Tensor, Tensor]
"""Mean and variance of each channel, ``[channels]``, in float32 or, of float64, in float64."""


def correctable(
    model: nn.Module, layers: Collection[str], norm_sources: Mapping[str, str]
) -> list[str]:
    """The modules that are corrected: batch normalisation, and layers with a bias that feed none.

    Args:
        model: A network, float or quantized.
        layers: Names of the layers whose biases may be corrected.
        norm_sources: For each batch normalisation the layer that feeds it, as `trace` finds them.
    """
    fed = set(norm_sources.values())
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, _BatchNorm) and module.running_mean is not None)
        or (name in layers and name not in fed and module.bias is not None)
    ]


class FloatMoments:
    """What the modules that are corrected tell in one forward of the float network.

    Args:
        modules: By name, as `correctable` finds them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._moments: dict[str, Moments] = {}
        self._calls = dict.fromkeys(modules, 0)

    def once(self) -> dict[str, Moments]:
        """The moments of those that ran, and no more than once: of the input or the output."""
        return {name: found for name, found in self._moments.items() if self._calls[name] == 1}

    def listening(self) -> ExitStack:
        """Hooks for as long as a block lasts."""
        stack = ExitStack()
        for name, module in self._modules.items():
            handle = module.register_forward_hook(self._hook(name))
            stack.callback(handle.remove)
        return stack

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self._calls[name] += 1
            of = inputs[0] if isinstance(module, _BatchNorm) else output
            if isinstance(of, Tensor):  # a layer that stays in float may put out anything
                self._moments[name] = _moments(of, channel_axis(module, of))

        return hook


def corrected_statistics(
    norm: nn.Module, x: Tensor, told: Moments, running: Mapping[str, Any]
) -> Moments:
    """Running mean and variance with what quantization moved in the input taken into account.

    Args:
        norm: The batch normalisation.
        x: What comes into it in the quantized network.
        told: The moments of its input in the float network.
        running: Its ``running_mean`` and ``running_var``.
    """
    mean, variance = _moments(x, channel_axis(norm, x))
    float_mean, float_variance = told
    ratio = torch.where(float_variance > 0, variance / float_variance, 1.0)
    return (
        running["running_mean"] + (mean - float_mean),
        running["running_var"] * ratio.clamp(LEAST_RATIO, 1 / LEAST_RATIO),
    )


def correction_of_bias(layer: nn.Module, output: Tensor, told: Moments) -> Tensor:
    """What has to be added to a bias, ``[channels]``, in the output's dtype.

    Args:
        layer: The layer.
        output: What it puts out in the quantized network.
        told: The moments of its output in the float network.
    """
    return (told[0] - _moments(output, channel_axis(layer, output))[0]).to(output.dtype)


def by_channel(values: Tensor, layer: nn.Module, output: Tensor) -> Tensor:
    """Values of channels in a shape that can be added to a layer's output."""
    shape = [1] * output.dim()
    shape[channel_axis(layer, output)] = -1
    return values.reshape(shape)


def _norm_hook(told: Moments) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        switched = isinstance(module, SwitchableBatchNorm)
        own: Any = module.row(module._row) if switched else module._buffers
        mean, variance = corrected_statistics(module, inputs[0], told, own)
        own["running_mean"].copy_(mean)
        own["running_var"].copy_(variance)

    return hook


def _bias_hook(told: Moments) -> Callable[..., Tensor]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        added = correction_of_bias(module, output, told)
        module.bias += added.to(module.bias.dtype)
        return output + by_channel(added, module, output)

    return hook


def _is_single(layer: QuantizedLayer) -> bool:
    return len(layer.weight_quantizer.bits) == 1


def _moments(x: Tensor, axis: int) -> Moments:
    axes = [place for place in range(x.dim()) if place != axis]
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    variance, mean = torch.var_mean(x.to(computing), dim=axes, correction=0)
    return mean, variance


def joined_inputs(batches: Batches, device: torch.device) -> Any:
    """The inputs of all batches as those of one.

    Raises:
        ValueError: There are no batches, or they have inputs of different shapes.
    """
    inputs = [moved(batch, device)[0] for batch in batches]
    if not inputs:
        raise ValueError("there are no batches to correct statistics with")
    leaves = [tree_flatten(value) for value in inputs]
    form = leaves[0][1]
    columns = itertools.zip_longest(*(values for values, _ in leaves))
    return tree_unflatten([_joined(column) for column in columns], form)


def _joined(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    for value in values:
        if not isinstance(value, Tensor) or value.shape[1:] != values[0].shape[1:]:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"batches have inputs of {tuple(values[0].shape)} and {what}, which cannot run as"
                " one"
            )
    return torch.cat(list(values))
