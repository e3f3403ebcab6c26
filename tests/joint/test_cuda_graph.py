"""A joint step as CUDA graphs: on a GPU, and its logic on the CPU with a stand-in for the graph."""

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("torchvision")

from limpq_ext import JointTrainer, NonFiniteError, prepare
from limpq_ext.nn.named import CifarResNet
from limpq_ext.training.cuda_graphs import Captured

BITS = (2, 4)


class ComputedOnHost(Captured):
    """Stands in for a CUDA graph: a replay computes again, into the tensors of the capture.

    The capture computes too, so the first replay, on the same inputs, has nothing left to do.
    """

    def __init__(self, compute, inputs, *, parameters=()):
        super().__init__(compute, inputs, parameters=parameters)
        computed = itertools.chain([True], itertools.repeat(False))

        def replay():
            if next(computed):
                return
            for parameter in parameters:
                parameter.grad = None
            tree_map(Tensor.copy_, self._results, compute(*self.inputs))
            for parameter, grad in self._grads:
                grad.copy_(parameter.grad)

        self._graph.replay = replay


class RecordedOnHost(Captured):
    """Stands in for a CUDA graph: a replay repeats the operators of the capture, on its tensors."""

    def __init__(self, compute, inputs, *, parameters=()):
        recorder = Recorder()

        def recorded(*inputs):
            with recorder:
                return compute(*inputs)

        super().__init__(recorded, inputs, parameters=parameters)
        computed = itertools.chain([True], itertools.repeat(False))
        self._graph.replay = lambda: next(computed) or recorder.repeat()


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        args, kwargs = tree_map(lambda leaf: leaf, (args, kwargs or {}))  # lists change later
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def repeat(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr("limpq_ext.joint.trainer.Captured", ComputedOnHost)
    monkeypatch.setattr("limpq_ext.training.update.Captured", RecordedOnHost)


def sgd(parameters, fused=True):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-3, fused=fused)


def adamw(parameters, fused=True):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=fused)


def trainer_of(graphed, optimizer=sgd, fused=True, **options):
    """A trainer of a small network; ``graphed`` ones capture, also on the CPU (see `on_host`)."""
    torch.manual_seed(0)
    model = CifarResNet(1, num_classes=5, width=4)
    prepared = prepare(model, BITS, example_input=torch.zeros(2, 3, 16, 16))
    optimizer = optimizer(prepared.parameters(), fused=fused)
    trainer = JointTrainer(prepared, optimizer, F.cross_entropy, **options)
    trainer.cuda_graph = graphed
    return trainer


def batches(count, size=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(size, 3, 16, 16, generator=generator).to(torch.get_default_device()),
            torch.randint(5, (size,), generator=generator).to(torch.get_default_device()),
        )


def assert_same_state(ours, reference, **tolerances):
    expected = reference.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name, **tolerances)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("fused", [True, False])
def test_replays_take_new_batches_draws_and_learning_rates(optimizer, fused):
    seen = []
    options = {"on_branch": lambda branch, output, _: seen.append((branch, output))}
    captured = trainer_of(True, optimizer, fused, **options)
    plain = trainer_of(False, optimizer, fused)
    schedules = [
        torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
        for trainer in (captured, plain)
    ]
    for step, (x, target) in enumerate(batches(8)):
        size = 3 if step == 5 else 4
        ours = captured.step(x[:size], target[:size])
        reference = plain.step(x[:size], target[:size])
        assert (captured._captured is not None) == (step >= 3)
        assert (captured._update._captured is not None) == (step >= 3 and fused)
        assert [branch for branch, _ in seen] == list(ours.losses)
        assert all(output.shape == (size, 5) for _, output in seen)
        for branch, loss in ours.losses.items():
            torch.testing.assert_close(loss, reference.losses[branch], msg=f"{step} {branch}")
        for schedule in schedules:
            schedule.step()
        seen.clear()
    assert_same_state(captured, plain)


@pytest.mark.usefixtures("on_host")
def test_a_step_that_measures_sensitivities_runs_beside_the_graph():
    captured, plain = (trainer_of(graphed, sensitivity_every=2) for graphed in (True, False))
    for step, batch in enumerate(batches(8)):
        ours, reference = captured.step(*batch), plain.step(*batch)
        for branch, loss in ours.losses.items():
            torch.testing.assert_close(loss, reference.losses[branch], msg=f"{step} {branch}")
    assert captured._captured is not None
    assert_same_state(captured, plain)
    ours, reference = captured.sensitivities(), plain.sensitivities()
    assert ours.meta["measured_steps"] == 4
    for layer, other in zip(ours.layers, reference.layers, strict=True):
        assert layer.weight == pytest.approx(other.weight, rel=1e-3)
        assert layer.activation == pytest.approx(other.activation, rel=1e-3)


