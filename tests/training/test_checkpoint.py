"""Trainings in this process that are cut off after a step and go on from a checkpoint."""

import json
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from networks import Depthwise
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from limpq_ext import FileFormatError, JointTrainer, finetune, prepare
from limpq_ext.data.loading import make_loader
from limpq_ext.training.checkpoint import Checkpoint, write_sealed
from limpq_ext.training.loop import Recording, run_epochs
from limpq_ext.training.metrics import Journal, MetricsFile
from limpq_ext.training.signals import Interrupted

BITS = (2, 4)


class Augmented(Dataset):
    """Samples that torch, NumPy and Python change at random."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        x = torch.full((3, 8, 8), index / 10) + torch.rand(3, 8, 8)
        x = x * (1 + random.random()) + float(np.random.rand())  # noqa: NPY002
        return x, index % 5


class CutOffError(Exception):
    """As a kill, but in this process."""


def network():
    torch.manual_seed(0)
    model = Depthwise()
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    return model


def recording_in(folder, *, steps, log_steps=0, said=None):
    checkpoint = Checkpoint(folder / "checkpoint", key="mine", steps=steps, minutes=0)
    say = print if said is None else said.append
    journal = Journal("tune", [MetricsFile(folder / "metrics.jsonl")], say)
    return Recording(checkpoint, journal, log_steps)


def train(folder, *, cut=None, loader=None, workers=0, steps=1, log_steps=0, **options):
    """Three epochs of five steps; ``cut`` is the step after which it is cut off."""
    model = network()
    loader = loader or make_loader(Augmented(), batch_size=4, train=True, seed=5, workers=workers)
    torch.manual_seed(7)

    def on_step(done, total):
        assert total == 15
        if done == cut:
            raise CutOffError

    recording = recording_in(folder, steps=steps, log_steps=log_steps)
    records = finetune(
        model, loader, epochs=3, lr=0.01, recording=recording, on_step=on_step, **options
    )
    return model.state_dict(), records


def plain(records):
    """Records without what depends on the clock and the machine."""
    return [
        {k: v for k, v in r.items() if k not in ("images_per_second", "rss_bytes")} for r in records
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours, reference):
    assert list(ours) == list(reference)
    assert all(torch.equal(ours[name], reference[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *train(folder, log_steps=2), lines(folder)


@pytest.mark.parametrize(("cuts", "steps"), [((1, 4, 5, 6, 11, 15), 1), ((3, 9, 14), 4)])
def test_a_training_that_was_cut_off_ends_with_the_same_bits(tmp_path, whole, cuts, steps):
    for cut in cuts:
        with pytest.raises(CutOffError):
            train(tmp_path, cut=cut, steps=steps, log_steps=2)
    state, records = train(tmp_path, steps=steps, log_steps=2)
    assert_same(state, whole[0])
    assert plain(records) == plain(whole[1])
    assert plain(lines(tmp_path)) == plain(whole[2])


def test_it_does_so_with_loading_processes_and_adamw(tmp_path):
    reference, _ = train(tmp_path, optimizer="adamw")
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(CutOffError):
        train(tmp_path, cut=7, workers=2, optimizer="adamw")
    state, _ = train(tmp_path, workers=1, optimizer="adamw")
    assert_same(state, reference)


def test_it_does_so_with_a_teacher_an_average_a_scaler_and_estimated_statistics(tmp_path):
    options = {
        "teacher": network(),
        "ema_decay": 0.9,
        "autocast": torch.float16,
        "reestimate_batches": 2,
    }
    reference, _ = train(tmp_path, **options)
    (tmp_path / "checkpoint").unlink()
    for cut in (7, 15):
        with pytest.raises(CutOffError):
            train(tmp_path, cut=cut, **options)
    assert_same(train(tmp_path, **options)[0], reference)


def test_it_does_so_with_a_sampler_that_has_epochs(tmp_path):
    data = [(torch.full((3, 8, 8), i / 22), i % 5) for i in range(20)]
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=3)
    loader = DataLoader(data, batch_size=4, sampler=sampler)
    reference, _ = train(tmp_path, loader=loader)
    (tmp_path / "checkpoint").unlink()
    with pytest.raises(CutOffError):
        train(tmp_path, cut=8, loader=loader)
    assert_same(train(tmp_path, loader=loader)[0], reference)


def joint(folder, *, cut=None):
    """Two epochs of joint training; returns the trainer."""
    prepared = prepare(network(), BITS, example_input=torch.zeros(1, 3, 8, 8))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01, momentum=0.9)
    trainer = JointTrainer(prepared, optimizer, F.cross_entropy, distill=True)
    prepared.train()

    def take_step(x, target):
        return torch.stack(list(trainer.step(x, target).losses.values())).mean()

    def on_step(done, total):
        if done == cut:
            raise CutOffError

    run_epochs(
        take_step,
        optimizer,
        make_loader(Augmented(), batch_size=4, train=True),
        model=prepared,
        epochs=2,
        parts={"trainer": trainer},
        check=trainer.check,
        recording=recording_in(folder, steps=1),
        on_step=on_step,
    )
    return trainer


def test_a_joint_training_that_was_cut_off_ends_with_the_same_bits(tmp_path):
    reference = joint(tmp_path)
    (tmp_path / "checkpoint").unlink()
    for cut in (1, 6):
        with pytest.raises(CutOffError):
            joint(tmp_path, cut=cut)
    trainer = joint(tmp_path)
    assert trainer.steps == reference.steps == 10
    assert_same(trainer.model.state_dict(), reference.model.state_dict())
    assert trainer.indicators() == reference.indicators()


def test_a_trainer_goes_on_from_its_state(tmp_path):
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)

    def make(seed=0):
        prepared = prepare(network(), BITS, example_input=x)
        optimizer = torch.optim.AdamW(prepared.parameters(), lr=0.01)
        return JointTrainer(prepared, optimizer, F.cross_entropy, seed=seed)

    first, second = make(), make()
    first.model.head[0].p = second.model.head[0].p = 0.0
    first.step(x, target)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for trainer in (first, second):
        trainer.step(x, target)
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert second.steps == 2
    with pytest.raises(ValueError, match="seed is 1, but the state is of seed 0"):
        make(seed=1).load_state_dict(first.state_dict())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(tmp_path, whole, number):
    def run(at):
        def on_step(done, total):
            if done == at:
                os.kill(os.getpid(), number)

        model = network()
        loader = make_loader(Augmented(), batch_size=4, train=True, seed=5)
        torch.manual_seed(7)
        recording = recording_in(tmp_path, steps=0, said=said)
        finetune(model, loader, epochs=3, lr=0.01, recording=recording, on_step=on_step)
        return model.state_dict()

    said, before = [], signal.getsignal(number)
    for at in (7, 15):
        with pytest.raises(Interrupted) as stop:
            run(at)
        assert stop.value.code == 128 + number
        where = f"stopped by {signal.Signals(number).name} after step {at} of 15; the same command"
        assert where in str(stop.value)
        assert signal.getsignal(number) is before
    assert_same(run(None), whole[0])
    assert said[-1].startswith("going on after step 15 of 15 from ")


def test_a_signal_without_a_checkpoint_says_so():
    def on_step(done, total):
        os.kill(os.getpid(), signal.SIGTERM)

    data = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    with pytest.raises(Interrupted, match="after step 1 of 1; there is no checkpoint"):
        finetune(network(), data, epochs=1, on_step=on_step)


def test_a_second_signal_ends_at_once():
    def on_step(done, total):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    data = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    with pytest.raises(Interrupted, match="at once by a second signal"):
        finetune(network(), data, epochs=1, on_step=on_step)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def foreign(path):
    state = torch.load(path, weights_only=True)
    with path.open("wb") as file:
        write_sealed(file, {**state, "key": "another recipe"})


def newer(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "version": 9}, path)


def pickled(path):
    torch.save({"format": CutOffError}, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "checkpoint: not a readable checkpoint"),
        (lambda path: path.write_bytes(b""), "checkpoint: not a readable checkpoint"),
        (pickled, "checkpoint: not a readable checkpoint"),
        (lambda path: torch.save([1], path), "checkpoint: not a checkpoint of a training"),
        (newer, "checkpoint: version is 9, this limpq_ext reads 2"),
        (foreign, "checkpoint: this checkpoint belongs to another recipe or other inputs"),
    ],
)
def test_a_spoilt_or_foreign_checkpoint_is_one_sentence(tmp_path, spoil, message):
    with pytest.raises(CutOffError):
        train(tmp_path, cut=3)
    spoil(tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint").read_bytes()
    with pytest.raises(FileFormatError, match=message) as error:
        train(tmp_path)
    assert "remove it to start this stage over" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "checkpoint").read_bytes() == before


def test_a_checkpoint_with_any_bit_changed_is_refused(tmp_path):
    path = tmp_path / "checkpoint"
    with pytest.raises(CutOffError):
        train(tmp_path, cut=3)
    data = path.read_bytes()
    checkpoint = Checkpoint(path, key="mine")
    assert checkpoint.load() is not None
    rng = random.Random(0)
    places = [*rng.sample(range(len(data)), 200), *range(len(data) - 80, len(data))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(FileFormatError, match=r"(damaged|readable).*; remove it to start"):
            checkpoint.load()


def test_torch_load_reads_a_checkpoint_too(tmp_path):
    Checkpoint(tmp_path / "c", key="mine").save({"step": 3, "tensor": torch.arange(5)})
    state = torch.load(tmp_path / "c", weights_only=True)
    assert (state["key"], state["step"]) == ("mine", 3)
    assert torch.equal(state["tensor"], torch.arange(5))


def changed_within(state, place, value):
    """The state with another value at a place such as "parts.optimizer"; no value: without it."""
    *outer, last = place.split(".")
    for part in outer:
        state = state[int(part) if part.isdigit() else part]
    if value is None:
        del state[last]
    else:
        state[int(last) if last.isdigit() else last] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("step", 10**9, "step: is 1000000000, expected 0 to 15"),
        ("step", -1, "step: is -1, expected 0 to 15"),
        ("step", True, "step: is True, expected 0 to 15"),
        ("step", torch.tensor(3), "step: is tensor"),
        ("seconds", "3", "seconds: is '3', expected something like"),
        ("seconds", float("nan"), "seconds: is nan, expected something like"),
        ("records", {}, "records: is {}, expected something like"),
        ("records", [3], "records: are no records"),
        ("epoch_sums", {"loss": "3"}, "epoch_sums: 'loss' is '3', no sum"),
        ("epoch_sums", None, "epoch_sums"),
        ("parts", [], "parts: is .*, expected something like"),
        ("parts.model", None, "model"),
        ("parts.optimizer.param_groups.0.lr", "0.1", r"param_groups\.0\.lr: is '0\.1'"),
        ("parts.optimizer.param_groups.0.lr", None, "optimizer: lr is missing"),
        (
            "parts.optimizer.param_groups.0.fused",
            torch.ones(2),
            r"param_groups\.0\.fused: is tensor",
        ),
        (
            "parts.optimizer.state.0",
            {"momentum_buffer": torch.ones(3)},
            "'momentum_buffer' does not",
        ),
        ("parts.optimizer.state.0", 3, "optimizer"),
        ("parts.schedule.last_epoch", "3", "last_epoch: is '3'"),
        ("parts.update.steps", [3], r"update\.steps: is \[3\]"),
        ("processes", {}, "processes: is no list of states"),
        ("processes.0", 3, "processes: is no list of states"),
        ("processes.0.meter", {"loss": 3.0}, "meter: 'loss' is no sum"),
        ("processes.0.meter", None, "meter"),
        ("processes.0.random.torch", torch.ones(3), "ByteTensor"),
        ("processes.0.random.numpy", ("MT19937", torch.ones(624).long(), 10**6, 0, 0.0), "numpy"),
        ("processes.0.random.python", (3, (1, 2), None), "state"),
    ],
)
def test_fields_of_a_checkpoint_of_the_wrong_kind_are_named(tmp_path, place, value, message):
    path = tmp_path / "checkpoint"
    with pytest.raises(CutOffError):
        train(tmp_path, cut=3)
    state = torch.load(path, weights_only=True)
    changed_within(state, place, value)
    with path.open("wb") as file:
        write_sealed(file, state)
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(path))}: .*{message}"):
        train(tmp_path)


def test_a_checkpoint_of_two_processes_goes_on_in_one_which_says_so(tmp_path, capsys):
    path = tmp_path / "checkpoint"
    with pytest.raises(CutOffError):
        train(tmp_path, cut=3)
    state = torch.load(path, weights_only=True)
    with path.open("wb") as file:
        write_sealed(file, {**state, "processes": 2 * state["processes"]})
    _, records = train(tmp_path)
    assert "the checkpoint is of 2 processes, now there are 1:" in capsys.readouterr().out
    assert [record["step"] for record in records] == [5, 10, 15]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    mine = tmp_path / f".checkpoint.{'0' * 32}.tmp"
    other = tmp_path / f".another.{'0' * 32}.tmp"
    for path in (mine, other):
        path.write_bytes(b"half")
    assert Checkpoint(tmp_path / "checkpoint").load() is None
    assert not mine.exists()
    assert other.exists()


def test_a_checkpoint_is_due_by_steps_and_by_time(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c", steps=3, minutes=0)
    assert [step for step in range(1, 10) if checkpoint.is_due(step)] == [3, 6, 9]
    now = [100.0]
    monkeypatch.setattr("limpq_ext.training.checkpoint.time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "c", minutes=2)
    now[0] += 119
    assert not checkpoint.is_due(1)
    now[0] += 1
    assert checkpoint.is_due(1)
    checkpoint.save({"step": 1})
    assert not checkpoint.is_due(2)
    with pytest.raises(ValueError, match="every -1 steps or 1 minutes"):
        Checkpoint(tmp_path / "c", steps=-1, minutes=1)


def test_a_failed_write_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c")
    checkpoint.save({"step": 1})

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("limpq_ext.training.checkpoint.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save({"step": 2})
    assert checkpoint.load()["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_joint_training_does_not_go_on_from_other_candidates():
    trainers = []
    for bits in ((2, 4), (3, 4)):
        model = prepare(network(), bits, example_input=torch.zeros(2, 3, 8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        trainers.append(JointTrainer(model, optimizer, F.cross_entropy))
    with pytest.raises(ValueError, match=r"candidates are \[3, 4\], but the state is of \[2, 4\]"):
        trainers[1].load_state_dict(trainers[0].state_dict())


def test_a_checkpoint_of_another_training_is_not_removed(tmp_path):
    path = tmp_path / "checkpoint"
    Checkpoint(path, key="mine").save({})
    with pytest.raises(FileFormatError, match="belongs to another recipe or other inputs"):
        Checkpoint(path, key="yours").remove()
    assert path.exists()
    Checkpoint(path, key="mine").remove()
    assert not path.exists()
    Checkpoint(path, key="mine").remove()
    path.write_text("a file")
    with pytest.raises(FileFormatError, match="not a readable checkpoint"):
        Checkpoint(path, key="mine").remove()
    assert path.read_text() == "a file"
