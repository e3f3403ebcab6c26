"""What the branches of a joint step share: found where it can be proven, and only there."""

import copy
import math

import pytest
import torch
from networks import Depthwise, NoNorm, PreActivation, Shared
from torch import nn
from torch.nn import functional as F

from limpq_ext import JointTrainer, prepare, quantized_layers
from limpq_ext.joint.sharing import BranchGraph, UntraceableError
from limpq_ext.nn.named import CifarResNet

BITS = (2, 4)


def image(batch=4):
    torch.manual_seed(0)
    return torch.randn(batch, 3, 8, 8)


def prepared(model):
    return prepare(model, BITS, example_input=image()).train()


class Net(nn.Module):
    """A stem that a test chooses, then two searchable layers."""

    def __init__(self, stem=None, between=None):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.stem = stem or nn.Identity()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.between = between or F.relu
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(self.first(x))
        x = self.conv2(self.between(self.conv1(x)))
        return self.head(F.relu(x).mean((2, 3)))


def stem_modules(graph):
    return [node.target for node in graph.stem.graph.nodes if node.op == "call_module"]


def test_the_stem_is_what_comes_before_the_first_searchable_layer():
    graph = BranchGraph(prepared(CifarResNet(3, num_classes=5, width=4)), image())
    assert stem_modules(graph) == ["conv1", "bn1", "relu"]
    assert graph.reason == ""
    assert "conv1" not in dict(graph.rest.named_modules())


def test_a_model_whose_first_layer_is_searchable_has_no_stem():
    model = prepare(NoNorm(), BITS, example_input=image(), fixed=["head"]).train()
    graph = BranchGraph(model, image())
    assert graph.stem is None
    assert graph.reason == ""


def test_stem_and_rest_compute_what_the_model_does():
    for network in (Depthwise(), NoNorm(), Shared(), PreActivation()):
        model = prepared(network)
        graph = BranchGraph(model, image())
        assert graph.stem is not None
        assert torch.equal(graph.rest(*graph.forward_stem(image(), 1)), model(image()))


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_the_stems_running_statistics_count_every_branch(momentum):
    model = prepared(Net(nn.BatchNorm2d(4, momentum=momentum))).double()
    x = image().double()
    twin = copy.deepcopy(model)
    graph = BranchGraph(model, x)
    assert stem_modules(graph) == ["first", "stem"]
    for _ in range(2):
        graph.forward_stem(x, 3)
        for _ in range(3):
            twin(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            getattr(model.stem, name), getattr(twin.stem, name), rtol=1e-12, atol=0
        )
    assert model.stem.momentum == momentum


def test_a_frozen_batch_norm_in_the_stem_keeps_its_statistics():
    model = prepared(Net(nn.BatchNorm2d(4)))
    model.stem.eval()
    before = copy.deepcopy(model.stem.state_dict())
    graph = BranchGraph(model, image())
    graph.forward_stem(image(), 3)
    assert all(torch.equal(before[name], value) for name, value in model.stem.state_dict().items())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x


class InPlaceAdd(nn.Module):
    """Adds a branch's own values to the shared ones in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.first(x) * 1
        x.add_(self.conv1(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Net(nn.Dropout(0.5)), "it draws random numbers"),
        (Net(Counting()), "it changes the buffer 'stem.calls'"),
        (InPlaceAdd(), "'add_' changes the shared value 'mul' in place"),
    ],
    ids=["dropout", "buffer", "in_place"],
)
def test_a_stem_that_may_differ_by_branch_is_not_shared(model, reason):
    model = prepared(model)
    before = copy.deepcopy(model.state_dict())
    graph = BranchGraph(model, image())
    assert graph.stem is None
    assert graph.reason == reason
    scales = ("scale", "initialized", "signed_range")  # the activations' start values
    after = {n: v for n, v in model.state_dict().items() if not n.endswith(scales)}
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_batch_norm_that_stem_and_rest_use_is_not_in_the_stem():
    norm = nn.BatchNorm2d(4)
    model = prepared(Net(norm, between=norm))
    graph = BranchGraph(model, image())
    assert stem_modules(graph) == ["first"]


class Sometimes(nn.Module):
    def forward(self, x):
        return x if x.shape[-1] > 4 else -x


class Remembering(nn.Module):
    """Computes something else every time, with a state that no graph shows."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class WithState(Net):
    def __init__(self):
        super().__init__()
        self.remembering = Remembering()

    def forward(self, x):
        # Behind the layers, which may put out nothing but zeros.
        return super().forward(x) + self.remembering(x).sum()


class Optional(Net):
    """A forward with arguments that its caller may leave out."""

    def forward(self, x, mask=None, *, scales=(1.0, 2.0), flip: bool = False):
        if mask is not None:
            x = x + mask
        x = super().forward(x * scales[0])
        return -x if flip else x


