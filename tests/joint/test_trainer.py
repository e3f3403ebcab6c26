import copy

import pytest
import torch
import torch._dynamo.testing
from eager import EagerNorms, EagerQuantizer, eager_select, eager_twin, start_activations
from networks import Attending, Depthwise, NoNorm, PreActivation, Shared, Upsampling
from torch import nn
from torch.nn import functional as F

from limpq_ext import Indicators, JointTrainer, prepare, quantized_layers
from limpq_ext.nn.batch_norm import SwitchableBatchNorm
from limpq_ext.nn.named import CifarResNet
from limpq_ext.values.reading import FileFormatError

BITS = (2, 4, 6)


def resnet():
    pytest.importorskip("torchvision")
    return CifarResNet(1, num_classes=5, width=4)


def torchvision_model(name, **options):
    torchvision = pytest.importorskip("torchvision")
    return getattr(torchvision.models, name)(num_classes=5, **options)


NETWORKS = {
    "resnet": resnet,
    "resnet18": lambda: torchvision_model("resnet18"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2", dropout=0.0),
    "depthwise": Depthwise,
    "low_ceiling": lambda: Depthwise(nn.Hardtanh(0.0, 0.5)),  # half of what is positive is above
    "no_norm": NoNorm,
    "shared": Shared,
    "pre_activation": PreActivation,
    "upsampling": Upsampling,
    "attending": Attending,
}


def problem(network="depthwise", dtype=torch.float32, batch=4):
    torch.manual_seed(0)
    model = NETWORKS[network]().to(dtype)
    size = 32 if network in ("resnet18", "mobilenet_v2") else 8
    x = torch.randn(batch, 3, size, size, dtype=dtype)
    target = torch.randint(0, 5, (batch,))
    return model, x, target


def trainer_of(model, x, lr=0.01, trainer=JointTrainer, per_channel=False, **options):
    # At the least squared error a weight of resnet18 lies exactly at the end of the range, where
    # the gradient hangs on the last bit.
    prepared = prepare(
        model, BITS, example_input=x, per_channel_weights=per_channel, scale_start="lsq"
    )
    prepared = prepared.to(x.dtype)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=lr)
    return trainer(prepared, optimizer, F.cross_entropy, **options)


def plain_loop(twin, draw, x, target, distill=False):
    """The n + 1 passes of a joint step over the eager model; gradients add up in .grad."""
    names = list(quantized_layers(twin))
    branches = [dict.fromkeys(names, bits) for bits in sorted(BITS, reverse=True)]
    teacher = None
    for bits in [*branches, draw]:
        eager_select(twin, bits)
        scores = twin(x)
        if teacher is None:
            loss = F.cross_entropy(scores, target)
            teacher = scores.detach().softmax(1) if distill else None
        else:
            loss = -(teacher * scores.log_softmax(1)).sum(1).mean()
        loss.backward()


class RandomBranchByTensor(JointTrainer):
    """What a CUDA graph captures: a tensor on the device says what the random branch draws."""

    def _run_branches(self, x, target, draw, *, by_tensor=False):
        self._runner.set_selection(draw)
        return super()._run_branches(x, target, draw, by_tensor=self.steps > 0)


