import pytest
import torch
from networks import Depthwise
from torch import nn

from limpq_ext import (
    Indicators,
    Policy,
    apply_policy,
    calibrate,
    prepare,
    quantized_layers,
    reestimate_batch_norm,
    select_bits,
)
from limpq_ext.nn.layers import quantize_layer
from limpq_ext.nn.start_values import Histogram, start_scales
from limpq_ext.training.correction import correct_statistics


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.zeros(4)) for _ in range(count)]


def test_a_calibrated_policy_has_scales_and_statistics_of_the_batches():
    torch.manual_seed(0)
    policy = Policy.uniform(["expand", "depthwise", "project"], 4, 4, fixed=["stem.0", "head"])
    model = apply_policy(Depthwise(), policy).eval()
    weights = model.expand.weight.detach().clone()
    calibrate(model, iter(images(3)))
    assert not model.training
    assert torch.equal(model.expand.weight, weights)
    assert model.expand.input_quantizer.initialized.all()
    twin = apply_policy(Depthwise(), policy)
    twin.load_state_dict(model.state_dict())
    reestimate_batch_norm(twin, images(3))
    assert torch.equal(twin.bn2.running_var, model.bn2.running_var)
    assert int(model.bn2.num_batches_tracked) == 3


def test_a_calibrated_prepared_model_has_indicators_that_fall_with_bits():
    torch.manual_seed(0)
    model = prepare(Depthwise(), (2, 4, 6), example_input=images(1)[0][0])
    calibrate(model, images(1))
    found = Indicators.from_model(model, {"calibrated": 1})
    assert found.bits == (2, 4, 6)
    for layer in found.layers:
        assert layer.weight[2] > layer.weight[4] > layer.weight[6]
        assert layer.activation[2] > layer.activation[4] > layer.activation[6]


@pytest.mark.parametrize("rule", ["mse", "max", "percentile"])
def test_scales_of_other_rules_begin_from_all_batches_run_in_float(rule):
    torch.manual_seed(0)
    reference = Depthwise().eval()
    batches = images(3)
    model = prepare(
        reference, (2, 4), example_input=batches[0][0], fixed=["head"], scale_start=rule
    )
    calibrate(model, iter(batches))
    histogram = Histogram()
    reference.stem[0].register_forward_pre_hook(lambda _, inputs: histogram.add(inputs[0]))
    for x, _ in batches:
        reference(x)
    quantizer = model.stem[0].input_quantizer
    found = histogram.distribution()
    for scale, levels in zip(quantizer.scale.tolist(), ((-2, 1), (-8, 7)), strict=True):
        assert scale == pytest.approx(float(start_scales(found, rule, *levels)), rel=1e-6)
    for layer in quantized_layers(model).values():
        assert layer.input_quantizer.initialized.all()
        assert layer.input_quantizer.observe is None
    assert all(not module.training for module in model.modules())


def test_what_was_started_before_keeps_its_scales():
    model = prepare(Depthwise(), (2, 4), example_input=images(1)[0][0], scale_start="mse")
    calibrate(model, images(1))
    before = {name: value.clone() for name, value in model.state_dict().items() if "scale" in name}
    calibrate(model, images(2, seed=5))
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("bits", [(3,), (2, 4)])
def test_with_a_reference_statistics_are_corrected_at_every_bit_width(bits):
    torch.manual_seed(0)
    reference = Depthwise().eval()
    batches = images(2)
    model = prepare(reference, bits, example_input=batches[0][0], scale_start="mse")
    calibrate(model, batches, reference=reference)
    twin = prepare(reference, bits, example_input=batches[0][0], scale_start="mse")
    twin.load_state_dict(
        {
            name: reference.state_dict().get(name, value).expand(value.shape)
            if "running" in name or "bias" in name
            else value
            for name, value in model.state_dict().items()
        }
    )
    for width in bits:
        select_bits(twin, width)
        correct_statistics(twin, reference, batches)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_names_the_layer(bad):
    batches = images(2)
    batches[1][0][0, 0, 0, 0] = bad
    model = prepare(
        Depthwise(), (2, 4), example_input=batches[0][0], fixed=["head"], scale_start="mse"
    )
    with pytest.raises(
        ValueError, match=r"layer 'stem\.0': input quantizer: a batch has a NaN or an"
    ):
        calibrate(model, batches)
    assert all(layer.input_quantizer.observe is None for layer in quantized_layers(model).values())


