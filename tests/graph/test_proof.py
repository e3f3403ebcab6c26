"""Nothing runs in float without a word, whichever way a forward takes to its weights."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from limpq_ext import Policy, apply_policy, prepare, profile, quantized_layers
from limpq_ext.graph.trace import trace
from limpq_ext.values.policy import LayerBits

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
        lambda: weight_norm(nn.ConvTranspose1d(8, 8, 1)),
        lambda: spectral_norm(nn.Conv1d(8, 8, 1)),
        lambda: prune.l1_unstructured(nn.Conv1d(8, 8, 1), "weight", 0.5),
    ],
    ids=[
        *("transposed", "weight", "spectral", "own forward"),
        *("former weight", "former spectral", "pruned"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_layers_that_compute_their_weight_run_on_it_quantized(layer, per_channel):
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


def test_a_policy_without_an_example_is_proven_in_every_forward_until_one_succeeds():
    layer = Closure()
    policy = Policy((LayerBits("1", 4, 4), LayerBits("2", 4, 4)))
    with pytest.warns(UserWarning, match="left in float"):
        model = apply_policy(network(layer), policy).train()
    for _ in range(2):
        with pytest.raises(ValueError, match="would compute in float: '2'"):
            model(torch.randn(4, 8))
    del model[2].forward
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not model._forward_pre_hooks
    weights = {name: value for name, value in model.state_dict().items() if "quantizer" not in name}
    assert all(torch.equal(before[name], value) for name, value in weights.items())


def test_the_proof_at_the_first_forward_goes_with_copies_and_keyword_inputs():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, *, x, bias=None):
            y = self.b(self.a(x["x"]))
            return y if bias is None else y + bias

    policy = Policy((LayerBits("a", 4, 4), LayerBits("b", 4, 4)))
    model = apply_policy(ByKeyword(), policy).train()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 8)
    assert torch.equal(model(x={"x": x}), twin(x={"x": x}, bias=None))
    assert not model._forward_pre_hooks
    assert not twin._forward_pre_hooks


def test_a_forward_that_cannot_be_followed_is_said_where_a_policy_runs():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    policy = Policy((LayerBits("0", 4, 4), LayerBits("1", 4, 4), LayerBits("3", 4, 4)))
    model = apply_policy(network(DataDependent()), policy).train()
    with pytest.warns(UserWarning, match="not proven that every layer runs quantized: cannot"):
        model(torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"cannot follow Sequential\.forward .*in '2'"):
        apply_policy(network(DataDependent()), policy, example_input=X)


def test_nothing_of_a_proof_stays_in_the_cache_of_autocast():
    model = network()
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        prepare(model, (2, 4), example_input=x)
        assert torch.equal(model(x), expected)


def compiled_by_jit(kind):
    layer = nn.Linear(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(layer) if kind == "script" else torch.jit.trace(layer, X)


class ByName(nn.Linear):
    """Asks for its parameter by name."""

    def forward(self, x):
        return F.linear(x, self.get_parameter("weight"), self.bias)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            compiled_by_jit("script"),
            r"'2' \(RecursiveScriptModule\): it was compiled by torch\.jit",
        ),
        (compiled_by_jit("trace"), r"'2' \(.*Module\): it was compiled by torch\.jit"),
        (ByName(8, 8), r"cannot follow .*, in '2': AttributeError: `weight` is not"),
        (
            prepare(network(), (2, 4), example_input=X),
            r"Sequential is prepared or quantized already, as '2\.1' shows",
        ),
    ],
    ids=["script", "trace", "parameter by name", "prepared"],
)
def test_parts_that_take_no_quantizers_are_an_error_in_one_sentence(part, message):
    for refuse in (prepare, profile):
        options = {"bits": (2, 4)} if refuse is prepare else {}
        with pytest.raises(ValueError, match=message):
            refuse(network(part), example_input=X, **options)


@pytest.mark.parametrize("kind", ["script", "trace"])
def test_what_torch_jit_compiled_can_be_excluded(kind):
    model = network(compiled_by_jit(kind))
    prepared = prepare(model, (2, 4), example_input=X, exclude=["2"]).train()
    assert list(quantized_layers(prepared)) == ["1"]
    assert prepared(torch.randn(4, 8)).shape == (4, 8)