def test_arguments_that_a_forward_does_not_need_have_their_defaults_in_its_graph():
    model = prepared(Optional())
    x = image()
    graph = BranchGraph(model, x)
    assert stem_modules(graph) == ["first", "stem"]
    assert torch.equal(graph.rest(*graph.forward_stem(x, 1)), model(x))


class NoTensor(nn.Module):
    """Its graph, which is made of no tensors, calls a method that tensors have not."""

    def forward(self, x):
        return x if isinstance(x, torch.Tensor) else x.decoded()


def hooked():
    model = Net()
    model.conv1.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(Sometimes()), "torch.fx cannot follow Net.forward"),
        (WithState(), "WithState.forward computes other values than its torch.fx graph"),
        (hooked(), "module 'conv1' has hooks"),
        (Net(NoTensor()), "torch.fx cannot follow Net.forward: AttributeError: .*decoded"),
    ],
    ids=["control_flow", "hidden_state", "hooks", "wrong_graph"],
)
def test_a_model_that_no_graph_describes_runs_as_it_is_and_says_so(model, message):
    model = prepared(model)
    with pytest.raises(UntraceableError, match=message):
        BranchGraph(model, image())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = JointTrainer(model, optimizer, F.cross_entropy)
    with pytest.warns(UserWarning, match=f"computed in every branch: .*{message}"):
        trainer.step(image(), torch.zeros(4, dtype=torch.long))


def ceilings(model):
    return {name: layer.input_quantizer.relu_max for name, layer in quantized_layers(model).items()}


@pytest.mark.parametrize(
    ("relu", "relu_max"),
    [
        (F.relu, math.inf),
        (nn.ReLU(), math.inf),
        (nn.ReLU(inplace=True), math.inf),
        (torch.relu, math.inf),
        (lambda x: x.relu(), math.inf),
        (F.relu6, 6.0),
        (nn.ReLU6(), 6.0),
        (nn.ReLU6(inplace=True), 6.0),
        (nn.Hardtanh(0, 0.5), 0.5),
        (lambda x: F.hardtanh(x, 0.0, 0.5), 0.5),
        (lambda x: F.hardtanh(x, min_val=0), 1.0),
        (lambda x: F.hardtanh(x, max_val=2, min_val=0, inplace=True), 2.0),
    ],
)
def test_a_relu_that_feeds_only_a_quantizer_is_dropped(relu, relu_max):
    model = prepared(Net(between=relu))
    before = model(image())
    graph = BranchGraph(model, image())
    assert graph.dropped_relus == 1
    assert ceilings(model) == {"conv1": None, "conv2": relu_max}
    assert torch.equal(graph.rest(*graph.forward_stem(image(), 1)), before)
    names = [node.name for node in graph.rest.graph.nodes]
    assert len([name for name in names if "relu" in name]) == 1  # the one in front of the head
    assert not [name for name in names if "hardtanh" in name or "between" in name]


OTHER_FUNCTIONS = {
    "hardswish": F.hardswish,
    "relu read twice": lambda x: F.relu(x) + x,
    "relu6 read twice": lambda x: F.relu6(x) + x,
    "relu6 in place of a value read twice": lambda x: F.relu6(y := x + 1, inplace=True) + y,
    "hardtanh from -1": nn.Hardtanh(),
    "hardtanh from above 0": nn.Hardtanh(0.5, 6.0),
    "hardtanh to what half precision rounds": nn.Hardtanh(0.0, 6.1),
    "a clamp, whose gradient passes at the bounds": lambda x: torch.clamp(x, 0, 6),
}


@pytest.mark.parametrize("between", OTHER_FUNCTIONS.values(), ids=OTHER_FUNCTIONS)
def test_other_functions_and_relus_that_others_read_stay(between):
    model = prepared(Net(between=between))
    assert BranchGraph(model, image()).dropped_relus == 0
    assert ceilings(model) == {"conv1": None, "conv2": None}


def test_a_relu_in_front_of_a_signed_quantizer_stays():
    model = prepared(Net())
    quantizer = quantized_layers(model)["conv2"].input_quantizer
    with torch.no_grad():
        quantizer(torch.tensor([-1.0, 1.0]))
    assert quantizer.signed
    assert BranchGraph(model, image()).dropped_relus == 0


class Twice(nn.Module):
    """One layer called with a ReLU in front and with something else."""

    def __init__(self, again):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.again = again

    def forward(self, x):
        x = self.conv(F.relu(self.first(x)))
        x = self.conv(self.again(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("again", "dropped"), [(F.relu, 2), (nn.Identity(), 0), (F.relu6, 0)])
def test_a_layer_that_is_called_twice_takes_over_the_same_relu_or_none(again, dropped):
    model = prepared(Twice(again))
    assert BranchGraph(model, image()).dropped_relus == dropped


@pytest.mark.parametrize("relu", [F.relu, nn.Hardtanh(0.0, 0.5)])
def test_the_model_gives_the_same_values_after_its_relus_were_taken_over(relu):
    model = prepared(Net(between=relu))
    before = model(image())
    BranchGraph(model, image())
    assert torch.equal(model(image()), before)