def test_there_has_to_be_something_to_calibrate():
    with pytest.raises(ValueError, match="Linear has no quantized layers"):
        calibrate(nn.Linear(2, 2), images(1))
    with pytest.raises(ValueError, match="no batches to calibrate with"):
        calibrate(nn.Sequential(quantize_layer(nn.Linear(2, 2), (4,), (4,))), [])
    with pytest.raises(ValueError, match="no candidate bits"):
        Indicators.from_model(nn.Linear(2, 2))


def test_batch_norm_statistics_become_the_means_over_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3)).eval()
    batches = [(torch.randn(6, 3), torch.zeros(6)) for _ in range(4)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model[1].running_mean.fill_(99)
    reestimate_batch_norm(model, iter(batches))
    with torch.no_grad():
        inputs = [model[0](x) for x, _ in batches]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0)
    )
    torch.testing.assert_close(
        model[1].running_var, torch.stack([x.var(0) for x in inputs]).mean(0)
    )
    assert model[1].momentum == 0.3
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="no batches"):
        reestimate_batch_norm(model, [])
    reestimate_batch_norm(nn.Linear(3, 4), [])


def prepared_network():
    torch.manual_seed(0)
    model = prepare(Depthwise(), (2, 4, 6), example_input=images(1)[0][0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    return model


def statistics(model):
    return {
        name: value.clone()
        for name, value in model.named_buffers()
        if not name.endswith(("initialized", "signed_range"))
    }


def test_calibration_of_a_prepared_model_changes_scales_alone():
    model = prepared_network()
    select_bits(model, {"expand": (2, 6), "depthwise": (6, 4), "project": (4, 2)})
    before = statistics(model)
    weights = {name: p.clone() for name, p in model.named_parameters() if "quantizer" not in name}
    calibrate(model, images(2))
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in weights.items())
    layers = quantized_layers(model)
    chosen = {name: (layer.weight_bits, layer.activation_bits) for name, layer in layers.items()}
    assert chosen == {"expand": (2, 6), "depthwise": (6, 4), "project": (4, 2)}
    assert [model.bn1.bits[model.bn1._row], model.bn2.bits[model.bn2._row]] == [2, 6]


def test_batch_norm_of_a_prepared_model_is_estimated_at_the_selected_bits_alone():
    model = prepared_network()
    calibrate(model, images(1))
    select_bits(model, 4)
    before = statistics(model)
    reestimate_batch_norm(model, images(3))
    place = model.bn1.bits.index(4)
    others = [row for row in range(3) if row != place]
    for name, value in statistics(model).items():
        if name.startswith(("bn1.", "bn2.")):
            assert torch.equal(value[others], before[name][others]), name
            assert not torch.equal(value[place], before[name][place]), name
    assert model.bn1.num_batches_tracked.tolist() == [0, 3, 0]
    model.stem.train()  # as in the estimate: by the statistics of each batch
    with torch.no_grad():
        inputs = [model.expand(model.activation(model.stem(x))) for x, _ in images(3)]
    means = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean[place], means)


def frozen_network():
    """A quantized network that trains, but for one batch normalisation."""
    policy = Policy.uniform(["expand", "depthwise", "project"], 4, 4, fixed=["stem.0", "head"])
    model = apply_policy(Depthwise(), policy).train()
    model.bn1.eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("function", [calibrate, reestimate_batch_norm])
def test_a_frozen_batch_norm_keeps_its_mode_and_statistics(function):
    model = frozen_network()
    nn.init.normal_(model.bn1.running_mean)
    calibrate(model, images(1))
    before, mean = modes(model), model.bn1.running_mean.clone()
    other = model.bn2.running_mean.clone()
    function(model, images(2, seed=3))
    assert modes(model) == before
    assert torch.equal(model.bn1.running_mean, mean)
    assert not torch.equal(model.bn2.running_mean, other)


@pytest.mark.parametrize("function", [calibrate, reestimate_batch_norm])
def test_modes_and_momenta_are_put_back_where_something_raises(function):
    model = frozen_network().eval()
    model.stem.train()
    model.bn2.momentum = 0.3
    before = modes(model)
    wrong = [*images(1), (torch.zeros(4, 7, 8, 8), torch.zeros(4))]
    with pytest.raises(RuntimeError, match="channels"):
        function(model, wrong)
    assert modes(model) == before
    assert model.bn2.momentum == 0.3


def test_a_selection_is_put_back_where_calibration_raises():
    model = prepared_network()
    select_bits(model, 2)
    with pytest.raises(RuntimeError, match="channels"):
        calibrate(model, [(torch.zeros(4, 7, 8, 8), torch.zeros(4))])
    assert model.expand.weight_bits == model.expand.activation_bits == 2
