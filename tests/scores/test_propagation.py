"""Rules of relevance against plain formulas in float64, and that relevance is kept."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import small_model

from limpq_ext.nn.attention import with_layers
from limpq_ext.nn.layers import quantizable_base
from limpq_ext.scores.propagation import propagate


def normal(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def ones(output):
    """Relevance to begin with that tells the samples and the classes apart."""
    return torch.linspace(0.5, 2, output.numel(), dtype=output.dtype).reshape(output.shape)


def layers_of(model):
    return {name: m for name, m in model.named_modules() if quantizable_base(m) is not None}


def propagated(model, inputs, watched=None, start=ones):
    """The relevance of the inputs and, by layer, of its outputs, call by call."""
    found = {}
    watched = layers_of(model) if watched is None else watched
    at_inputs = propagate(
        model.eval(),
        watched,
        inputs,
        start,
        lambda name, relevance: found.setdefault(name, []).append(relevance.clone()),
    )
    return at_inputs, found


# Slow, plain versions of the rules.


def by_positive_products(matrix, x, relevance):
    """z+ of ``y = x @ matrix.T``, product by product."""
    products = x[:, None, :] * matrix[None]  # [samples, outputs, inputs]
    shares = products.clamp(min=0)
    nothing = shares.sum(dim=2) == 0
    shares = torch.where(nothing[..., None], products.abs(), shares)
    total = shares.sum(dim=2, keepdim=True)
    parts = torch.where(total > 0, shares / total, 0.0)
    return (parts * relevance[..., None]).sum(dim=1)


def matrix_of(conv, shape):
    """A convolution without its bias as a matrix, and the shape of its output."""
    size = torch.Size(shape).numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        rows = conv(basis) - conv(torch.zeros_like(basis[:1]))
    return rows.flatten(1).T, rows.shape[1:]


def by_convolution(conv, x, relevance):
    matrix, _ = matrix_of(conv, x.shape[1:])
    return by_positive_products(matrix, x.flatten(1), relevance.flatten(1)).reshape(x.shape)


def by_magnitude(parts, relevance):
    total = sum(part.abs() for part in parts)
    return [relevance * part.abs() / total for part in parts]


def by_input_times_gradient(a, b, relevance):
    """Of ``z = a @ b``, ``[..., n, k] @ [..., k, m]``, product by product, half to each factor."""
    products = a[..., :, :, None] * b[..., None, :, :]  # [..., n, k, m]
    sign = torch.where(products.sum(dim=-2, keepdim=True) < 0, -1.0, 1.0)
    products = products + sign * 0.1 * products.abs()
    shares = products / products.sum(dim=-2, keepdim=True) * relevance[..., :, None, :] / 2
    return shares.sum(dim=-1), shares.sum(dim=-3)


# Whole networks by hand.


def test_a_perceptron_is_propagated_as_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)
    ).double()
    x = normal(4, 7)
    with torch.no_grad():
        first = model[1](model[0](x))
        second = model[3](model[2](first))
        output = model[4](second)
    at_head = ones(output)
    at_second = by_positive_products(model[4].weight.detach(), second, at_head)
    at_first = by_positive_products(model[2].weight.detach(), first, at_second)
    expected = by_positive_products(model[0].weight.detach(), x, at_first)
    (at_input,), found = propagated(model, x)
    torch.testing.assert_close(found["4"][0], at_head)
    torch.testing.assert_close(found["2"][0], at_second)
    torch.testing.assert_close(found["0"][0], at_first)
    torch.testing.assert_close(at_input, expected)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)), inplace=True)
        y = self.norm2(self.conv(x))
        y += x
        return self.head(F.relu(y, inplace=True).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    model = Residual().double()
    for _ in range(5):
        model(normal(8, 2, 5, 5))
    return model.eval()


def test_a_residual_network_is_propagated_as_by_hand():
    model, x = residual(), normal(3, 2, 5, 5)
    with torch.no_grad():
        stem = F.relu(model.norm1(model.stem(x)))
        branch = model.norm2(model.conv(stem))
        pooled_from = F.relu(branch + stem)
        pooled = pooled_from.mean((2, 3))
        output = model.head(pooled)
    at_pooled = by_positive_products(model.head.weight.detach(), pooled, ones(output))
    share = pooled_from / pooled_from.sum((2, 3), keepdim=True)
    at_sum = torch.where(pooled[..., None, None] > 0, share, 0.0) * at_pooled[..., None, None]
    at_branch, at_skip = by_magnitude([branch, stem], at_sum)
    at_branch, at_skip = at_branch.nan_to_num(), at_skip.nan_to_num()  # 0 + 0 has nothing to share
    at_stem = at_skip + by_convolution(model.conv, stem, at_branch)
    expected = by_convolution(model.stem, x, at_stem)
    (at_input,), found = propagated(model, x)
    torch.testing.assert_close(found["conv"][0], at_branch)
    torch.testing.assert_close(found["stem"][0], at_stem)
    torch.testing.assert_close(at_input, expected)


class Block(nn.Module):
    """One attention with its residual over tokens, normalised before."""

    def __init__(self, width=6, heads=2):
        super().__init__()
        self.heads = heads
        self.place = nn.Parameter(torch.randn(1, 5, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = x + self.place
        n, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).reshape(n, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        return self.head((x + self.proj(y)).mean(1))


def test_an_attention_block_is_propagated_as_by_hand():
    torch.manual_seed(0)
    model, x = Block().double(), normal(2, 5, 6)
    n, tokens, width = x.shape

    def by_rows(linear, inputs, relevance):
        rows = by_positive_products(
            linear.weight.detach(), inputs.flatten(0, -2), relevance.flatten(0, -2)
        )
        return rows.reshape(inputs.shape)

    with torch.no_grad():
        placed = x + model.place
        normed = model.norm(placed)
        parts = model.qkv(normed).reshape(n, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4)
        q, k, v = parts
        attention = (q @ k.transpose(2, 3) / 3**0.5).softmax(3)
        heads = attention @ v
        joined = heads.transpose(1, 2).reshape(n, tokens, width)
        projected = model.proj(joined)
        pooled = (placed + projected).mean(1)
        output = model.head(pooled)
    at_pooled = by_rows(model.head, pooled, ones(output))
    total = placed + projected
    at_sum = at_pooled[:, None] * total.abs() / total.abs().sum(1, keepdim=True)
    at_skip, at_projected = by_magnitude([placed, projected], at_sum)
    at_joined = by_rows(model.proj, joined, at_projected)
    at_heads = at_joined.reshape(n, tokens, 2, 3).transpose(1, 2)
    at_attention, at_v = by_input_times_gradient(attention, v, at_heads)
    at_q, at_kt = by_input_times_gradient(q, k.transpose(2, 3), at_attention)
    at_parts = torch.stack([at_q, at_kt.transpose(2, 3), at_v])
    at_qkv = at_parts.permute(1, 3, 0, 2, 4).reshape(n, tokens, 3 * width)
    expected = at_skip + by_rows(model.qkv, normed, at_qkv)
    (at_input,), found = propagated(model, x)
    torch.testing.assert_close(found["proj"][0], at_projected)
    torch.testing.assert_close(found["qkv"][0], at_qkv)
    torch.testing.assert_close(at_input, expected)
    torch.testing.assert_close(at_input.sum(), ones(output).sum())


# One operator at a time.


class Through(nn.Module):
    """One function between the input and the output."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


