import pytest
import torch

pytest.importorskip("torchvision")

from networks import (
    Attending,
    NoNorm,
    PaddedConv2d,
    PreActivation,
    StandardizedConv2d,
    Upsampling,
)
from torch import nn
from torch.nn import functional as F

from limpq_ext import Policy, apply_policy, prepare, profile, quantized_layers
from limpq_ext.graph.trace import trace

IMAGE = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "weights"),
    [
        (nn.Conv1d(4, 6, 3, stride=2), (4, 11), 6 * 5 * 4 * 3, 72),
        (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 5), 6 * 35 * 4 * 9, 216),
        (nn.Conv2d(4, 8, 3, groups=2), (4, 7, 5), 8 * 15 * 2 * 9, 144),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (4, 7, 9), 4 * 15 * 9, 36),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 7, 5), 6 * 12 * 4 * 9, 216),
        (nn.Conv3d(2, 3, (1, 2, 3)), (2, 4, 4, 4), 3 * 4 * 3 * 2 * 2 * 6, 36),
        (nn.Linear(5, 7), (5,), 35, 35),
        (nn.Linear(5, 7), (3, 5), 3 * 35, 35),
    ],
)
def test_macs_and_counts_of_one_layer(layer, shape, macs, weights):
    found = trace(nn.Sequential(layer), torch.zeros(2, *shape)).layers
    assert [(x.name, x.macs, x.weights) for x in found] == [("0", macs, weights)]
    assert found[0].activations == torch.zeros(shape).numel()
    assert found[0].kind == type(layer).__name__.lower()


def test_sources_of_batch_norms_are_followed_through_sums_and_pooling():
    assert trace(PreActivation(), IMAGE).norm_sources == {
        "bn1": "first",
        "bn2": "conv1",
        "bn3": "conv2",
    }


def test_layers_that_do_not_run_are_named():
    model = NoNorm()
    model.auxiliary = nn.Linear(3, 3)
    assert trace(model, IMAGE).unused == ("auxiliary",)


def test_a_subclass_that_uses_its_weight_as_it_is_is_traced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), PaddedConv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    assert [layer.name for layer in trace(model, IMAGE).layers] == ["0", "1", "2"]


class OwnProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(8, 8))

    def forward(self, x):
        return x @ self.matrix


class OwnAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x.flatten(1).unsqueeze(1))[0]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Recurrent(8, 8), r"'1' \(Recurrent\): it computes all its steps"),
        (OwnAttention(8, 2), r"'1' \(OwnAttention\): it changes nn\.MultiheadAttention\.forward"),
        (nn.Bilinear(8, 8, 8), r"'1' \(Bilinear\): a product of two inputs"),
        (StandardizedConv2d(4, 4, 1), r"'1' \(StandardizedConv2d\): it changes its weight"),
        (OwnProduct(), r"'1' \(OwnProduct\): it multiplies by '1\.matrix', where no quantizer"),
    ],
)
def test_what_cannot_be_quantized_truly_is_refused_by_name(module, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module, nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match="cannot quantize " + message):
        trace(model, IMAGE)


def test_what_is_excluded_is_neither_refused_nor_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OwnProduct(), StandardizedConv2d(4, 4, 1))
    assert [layer.name for layer in trace(model, IMAGE, exclude=["1", "2"]).layers] == ["0"]


def test_an_unknown_name_to_exclude_is_an_error():
    with pytest.raises(ValueError, match="exclude: the model has no module 'heads'"):
        trace(NoNorm(), IMAGE, exclude=["heads"])


def test_a_forward_that_needs_values_is_an_error_that_says_so():
    class DataDependent(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"cannot follow DataDependent\.forward"):
        trace(DataDependent(), IMAGE)


def test_an_empty_example_is_an_error():
    with pytest.raises(ValueError, match=r"example_input has shape \(0, 3, 8, 8\)"):
        trace(NoNorm(), torch.zeros(0, 3, 8, 8))


def test_a_lazy_layer_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="run the model on one batch first"):
        trace(nn.Sequential(nn.LazyConv2d(3, 3)), IMAGE)


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return self.c(F.relu(self.a(x) + self.b(y)))

    found = trace(Two(), (torch.zeros(2, 3), torch.zeros(2, 5)))
    assert [layer.macs for layer in found.layers] == [12, 20, 8]


def test_nothing_of_a_trace_stays_in_a_model_that_keeps_what_it_computes():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
            self.bias = nn.Parameter(torch.ones(3))
            self.cache = {}

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias * 2
            return self.last(self.first(x) + self.cache["bias"])

    model = Caching().eval()
    trace(model, torch.zeros(1, 3))
    assert model.cache == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_called_by_keyword_is_traced():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.last(input=self.first(input=x))

    assert [x.activations for x in trace(ByKeyword(), torch.zeros(1, 3)).layers] == [3, 4]


def test_the_norm_after_a_transposed_convolution_follows_its_bits():
    assert trace(Upsampling(), IMAGE).norm_sources == {"bn": "up1"}


@pytest.mark.parametrize("model", [Attending(), Upsampling()])
def test_a_prepared_model_has_the_layers_that_were_profiled(model):
    costs = profile(model, IMAGE)
    prepared = prepare(model, (2, 4), example_input=IMAGE)
    assert {layer.name for layer in costs.layers} == set(quantized_layers(prepared))
    names = dict(prepared.named_modules())
    assert {layer.name for layer in costs.fixed} < set(names)
    policy = Policy.uniform(costs, 4, 4)
    assert set(quantized_layers(apply_policy(model, policy))) == set(policy.bits())


def test_what_a_module_keeps_beside_parameters_is_followed_or_named():
    kept = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    kept.table = kept[0].weight * 2  # as the former torch.nn.utils.weight_norm keeps a weight
    assert len(profile(kept, torch.zeros(1, 3)).layers) == 1
    kept.cache = {"table": kept[0].weight * 3}
    with pytest.raises(ValueError, match="cannot copy Sequential: Only Tensors created explicitly"):
        profile(kept, torch.zeros(1, 3))
