"""Statistics and biases that quantization moved, against a plain loop over the layers."""

import pytest
import torch
from networks import Attending
from torch import nn

from limpq_ext import (
    Policy,
    apply_policy,
    calibrate,
    prepare,
    profile,
    quantized_layers,
    select_bits,
)
from limpq_ext.training.correction import correct_statistics


def network(norms=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=not norms), nn.ReLU()]
    for width in (8, 8):
        norm = [nn.BatchNorm2d(8)] if norms else []
        layers += [nn.Conv2d(8, width, 3, bias=not norms), *norm, nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    model.train()
    for _ in range(20):
        model(2 * torch.randn(16, 3, 10, 10) + 1)
    return model.eval()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (2 * torch.randn(16, 3, 10, 10, generator=generator) + 1, torch.zeros(16, dtype=torch.long))
        for _ in range(count)
    ]


def quantized(model, bits=3):
    example = batches(1)[0][0]
    prepared = prepare(model, (bits,), example_input=example)
    names = list(quantized_layers(prepared))
    policy = Policy.uniform(names, bits, bits)
    result = apply_policy(model, policy, example_input=example)
    result.train()
    momenta = [m.momentum for m in result.modules() if isinstance(m, nn.BatchNorm2d)]
    for module in result.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    result(example)  # start values
    for module, momentum in zip(
        [m for m in result.modules() if isinstance(m, nn.BatchNorm2d)], momenta, strict=True
    ):
        module.momentum = momentum
    return result.eval()


def moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


@torch.no_grad()
def test_batch_norm_is_corrected_by_the_difference_layer_after_layer():
    reference = network()
    model = quantized(reference)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    correct_statistics(model, reference, batches())
    x = y = torch.cat([x for x, _ in batches()])
    norms = 0
    for name, module in reference.named_children():
        own = model.get_submodule(name)
        if isinstance(module, nn.BatchNorm2d):
            norms += 1
            (mean_f, var_f), (mean_q, var_q) = moments(x), moments(y)
            mean = before[f"{name}.running_mean"] + mean_q - mean_f
            torch.testing.assert_close(own.running_mean, mean)
            torch.testing.assert_close(
                own.running_var, before[f"{name}.running_var"] * var_q / var_f
            )
        x, y = module(x), own(y)
    assert norms == 2
    for name, value in model.state_dict().items():
        if "running" not in name and name not in ("9.bias",):
            assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_a_bias_takes_back_what_quantization_moves_the_mean_by():
    reference = network(norms=False)
    model = quantized(reference)
    correct_statistics(model, reference, batches())
    x = y = torch.cat([x for x, _ in batches()])
    for name, module in reference.named_children():
        own = model.get_submodule(name)
        x, y = module(x), own(y)
        if name in quantized_layers(model):
            axes = (0, 2, 3) if x.dim() == 4 else 0
            torch.testing.assert_close(y.mean(axes), x.mean(axes), atol=1e-5, rtol=1e-4)
    assert not any(torch.isnan(p).any() for p in model.parameters())


def test_the_outputs_come_closer_to_the_float_ones():
    reference = network()
    model = quantized(reference)
    x = batches(5)[-1][0]
    before = (model(x) - reference(x)).square().mean()
    correct_statistics(model, reference, batches())
    assert (model(x) - reference(x)).square().mean() < before


def test_of_a_prepared_model_the_selected_rows_are_corrected_and_no_others():
    reference = network()
    model = prepare(reference, (2, 4), example_input=batches(1)[0][0])
    calibrate(model, batches())
    select_bits(model, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    correct_statistics(model, reference, batches())
    for name, value in model.state_dict().items():
        if "running" in name:
            assert not torch.equal(value[0], before[name][0])
            assert torch.equal(value[1], before[name][1])
        else:
            assert torch.equal(value, before[name])


def test_modes_hooks_and_the_reference_stay_as_they_are():
    reference = network()
    model = quantized(reference)
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    reference.train()
    correct_statistics(model, reference, batches())
    assert [module.training for module in model.modules()] == modes
    assert all(module.training for module in reference.modules())
    for name, value in reference.state_dict().items():
        assert torch.equal(value, state[name])
    for module in (*model.modules(), *reference.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_module_that_runs_twice_stays_as_it_is():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.first(x)
            for _ in range(2):
                x = self.norm(self.conv(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    reference = Twice().eval()
    model = quantized(reference)
    before = model.norm.running_mean.clone()
    correct_statistics(model, reference, batches())
    assert torch.equal(model.norm.running_mean, before)


@torch.no_grad()
def test_the_projections_of_attention_have_biases_that_are_corrected():
    torch.manual_seed(0)
    reference = Attending().eval()
    x = torch.randn(16, 3, 8, 8)
    policy = Policy.uniform(profile(reference, x), 3, 3)
    model = apply_policy(reference, policy, example_input=x, scale_start="mse")
    before = model.first.in_proj.bias.clone()
    calibrate(model, [(x, None)], reference=reference)
    assert not torch.equal(model.first.in_proj.bias, before)


def test_without_batches_of_one_shape_or_with_another_network_it_is_an_error():
    model = quantized(network())
    with pytest.raises(ValueError, match="there are no batches to correct statistics with"):
        correct_statistics(model, network(), [])
    larger = (torch.zeros(16, 3, 12, 12), torch.zeros(16))
    with pytest.raises(
        ValueError, match=r"of \(16, 3, 10, 10\) and \(16, 3, 12, 12\), which cannot"
    ):
        correct_statistics(model, network(), [*batches(1), larger])
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(512, 5))
    with pytest.raises(ValueError, match="the reference has no module '3': it is another network"):
        correct_statistics(model, other, batches())