WEIGHT, FIELD = normal(6, 4, seed=5), normal(6, 4, 3, 3, seed=6)
CHOSEN = torch.tensor([2, 0, 3])


def written(x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    y[:, 0] = x[:, 3]
    return y + x


def changed_after_use(x):
    x = x + 0
    y = x[:, :2] * x[:, 2:]
    x.mul_(3.0)
    x[:, 1] += y[:, 0]
    return torch.cat([x, y], dim=1)


KEEPING = {
    "relu in place": lambda x: F.relu(x + 1, inplace=True),
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "by hand swish": lambda x: x * torch.sigmoid(x),
    "square and root": lambda x: (x * x + 1).sqrt(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "linear": lambda x: F.linear(x.flatten(2).transpose(1, 2), WEIGHT, WEIGHT[:, 0]),
    "matrix by vector": lambda x: x[0].flatten(1).T @ WEIGHT[0],
    "convolution": lambda x: F.conv2d(x, FIELD, WEIGHT[:, 0], padding=1),
    "in groups": lambda x: F.conv2d(x, FIELD[:, :2], groups=2, padding=1),
    "depthwise": lambda x: F.conv2d(x.abs(), FIELD[:4, :1], groups=4, padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, FIELD.transpose(0, 1), stride=2),
    "convolution in 1": lambda x: F.conv1d(x.flatten(2), FIELD[..., 0]),
    "product of two": lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2),
    "added to a product": lambda x: torch.addmm(x[0, 0], x[0, 1], x[0, 2], beta=2, alpha=-3),
    "added to products": lambda x: torch.baddbmm(x[0, :, :1], x[0], x[1]),
    "vectors": lambda x: torch.addmv(x[0, 0, 0], x[0, 1], x[1, 2, 3]) * (x[0, 0, 1] @ x[0, 0, 2]),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x + 1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x * 2),
    "masked attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "group norm": lambda x: F.group_norm(x, 2),
    "rms norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "normalize": F.normalize,
    "rms norm by hand": lambda x: x * (x.pow(2).mean(1, keepdim=True) + 1e-6).rsqrt(),
    "centred": lambda x: x - x.mean((2, 3), keepdim=True),
    "sum": lambda x: x.sum((1, 2)),
    "average": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, 3),
    "to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "maximum": lambda x: F.max_pool2d(x, 2, 1),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, 2),
    "amax": lambda x: x.amax((2, 3)),
    "larger of two": lambda x: torch.maximum(x, x.flip(2)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x: F.interpolate(x, scale_factor=3),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "gated linear unit": lambda x: F.glu(x, 1),
    "quotient": lambda x: x / x.exp().sum(1, keepdim=True),
    "with a constant": lambda x: 3 - (2 * x.sum(-1).sum(-1) + WEIGHT[0]) / 5,
    "concatenated": lambda x: torch.cat([x, x[:, :2] * 2], dim=1),
    "stacked": lambda x: torch.stack([x, x + x], dim=2),
    "chunks": lambda x: x.chunk(2, 1)[0] + x.chunk(2, 1)[1],
    "shuffled": lambda x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2),
    "rolled": lambda x: x.roll((1, 1), (2, 3)).flip(1),
    "mirrored": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "indexed": lambda x: x[:, CHOSEN] + x.index_select(1, CHOSEN),
    "gathered": lambda x: x.gather(1, x.argsort(1)) + x.sort(1).values,
    "chosen": lambda x: torch.where(x > 0, x, -x),
    "expanded": lambda x: x.mean(1, keepdim=True).expand(-1, 5, -1, -1) * 2,
    "windows that overlap": lambda x: x.unfold(2, 3, 1) * 2,
    "patches": lambda x: F.unfold(x, 2, stride=2),
    "written": written,
    "changed after use": changed_after_use,
    "converted": lambda x: x.float().double(),
}


