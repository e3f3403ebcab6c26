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
from collections.abc import Callable
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
from limpq_ext.nn.layers import QuantizedLayer
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
        ValueError: There are no batches, or the reference is another network.
    """
    x = _joined(batches, device_of(model))
    # The same layers as in the quantized network, in attention too.
    reference = with_layers(reference, lambda _: False)
    single = {name for name, layer in quantized_layers(model).items() if _is_single(layer)}
    fed = set(trace(reference, x).norm_sources.values())
    chosen = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, _BatchNorm) and module.running_mean is not None)
        or (name in single - fed and module.bias is not None)
    ]
    originals = dict(reference.named_modules())
    for name in chosen:
        if name not in originals:
            raise ValueError(f"the reference has no module '{name}': it is another network")
    told = _Told(originals, chosen)
    with modes_kept(reference, model), told.listening():
        reference.eval()
        call(reference, x)
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in told.once():
            module: Any = modules[name]
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(_norm_hook(told.statistics[name])))
            else:
                handles.append(module.register_forward_hook(_bias_hook(told.statistics[name][0])))
        with modes_kept(model):
            model.eval()
            call(model, x)
    finally:
        for handle in handles:
            handle.remove()
    broadcast_state(model)


class _Told:
    """What the modules of a float network tell in one forward: statistics by channel."""

    def __init__(self, modules: dict[str, nn.Module], names: list[str]) -> None:
        self.modules = {name: modules[name] for name in names}
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}
        self._calls = dict.fromkeys(names, 0)

    def once(self) -> list[str]:
        """The names of the modules that ran, and no more than once."""
        return [name for name, calls in self._calls.items() if calls == 1]

    def listening(self) -> ExitStack:
        """Hooks for as long as a block lasts."""
        stack = ExitStack()
        for name, module in self.modules.items():
            handle = module.register_forward_hook(self._hook(name))
            stack.callback(handle.remove)
        return stack

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._calls[name] += 1
            of = inputs[0] if isinstance(module, _BatchNorm) else output
            self.statistics[name] = _statistics(of, _channel_axis(module, of))

        return hook


def _norm_hook(statistics: tuple[Tensor, Tensor]) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        mean, variance = _statistics(inputs[0], _channel_axis(module, inputs[0]))
        float_mean, float_variance = statistics
        switched = isinstance(module, SwitchableBatchNorm)
        own: Any = module.row(module._row) if switched else module._buffers
        ratio = torch.where(float_variance > 0, variance / float_variance, 1.0)
        own["running_mean"] += mean - float_mean
        own["running_var"] *= ratio.clamp(LEAST_RATIO, 1 / LEAST_RATIO)

    return hook


def _bias_hook(float_mean: Tensor) -> Callable[..., Tensor]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        axis = _channel_axis(module, output)
        moved_by = (float_mean - _statistics(output, axis)[0]).to(output.dtype)
        module.bias += moved_by.to(module.bias.dtype)
        shape = [1] * output.dim()
        shape[axis] = -1
        return output + moved_by.reshape(shape)

    return hook


def _is_single(layer: QuantizedLayer) -> bool:
    return len(layer.weight_quantizer.bits) == 1


def _channel_axis(module: nn.Module, tensor: Tensor) -> int:
    return tensor.dim() - 1 if isinstance(module, nn.Linear) else 1


def _statistics(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, ``[channels]``."""
    axes = [place for place in range(x.dim()) if place != axis]
    variance, mean = torch.var_mean(x.float(), dim=axes, correction=0)
    return mean, variance


def _joined(batches: Batches, device: torch.device) -> Any:
    """The inputs of all batches as those of one."""
    inputs = [moved(batch, device)[0] for batch in batches]
    if not inputs:
        raise ValueError("there are no batches to correct statistics with")
    leaves = [tree_flatten(value) for value in inputs]
    form = leaves[0][1]
    columns = itertools.zip_longest(*(values for values, _ in leaves))
    joined = [
        torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns
    ]
    return tree_unflatten(joined, form)