NOTHING_SHARED = {"weight_bank": False, "share_stem": False, "drop_relu": False}
EXECUTIONS = {
    "everything shared": {},
    "nothing shared": NOTHING_SHARED,
    "weight bank": NOTHING_SHARED | {"weight_bank": True},
    "stem": NOTHING_SHARED | {"share_stem": True},
    "relu": NOTHING_SHARED | {"drop_relu": True},
    "compiled": {"compile_forward": lambda model: torch.compile(model, backend="aot_eager")},
    "random branch by tensor": {"trainer": RandomBranchByTensor},
    "compiled, nothing shared": NOTHING_SHARED
    | {"compile_forward": lambda model: torch.compile(model, backend="aot_eager")},
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_gradients_and_statistics_equal_a_plain_loop_over_an_eager_model(network, execution):
    compare_with_plain_loop(network, torch.float64, 1e-9, **EXECUTIONS[execution])


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("network", ["depthwise", "shared", "upsampling", "attending"])
@pytest.mark.parametrize(
    "execution", ["everything shared", "nothing shared", "compiled", "random branch by tensor"]
)
def test_scales_of_channels_equal_a_plain_loop_over_an_eager_model(network, execution):
    compare_with_plain_loop(network, torch.float64, 1e-9, per_channel=True, **EXECUTIONS[execution])


def test_scales_of_channels_are_in_the_bank_and_their_mean_is_the_indicator():
    model, x, target = problem("upsampling")
    trainer = trainer_of(model, x, per_channel=True)
    trainer.step(x, target)
    assert trainer.shared["weight_bank"]
    for layer in trainer.indicators().layers:
        quantizer = trainer.layers[layer.name].weight_quantizer
        assert quantizer.scale.shape[1] > 1
        for bits, indicator in layer.weight.items():
            scales = quantizer.scale[quantizer.bits.index(bits)]
            assert indicator == pytest.approx(scales.mean().item())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("network", NETWORKS)
def test_distillation_equals_a_plain_loop_over_an_eager_model(network):
    compare_with_plain_loop(network, torch.float64, 1e-9, distill=True)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("network", NETWORKS)
def test_float32_gradients_are_close_to_those_of_a_plain_loop(network):
    compare_with_plain_loop(network, torch.float32, 1e-4)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("network", "relus"), [("resnet", 5), ("mobilenet_v2", 34), ("depthwise", 3)]
)
def test_what_can_be_shared_is_shared(network, relus):
    model, x, target = problem(network)
    trainer = trainer_of(model, x)
    trainer.step(x, target)
    assert trainer.shared == {"weight_bank": True, "stem": True, "dropped_relus": relus}
    plain = trainer_of(model, x, **NOTHING_SHARED)
    plain.step(x, target)
    assert plain.shared == {"weight_bank": False, "stem": False, "dropped_relus": 0}


def compare_with_plain_loop(network, dtype, tolerance, distill=False, **options):
    model, x, target = problem(network, dtype)
    trainer = trainer_of(model, x, lr=0.0, clip_value=1e9, distill=distill, **options)
    start_activations(trainer.model, x)
    twin = eager_twin(trainer.model, model).train()
    # Two steps: the first one is never compiled. The learning rate is 0.
    for step in range(2):
        twin.zero_grad()
        plain_loop(twin, trainer.draw(step), x, target, distill)
        trainer.step(x, target)

    def assert_close(name, ours, reference):
        # A bias in front of a batch norm has the gradient 0, which rounding makes 1e-16.
        scale = reference.abs().max().clamp(min=1e-6 if dtype == torch.float64 else 1e-3)
        assert float((ours - reference).abs().max() / scale) < tolerance, name

    exact = {
        "rtol": 1e-12 if dtype == torch.float64 else 1e-5,
        "atol": 0 if dtype == torch.float64 else 1e-6,
    }
    ours = dict(trainer.model.named_modules())
    compared = 0
    for name, module in twin.named_modules():
        if isinstance(module, EagerQuantizer):
            reference = torch.stack([s.grad for s in module.scales])
            assert_close(name, ours[name].scale.grad, reference)
            compared += 1
        elif isinstance(module, EagerNorms):
            for key, value in ours[name].named_parameters():
                rows = torch.stack([getattr(n, key).grad for n in module.norms])
                assert_close(f"{name}.{key}", value.grad, rows)
            for key, value in ours[name].named_buffers():
                rows = torch.stack([getattr(n, key) for n in module.norms])
                torch.testing.assert_close(value, rows, **exact)
    inside = (EagerQuantizer, EagerNorms)
    special = [name for name, module in twin.named_modules() if isinstance(module, inside)]
    for name, value in twin.named_parameters():
        if not any(name.startswith(prefix + ".") for prefix in special):
            grad = trainer.model.get_parameter(name).grad
            assert_close(name, grad, value.grad)
            compared += 1
    assert compared >= 2 * len(trainer.layers) + 4
    for name, value in twin.named_buffers():
        if not any(name.startswith(prefix + ".") for prefix in special):
            torch.testing.assert_close(trainer.model.get_buffer(name), value, msg=name, **exact)