@pytest.mark.usefixtures("on_host")
def test_another_option_of_the_optimizer_is_captured_again():
    captured, plain = trainer_of(True), trainer_of(False)
    for step, batch in enumerate(batches(7)):
        for trainer in (captured, plain):
            trainer.optimizer.param_groups[0]["momentum"] = 0.9 if step < 5 else 0.5
            trainer.step(*batch)
    assert_same_state(captured, plain)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_captured_training_goes_on_from_a_loaded_state(optimizer):
    captured, plain = trainer_of(True, optimizer), trainer_of(False, optimizer)
    steps = list(batches(9))
    for batch in steps[:5]:
        captured.step(*batch)
        plain.step(*batch)
    state = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, plain.state_dict()
    )
    captured.step(*steps[0])
    captured.load_state_dict(state)
    for batch in steps[5:]:
        captured.step(*batch)
        plain.step(*batch)
    assert captured.steps == plain.steps == 9
    assert_same_state(captured, plain)


@pytest.mark.usefixtures("on_host")
def test_a_captured_step_that_is_not_finite_is_named_and_changes_nothing():
    trainer = trainer_of(True, check_steps=4)
    steps = list(batches(8))
    for batch in steps[:5]:
        trainer.step(*batch)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    x, target = steps[5]
    x[0, 0, 0, 0] = math.nan
    trainer.step(x, target)
    trainer.step(*steps[6])
    for parameter, old in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    with pytest.raises(NonFiniteError, match=r"step 6, branch '4'.*the batch itself"):
        trainer.step(*steps[7])


@pytest.mark.usefixtures("on_host")
def test_a_captured_training_goes_on_from_a_good_state_after_a_bad_step():
    captured, plain = trainer_of(True, check_steps=2), trainer_of(False)
    steps = list(batches(8))
    for batch in steps[:5]:
        captured.step(*batch)
        plain.step(*batch)
    attributes = set(vars(captured.optimizer))
    state = tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, plain.state_dict()
    )
    x, target = steps[5]
    with pytest.raises(NonFiniteError, match="step 6"):
        captured.step(x * math.nan, target)
    assert set(vars(captured.optimizer)) == attributes
    captured.load_state_dict(state)
    for batch in steps[5:]:
        captured.step(*batch)
        plain.step(*batch)
    captured.check()
    assert_same_state(captured, plain)


def test_a_first_step_that_is_held_back_leaves_no_momentum():
    trainer = trainer_of(False, autocast=torch.float16)
    trainer.scaler = trainer._update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    trainer.step(*next(batches(1)))
    assert trainer.scaler.get_scale() == 2.0**99
    states = trainer.optimizer.state.values()
    assert all(torch.count_nonzero(state["momentum_buffer"]) == 0 for state in states)


@pytest.mark.usefixtures("on_host")
def test_the_optimizers_own_options_stay_as_they_are():
    trainer = trainer_of(True, adamw)
    before = [
        {name: value for name, value in group.items() if name != "params"}
        for group in trainer.optimizer.param_groups
    ]
    for batch in batches(5):
        trainer.step(*batch)
    assert trainer._update._captured is not None
    for group, options in zip(trainer.optimizer.param_groups, before, strict=True):
        assert {name: value for name, value in group.items() if name != "params"} == options


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_captured_steps_are_those_of_ordinary_ones(optimizer, autocast):
    with torch.device("cuda"), torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        graphed = trainer_of(True, optimizer, autocast=autocast)
        plain = trainer_of(False, optimizer, autocast=autocast)
        for step, batch in enumerate(batches(8)):
            ours, reference = graphed.step(*batch), plain.step(*batch)
            assert (graphed._captured is not None) == (step >= 3)
            assert (graphed._update._captured is not None) == (step >= 3)
            for branch, loss in ours.losses.items():
                torch.testing.assert_close(loss, reference.losses[branch], rtol=1e-2, atol=1e-3)
        assert_same_state(graphed, plain, rtol=1e-2, atol=1e-3)
        smaller = graphed.step(*next(batches(1, size=2)))
        assert all(loss.isfinite() for loss in smaller.losses.values())


@pytest.mark.cuda
def test_a_captured_step_on_the_device_holds_back_what_is_not_finite():
    with torch.device("cuda"):
        trainer = trainer_of(True, check_steps=4)
        steps = list(batches(8))
        for batch in steps[:5]:
            trainer.step(*batch)
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        steps[5][0][0, 0, 0, 0] = math.nan
        trainer.step(*steps[5])
        trainer.step(*steps[6])
        for parameter, old in zip(trainer.model.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        with pytest.raises(NonFiniteError, match="step 6"):
            trainer.step(*steps[7])
