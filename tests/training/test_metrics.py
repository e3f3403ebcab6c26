import json
import sys

import pytest
import torch
from torch import nn

from limpq_ext import finetune
from limpq_ext.training.loop import Recording
from limpq_ext.training.metrics import Journal, Meter, MetricsFile, TensorBoard, resident_bytes


def test_a_meter_adds_up_and_goes_on_from_its_state():
    meter = Meter(torch.device("cpu"))
    assert meter.read() == {}
    scores, target = torch.eye(4)[:3], torch.tensor([0, 1, 3])
    meter.add_branch("4", scores, target)
    meter.add("loss", torch.tensor(0.5))
    other = Meter(torch.device("cpu"))
    other.load_state_dict(meter.state_dict())
    other.add("loss", 1.0)
    assert other.read() == {"correct 4": 2.0, "samples 4": 3.0, "loss": 1.5}
    other.reset()
    assert other.read() == {}


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
        ((torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_what_is_no_classifier_has_no_accuracy(output, target):
    meter = Meter(torch.device("cpu"))
    meter.add_branch("", output, target)
    assert meter.read() == {}


def test_a_stage_that_starts_or_goes_on_drops_its_lines_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.start("float")
    assert not path.exists()
    for stage, step in (("float", 1), ("joint", 1), ("float", 2), ("float", 3)):
        file.write(stage, {"step": step})
    with path.open("a") as half:
        half.write('{"stage": "joint", "st')

    def steps(stage):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["step"] for line in lines if line["stage"] == stage]

    file.start("float", after_step=2)
    assert (steps("float"), steps("joint")) == ([1, 2], [1])
    file.start("float")
    assert (steps("float"), steps("joint")) == ([], [1])


def test_lines_that_are_no_records_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("a note\n[1]\n")
    MetricsFile(path).start("float")
    assert path.read_text() == "a note\n[1]\n"


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"stage": "float", "step": "2"}', "\x80", "9" * 5000]
)
def test_lines_that_cannot_be_understood_are_kept(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    own = '{"stage": "float", "step": 2}\n'
    path.write_bytes(f"{line}\n{own}".encode("latin-1"))
    MetricsFile(path).start("float", after_step=1)
    assert path.read_bytes() == f"{line}\n".encode("latin-1")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"loss": 1.0}, "'loss' is no sum"),
        ({"loss": torch.zeros(2, dtype=torch.float64)}, "'loss' is no sum"),
        ({"correct 4": torch.zeros((), dtype=torch.float64)}, "'samples 4' is missing"),
    ],
)
def test_a_meter_refuses_what_are_no_sums(state, message):
    with pytest.raises(ValueError, match=message):
        Meter(torch.device("cpu")).load_state_dict(state)


def test_records_have_loss_accuracy_speed_and_memory(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    data = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(5)]
    file = MetricsFile(tmp_path / "metrics.jsonl")
    recording = Recording(journal=Journal("tune", [file]), log_steps=2)
    finetune(model, data, epochs=2, recording=recording)
    records = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 5, 6, 8, 10, 10]
    assert ["epoch" in record for record in records].count(True) == 2
    for record in records:
        assert record["stage"] == "tune"
        assert 0 <= record["accuracy"] <= 1
        assert record["images_per_second"] > 0
        assert record["rss_bytes"] > 2**20
        assert record["lr"] >= 0
    epoch = [record for record in records if record["step"] <= 5]
    loss = (2 * epoch[0]["loss"] + 2 * epoch[1]["loss"]) / 5
    assert epoch[2]["loss"] > loss


def test_tensorboard_events_hold_every_number_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for after in (0, 2):
        board = TensorBoard(tmp_path)
        journal = Journal("joint", [board])
        journal.start(after)
        for step in range(after + 1, 5 - after // 2):
            journal.write({"step": step, "loss": step / 2, "branches": {"4": {"accuracy": 0.5}}})
        board.close()
    events = reader.EventAccumulator(str(tmp_path / "joint"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["branches/4/accuracy", "loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
    ]


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'limpq_ext\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_resident_memory_is_that_of_this_process():
    assert 10 * 2**20 < resident_bytes() < 100 * 2**30
