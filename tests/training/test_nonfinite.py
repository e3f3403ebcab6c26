import copy
import gc

import pytest
import torch
from networks import Depthwise
from torch import nn
from torch.nn import functional as F

from limpq_ext import JointTrainer, finetune, prepare
from limpq_ext.training.checkpoint import Checkpoint
from limpq_ext.training.loop import Recording
from limpq_ext.training.metrics import Journal, guarded_scales
from limpq_ext.training.nonfinite import FiniteWatch, NonFiniteError

BITS = (2, 4)


class Failing(nn.Module):
    """Multiplies by a factor, on the way there or back, at some of its calls."""

    def __init__(self, factor, calls, backward=False):
        super().__init__()
        self.factor, self.calls, self.backward, self.seen = factor, calls, backward, 0

    def forward(self, x):
        self.seen += 1
        factor = self.factor if self.seen in self.calls else 1.0
        if self.backward:
            x = x.clone()
            if x.requires_grad:
                x.register_hook(lambda grad: grad * factor)
            return x
        return x * factor


def batch():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)


def trainer_of(failing, place, *, fused=False, **options):
    """A trainer whose model has one more module after the submodule ``place``."""
    torch.manual_seed(0)
    prepared = prepare(Depthwise(), BITS, example_input=torch.zeros(1, 3, 8, 8))
    if failing is not None:
        setattr(prepared, place, nn.Sequential(getattr(prepared, place), failing))
        options |= {"share_stem": False, "drop_relu": False}  # a traced module counts no calls
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01, momentum=0.9, fused=fused or None)
    return JointTrainer(prepared, optimizer, F.cross_entropy, **options)


def first_passing(module, *, branch):
    """Fails from the given branch of the third step on, and whenever that is repeated."""
    module.calls = range(2 * 3 + branch, 100)
    return module


@pytest.mark.parametrize(("number", "branch"), [(1, "4"), (2, "2"), (3, "random")])
def test_a_bad_loss_names_step_branch_and_layer(number, branch):
    failing = first_passing(Failing(torch.nan, ()), branch=number)
    trainer = trainer_of(failing, "bn1")
    for _ in range(2):
        trainer.step(*batch())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(NonFiniteError) as error:
        trainer.step(*batch())
    told = f"step 3, branch '{branch}': the loss became nan; it shows first in the output of layer"
    assert str(error.value).startswith(f"{told} 'bn1.1'")
    assert (error.value.step, error.value.branch, error.value.layer) == (3, branch, "bn1.1")
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_bad_gradient_behind_a_good_loss_is_named():
    failing = first_passing(Failing(torch.inf, (), backward=True), branch=2)
    trainer = trainer_of(failing, "bn1")
    for _ in range(2):
        trainer.step(*batch())
    with pytest.raises(NonFiniteError, match=r"step 3, branch '.*': a gradient became") as error:
        trainer.step(*batch())
    assert "it shows first in the gradient" in str(error.value)
    assert error.value.layer == "bn1.1"


@pytest.mark.parametrize("name", ["expand.weight_quantizer.scale", "depthwise.weight", "head.bias"])
def test_a_bad_parameter_is_named(name):
    trainer = trainer_of(None, None)
    trainer.step(*batch())
    with torch.no_grad():
        trainer.model.get_parameter(name).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=rf"step 2, .* in the parameter '{name}'") as error:
        trainer.step(*batch())
    assert error.value.layer == name.rpartition(".")[0]


def test_a_bad_batch_is_named():
    trainer = trainer_of(None, None)
    trainer.step(*batch())
    x, target = batch()
    with pytest.raises(NonFiniteError, match=r"step 2, branch '4': .* in the batch itself"):
        trainer.step(x * torch.nan, target)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_a_late_look_names_the_first_bad_step(fused, backward):
    """As on a GPU, where the host reads a flag now and then."""
    failing = Failing(torch.inf, (), backward)
    trainer = trainer_of(failing, "stem", fused=fused, check_steps=10)
    for _ in range(3):
        trainer.step(*batch())
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    failing.calls = range(1000)
    for _ in range(4):
        trainer.step(*batch())
    if fused:  # the device held the updates back
        assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    with pytest.raises(NonFiniteError, match=r"^step 4") as error:
        trainer.check()
    assert error.value.step == 4
    if fused:
        assert error.value.layer == "stem.1"
    with pytest.raises(NonFiniteError, match=r"^step 4"):
        trainer.state_dict()