@pytest.mark.usefixtures("device")
def test_every_scale_gets_a_gradient_and_losses_are_named():
    model, x, target = problem("resnet")
    trainer = trainer_of(model, x)
    result = trainer.step(x, target)
    assert list(result.losses) == ["6", "4", "2", "random"]
    assert all(loss.isfinite() and not loss.requires_grad for loss in result.losses.values())
    for layer in trainer.layers.values():
        assert layer.weight_quantizer.scale.grad.count_nonzero() == 3
        assert layer.input_quantizer.scale.grad.count_nonzero() == 3


def test_the_random_draw_depends_on_seed_and_step_alone():
    model, x, target = problem("resnet")
    first, second = trainer_of(model, x, seed=3), trainer_of(model, x, seed=3)
    torch.manual_seed(99)
    drawn = [first.step(x, target).draw for _ in range(4)]
    assert drawn == [second.draw(step) for step in range(4)]
    assert drawn[0] != drawn[1]
    assert drawn != [trainer_of(model, x, seed=4).draw(step) for step in range(4)]
    assert {bits for draw in drawn for bits in draw.values()} == set(BITS)


@pytest.mark.usefixtures("device")
def test_gradients_are_clipped_after_they_added_up():
    model, x, target = problem()
    free, clipped = (
        trainer_of(model, x, lr=0.0, clip_value=1e9),
        trainer_of(model, x, lr=0.0, clip_value=1e-3),
    )
    free.step(x, target)
    clipped.step(x, target)
    for ours, reference in zip(clipped.model.parameters(), free.model.parameters(), strict=True):
        assert torch.equal(ours.grad, reference.grad.clamp(-1e-3, 1e-3))


@pytest.mark.usefixtures("device")
def test_a_parameter_without_a_gradient_is_not_touched():
    model, x, target = problem()
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    prepared = prepare(model, BITS, example_input=x)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    JointTrainer(prepared, optimizer, F.cross_entropy).step(x, target)
    assert torch.equal(prepared.idle, torch.ones(3))
    assert prepared.idle.grad is None


@pytest.mark.usefixtures("device")
def test_two_runs_end_with_the_same_bits():
    def run():
        model, x, target = problem("resnet")
        trainer = trainer_of(model, x)
        for _ in range(3):
            trainer.step(x, target)
        return trainer.model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("device")
def test_indicators_are_the_scales_in_use():
    model, x, target = problem("resnet")
    trainer = trainer_of(model, x)
    trainer.step(x, target)
    indicators = trainer.indicators()
    assert indicators.bits == (2, 4, 6)
    assert [layer.name for layer in indicators.layers] == list(trainer.layers)
    layer = trainer.layers["layer2.0.conv1"]
    found = next(x for x in indicators.layers if x.name == "layer2.0.conv1")
    assert list(found.weight.values()) == layer.weight_quantizer.scale.tolist()
    assert list(found.activation.values()) == layer.input_quantizer.scale.tolist()


def test_a_nan_indicator_is_an_error_that_names_its_layer():
    model, x, target = problem("resnet")
    trainer = trainer_of(model, x)
    trainer.step(x, target)
    with torch.no_grad():
        trainer.layers["layer2.0.conv1"].weight_quantizer.scale[1] = float("nan")
    with pytest.raises(
        ValueError, match=r"layer 'layer2.0.conv1': weight indicator at 4 bits is nan"
    ):
        trainer.indicators()


