"""What every score keeps to: the model stays as it is, what cannot be used is refused by name."""

import copy
import operator

import pytest
import torch
from small_classifiers import LAYERS, classifier, image_batches
from torch import nn

import limpq_ext as lq

BITS = (2, 4)
OF_CLASSES = [
    lq.scores.loss_aware,
    lq.scores.fisher,
    lq.scores.gradient,
    lq.scores.hessian,
    lq.scores.lampq,
]
OF_ANY = [lq.scores.activation_variance, lq.scores.weight_error]
WITHOUT_TARGETS = [lq.scores.layerwise, lq.scores.relevance, lq.scores.relevance_sensitivity]
SCORES = [*OF_CLASSES, *OF_ANY, *WITHOUT_TARGETS]


def state(model):
    """All that a score could leave changed."""
    return {
        "tensors": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": [
            (list(module._forward_hooks), list(module._forward_pre_hooks))
            for module in model.modules()
        ],
        "classes": [type(module) for module in model.modules()],
    }


def assert_same(found, expected):
    tensors, others = found.pop("tensors"), expected.pop("tensors")
    assert found == expected
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name])


def half_frozen(network):
    model = classifier(network).float()
    model.norm.train()
    model.head.requires_grad_(False)
    return model, [(x.float(), target) for x, target in image_batches()]


@pytest.mark.parametrize("network", LAYERS)
@pytest.mark.parametrize("score", SCORES)
def test_the_model_stays_as_it_is_and_scores_fall_with_bits(score, network):
    model, data = half_frozen(network)
    before = state(model)
    found = score(model, data, (2, 4, 8))
    assert_same(state(model), before)
    assert tuple(layer.name for layer in found.layers) == LAYERS[network]
    assert found.meta.items() >= {"score": score.__name__, "batches": 2}.items()
    # The trace of a Hessian can be below 0, which counts as 0.
    above = operator.ge if score is lq.scores.hessian else operator.gt
    for layer in found.layers:
        for values in (layer.weight, layer.activation):
            assert above(values[2], values[8])


@pytest.mark.parametrize("score", SCORES)
def test_the_model_stays_as_it_is_when_a_score_is_interrupted(score, monkeypatch):
    model, data = half_frozen("convolutions")
    before = state(model)
    forward, calls, most = type(model).forward, [], [10**6]

    def counting(self, x):
        calls.append(len(x))
        if len(calls) == most[0]:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(type(model), "forward", counting)
    score(model, data, BITS)
    most[0] = len(calls)  # in its last forward the score is in the middle of its work
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        score(model, data, BITS)
    assert_same(state(model), before)


@pytest.mark.parametrize("score", SCORES)
def test_frozen_parameters_and_no_grad_around_do_not_matter(score):
    model, data = classifier(), image_batches()
    expected = score(model, data, BITS)
    model.requires_grad_(False)
    with torch.no_grad():
        assert score(model, data, BITS) == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("score", SCORES)
def test_a_search_takes_a_score_from_its_file(score, tmp_path):
    model, data = classifier(), image_batches()
    found = score(model, data, BITS)
    found.save(tmp_path / "indicators.json")
    loaded = lq.Indicators.load(tmp_path / "indicators.json")
    assert loaded == found
    costs = lq.profile(model, data[0][0])
    policy = lq.search(loaded, costs, bitops=lq.uniform(3, 3), non_monotone="keep")
    assert set(policy.bits()) == {"first", *LAYERS["convolutions"], "head"}


@pytest.mark.parametrize("score", SCORES)
def test_options_of_prepare_are_taken(score):
    model, data = classifier(), image_batches()
    options = {"fixed": ["head"], "exclude": ["hidden"], "per_channel_weights": True}
    found = score(model, iter(data), BITS, **options)
    assert [layer.name for layer in found.layers] == ["first", "conv", "depthwise", "biased"]
    with pytest.raises(ValueError, match="scale_start is 'lsq', which needs a training"):
        score(model, data, BITS, scale_start="lsq")


@pytest.mark.parametrize("score", SCORES)
def test_inputs_by_keyword_are_taken(score):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = classifier()

        def forward(self, image):
            return self.inside(image)

    data = image_batches()
    named = score(Named(), [({"image": x}, target) for x, target in data], BITS)
    expected = score(classifier(), data, BITS)
    for one, other in zip(named.layers, expected.layers, strict=True):
        assert one.name == f"inside.{other.name}"
        assert (one.weight, one.activation) == (other.weight, other.activation)


@pytest.mark.parametrize("score", SCORES)
def test_no_batches_are_refused(score):
    with pytest.raises(ValueError, match="there are no batches to measure scores on"):
        score(classifier(), [], BITS)


@pytest.mark.parametrize("score", OF_CLASSES)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda t: t.double(), r"the targets are \(5,\), expected a class index for each sample"),
        (lambda t: t[:3], r"the targets are \(3,\), expected a class index for each sample"),
        (lambda t: None, "the targets are NoneType, expected a class index for each sample"),
        (lambda t: t + 4, "a target is not one of the 4 classes"),
    ],
)
def test_targets_that_are_no_classes_are_refused(score, target, message):
    with pytest.raises(ValueError, match=message):
        score(classifier(), [(x, target(t)) for x, t in image_batches()], BITS)


@pytest.mark.parametrize("score", OF_CLASSES)
def test_one_class_and_an_output_that_is_no_table_are_refused(score):
    model = classifier()
    model.head = nn.Linear(6, 1).double()
    with pytest.raises(ValueError, match=r"the model puts out \(5, 1\), expected scores"):
        score(model, image_batches(), BITS)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)).double()
    with pytest.raises(ValueError, match=r"the model puts out \(5, 4, 6, 6\), expected scores"):
        score(model, image_batches(), BITS)


@pytest.mark.parametrize("score", OF_ANY)
def test_statistics_need_neither_targets_nor_a_classifier(score):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)).double()
    found = score(model, [(x, None) for x, _ in image_batches()], BITS)
    assert found.layers[0].weight[2] > found.layers[0].weight[4] > 0


@pytest.mark.parametrize("score", SCORES)
def test_what_is_not_finite_is_refused_by_the_name_of_its_layer(score):
    model, data = classifier(), image_batches()
    with pytest.raises(ValueError, match="layer 'conv': input quantizer: a batch has a NaN"):
        score(model, [(x * torch.nan, target) for x, target in data], BITS)
    with torch.no_grad():
        model.biased.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"layer 'biased'|layer 'hidden'"):
        score(model, data, BITS)


@pytest.mark.parametrize("score", OF_CLASSES)
def test_a_gradient_that_is_not_finite_is_refused_by_the_name_of_its_layer(score):
    class Root(nn.Module):
        """The square root of 0 has no gradient, and what reaches it has 0 times infinity."""

        def __init__(self):
            super().__init__()
            self.first, self.middle, self.head = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            return self.head((self.middle(self.first(x)) * 0).sqrt())

    data = [(torch.randn(4, 3), torch.arange(4) % 3)]
    with pytest.raises(ValueError, match=r"layer 'middle': \w+ indicator at 2 bits is nan"):
        score(Root(), data, BITS)
