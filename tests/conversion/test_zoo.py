"""Real networks go through every stage."""

import warnings

import pytest
import torch

pytest.importorskip("torchvision")

from torch.nn import functional as F
from zoo import TIMM, TINY, TORCHVISION, small_model

import limpq_ext as lq
from limpq_ext.app.weights import load_weights, save_weights

FAST = [*TINY, "resnet18", "mobilenet_v2", "beit_base_patch16_224"]

# What cannot be prepared, and why. At most three.
REFUSED: dict[str, str] = {}


def test_at_most_three_are_refused():
    assert len(REFUSED) <= 3
    assert len(TORCHVISION) >= 80
    assert len(TIMM) >= 15


@pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in (*TINY, *TORCHVISION, *TIMM)
    ],
)
def test_a_network_goes_through_every_stage(name, tmp_path):
    model, x, bits = small_model(name)
    target = torch.arange(len(x))
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            lq.prepare(model, bits, example_input=x)
        return
    prepared = lq.prepare(model, bits, example_input=x)
    # A bank of the largest networks would need more memory than a small machine has.
    bank = sum(p.numel() for p in model.parameters()) < 100e6
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    trainer = lq.JointTrainer(prepared, optimizer, F.cross_entropy, weight_bank=bank)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the stem is computed in every branch")
        step = trainer.step(x, target)
    assert all(loss.isfinite() for loss in step.losses.values())
    for layer in lq.quantized_layers(prepared).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            grad = quantizer.scale.grad
            assert grad is not None, quantizer.name
            assert grad.isfinite().all(), quantizer.name
            assert grad.count_nonzero() == grad.numel(), quantizer.name
    indicators = trainer.indicators()
    del prepared, optimizer, trainer

    costs = lq.profile(model, x)
    assert {layer.name for layer in indicators.layers} == {layer.name for layer in costs.layers}
    policy = lq.search(indicators, costs, bitops=lq.uniform(sum(bits) // 2, sum(bits) // 2))

    quantized = lq.apply_policy(model, policy).train()
    layers = lq.quantized_layers(quantized)
    assert {n: (m.weight_bits, m.activation_bits) for n, m in layers.items()} == {
        **policy.bits(),
        **{layer.name: (8, 8) for layer in costs.fixed},
    }
    optimizer = torch.optim.SGD(quantized.parameters(), lr=1e-3)
    loss = F.cross_entropy(quantized(x), target)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()

    path = tmp_path / "weights.safetensors"
    save_weights(quantized, path)
    again = lq.apply_policy(model, policy)
    load_weights(again, path)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), quantized.eval()(x))