def test_wrong_models_and_arguments_are_named():
    model, x, _ = problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Depthwise has no quantized layers"):
        JointTrainer(model, optimizer, F.cross_entropy)
    prepared = prepare(model, BITS, example_input=x)
    with pytest.raises(ValueError, match="clip_value is 0"):
        JointTrainer(prepared, optimizer, F.cross_entropy, clip_value=0)
    other = prepare(model, (3, 5), example_input=x)
    mixed = copy.deepcopy(prepared)
    mixed.expand = other.expand
    with pytest.raises(ValueError, match="candidate bits differ"):
        JointTrainer(mixed, optimizer, F.cross_entropy)


def test_the_float_stem_keeps_one_batch_norm_with_every_pass_counted():
    model, x, target = problem()
    trainer = trainer_of(model, x)
    trainer.step(x, target)
    assert int(trainer.model.stem[1].num_batches_tracked) == len(BITS) + 1
    norms = [m for m in trainer.model.modules() if isinstance(m, SwitchableBatchNorm)]
    assert all(int(norm.num_batches_tracked.sum()) == len(BITS) + 1 for norm in norms)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("wrapped", [False, True])
def test_one_compiled_graph_serves_all_branches_and_draws(wrapped):
    model, x, target = problem("resnet")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    prepared = prepare(model, BITS, example_input=x)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    if wrapped:
        compiled = torch.compile(prepared, backend=counter)
        trainer = JointTrainer(compiled, optimizer, F.cross_entropy)
    else:
        trainer = JointTrainer(
            prepared,
            optimizer,
            F.cross_entropy,
            compile_forward=lambda rest: torch.compile(rest, backend=counter, fullgraph=True),
        )
    draws = [trainer.step(x, target).draw for _ in range(4)]
    assert counter.frame_count == 1
    assert len({tuple(draw.values()) for draw in draws}) > 1
    assert list(trainer.layers) == list(quantized_layers(prepared))


