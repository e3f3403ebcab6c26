"""Follows the weights of a model through one forward on fake tensors.

Every value of a forward is followed from where it comes: an input of the model, a quantizer, or a
tensor that holds weights (a parameter, a buffer, any tensor that the model brings along). A product
of an activation by something that comes from such a tensor past every quantizer runs in float; it
is found whatever function asked for it, since all of them end in a few operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from limpq_ext.nn.layers import QuantizedLayer, quantizable_base, quantized_twin
from limpq_ext.nn.swapping import float_class, swap_modules
from limpq_ext.values.reading import first_line

# Operators of ATen that sum products, and the places of the arguments that they multiply.
_PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm"), (0, 1)),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "_sparse_mm"), (0, 1)),
    **dict.fromkeys(("addmm", "_addmm_activation", "addmv", "addbmm", "baddbmm"), (1, 2)),
    **dict.fromkeys(("sspaddmm", "_sparse_addmm"), (1, 2)),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), (0, 1)),
    **dict.fromkeys(("linear", "mkldnn_linear", "mkldnn_convolution"), (0, 1)),
    **dict.fromkeys(("cudnn_convolution", "cudnn_convolution_transpose"), (0, 1)),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), (0, 1)),
    **dict.fromkeys(("_trilinear",), (0, 1, 2)),
    **dict.fromkeys(("scaled_dot_product_attention",), (0, 1, 2)),
    **dict.fromkeys(("_fused_sdp_choice",), ()),
}
# Fused operators: all their tensors are weights, or are multiplied by them.
_FUSED = (
    *("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
)
# Operators that give every value as it is.
_COPIES = ("clone", "_to_copy", "copy", "copy_", "lift_fresh", "lift_fresh_copy", "detach")

# Why a layer is bypassed.
_PASSED_BY = (
    "its weight is used without its quantizers, as where a module is also held in a plain list"
    " (nn.ModuleList is not one), or where its forward was replaced on the instance"
)
_UNUSED = "its forward does not multiply its quantized input by its quantized weight"
_NOT_RUN = "the forward does not run it"


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from.

    Attributes:
        activation: From an input of the model, or the output of a layer.
        inputs: Layers whose quantized input it is, in whatever form.
        weights: Layers whose quantized weight it is.
        changed: A quantized weight is no longer the quantizer's: something computed with it.
        floats: Tensors with weights that it comes from past every quantizer, by name.
    """

    activation: bool = False
    inputs: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    changed: bool = False
    floats: frozenset[str] = frozenset()

    @classmethod
    def merged(cls, origins: Sequence[_Origin], *, changed: bool) -> _Origin:
        """The origin of what is computed from values of these."""
        inputs = frozenset[str]().union(*(origin.inputs for origin in origins))
        if any(origin.activation for origin in origins):
            return cls(activation=True, inputs=inputs)
        weights = frozenset[str]().union(*(origin.weights for origin in origins))
        floats = frozenset[str]().union(*(origin.floats for origin in origins))
        changed = bool(weights) and (changed or any(origin.changed for origin in origins))
        return cls(weights=weights, changed=changed, floats=floats)


_CONSTANT = _Origin()
_ACTIVATION = _Origin(activation=True)


class UnfollowedError(ValueError):
    """A forward could not be followed on fake tensors; the message says why."""


