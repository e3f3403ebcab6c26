import pytest
import torch
from networks import Depthwise
from torch import nn

from limpq_ext import Indicators, Policy, apply_policy, calibrate, prepare, reestimate_batch_norm
from limpq_ext.layers import quantize_layer


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
