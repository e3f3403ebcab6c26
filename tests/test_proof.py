"""Nothing runs in float without a word, whichever way a forward takes to its weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from limpq_ext import Policy, apply_policy, prepare, profile, quantized_layers
from limpq_ext.policy import LayerBits
from limpq_ext.trace import trace

X = torch.zeros(2, 8)


def network(*between):
    """Layers around what is tried; the first and the last stay in float."""
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), *between, nn.Linear(8, 8))


class Own(nn.Module):
    """Computes ``function(x, self)`` with weights of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(8, 8))
        self.v = nn.Parameter(torch.randn(8))
        self.down, self.up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.ws = nn.ParameterList([torch.randn(8, 8)])
        self.register_buffer("table", torch.randn(8, 8))
        self.plain = torch.randn(8, 8)
        self.listed = [torch.randn(8, 8)]

    def forward(self, x):
        return self.function(x, self)


def with_own(name):
    """A product, tried as a module's own."""
    return pytest.param(PRODUCTS[name], id=name)


OUTSIDE = torch.randn(8, 8)
PRODUCTS = {
    "matmul": lambda x, m: x @ m.w,
    "transposed": lambda x, m: x @ m.w.T,
    "viewed": lambda x, m: x @ m.w.view(4, 16).view(8, 8),
    "detached": lambda x, m: x @ m.w.detach(),
    "data": lambda x, m: x @ m.w.data,
    "masked": lambda x, m: x @ (m.w * (m.w > 0)),
    "cast": lambda x, m: (x.double() @ m.w.double()).float(),
    "from the left": lambda x, m: (m.w @ x.T).T,
    "lora": lambda x, m: x + x @ m.down.T @ m.up.T,
    "merged lora": lambda x, m: x @ (m.up @ m.down),
    "tensordot": lambda x, m: torch.tensordot(x, m.w, 1),
    "inner": lambda x, m: torch.inner(x, m.w),
    "mv": lambda x, m: x + torch.mv(x, m.v)[:, None],
    "dot": lambda x, m: x + torch.dot(x[0], m.v),
    "addmm": lambda x, m: torch.addmm(x, x, m.w),
    "addmv": lambda x, m: x + torch.addmv(x[:, 0], x, m.v)[:, None],
    "bmm": lambda x, m: torch.bmm(x[None], m.w[None])[0],
    "baddbmm": lambda x, m: torch.baddbmm(x[None], x[None], m.w[None])[0],
    "einsum": lambda x, m: torch.einsum("ni,io->no", x, m.w),
    "chain_matmul": lambda x, m: torch.linalg.multi_dot([x, m.w, m.w]),
    "linear": lambda x, m: F.linear(x, m.w),
    "changed linear": lambda x, m: F.linear(x, m.w * 2),
    "conv1d": lambda x, m: F.conv1d(x[..., None], m.w[..., None])[..., 0],
    "convolution": lambda x, m: torch.convolution(
        x[..., None], m.w[..., None], None, (1,), (0,), (1,), False, (0,), 1
    )[..., 0],
    "cdist": lambda x, m: torch.cdist(x, m.w),
    "attention": lambda x, m: F.scaled_dot_product_attention(x[None], m.w[None], m.w[None])[0],
    "aten": lambda x, m: torch.ops.aten.mm(x, m.w),
    "parameter list": lambda x, m: x @ m.ws[0].T,
    "buffer": lambda x, m: x @ m.table,
    "plain tensor": lambda x, m: x @ m.plain,
    "tensor in a list": lambda x, m: x @ m.listed[0],
    "tensor of the closure": lambda x, m: x @ OUTSIDE,
    "mixed by softmax": lambda x, m: m.w.softmax(-1) @ x.T @ x,
    "without gradients": lambda x, m: _without_gradients(x, m),
}


def _without_gradients(x, m):
    with torch.inference_mode():
        product = x @ m.w
    return product.clone()


@pytest.mark.parametrize("product", [with_own(name) for name in PRODUCTS])
def test_a_product_with_weights_of_a_modules_own_is_refused_by_its_name(product):
    model = network(Own(product))
    for refuse in (lambda: prepare(model, (2, 4), example_input=X), lambda: profile(model, X)):
        with pytest.raises(ValueError, match=r"cannot quantize '2' \(Own\): it multiplies by"):
            refuse()
    prepared = prepare(model, (2, 4), example_input=X, exclude=["2"])
    assert list(quantized_layers(prepared)) == ["1"]


FLOAT_BUT_NO_PRODUCT = {
    "scaled": lambda x, m: x * m.v + m.table[0],
    "gathered": lambda x, m: x + m.w[torch.arange(len(x))],
    "embedded": lambda x, m: x + F.embedding(torch.zeros(len(x), dtype=torch.long), m.w),
    "normalised": lambda x, m: F.layer_norm(x, (8,), m.v, m.v),
    "constant": lambda x, m: x @ torch.ones(8, 8).tril(),
    "of activations": lambda x, m: x @ x.T @ x,
    "of weights alone": lambda x, m: x + (m.up @ m.down).mean(),
    "biased attention": lambda x, m: F.scaled_dot_product_attention(
        x[None], x[None], x[None], m.w[: len(x), : len(x)]
    )[0],
    "in place": lambda x, m: x.clone().mul_(m.v),
}


