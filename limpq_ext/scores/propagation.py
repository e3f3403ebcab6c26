"""Layer-wise relevance propagation: how much of a decision every value of a forward has.

A forward is noted operator by operator, and walked back: each operator hands the relevance of its
output on to its inputs, and the sum stays what it is. The rules are after Bach et al. (PLoS ONE
10(7), 2015) and Chefer, Gur and Wolf (arXiv 2012.09838):

- A product by constants, as in linear layers and convolutions: the z+ rule. With the positive and
  the negative parts of inputs and weights, ``z = f(x+, w+) + f(x-, w-)`` is what speaks for the
  output; every input gets its share of it. Where that is 0, ``f(x+, -w-) + f(x-, -w+)`` takes its
  place: else a depthwise convolution would lose most of the relevance. The bias gets nothing.
- A product of two values, of matrices (attention) or elementwise (gates): input times gradient,
  ``x * dz/dx * R / z``, which gives each of the two all of R; so each gets half. Sums of matrix
  products come near 0 with large parts of either sign, and a few of them would have most of all
  ``|R|``. So a part ``p_i`` of ``z`` gets ``(p_i + d |p_i|) / (z + d sum |p_j|)``, or with ``-d``
  where ``z`` is negative, ``d`` being `BY_MAGNITUDE`. The sum stays what it is.
- An addition, a mean, a pooling of means, an interpolation: by magnitude, ``|x_i| / sum |x_j|``.
  Chefer et al. share an addition by ``x_i / sum x_j`` and then scale both parts so that the sum is
  kept; by magnitude it is kept for every element, and no denominator comes near 0.
- Normalisation, softmax and functions of one value: all of it. A quotient is a normalisation too:
  the numerator has all.
- What moves values, and maxima: to where the value came from.

What does not come from an input of the model (a bias, a position embedding, a mask) gets nothing of
a sum, unless it comes from one of its layers. Relevance ends only where there is nothing else: in
class tokens, in padding, and at outputs of layers that see nothing but zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from limpq_ext.nn.inputs import call
from limpq_ext.scores.tape import Call, Carried, Tape, Value, no_rule

BY_MAGNITUDE: Final = 0.1
"""How much of a product of two matrices is shared by magnitude alone. Without it the importances of
a small vision transformer differed from one set of images to another by up to a factor of 5; from
0.03 to 0.25 by no more than 1.2."""

Shares = Iterable[tuple[Value, Tensor]]
"""What each input gets of the relevance of an output."""

Rule = Callable[[Call, Tensor], Shares]

Visit = Callable[[str, Tensor], None]


class _NoRuleError(Exception):
    """A rule does not fit this call."""


@torch.inference_mode(False)
@torch.no_grad()
def propagate(
    network: nn.Module,
    watched: Mapping[str, nn.Module],
    inputs: Any,
    start: Callable[[Tensor], Tensor],
    visit: Visit,
) -> list[Tensor]:
    """Propagate relevance from a network's output to its inputs.

    Args:
        network: In evaluation mode. It gets hooks for as long, and is else left as it is.
        watched: Modules of it by name, whose outputs are tensors.
        inputs: Those of a batch, as for :func:`limpq_ext.nn.inputs.call`.
        start: The relevance of the output, of its shape, which is given the output.
        visit: Is called with the name of a watched module and the relevance of its output, last
            module first; once for each call of the module that relevance came to.

    Returns:
        The relevance of the inputs' tensors of floating point, in their order.

    Raises:
        ValueError: An operator on the way has no rule; the message names it and the module that
            runs it.
    """
    tape = Tape(network, watched, _NEEDS_VALUES)
    # What the forward changes in place is a copy.
    inputs = _cloned(inputs)
    leaves = [
        leaf
        for leaf in tree_leaves(dict(inputs) if isinstance(inputs, Mapping) else inputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    with tape.running():
        begins = [tape.begin(leaf) for leaf in leaves]
        output = call(network, inputs)
    carried = Carried()
    begun = start(output)
    carried.add(tape.value(output), begun)
    while tape.events:
        event = tape.events.pop()
        if isinstance(event, Call):
            _back(event, carried)
        else:
            relevance = carried.at(event.value)
            if relevance is not None:
                visit(event.name, relevance)
    found = [carried.at(value) for value in begins]
    return [
        torch.zeros_like(leaf) if relevance is None else relevance
        for leaf, relevance in zip(leaves, found, strict=True)
    ]


def _cloned(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _cloned(value) for key, value in inputs.items()}
    return tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), inputs)


def _back(made: Call, carried: Carried) -> None:
    """Hand on what came to the outputs of a call."""
    relevance = [carried.take(value) for value in made.outputs]
    for memory in made.made:
        carried.drop(memory)
    first, *others = relevance
    if first is None and not any(other is not None for other in others):
        return
    rule = _RULES.get(made.name)
    try:
        if rule is None or first is None or any(other is not None for other in others):
            raise _NoRuleError
        shares = list(rule(made, first))
    except _NoRuleError:
        raise ValueError(no_rule(str(made.function._schema.name), made.module)) from None
    for value, share in shares:
        carried.add(value, share)


def _sources(made: Call) -> list[Value]:
    return [value for value in made.values() if value.depends]


def _all(made: Call, relevance: Tensor) -> Shares:
    """All to the first argument, whose shape the output has."""
    value = made.values()[0]
    if not value.depends or value.shape != relevance.shape:
        raise _NoRuleError
    yield value, relevance


def _none(made: Call, relevance: Tensor) -> Shares:
    """The output is a constant."""
    return ()


def _copy(made: Call, relevance: Tensor) -> Shares:
    """``self.copy_(src)``."""
    source = made.arguments["src"]
    yield source, relevance.sum_to_size(source.shape)


def _addition(made: Call, relevance: Tensor) -> Shares:
    """``self + alpha * other`` and ``self - alpha * other``, either of which may be a constant."""
    one, other = made.arguments["self"], made.arguments["other"]
    factor = abs(made.arguments.get("alpha", 1))
    both = [value for value in (one, other) if isinstance(value, Value) and value.depends]
    if len(both) == 1:
        yield both[0], relevance.sum_to_size(both[0].shape)
        return
    weights = one.values.abs(), other.values.abs() * factor
    for value, share in zip(both, _by_magnitude(*weights, relevance), strict=True):
        yield value, share.sum_to_size(value.shape)


def _by_magnitude(one: Tensor, other: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Shares in proportion to magnitudes; equal ones of two zeros."""
    least = _least(relevance)
    share = relevance * ((one + least) / (one + other + 2 * least))
    return share, relevance - share


