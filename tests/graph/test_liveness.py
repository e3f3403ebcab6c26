"""What is held between layers and what they share, counted by hand. 10x10 images, 1 sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from limpq_ext import profile
from limpq_ext.graph.liveness import Flow, Kind
from limpq_ext.graph.trace import trace
from limpq_ext.values.costs import LiveTensor

IMAGE = torch.zeros(2, 3, 10, 10)
SIZES = st.integers(1, 4)


class Network(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.run = forward

    def forward(self, x):
        return self.run(x, *self.layers.values())


def found(forward, **layers):
    traced = trace(Network(forward, **layers), IMAGE)
    tensors = [
        LiveTensor(t.elements, t.layer and t.layer.removeprefix("layers."), t.first, t.last)
        for t in traced.tensors
    ]
    groups = [tuple(n.removeprefix("layers.") for n in group) for group in traced.shared_inputs]
    return tensors, groups


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def test_a_layer_with_its_norm_and_activation_is_one_tensor():
    tensors, groups = found(
        lambda x, a, norm, b: torch.sigmoid(b(F.relu(norm(a(x))))),
        a=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        b=conv(4, 5),
    )
    # Moment 0: the image and a's output; moment 1: a's output and b's, which nothing reads.
    assert tensors == [
        LiveTensor(300, "a", 0, 0),
        LiveTensor(400, "b", 0, 1),
        LiveTensor(500, None, 1, 1),
    ]
    assert groups == []


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_block_holds_its_input_up_to_the_addition(inplace):
    def forward(x, stem, a, b, head):
        x = F.relu(stem(x), inplace=inplace)
        y = b(F.relu(a(x), inplace=inplace))
        if inplace:
            y += x
        else:
            y = y + x
        return head(F.relu(y, inplace=inplace))

    tensors, groups = found(forward, stem=conv(3, 4), a=conv(4, 4), b=conv(4, 4), head=conv(4, 2))
    assert tensors == [
        LiveTensor(300, "stem", 0, 0),
        LiveTensor(400, "a", 0, 2),  # also added, after b was called
        LiveTensor(400, "b", 1, 2),
        LiveTensor(400, "head", 2, 3),  # b's output and the sum
        LiveTensor(200, None, 3, 3),
    ]
    assert groups == []


def test_a_downsampled_residual_block_shares_its_input():
    def forward(x, stem, a, b, down, head):
        x = F.relu(stem(x))
        y = b(F.relu(a(x)))
        return head(F.relu(y + down(x)))

    tensors, groups = found(
        forward,
        stem=conv(3, 4),
        a=conv(4, 6, stride=2),
        b=conv(6, 6),
        down=nn.Conv2d(4, 6, 1, stride=2),
        head=conv(6, 2),
    )
    assert tensors == [
        LiveTensor(300, "stem", 0, 0),
        LiveTensor(400, "a", 0, 3),
        LiveTensor(150, "b", 1, 2),
        LiveTensor(150, None, 2, 3),  # b's output waits for down; only their sum is read
        LiveTensor(150, "head", 3, 4),
        LiveTensor(50, None, 4, 4),
    ]
    assert groups == [("a", "down")]


def test_branches_that_are_concatenated_are_stored_as_what_reads_them_wants():
    def forward(x, stem, one, two, pooled, head):
        x = F.relu(stem(x))
        branches = [one(x), two(x), pooled(F.max_pool2d(x, 3, 1, 1))]
        return head(F.relu(torch.cat(branches, 1)))

    tensors, groups = found(
        forward,
        stem=conv(3, 4),
        one=nn.Conv2d(4, 1, 1),
        two=conv(4, 2),
        pooled=nn.Conv2d(4, 3, 1),
        head=conv(6, 2),
    )
    assert tensors == [
        LiveTensor(300, "stem", 0, 0),
        LiveTensor(400, "one", 0, 2),  # pooled after moment 2
        LiveTensor(100, "head", 1, 4),
        LiveTensor(200, "head", 2, 4),
        LiveTensor(400, "pooled", 2, 3),
        LiveTensor(300, "head", 3, 4),
        LiveTensor(200, None, 4, 4),
    ]
    assert groups == [("one", "two")]


def test_a_tensor_whose_maxima_are_read_has_the_bits_of_their_reader():
    tensors, _ = found(lambda x, a, b: b(F.max_pool2d(a(x), 2)), a=conv(3, 4), b=conv(4, 5))
    assert tensors == [
        LiveTensor(300, "a", 0, 0),
        LiveTensor(400, "b", 0, 0),
        LiveTensor(100, "b", 0, 1),
        LiveTensor(125, None, 1, 1),
    ]


def test_a_tensor_whose_means_are_read_is_float():
    tensors, _ = found(lambda x, a, b: b(a(x).mean((2, 3))), a=conv(3, 4), b=nn.Linear(4, 5))
    assert tensors == [
        LiveTensor(300, "a", 0, 0),
        LiveTensor(400, None, 0, 0),
        LiveTensor(4, "b", 0, 1),
        LiveTensor(5, None, 1, 1),
    ]


def test_a_shared_module_called_twice_reads_at_both_moments():
    tensors, groups = found(
        lambda x, first, again, head: head(F.relu(again(F.relu(again(first(x)))))),
        first=conv(3, 4),
        again=conv(4, 4),
        head=conv(4, 1),
    )
    assert tensors == [
        LiveTensor(300, "first", 0, 0),
        LiveTensor(400, "again", 0, 1),
        LiveTensor(400, "again", 1, 2),
        LiveTensor(400, "head", 2, 3),
        LiveTensor(100, None, 3, 3),
    ]
    assert groups == []


def test_depthwise_and_pointwise_layers_are_a_chain():
    tensors, groups = found(
        lambda x, expand, depthwise, project: project(F.relu6(depthwise(F.relu6(expand(x))))),
        expand=nn.Conv2d(3, 8, 1),
        depthwise=conv(8, 8, groups=8, stride=2),
        project=nn.Conv2d(8, 2, 1),
    )
    assert tensors == [
        LiveTensor(300, "expand", 0, 0),
        LiveTensor(800, "depthwise", 0, 1),
        LiveTensor(200, "project", 1, 2),
        LiveTensor(50, None, 2, 2),
    ]
    assert groups == []


def test_flattening_makes_no_tensor():
    def forward(x, a, b, c):
        x = a(x.permute(0, 2, 3, 1).flatten(1))  # a copy in another order
        return b(x) + c(nn.Identity()(F.dropout(x, training=False)).view(-1, 4, 2).reshape(-1, 8))

    tensors, groups = found(forward, a=nn.Linear(300, 8), b=nn.Linear(8, 5), c=nn.Linear(8, 5))
    assert tensors == [
        LiveTensor(300, "a", 0, 0),
        LiveTensor(8, "b", 0, 2),
        LiveTensor(5, None, 1, 2),
        LiveTensor(5, None, 2, 2),
    ]
    assert groups == [("b", "c")]


def test_what_an_activation_changed_is_another_tensor():
    def forward(x, stem, a, b, c, inplace):
        x = stem(x)
        y = a(x)
        z = F.relu(x, inplace=inplace)
        return y + b(z) + c(z)

    layers = {"stem": conv(3, 4), "a": conv(4, 4), "b": conv(4, 4), "c": conv(4, 4)}
    for inplace in (False, True):
        _, groups = found(lambda *args, inplace=inplace: forward(*args, inplace), **layers)
        assert groups == [("b", "c")]


def test_where_the_values_before_an_activation_are_still_needed_it_makes_a_tensor():
    def forward(x, stem, a):
        x = stem(x)
        return x + a(F.relu(x))

    tensors, _ = found(forward, stem=conv(3, 4), a=conv(4, 4))
    assert tensors == [
        LiveTensor(300, "stem", 0, 0),
        LiveTensor(400, None, 0, 1),  # the residual stream: no layer reads it as it is
        LiveTensor(400, "a", 0, 1),
        LiveTensor(400, None, 1, 1),
    ]


def test_the_parts_of_a_tensor_hold_it_all():
    def forward(x, stem, a, head):
        kept, worked = stem(x).chunk(2, dim=1)
        return head(torch.cat([kept, a(worked)], dim=1))

    tensors, groups = found(forward, stem=conv(3, 4), a=conv(2, 2), head=conv(4, 2))
    assert tensors == [
        LiveTensor(300, "stem", 0, 0),
        LiveTensor(400, "a", 0, 2),
        LiveTensor(200, "head", 1, 2),
        LiveTensor(200, None, 2, 2),
    ]
    assert groups == []


def test_layers_that_read_a_constant_share_no_input_of_the_network():
    table = torch.zeros(7, 2)
    tensors, _ = found(
        lambda x, a, bias: a(x).mean((2, 3)) + bias(table).mean(0),
        a=conv(3, 4),
        bias=nn.Linear(2, 4),
    )
    assert tensors == [
        LiveTensor(300, "a", 0, 0),
        LiveTensor(400, None, 0, 0),
        LiveTensor(4, None, 0, 1),
        LiveTensor(28, None, 1, 1),
        LiveTensor(4, None, 1, 1),
    ]


def test_resnet18_at_224():
    models = pytest.importorskip("torchvision.models")
    costs = profile(models.resnet18(), torch.zeros(1, 3, 224, 224))
    blocks = [f"layer{i}.0" for i in (2, 3, 4)]
    assert costs.shared_inputs == tuple(
        (f"{block}.conv1", f"{block}.downsample.0") for block in blocks
    )
    # Of each addition the skip connection, where a layer reads it, and the sum: not what a block
    # with a downsampling adds, nor what the last one puts out.
    assert {frozenset(group) for group in costs.added_inputs} == {
        frozenset({f"layer{i}.1.conv1", other})
        for i, other in (
            (1, "layer1.0.conv1"),
            (1, "layer2.0.conv1"),
            (2, "layer3.0.conv1"),
            (3, "layer4.0.conv1"),
        )
    }
    # 21 layer calls. Each puts out a tensor; beside these are the image, the maxima after conv1
    # and the means before fc. All layers at 4 bits but conv1 and fc at 8:
    # moment 0: the image, 3 x 224 x 224 = 150,528 at conv1's 8 bits; conv1's output of
    # 64 x 112 x 112 = 802,816, whose maxima, 64 x 56 x 56 = 200,704, layer1.0.conv1 reads at 4.
    # Every later moment is below: in layer1 at most three tensors of 200,704, which are a skip
    # connection, what a convolution reads and what it puts out, all at 4 bits.
    assert len(costs.tensors) == 21 + 3
    bits = {layer.name: (4, 4) for layer in costs.layers}
    peak = 150_528 * 8 + (802_816 + 200_704) * 4
    assert costs.activation_memory_bits(bits) == peak
    assert peak > 3 * 200_704 * 4
    # With conv1's reader at 2 bits and the rest at 8 the peak is elsewhere. Moment 7, the call of
    # layer2.0.downsample.0: it reads 64 x 56 x 56 at 8 bits and puts out 128 x 28 x 28 = 100,352 at
    # 8; what layer2.0.conv2 put out, as large, waits in float for their sum.
    bits = {layer.name: (8, 8) for layer in costs.layers} | {"layer1.0.conv1": (2, 2)}
    assert costs.activation_memory_bits(bits) == 200_704 * 8 + 100_352 * 8 + 100_352 * 32


CALLS = st.lists(
    st.tuples(st.sampled_from(Kind), st.lists(st.integers(0, 30), min_size=1, max_size=3), SIZES),
    max_size=20,
)


@given(sizes=st.lists(SIZES, min_size=1, max_size=2), calls=CALLS)
def test_in_any_network_what_a_layer_reads_and_puts_out_is_held_at_its_moment(sizes, calls):
    flow = Flow()
    for elements in sizes:
        flow.add_input(elements)
    values = len(sizes)
    moments = []
    for kind, chosen, elements in calls:
        inputs = [number % values for number in chosen][: 1 if kind is not Kind.MOVE else None]
        if kind is Kind.SAME:
            elements = flow.elements(inputs[0])
        layer = f"layer{len(moments)}" if kind is Kind.LAYER else None
        values = 1 + flow.add_call(kind, inputs, elements, layer)
        if layer is not None:
            moments.append((layer, elements))
    flow.set_outputs([values - 1])
    tensors = flow.tensors()
    last_moment = max(0, len(moments) - 1)
    assert all(0 <= tensor.first <= tensor.last <= last_moment for tensor in tensors)
    names = {layer for layer, _ in moments}
    assert {tensor.layer for tensor in tensors} <= names | {None}
    assert any(tensor.last == last_moment for tensor in tensors)
    for moment, (_, elements) in enumerate(moments):
        held = [tensor for tensor in tensors if tensor.first <= moment <= tensor.last]
        assert any(tensor.first == moment and tensor.elements == elements for tensor in held)
        assert len(held) >= 2  # what the layer reads, too
    for groups in (flow.shared_inputs(), flow.added_inputs()):
        assert all(len(set(group)) > 1 and set(group) <= names for group in groups)


def test_the_operands_of_an_addition_and_its_sum_belong_together():
    flow = Flow()
    image = flow.add_input(8)
    a = flow.add_call(Kind.LAYER, [image], 8, "a")
    b = flow.add_call(Kind.LAYER, [a], 8, "b")
    total = flow.add_call(Kind.SUM, [a, b], 8)
    shaped = flow.add_call(Kind.SAME, [flow.add_call(Kind.ELEMENTWISE, [total], 8)], 8)
    c = flow.add_call(Kind.LAYER, [shaped], 8, "c")
    flow.add_call(Kind.LAYER, [flow.add_call(Kind.SUM, [c], 8)], 8, "d")  # a constant is added
    assert flow.added_inputs() == (("b", "c"),)