@pytest.mark.parametrize("name", KEEPING)
def test_an_operator_keeps_the_sum(name):
    x = normal(2, 4, 6, 6)
    model = Through(KEEPING[name])
    start = []

    def begin(output):
        start.append(ones(output))
        return start[0]

    (at_input,), _ = propagated(model, x, start=begin)
    torch.testing.assert_close(at_input.sum(), start[0].sum(), rtol=1e-6, atol=0)
    assert at_input.shape == x.shape


def test_gates_and_factors_get_halves_and_constants_nothing():
    x, gate = normal(2, 4, 3, 3), normal(2, 4, 1, 1, seed=2)
    model = Through(lambda x, gate: (x * gate.sigmoid() * 3 + 1) * WEIGHT[0, 0])
    (at_x, at_gate), _ = propagated(model, (x, gate))
    start = ones(x)
    torch.testing.assert_close(at_x, start / 2)
    torch.testing.assert_close(at_gate, start.sum((2, 3), keepdim=True) / 2)


def test_a_mean_and_a_difference_are_shared_by_magnitude():
    x, y = normal(3, 4), normal(3, 1, seed=2)
    model = Through(lambda x, y: (x - 2 * y).mean(1))
    (at_x, at_y), _ = propagated(model, (x, y))
    difference = x - 2 * y
    share = ones(x[:, 0])[:, None] * difference.abs() / difference.abs().sum(1, keepdim=True)
    expected_x, expected_y = by_magnitude([x, 2 * y.expand(3, 4)], share)
    torch.testing.assert_close(at_x, expected_x)
    torch.testing.assert_close(at_y, expected_y.sum(1, keepdim=True))


