"""What happens in a model's forward, found with fake tensors: no computation, no memory, no data.

From one traced forward come the order of the quantizable layers, what each costs, and which layer
feeds each batch normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from .layers import overrides_forward, quantizable_base


@dataclass(frozen=True)
class TracedLayer:
    """A quantizable layer as it was executed, per sample.

    Attributes:
        name: Its name in ``named_modules()``; a shared module has one name.
        kind: "conv1d", "conv2d", "conv3d" or "linear".
        macs: Multiply-accumulates, over all its calls.
        weights: Elements of its weight.
        activations: Elements of the inputs that are quantized, over all its calls.
    """

    name: str
    kind: str
    macs: int
    weights: int
    activations: int


@dataclass(frozen=True)
class Trace:
    """One forward of a model.

    Attributes:
        layers: The quantizable layers, in the order in which they first ran.
        norm_sources: For each batch normalisation, the layer whose output reaches it last.
        unused: Quantizable layers that did not run.
    """

    layers: tuple[TracedLayer, ...]
    norm_sources: dict[str, str]
    unused: tuple[str, ...]


# Modules that compute with weights that this package would leave in float, and why.
_REFUSED: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "it reads its projections' weights directly, past their own forward",
    nn.RNNBase: "it computes all its steps in one fused call that has no place for quantizers",
    nn.RNNCellBase: "it computes its gates in one fused call that has no place for quantizers",
    nn.Bilinear: "a product of two inputs and a weight has no quantized form here",
    nn.modules.conv._ConvTransposeNd: "transposed convolutions have no quantized form here",
}

# Functions that multiply by a weight; with a parameter outside a known layer they would stay float.
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    [
        F.linear,
        F.bilinear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
        F.multi_head_attention_forward,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        Tensor.mm,
        Tensor.bmm,
    ]
)


def trace(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    exclude: Sequence[str] = (),
) -> Trace:
    """Follow one sample through a model, without computing anything.

    Args:
        model: Any module; it is not changed.
        example_input: What its forward takes, with a leading batch axis of at least 1; the values
            do not matter.
        exclude: Names or patterns (``"head.*"``) of modules to leave in float and not count.

    Raises:
        ValueError: The model has a part that cannot be quantized truly and is not excluded, a
            pattern matches nothing, or its forward cannot be followed.
    """
    names = {module: name for name, module in model.named_modules()}
    check_patterns(exclude, names.values(), "exclude")
    recorder = _Recorder(names, exclude)
    for module, name in names.items():
        recorder.check(module, name)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    for value in inputs:
        if value.dim() == 0 or value.shape[0] == 0:
            raise ValueError(
                f"example_input has shape {tuple(value.shape)}, expected a batch of at least 1"
            )
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _evaluating(model), recorder.hooks(), torch.enable_grad():
        fakes = [fake_mode.from_tensor(value[:1].detach()) for value in inputs]
        try:
            with fake_mode, recorder:
                model(*fakes)
        except _RefusedError as refusal:
            raise ValueError(str(refusal)) from None
        except Exception as error:
            first_line = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"cannot follow {type(model).__name__}.forward on fake tensors of shape"
                f" {[tuple(value.shape) for value in fakes]}:"
                f" {type(error).__name__}: {first_line}"
            ) from error
    return recorder.result()


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


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's name, or that of a module around it, fits one of the patterns."""
    parts = name.split(".")
    parents = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(parent, pattern) for parent in parents for pattern in patterns)


def check_patterns(patterns: Sequence[str], names: Any, argument: str) -> None:
    """Raise ValueError for a pattern that fits no name."""
    known = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{argument}: the model has no module '{pattern}'")


class _RefusedError(Exception):
    """A part of the model cannot be quantized truly; the message says which and why."""


class _Recorder(TorchFunctionMode):
    """Sees every module call (hooks) and every function call (as a mode) of a forward."""

    def __init__(self, names: dict[nn.Module, str], exclude: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.exclude = exclude
        self.active: list[nn.Module] = []
        self.order: list[str] = []
        self.totals: dict[str, TracedLayer] = {}
        self.norm_sources: dict[str, str] = {}

    def quantizable(self, module: nn.Module) -> bool:
        return quantizable_base(module) is not None and not matches(
            self.names[module], self.exclude
        )

    def check(self, module: nn.Module, name: str) -> None:
        if matches(name, self.exclude):
            return
        for refused, reason in _REFUSED.items():
            if isinstance(module, refused):
                raise ValueError(
                    f"cannot quantize '{name}' ({type(module).__name__}): {reason};"
                    f" exclude=['{name}'] leaves it in float"
                )
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()
        ):
            raise ValueError(
                f"layer '{name}' ({type(module).__name__}) has no shape yet: run the model on one"
                " batch first"
            )

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.names:
                before = module.register_forward_pre_hook(self._enter)
                stack.callback(before.remove)
                after = module.register_forward_hook(self._leave)
                stack.callback(after.remove)
            yield

    def result(self) -> Trace:
        unused = [
            name
            for module, name in self.names.items()
            if self.quantizable(module) and name not in self.totals
        ]
        layers = tuple(self.totals[name] for name in self.order)
        return Trace(layers, self.norm_sources, tuple(unused))

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.active.append(module)
        if isinstance(module, _BatchNorm):
            source = _source_of(inputs)
            if source is not None:
                self.norm_sources.setdefault(self.names[module], self.order[source])

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.active.pop()
        base = quantizable_base(module)
        if base is None or not self.quantizable(module):
            return
        name = self.names[module]
        weight = cast(Tensor, module.weight)
        before = self.totals.get(name)
        if before is None:
            self.order.append(name)
            before = TracedLayer(name, base.__name__.lower(), 0, weight.numel(), 0)
        # Each output element sums the weights of one output channel.
        macs = output.numel() * (weight.numel() // weight.shape[0])
        self.totals[name] = replace(
            before, macs=before.macs + macs, activations=before.activations + inputs[0].numel()
        )
        _set_source(output, self.order.index(name))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            self._check_product(func, args, kwargs)
        output = func(*args, **kwargs)
        source = _source_of((args, kwargs))
        if source is not None:
            _set_source(output, source)
        return output

    def _check_product(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Refuse a product with a weight that no quantizer would reach."""
        module = self.active[-1]
        name = self.names[module]
        if matches(name, self.exclude):
            return
        base = quantizable_base(module)
        if base is not None:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if overrides_forward(module, base) and weight is not module.weight:
                raise _RefusedError(
                    f"cannot quantize '{name}' ({type(module).__name__}): it changes its weight"
                    f" before it multiplies by it; exclude=['{name}'] leaves it in float"
                )
            return
        leaves, _ = tree_flatten((args, kwargs))
        if any(isinstance(leaf, nn.Parameter) and leaf.dim() > 1 for leaf in leaves):
            raise _RefusedError(
                f"cannot quantize '{name}' ({type(module).__name__}): it calls"
                f" {getattr(func, '__name__', func)} with a parameter of its own, where no"
                f" quantizer reaches; exclude=['{name}'] leaves it in float"
            )


def _source_of(values: Any) -> int | None:
    """The latest layer, by its place in the order, that the tensors in ``values`` come from."""
    sources = [getattr(leaf, "_limpq_source", None) for leaf in tree_leaves(values)]
    return max((source for source in sources if source is not None), default=None)


def _set_source(values: Any, source: int) -> None:
    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            leaf._limpq_source = source  # type: ignore[attr-defined]  # a mark of this module
        return leaf

    tree_map(mark, values)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
