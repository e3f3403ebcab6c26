"""What happens in a model's forward, found with fake tensors: no computation, no memory, no data.

From one traced forward come the order of the quantizable layers, what each costs, which layer
feeds each batch normalisation, and which tensors are held between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from limpq_ext.graph.proof import refusal
from limpq_ext.graph.recorder import Recorder
from limpq_ext.graph.watch import UnfollowedError, Watch, fakes_only, with_probes
from limpq_ext.nn.attention import ProjectedAttention, with_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.inputs import Inputs, example_arguments
from limpq_ext.nn.layers import QuantizedLayer, quantizable_base
from limpq_ext.values.costs import LayerCost, LiveTensor
from limpq_ext.values.names import check_patterns, matches


@dataclass(frozen=True)
class Trace:
    """One forward of a model.

    Attributes:
        layers: The quantizable layers, in the order in which they first ran, and what all calls of
            each cost for one sample.
        norm_sources: For each batch normalisation, the layer whose output reaches it last.
        unused: Quantizable layers that did not run.
        shared_inputs: Groups of layers that read one and the same tensor.
        added_inputs: Groups of layers that read the operands of one addition, or its sum.
        tensors: What is held between the layers; liveness.py has the rules.
        parameters: Elements of all parameters, each counted once.
        float_parameters: Elements of those that are no weight of these layers, or of another
            module too, each counted once.
    """

    layers: tuple[LayerCost, ...]
    norm_sources: dict[str, str]
    unused: tuple[str, ...]
    shared_inputs: tuple[tuple[str, ...], ...]
    added_inputs: tuple[tuple[str, ...], ...]
    tensors: tuple[LiveTensor, ...]
    parameters: int
    float_parameters: int


# Modules that compute with weights that this package would leave in float, and why.
_REFUSED: dict[type[nn.Module], str] = {
    torch.jit.ScriptModule: "it was compiled by torch.jit, where no quantizer can be put",
    nn.MultiheadAttention: "it changes nn.MultiheadAttention.forward, which multiplies by weights",
    nn.RNNBase: "it computes all its steps in one fused call that has no place for quantizers",
    nn.RNNCellBase: "it computes its gates in one fused call that has no place for quantizers",
    nn.Bilinear: "a product of two inputs and a weight has no quantized form here",
}


def trace(
    model: nn.Module,
    example_input: Inputs,
    *,
    exclude: Sequence[str] = (),
) -> Trace:
    """Follow one sample through a model, without computing anything.

    Args:
        model: Any module; it is not changed.
        example_input: What its forward takes, with a leading batch axis of at least 1; the values
            do not matter. A tuple or list: several inputs. A dict: inputs by keyword.
        exclude: Names or patterns (``"head.*"``) of modules to leave in float and not count.

    Raises:
        ValueError: The model has parts that cannot be quantized truly and are not excluded, all of
            which are named, a pattern matches nothing, the model is prepared already, or its
            forward cannot be followed.
    """

    def excluded(name: str) -> bool:
        return matches(name, exclude)

    _check_is_float(model)
    # A copy: a forward may keep what it computed, and fake tensors must not stay in the model.
    model = with_layers(model, lambda name: not excluded(name)).eval()
    modules = dict(model.named_modules())
    check_patterns(exclude, modules, "exclude")
    refused = _refused(modules, excluded)
    probed = with_probes(model, lambda name: excluded(name) or name in refused)
    watch = Watch(probed, excluded)
    recorder = Recorder({module: name for name, module in watch.modules.items()}, excluded)
    inputs = example_arguments(example_input)
    recorder.register_hooks()
    with fakes_only() as fake_mode:
        positional, keywords = tree_map_only(
            Tensor, lambda value: fake_mode.from_tensor(value[:1].detach()), inputs
        )
        fakes = [leaf for leaf in tree_leaves((positional, keywords)) if isinstance(leaf, Tensor)]
        recorder.start(fakes)
        try:
            with fake_mode:
                output = watch.follow(probed, positional, keywords, recorder)
        except UnfollowedError as error:
            if refused:
                raise ValueError(refusal(modules, refused)) from error
            raise
    refused |= watch.refusals(refused)
    if refused:
        raise ValueError(refusal(modules, refused))
    recorder.end(output)
    parameters, float_parameters = _count_parameters(model, set(recorder.layers))
    return Trace(
        layers=tuple(recorder.layers.values()),
        norm_sources=recorder.norm_sources,
        unused=recorder.unused(),
        shared_inputs=recorder.flow.shared_inputs(),
        added_inputs=recorder.flow.added_inputs(),
        tensors=recorder.flow.tensors(),
        parameters=parameters,
        float_parameters=float_parameters,
    )


def split_layers(
    found: Trace, fixed: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of a traced model's searchable and of its fixed layers, in order of execution.

    Args:
        found: What :func:`trace` returned.
        fixed: Names or patterns; None for the first and the last layer.

    Raises:
        ValueError: A name fits no layer, or no layer is left to search.
    """
    names = [layer.name for layer in found.layers]
    if fixed is None:
        kept = set(names[:1] + names[-1:])
    else:
        check_patterns(fixed, names, "fixed")
        kept = {name for name in names if matches(name, fixed)}
    searchable = tuple(name for name in names if name not in kept)
    if not searchable:
        raise ValueError(
            f"no layer is left to search: the model runs {len(names)} quantizable layers and"
            f" {len(kept)} of them are fixed"
        )
    return searchable, tuple(name for name in names if name in kept)


def _check_is_float(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer | SwitchableBatchNorm):
            raise ValueError(
                f"{type(model).__name__} is prepared or quantized already, as '{name}' shows: pass"
                " the float model"
            )


def _refused(modules: Mapping[str, nn.Module], excluded: Callable[[str], bool]) -> dict[str, str]:
    """The modules that cannot be quantized whatever their forward does, and why.

    Raises:
        ValueError: A layer has no shape yet.
    """
    refused: dict[str, str] = {}
    for name, module in modules.items():
        if excluded(name) or matches(name, list(map(escape, refused))):
            continue
        for kind, reason in _REFUSED.items():
            if isinstance(module, kind) and not isinstance(module, ProjectedAttention):
                refused[name] = reason
        if quantizable_base(module) is None:
            continue
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()
        ):
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) has no shape yet: run the model on one"
                " batch first"
            )
    return refused


def _count_parameters(model: nn.Module, layers: set[str]) -> tuple[int, int]:
    """Elements of all parameters, and of those that stay in float, each counted once."""
    every: dict[int, int] = {}
    in_float: dict[int, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        every[id(parameter)] = parameter.numel()
        owner = name.split(".parametrizations.weight.")[0].removesuffix(".weight")
        if owner not in layers or owner == name:
            in_float[id(parameter)] = parameter.numel()
    return sum(every.values()), sum(in_float.values())