def test_a_maximum_passes_all_to_where_it_stands():
    x = torch.tensor([[[1.0, 5.0, 2.0, 7.0]]], dtype=torch.float64)
    (at_x,), _ = propagated(Through(lambda x: F.max_pool1d(x, 2)), x)
    assert at_x.tolist() == [[[0.0, 0.5, 0.0, 2.0]]]


def test_an_output_with_negative_products_alone_is_shared_by_them():
    linear = nn.Linear(2, 1).double()
    linear.weight.data = torch.tensor([[-1.0, -3.0]], dtype=torch.float64)
    (at_x,), _ = propagated(linear, torch.ones(1, 2, dtype=torch.float64))
    torch.testing.assert_close(at_x, torch.tensor([[0.125, 0.375]], dtype=torch.float64))


def test_relevance_ends_where_all_is_zero():
    (at_x,), _ = propagated(nn.Linear(2, 1).double(), torch.zeros(1, 2, dtype=torch.float64))
    assert at_x.tolist() == [[0.0, 0.0]]


def test_what_is_masked_or_written_over_has_nothing():
    def forward(x):
        x = x.masked_fill(torch.tensor([True, False, False]), -5.0) * 2
        x[:, 1] = 3.0
        return x

    (at_x,), _ = propagated(Through(forward), normal(2, 3))
    expected = ones(at_x)
    expected[:, :2] = 0
    assert torch.equal(at_x, expected)


def test_a_class_token_has_its_own_part():
    token = normal(1, 1, 4, seed=3)
    model = Through(lambda x: torch.cat([token.expand(len(x), -1, -1), x], dim=1))
    (at_x,), _ = propagated(model, normal(2, 3, 4))
    torch.testing.assert_close(at_x, ones(torch.zeros(2, 4, 4, dtype=torch.float64))[:, 1:])


def test_a_watched_layer_that_no_input_reaches_has_relevance():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.places = nn.Linear(2, 3)

        def forward(self, x):
            return x + self.places(torch.ones(1, 2, dtype=x.dtype))

    model, x = Biased().double(), normal(4, 3)
    (at_x,), found = propagated(model, x)
    assert found["places"][0].shape == (1, 3)
    torch.testing.assert_close(at_x.sum() + found["places"][0].sum(), ones(x).sum())


def test_samples_do_not_know_of_each_other():
    torch.manual_seed(0)
    model, x = Block().double(), normal(3, 5, 6)
    (at_all,), _ = propagated(model, x, start=torch.ones_like)
    for sample in range(3):
        (at_one,), _ = propagated(model, x[sample : sample + 1], start=torch.ones_like)
        torch.testing.assert_close(at_all[sample : sample + 1], at_one)


def test_a_network_of_16_bits_is_computed_with_in_32():
    model, x = residual(), normal(3, 2, 5, 5)
    (expected,), _ = propagated(model, x)
    (at_input,), _ = propagated(model.bfloat16(), x.bfloat16(), start=lambda y: ones(y.float()))
    assert at_input.dtype == torch.float32
    assert (at_input - expected).norm() < 0.05 * expected.norm()