class Probe(nn.Module):
    """Stands for a quantizer in a forward that is followed: gives its input, and is seen."""

    def __init__(self, name: str, origin: _Origin) -> None:
        super().__init__()
        self.name = name
        self.origin = origin
        self.watch: Watch | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x``, as a tensor of its own."""
        assert self.watch is not None
        return self.watch.quantized(self, x)


class Watch(TorchDispatchMode):
    """Follows the weights of a model through one forward on fake tensors.

    Args:
        model: The modules to follow, which get hooks; those to be quantized have probes.
        excluded: Whether what a module of this name multiplies by may stay float.
    """

    def __init__(self, model: nn.Module, excluded: Callable[[str], bool]) -> None:
        super().__init__()
        self.excluded = excluded
        self.modules = {
            name: module for name, module in model.named_modules() if not isinstance(module, Probe)
        }
        self.probed: dict[str, None] = {}
        # The module that runs, after those that called it; and the first that raised.
        self.active: list[str] = []
        self._failed: str | None = None
        self.ran: set[str] = set()
        self.used: set[str] = set()
        self.changed: set[str] = set()
        # Products by float weights, in the order in which they ran: the module that ran it, and the
        # names of the weights.
        self.products: dict[tuple[str, frozenset[str]], None] = {}
        self._names: dict[int, str] = {}
        self._origins: dict[int, _Origin] = {}
        # Their memory must not be used again: values are known by their place in it.
        self._kept: list[Tensor] = []
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(_memory(tensor), name)
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave, always_call=True)
            if isinstance(module, QuantizedLayer):
                for quantizer in (module.weight_quantizer, module.input_quantizer):
                    if isinstance(quantizer, Probe):
                        quantizer.watch = self
                        self.probed[quantizer.name] = None

    def quantized(self, probe: Probe, x: Tensor) -> Tensor:
        """What a quantizer puts out for ``x``."""
        output = x.clone()
        self._set(output, probe.origin)
        return output

    def follow(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        keywords: Mapping[str, Any],
        *modes: AbstractContextManager[Any],
    ) -> Any:
        """The output of one forward, which is followed.

        Args:
            model: The modules that were given before.
            inputs: What the forward takes; all tensors are fake.
            keywords: What it takes by keyword, likewise.
            *modes: Others that it runs under.

        Raises:
            UnfollowedError: The forward raised something.
        """
        fakes = _tensors((inputs, keywords))
        for tensor in fakes:
            self._set(tensor, _ACTIVATION)
        try:
            with self, ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode)
                return model(*inputs, **keywords)
        except Exception as error:  # whatever a model's own forward raises on fake tensors
            where = f", in '{self._failed}'" if self._failed else ""
            raise UnfollowedError(
                f"cannot follow {float_class(model).__name__}.forward on fake tensors of shape"
                f" {[tuple(tensor.shape) for tensor in fakes]}{where}:"
                f" {first_line(error, typed=True)}"
            ) from error

    def bypassed(self) -> dict[str, str]:
        """The layers with quantizers that did not compute with what these put out, and why."""
        owners = {name.rpartition(".")[0] for _, floats in self.products for name in floats if name}
        found: dict[str, str] = {}
        for layer in self.probed:
            if layer in self.changed:
                found[layer] = "it changes its weight before it multiplies by it"
            elif layer in self.used:
                continue
            elif any(_within(owner, layer) for owner in owners):
                found[layer] = _PASSED_BY
            elif layer in self.ran:
                found[layer] = _UNUSED
            else:
                found[layer] = _NOT_RUN
        return found

    def refusals(self, refused: Mapping[str, str]) -> dict[str, str]:
        """What ran in float in a forward: the names of modules, and why each cannot be quantized.

        Args:
            refused: What is refused anyhow; nothing within these is named.
        """
        found = {name: reason for name, reason in self.bypassed().items() if reason != _NOT_RUN}

        def settled(name: str) -> bool:
            return self.excluded(name) or any(_within(name, other) for other in refused)

        for module, floats in self.products:
            owners = {name.rpartition(".")[0] for name in floats if name}
            known = any(_within(owner, layer) for owner in owners for layer in found)
            if known or settled(module) or (owners and all(map(settled, owners))):
                continue
            named = [f"'{name}'" for name in sorted(floats) if name]
            what = ", ".join(named[:3]) if named else "a tensor that it brings along"
            found.setdefault(module, f"it multiplies by {what}, where no quantizer reaches")
        outer = [*refused, *found]
        return {
            name: reason
            for name, reason in found.items()
            if not any(other and name != other and _within(name, other) for other in outer)
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # asks what a tensor is
            return func(*args, **kwargs)
        operator = func._schema.name.partition("::")[2]
        if operator not in _PRODUCTS and operator not in _FUSED:
            # One that is made of others shows itself in inference mode alone.
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        arguments = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        arguments |= kwargs
        values = list(arguments.values())
        origins = [self._origin(tensor) for tensor in _tensors(values)]
        multiplied = self._multiplied(func, operator, values)
        if multiplied is not None:
            self._note_product(multiplied)
        output = func(*args, **kwargs)
        is_view = any(a.alias_info is not None for a in func._schema.returns)
        origin = _Origin.merged(origins, changed=not is_view and operator not in _COPIES)
        if multiplied is not None and origin.activation:
            origin = _ACTIVATION
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(arguments.get(argument.name)):
                    self._set(tensor, origin)
        for tensor in _tensors(output):
            if _memory(tensor) not in self._origins:
                self._set(tensor, origin)
        return output

    def _multiplied(
        self, func: Any, operator: str, values: Sequence[Any]
    ) -> list[tuple[_Origin, Tensor]] | None:
        """The tensors that an operator multiplies and sums; None: it does no such thing."""
        places: Sequence[int] | None = None
        if func.namespace == "aten":
            places = _PRODUCTS.get(operator)
            if operator.startswith("_scaled_dot_product"):
                places = (0, 1, 2)
            elif operator in _FUSED:
                places = range(len(values))
        elif func.namespace not in ("limpq", "prims"):
            # What an operator from elsewhere does is not known.
            places = range(len(values))
        if places is None:
            return None
        chosen = [values[place] for place in places if place < len(values)]
        return [(self._origin(tensor), tensor) for tensor in _tensors(chosen)]

    def _note_product(self, operands: Sequence[tuple[_Origin, Tensor]]) -> None:
        origins = [origin for origin, _ in operands]
        # Weights by weights are preparations; what comes of them is float when an activation meets
        # it.
        if not any(origin.activation for origin in origins):
            return
        module = self.active[-1] if self.active else ""
        for origin, tensor in operands:
            if origin.activation:
                continue
            if origin.floats and tensor.numel() > 1:
                self.products[module, origin.floats] = None
            elif origin.weights:
                if origin.changed:
                    self.changed |= origin.weights
                self.used |= {
                    layer
                    for layer in origin.weights
                    if any(layer in other.inputs for other in origins)
                }

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self.active.append(name)
            self.ran.add(name)

        return hook

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        left = self.active.pop()
        if sys.exc_info()[0] is not None and self._failed is None:
            self._failed = left

    def _origin(self, tensor: Tensor) -> _Origin:
        memory = _memory(tensor)
        known = self._origins.get(memory)
        if known is None and not isinstance(tensor, FakeTensor):
            known = _Origin(floats=frozenset({self._names.get(memory, "")}))
            self._set(tensor, known)
        return _CONSTANT if known is None else known

    def _set(self, tensor: Tensor, origin: _Origin) -> None:
        self._origins[_memory(tensor)] = origin
        self._kept.append(tensor)


def with_probes(model: nn.Module, excluded: Callable[[str], bool]) -> nn.Module:
    """A model with probes in the place of quantizers, also in layers that have none yet.

    Args:
        model: A copy that may be changed.
        excluded: Whether the layer of this name stays as it is, if it has no quantizers.
    """
    swap: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or (
            quantizable_base(module) is not None and not excluded(name)
        ):
            swap[module] = quantized_twin(
                module,
                Probe(name, _Origin(weights=frozenset({name}))),
                Probe(name, _Origin(activation=True, inputs=frozenset({name}))),
            )
    return swap_modules(model, swap)


@contextmanager
def fakes_only() -> Iterator[FakeTensorMode]:
    """A mode for fake tensors that leaves nothing of them behind."""
    cached = torch.is_autocast_cache_enabled()
    # The cache would hand fake parameters to the next forward.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(content: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]