@pytest.mark.parametrize(
    "function",
    [pytest.param(function, id=name) for name, function in FLOAT_BUT_NO_PRODUCT.items()],
)
def test_what_sums_no_products_of_weights_is_accepted(function):
    prepared = prepare(network(Own(function)), (2, 4), example_input=X)
    assert list(quantized_layers(prepared)) == ["1"]


class Twice(nn.Module):
    """Uses the weight of its layer once more."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(x) + x @ self.lin.weight.T


def test_the_weight_of_a_layer_used_once_more_is_refused_by_the_name_of_the_user():
    with pytest.raises(ValueError, match=r"'2' \(Twice\): it multiplies by '2\.lin\.weight'"):
        prepare(network(Twice()), (2, 4), example_input=X)


class Held(nn.Module):
    """Holds its layers once more, as ``held`` does, and runs those."""

    def __init__(self, held):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.held = held(self.a, self.b)

    def forward(self, x):
        for layer in self.held.values() if isinstance(self.held, dict) else self.held:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "held",
    [lambda *m: list(m), lambda *m: tuple(m), lambda a, b: {"a": a, "b": b}],
    ids=["list", "tuple", "dict"],
)
def test_layers_that_run_where_they_are_held_besides_are_refused_by_name(held):
    model = network(Held(held))
    with pytest.raises(
        ValueError, match=r"'2\.a', '2\.b' \(Linear\): its weight is used without its quantizers"
    ):
        prepare(model, (2, 4), example_input=X)
    prepared = prepare(model, (2, 4), example_input=X, exclude=["2.a", "2.b"])
    assert list(quantized_layers(prepared)) == ["1"]


class Alias(nn.Linear):
    """Uses its weight under a second name."""

    def __init__(self):
        super().__init__(8, 8)
        self.second = self.weight

    def forward(self, x):
        return F.linear(x, self.second, self.bias)


class Closure(nn.Linear):
    """Has a forward of the instance's own, which calls the former one."""

    def __init__(self):
        super().__init__(8, 8)
        former = self.forward
        self.forward = lambda x: former(x)


class Idle(nn.Linear):
    """Multiplies nothing."""

    def forward(self, x):
        return x + self.weight.mean()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Alias(), "its weight is used without its quantizers"),
        (Closure(), "its weight is used without its quantizers"),
        (Idle(8, 8), "its forward does not multiply its quantized input by its quantized weight"),
    ],
    ids=["alias", "closure", "idle"],
)
def test_a_layer_that_goes_past_its_quantizers_is_refused_by_name(layer, reason):
    with pytest.raises(ValueError, match=rf"'2' \({type(layer).__name__}\): {reason}"):
        prepare(network(layer), (2, 4), example_input=X)
    policy = Policy((LayerBits("2", 4, 4),))
    with (
        pytest.warns(UserWarning, match="left in float"),
        pytest.raises(ValueError, match=f"would compute in float: '2' .{type(layer).__name__}"),
    ):
        apply_policy(network(layer), policy, example_input=X)


def test_all_that_is_refused_is_named_at_once_with_the_exclude_to_copy():
    model = nn.ModuleDict(
        {"first": nn.Linear(8, 8), "own": Own(PRODUCTS["matmul"]), "lstm": nn.LSTMCell(8, 8)}
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model
            self.alias = Alias()
            self.last = nn.Linear(8, 8)
            self.w = nn.Parameter(torch.zeros(8, 8))

        def forward(self, x):
            x = self.parts["own"](self.parts["first"](x)) @ self.w
            return self.last(self.alias(self.parts["lstm"](x)[0]))

    with pytest.raises(ValueError, match="cannot quantize") as refused:
        profile(Net(), X)
    message = str(refused.value)
    exclude = message[message.index("exclude=[") + 8 : message.index("]") + 1]
    found = trace(Net(), X, exclude=eval(exclude))
    assert [layer.name for layer in found.layers] == ["parts.first", "last"]


class PaddedConv1d(nn.Conv1d):
    """Has a forward of its own."""

    def forward(self, x):
        return F.conv1d(F.pad(x, (1, 1)), self.weight, self.bias)[..., 1:-1]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(8, 8, 1)),
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 1)),
        lambda: parametrizations.spectral_norm(nn.Conv1d(8, 8, 1)),
        lambda: parametrizations.weight_norm(PaddedConv1d(8, 8, 1)),
    ],
    ids=["transposed", "weight", "spectral", "own forward"],
)
def test_parametrized_layers_run_on_their_quantized_weight(layer, per_channel):
    model = nn.Sequential(nn.Conv1d(8, 8, 1), layer(), nn.Conv1d(8, 8, 1))
    x = torch.randn(2, 8, 5)
    prepared = prepare(model, (2, 4), example_input=x, per_channel_weights=per_channel).train()
    (quantized,) = quantized_layers(prepared).values()
    seen = []
    quantized.weight_quantizer.register_forward_hook(lambda *args: seen.append(args[-1]))
    prepared(x)
    prepared.eval()
    inputs = quantized.input_quantizer(prepared[0](x))
    outputs = quantized(prepared[0](x))
    convolve = F.conv_transpose1d if isinstance(quantized, nn.ConvTranspose1d) else F.conv1d
    torch.testing.assert_close(outputs, convolve(inputs, seen[-1], quantized.bias))