def test_a_network_on_channels_last_is_propagated_alike():
    model, x = residual(), normal(3, 2, 5, 5)
    (expected,), _ = propagated(model, x)
    model = model.to(memory_format=torch.channels_last)
    (at_input,), _ = propagated(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(at_input, expected)


def test_what_a_forward_computed_is_let_go_on_the_way_back():
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)))
    alive = []
    handles = [
        layer.register_forward_hook(lambda m, i, y: alive.append(weakref.ref(y.untyped_storage())))
        for layer in model
    ]
    living = []

    def visit(name, relevance):
        living.append([int(name), sum(reference() is not None for reference in alive[:-1])])

    propagate(model, layers_of(model), torch.randn(2, 8, 9, 9), torch.ones_like, visit)
    for handle in handles:
        handle.remove()
    assert living == [[3, 3], [2, 2], [1, 1], [0, 0]]


def test_a_layer_that_runs_twice_is_seen_twice():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    _, found = propagated(model, normal(2, 4))
    assert len(found["0"]) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_gradients_does_not_matter(mode):
    model = residual()
    (expected,), _ = propagated(model, normal(3, 2, 5, 5))
    with mode():
        (at_input,), _ = propagated(model, normal(3, 2, 5, 5))
    torch.testing.assert_close(at_input, expected)


def test_inputs_of_a_batch_come_in_a_tuple_or_by_name_and_are_left_as_they_are():
    def forward(x, y):
        x.add_(1)
        return x * y

    model = Through(forward)
    x, y = normal(2, 3), normal(2, 3, seed=2)
    before = x.clone()
    propagated(model, (x, y))
    assert torch.equal(x, before)
    named = Through(None)
    named.forward = lambda first, second: forward(first, second)
    assert len(propagated(named, {"first": x, "second": y})[0]) == 2


@torch.library.custom_op("tests_of_relevance::mul", mutates_args=())
def own_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y * y


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: x.cumsum(1), "aten.cumsum"),
        (lambda x: torch.fft.rfft(x).real, "aten.view_as_real"),
        (lambda x: x.view(torch.int64).view(torch.float64), "aten.view"),
        (lambda x: x.var(1), "aten.var"),
        (lambda x: own_product(x, x), "tests_of_relevance.mul"),
        (lambda x: torch.atan2(x, x), "aten.atan2"),
        (lambda x: torch.ops.aten.native_layer_norm(x, [3], None, None, 0.1)[1], "aten.native_lay"),
    ],
)
def test_an_operator_without_a_rule_is_named_with_its_module(function, operator):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Through(function)

        def forward(self, x):
            return self.inner(x * 2)

    with pytest.raises(ValueError, match=rf"no rule for {operator}.*'inner' \(Through\) runs"):
        propagated(Outer(), normal(2, 3))


def test_an_operator_without_a_rule_matters_on_the_way_alone():
    def forward(x):
        x.cumsum(1)
        return x * 2

    (at_x,), _ = propagated(Through(forward), normal(2, 3))
    torch.testing.assert_close(at_x, ones(at_x))


def test_hooks_are_taken_off_also_after_an_error():
    model = residual()
    with pytest.raises(RuntimeError):
        propagated(model, normal(3, 3, 5, 5))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "tiny vit", "tiny swin", "tiny swin v2"]
)
def test_relevance_reaches_every_layer_of_networks_that_are_used(name):
    model, x, _ = small_model(name)
    model = with_layers(model.eval(), lambda _: True)
    (at_input,), found = propagated(model, x[:2])
    assert found.keys() == layers_of(model).keys()
    assert all(bool(part.isfinite().all()) for parts in found.values() for part in parts)
    total = float(ones(torch.zeros(2, 8)).sum())
    if name == "resnet18":
        assert float(at_input.sum()) == pytest.approx(total, rel=1e-4)
    else:  # class tokens, padded windows, channels of zeros
        assert 0 < float(at_input.sum()) < total * 1.0001