@pytest.mark.usefixtures("device")
def test_shared_steps_under_autocast_are_those_of_the_plain_loop():
    model, x, target = problem("resnet")
    shared = trainer_of(model, x, lr=0.0, autocast=torch.bfloat16)
    plain = trainer_of(model, x, lr=0.0, autocast=torch.bfloat16, **NOTHING_SHARED)
    losses, expected = shared.step(x, target).losses, plain.step(x, target).losses
    assert shared.scaler is None
    for branch, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected[branch]), rel=1e-2)
    for ours, reference in zip(shared.model.parameters(), plain.model.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        error = (ours.grad - reference.grad).abs().mean()
        assert error <= 2e-2 * reference.grad.abs().mean() + 1e-5


@pytest.mark.usefixtures("device")
def test_float16_steps_scale_the_loss_until_gradients_are_finite():
    model, x, target = problem("resnet")
    trainer = trainer_of(model, x, autocast=torch.float16)
    before = copy.deepcopy(trainer.model.layer1[0].conv1.weight.detach())
    for _ in range(20):
        result = trainer.step(x, target)
    assert all(loss.isfinite() for loss in result.losses.values())
    assert trainer.scaler.get_scale() < 2.0**16
    assert not torch.equal(trainer.model.layer1[0].conv1.weight, before)
    assert all(parameter.grad.isfinite().all() for parameter in trainer.model.parameters())


def test_an_overflow_under_float16_skips_the_step_and_lowers_the_scale():
    model, x, target = problem("resnet")
    trainer = trainer_of(model, x, autocast=torch.float16)
    trainer.scaler = trainer._update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = copy.deepcopy(trainer.model.layer1[0].conv1.weight.detach())
    trainer.step(x, target)
    assert torch.equal(trainer.model.layer1[0].conv1.weight, before)
    assert trainer.scaler.get_scale() == 2.0**99


def test_a_cuda_graph_needs_a_model_on_cuda_and_no_compiler():
    model, x, _ = problem()
    with pytest.raises(ValueError, match="cuda_graph needs a model on a CUDA device"):
        trainer_of(model, x, cuda_graph=True)


def test_weights_that_were_loaded_over_zeros_start_at_what_they_are_now():
    model, x, target = problem("no_norm")
    weight = model.hidden.weight.detach().clone()
    nn.init.zeros_(model.hidden.weight)
    trainer = trainer_of(model, x)
    with pytest.raises(ValueError, match="layer 'hidden': weight quantizer: all weights are 0"):
        trainer.step(x, target)
    with torch.no_grad():
        trainer.model.hidden.weight.copy_(weight)
        model.hidden.weight.copy_(weight)
    usual = trainer_of(model, x)
    trainer.step(x, target)
    usual.step(x, target)
    assert trainer.indicators().layers == usual.indicators().layers


def test_an_optimizer_without_the_step_sizes_is_an_error_in_one_sentence():
    model, x, _ = problem()
    prepared = prepare(model, BITS, example_input=x)
    foreign = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = torch.optim.SGD(
        [p for name, p in prepared.named_parameters() if not name.endswith("r.scale")], lr=0.1
    )
    for optimizer in (foreign, weights):
        with pytest.raises(ValueError, match=r"does not hold 6 of the model's 6 step sizes, such"):
            JointTrainer(prepared, optimizer, F.cross_entropy)


def test_indicators_of_a_model_that_was_never_trained_are_an_error_that_names_the_layers():
    model, x, target = problem()
    trainer = trainer_of(model, x)
    with pytest.raises(
        ValueError,
        match=r"layer 'expand' \(activations at 2, 4, 6 bits\), layer 'depthwise' .*'project'",
    ):
        Indicators.from_model(trainer.model)
    layers = quantized_layers(trainer.model)
    for layer in layers.values():
        layer.select(4, 4)
    trainer.model.train()(x)
    with pytest.raises(ValueError, match=r"'expand' \(activations at 2, 6 bits\)"):
        trainer.indicators()
    trainer.step(x, target)
    assert [layer.name for layer in trainer.indicators().layers] == list(layers)


def test_indicators_from_a_checkpoint_are_those_of_the_trainer_with_bounded_scales(tmp_path):
    model, x, target = problem()
    prepared = prepare(model, BITS, example_input=x, scale_max=0.25)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    trainer = JointTrainer(prepared, optimizer, F.cross_entropy)
    torch.save(trainer.state_dict(), tmp_path / "before.pt")
    with pytest.raises(FileFormatError, match=r"before\.pt: step sizes without a start value"):
        Indicators.from_checkpoint(tmp_path / "before.pt")
    trainer.step(x, target)
    with torch.no_grad():
        prepared.expand.weight_quantizer.scale.fill_(3.0)
    torch.save(trainer.state_dict(), tmp_path / "after.pt")
    found = Indicators.from_checkpoint(tmp_path / "after.pt")
    assert found.layers == trainer.indicators().layers
    assert set(found.layers[0].weight.values()) == {0.25}


def test_a_loss_that_reaches_no_parameter_is_an_error_in_one_sentence():
    model, x, target = problem()
    trainer = trainer_of(model, x)
    trainer.loss_fn = lambda output, target: torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match="step 1: the loss depends on none of the parameters"):
        trainer.step(x, target)


def wrapped_data_parallel(model):
    return nn.DataParallel(model), ".module"


def wrapped_distributed(model):
    return nn.parallel.DistributedDataParallel(model), ".module"


def wrapped_inside(model):
    model.expand = nn.DataParallel(model.expand)
    return model, ".module"


def wrapped_fully_sharded(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu")), "before it was sharded"


def wrapped_sharded_in_place(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (1,))), "before it was sharded"


@pytest.mark.parametrize(
    "wrap",
    [
        wrapped_data_parallel,
        wrapped_distributed,
        wrapped_inside,
        wrapped_fully_sharded,
        wrapped_sharded_in_place,
    ],
)
def test_a_model_wrapped_for_several_devices_is_refused_with_what_to_pass(wrap, tmp_path):
    model, x, _ = problem()
    prepared = prepare(model, BITS, example_input=x)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        wrapped, advice = wrap(prepared)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=rf"JointTrainer does not take .*: pass .*{advice};"):
            JointTrainer(wrapped, optimizer, F.cross_entropy)
    finally:
        torch.distributed.destroy_process_group()