def _product(made: Call, relevance: Tensor) -> Shares:
    """``self * other``, elementwise."""
    both = [made.arguments["self"], made.arguments["other"]]
    both = [value for value in both if isinstance(value, Value) and value.depends]
    for value in both:
        yield value, relevance.sum_to_size(value.shape) / len(both)


def _quotient(made: Call, relevance: Tensor) -> Shares:
    """``self / other``: to the numerator, where it is no constant."""
    value = _sources(made)[0]
    yield value, relevance.sum_to_size(value.shape)


def _gated(made: Call, relevance: Tensor) -> Shares:
    """``a * sigmoid(b)`` of the halves of one tensor."""
    value = made.arguments["self"]
    axis = made.arguments.get("dim", -1)
    yield value, torch.cat([relevance, relevance], dim=axis) / 2


def _matrices(one: str, other: str, multiply: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """The rule of a product of two arguments."""

    def rule(made: Call, relevance: Tensor) -> Shares:
        return _bilinear(multiply, made.arguments[one], made.arguments[other], relevance)

    return rule


def _matrices_and_more(multiply: Callable[[Tensor, Tensor], Tensor], one: str, other: str) -> Rule:
    """The rule of ``beta * self + alpha * product``."""

    def rule(made: Call, relevance: Tensor) -> Shares:
        added, a, b = (made.arguments[name] for name in ("self", one, other))
        if added.depends:
            beta, alpha = (abs(made.arguments.get(name, 1)) for name in ("beta", "alpha"))
            weights = beta * added.values.abs(), alpha * multiply(a.values, b.values).abs()
            share, relevance = _by_magnitude(*weights, relevance)
            yield added, share.sum_to_size(added.shape)
        yield from _bilinear(multiply, a, b, relevance)

    return rule


def _convolution(made: Call, relevance: Tensor) -> Shares:
    x, weight = made.arguments["input"], made.arguments["weight"]
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    how = [made.arguments[name] for name in names]

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution(x, weight, None, *how)

    return _bilinear(convolve, x, weight, relevance)


def _bilinear(
    multiply: Callable[[Tensor, Tensor], Tensor], one: Value, other: Value, relevance: Tensor
) -> Shares:
    """What two factors get of a sum of products of them; nothing if neither depends."""
    if one.depends and other.depends:
        yield from _two_values(multiply, one, other, relevance)
    elif one.depends:
        yield one, _positive_products(multiply, one.values, other.values, relevance)
    elif other.depends:

        def turned(x: Tensor, weight: Tensor) -> Tensor:
            return multiply(weight, x)

        yield other, _positive_products(turned, other.values, one.values, relevance)


def _two_values(
    multiply: Callable[[Tensor, Tensor], Tensor], one: Value, other: Value, relevance: Tensor
) -> Shares:
    """Input times gradient, with some of it by magnitude; half to each factor."""
    with torch.enable_grad():
        factors = [value.values.detach().requires_grad_() for value in (one, other)]
        z = multiply(*factors)
        magnitudes = [factor.detach().abs().requires_grad_() for factor in factors]
        total = multiply(*magnitudes)
    sign = torch.where(z.detach() < 0, -1.0, 1.0).to(z.dtype)
    ratio = _ratio(relevance, z.detach() + sign * BY_MAGNITUDE * total.detach())
    signed = torch.autograd.grad(z, factors, ratio)
    unsigned = torch.autograd.grad(total, magnitudes, ratio * sign * BY_MAGNITUDE)
    for place, value in enumerate((one, other)):
        share = factors[place] * signed[place] + magnitudes[place] * unsigned[place]
        yield value, share.detach() / 2


def _positive_products(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, relevance: Tensor
) -> Tensor:
    """The z+ rule; an output without a positive product is shared by its negative ones."""
    for_it, z = _by_signs(multiply, x, weight, relevance)
    left = torch.where(z > _least(z), 0.0, relevance)
    if not bool(left.any()):
        return for_it
    against_it, _ = _by_signs(multiply, x, -weight, left)
    return for_it + against_it


def _by_signs(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, relevance: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``x`` gets by its positive products with the weights, and the sums of these."""
    parts = [x] if bool((x >= 0).all()) else [x.clamp(min=0), x.clamp(max=0)]
    weights = [weight.clamp(min=0), weight.clamp(max=0)]
    with torch.enable_grad():
        parts = [part.detach().requires_grad_() for part in parts]
        terms = [multiply(part, own) for part, own in zip(parts, weights, strict=False)]
        z = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    gradients = torch.autograd.grad(z, parts, _ratio(relevance, z.detach()))
    shares = [part.detach() * gradient for part, gradient in zip(parts, gradients, strict=True)]
    return (shares[0] if len(shares) == 1 else shares[0] + shares[1]), z.detach()


def _ratio(relevance: Tensor, z: Tensor) -> Tensor:
    """``relevance / z``, and 0 where there is nothing to share it by."""
    nothing = z.abs() <= _least(z)
    return torch.where(nothing, 0.0, relevance / torch.where(nothing, 1.0, z)).to(z.dtype)


def _mean(made: Call, relevance: Tensor) -> Shares:
    """An output that is a sum of its input with weights that are not negative: by magnitude."""
    value = made.values()[0]
    if not value.depends:
        raise _NoRuleError
    with torch.enable_grad():
        magnitudes = (value.values.abs() + _least(value.values)).detach().requires_grad_()
        z = _again(made, {id(value): magnitudes})
    (gradient,) = torch.autograd.grad(z, magnitudes, (relevance / z.detach()).to(z.dtype))
    yield value, magnitudes.detach() * gradient


def _moved(made: Call, relevance: Tensor) -> Shares:
    """To where each value of the output came from."""
    sources = _sources(made)
    with torch.enable_grad():
        leaves = {id(value): value.values.detach().requires_grad_() for value in sources}
        output = _again(made, leaves)
    gradients = torch.autograd.grad(
        output, list(leaves.values()), relevance.to(output.dtype), materialize_grads=True
    )
    return zip(sources, gradients, strict=True)


def _again(made: Call, contents: Mapping[int, Tensor]) -> Tensor:
    """The first output of a call with other contents of some of its values."""

    def content(value: Value) -> Any:
        # Of one that is written in place, a copy is.
        return contents[id(value)].clone() if id(value) in contents else _constant(value)

    arguments = tree_map_only(Value, content, made.arguments)
    schema = made.function._schema.arguments
    positional = [
        arguments[argument.name]
        for argument in schema
        if not argument.kwarg_only and argument.name in arguments
    ]
    keywords = {
        argument.name: arguments[argument.name]
        for argument in schema
        if argument.kwarg_only and argument.name in arguments
    }
    output = made.function(*positional, **keywords)
    return output if isinstance(output, Tensor) else output[0]


def _constant(value: Value) -> Tensor:
    content = value.content
    assert content is not None
    return value.values if content.is_floating_point() else content


def _least(like: Tensor) -> float:
    """What is taken for 0, where something is divided by it."""
    return torch.finfo(like.dtype).tiny ** 0.5


_FUNCTIONS_OF_ONE: Final = (
    *("relu", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "sigmoid", "log_sigmoid_forward", "tanh"),
    *("clamp", "clamp_min", "clamp_max", "threshold", "_prelu_kernel", "hardshrink", "softshrink"),
    *("abs", "neg", "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "square"),
    *("reciprocal", "pow", "erf", "sin", "cos", "atan", "logit", "nan_to_num"),
)
_NORMALISATIONS: Final = (
    *("_softmax", "_safe_softmax", "_log_softmax", "native_layer_norm", "native_group_norm"),
    *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_fused_rms_norm"),
    *("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_batch_norm_with_update"),
)
_COPIES: Final = ("clone", "_to_copy", "native_dropout")
_MEANS: Final = (
    *("mean", "sum", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
)
_MOVES: Final = (
    *("cat", "stack", "index", "index_select", "gather", "repeat", "roll", "flip", "take"),
    *("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d"),
    *("replication_pad1d", "replication_pad2d", "replication_pad3d", "im2col"),
    *("pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "channel_shuffle"),
    *("where", "masked_fill", "tril", "triu", "index_put", "sort", "topk"),
    *("max_pool2d_with_indices", "max_pool3d_with_indices", "maximum", "minimum", "max", "min"),
    *("adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "amin"),
)

_RULES: Final[Mapping[str, Rule]] = {
    **dict.fromkeys((*_FUNCTIONS_OF_ONE, *_NORMALISATIONS, *_COPIES), _all),
    **dict.fromkeys(("fill", "zero"), _none),
    "copy": _copy,
    **dict.fromkeys(("add", "sub", "rsub"), _addition),
    "mul": _product,
    "div": _quotient,
    "glu": _gated,
    "mm": _matrices("self", "mat2", torch.mm),
    "bmm": _matrices("self", "mat2", torch.bmm),
    "mv": _matrices("self", "vec", torch.mv),
    "dot": _matrices("self", "tensor", torch.dot),
    "addmm": _matrices_and_more(torch.mm, "mat1", "mat2"),
    "addmv": _matrices_and_more(torch.mv, "mat", "vec"),
    "baddbmm": _matrices_and_more(torch.bmm, "batch1", "batch2"),
    "convolution": _convolution,
    **dict.fromkeys(_MEANS, _mean),
    **dict.fromkeys(_MOVES, _moved),
}

_RULES_OF_SHAPES: Final = (_all, _none, _copy, _product, _quotient, _gated)

_NEEDS_VALUES: Final = {name: rule not in _RULES_OF_SHAPES for name, rule in _RULES.items()}