def test_the_bad_batch_is_repeated_after_a_late_look():
    trainer = trainer_of(None, None, fused=True, check_steps=4)
    for _ in range(2):
        trainer.step(*batch())
    x, target = batch()
    trainer.step(x * torch.inf, target)
    with pytest.raises(NonFiniteError, match=r"^step 3, branch '4': .* in the batch itself"):
        trainer.step(*batch())


def test_fine_tuning_names_step_and_layer_and_keeps_the_last_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Depthwise()
    model.bn2 = nn.Sequential(model.bn2, Failing(torch.nan, range(4, 100)))
    checkpoint = Checkpoint(tmp_path / "checkpoint", steps=1)
    recording = Recording(checkpoint)
    message = (
        r"^step 4: the loss became nan; it shows first in the output of layer 'bn2\.1'\."
        r" .*; the last good checkpoint is kept: .*checkpoint$"
    )
    with pytest.raises(NonFiniteError, match=message):
        finetune(model, [batch()] * 6, epochs=1, lr=0.01, recording=recording)
    assert checkpoint.load()["step"] == 3


def test_scales_at_their_guard_are_counted_and_reported():
    prepared = prepare(Depthwise(), BITS, example_input=torch.zeros(1, 3, 8, 8))
    quantizer = prepared.depthwise.weight_quantizer
    assert guarded_scales(prepared) == []
    with torch.no_grad():
        quantizer.scale[BITS.index(2)] = quantizer.scale_min / 2
    assert guarded_scales(prepared) == ["layer 'depthwise': weight quantizer at 2 bits"]
    said, records = [], []
    recording = Recording(journal=Journal("tune", (), said.append))
    for bits in (2, 4):
        for layer in (prepared.expand, prepared.depthwise, prepared.project):
            layer.select(bits, bits)
            prepared.train()(batch()[0])
    finetune(prepared, [batch()], epochs=1, recording=recording, on_epoch=records.append)
    assert records[0]["guarded_scales"] == 1
    assert said == [
        "epoch 1: 1 step sizes are at their lower bound: layer 'depthwise': weight quantizer at"
        " 2 bits"
    ]


@pytest.mark.parametrize(
    ("fused", "options"),
    [
        (False, {}),
        (True, {"check_steps": 3}),
        (False, {"check_steps": 3}),
        (False, {"autocast": torch.float16}),
        (True, {"autocast": torch.float16, "check_steps": 3}),
    ],
)
def test_a_good_state_is_a_way_on_after_a_bad_step(fused, options):
    trainer, untouched = (trainer_of(None, None, fused=fused, **options) for _ in range(2))
    x, target = batch()
    for either in (trainer, untouched):
        either.step(x, target)
    good = copy.deepcopy(trainer.state_dict())
    for _ in range(options.get("check_steps", 1) - 2):
        trainer.step(x * torch.nan, target)
    with pytest.raises(NonFiniteError):
        trainer.step(x * torch.nan, target)
    trainer.load_state_dict(good)
    for either in (trainer, untouched):
        for _ in range(4):
            either.step(x, target)
        either.check()
    assert trainer.steps == untouched.steps == 5
    for ours, reference in zip(
        trainer.model.parameters(), untouched.model.parameters(), strict=True
    ):
        assert torch.equal(ours, reference)


def test_an_optimizer_is_left_as_it_was_after_a_bad_step():
    trainer = trainer_of(None, None, fused=True, check_steps=2)
    x, target = batch()
    attributes = set(vars(trainer.optimizer))
    trainer.step(x, target)
    assert set(vars(trainer.optimizer)) == attributes
    with pytest.raises(NonFiniteError):
        trainer.step(x * torch.nan, target)
    assert set(vars(trainer.optimizer)) == attributes
    before = trainer.model.head.bias.detach().clone()
    trainer.model.head.bias.grad = torch.ones_like(before)
    trainer.optimizer.step()
    assert not torch.equal(trainer.model.head.bias, before)


def test_batches_of_many_shapes_are_not_kept_beyond_the_next_look():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = FiniteWatch(model, optimizer, lambda *_: None, steps=5)

    def kept():
        gc.collect()
        found = (o for o in gc.get_objects() if type(o) is torch.Tensor and o.dim() == 5)
        return len(list(found))

    before = kept()  # of other tests
    for step in range(1, 24):
        x = torch.zeros(1, 1, 1, 1, step)
        watch.look(step, ("",), torch.zeros(1), [torch.zeros(1)], (x, torch.zeros(1)))
        del x
        assert kept() - before == step % 5
