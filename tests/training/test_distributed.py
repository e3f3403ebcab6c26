"""Two processes that train together, started by torchrun, on the CPU with gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limpq_ext.data.loading import TrainingBatches
from limpq_ext.training import distributed

WORKER = Path(__file__).resolve().parents[1] / "distributed_worker.py"


def run(task, folder, processes):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(launcher if processes > 1 else ()), str(WORKER), task, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert told.returncode == 0, told.stderr


def load(folder, name):
    # Files of our own, with parameters in them.
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_two_processes_on_halves_of_a_batch_equal_one_on_the_whole(tmp_path):
    for processes in (1, 2):
        run("frozen", tmp_path, processes)
    whole, half = load(tmp_path, "1-0"), load(tmp_path, "2-0")
    assert half["draw"] == whole["draw"]
    assert half["signed"].keys() == whole["signed"].keys()
    for name, value in whole["signed"].items():
        assert torch.equal(half["signed"][name], value), name
    for name, loss in whole["losses"].items():
        torch.testing.assert_close(half["losses"][name], loss, rtol=1e-6, atol=0)
    for name, value in whole["parameters"].items():
        torch.testing.assert_close(
            half["parameters"][name],
            value,
            rtol=1e-6,  # start values are computed in float32
            atol=1e-8,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for layer, other in zip(*(f["sensitivities"]["layers"] for f in (whole, half)), strict=True):
        for kind in ("weight", "activation"):
            assert other[kind] == pytest.approx(layer[kind], rel=1e-5)


def test_two_processes_have_the_same_bits_after_fifty_steps(tmp_path):
    run("joint", tmp_path, 2)
    first, second = load(tmp_path, "2-0"), load(tmp_path, "2-1")
    assert first["draw"] == second["draw"]
    for name, value in first["parameters"].items():
        assert value.isfinite().all()
        assert torch.equal(second["parameters"][name], value), name
    assert first["sensitivities"] == second["sensitivities"]


def test_one_exchange_handles_gradients_that_some_processes_have(tmp_path):
    run("exchange", tmp_path, 2)
    for number in (0, 1):
        found = load(tmp_path, str(number))
        means = {name: g if g is None else g.tolist() for name, g in found["grads"].items()}
        assert means == {"a": [1.5] * 3, "b": [2.0] * 3, "c": None, "d": [3.0] * 3}
        assert found["mean"].tolist() == [0.5]
        assert found["calls"] == 2  # who has what, and one bucket


def test_all_processes_name_what_one_of_them_sees(tmp_path):
    run("failure", tmp_path, 2)
    told = [(tmp_path / f"{number}.txt").read_text() for number in (0, 1)]
    assert told[0] == told[1]
    assert "step 2, branch '6': the loss became nan; it shows first in the batch itself" in told[0]
    assert "in process 1" in told[0]


def test_evaluation_and_batches_are_shared(tmp_path):
    for processes in (1, 2):
        run("evaluation", tmp_path, processes)
    whole, *halves = (load(tmp_path, name) for name in ("1-0", "2-0", "2-1"))
    for half in halves:
        assert half[0] == whole[0]
        assert half[1] == pytest.approx(whole[1], rel=1e-6)
        assert half[2:4] == whole[2:4] == [21, [6] * 6]
        assert half[4] == pytest.approx(whole[4], rel=1e-5)
        torch.testing.assert_close(half[5], whole[5])
    assert torch.equal(halves[0][5], halves[1][5])


def test_shares_of_a_batch_are_the_batch():
    whole = list(TrainingBatches(23, 6, 1, 0, 1))
    shares = [list(TrainingBatches(23, 6, 1, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    assert [len(batch) for batch in whole] == [6, 6, 6]
    assert len({index for batch in whole for _, index in batch}) == 18


def test_batches_go_on_from_a_position_and_change_with_the_epoch():
    batches = TrainingBatches(23, 6, 1, 0, 1)
    first, second = list(batches), list(batches)
    assert first != second
    batches.set_position(0, 2)
    assert list(batches) == first[2:]
    assert list(batches) == second
    assert len(batches) == 3


@pytest.mark.parametrize(
    ("size", "batch_size", "processes", "message"),
    [
        (9, 6, 4, "batch_size is 6, which 4 processes cannot share equally"),
        (1, 2, 2, "the data set has 1 samples, too few for 2 processes"),
    ],
)
def test_batches_that_cannot_be_shared_are_named(size, batch_size, processes, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(size, batch_size, 0, 0, processes)


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    shares = [list(TrainingBatches(5, 8, 0, rank, 2)) for rank in (0, 1)]
    assert [[len(batch) for batch in share] for share in shares] == [[2], [2]]


def test_buckets_keep_order_and_size(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 40)
    sizes = (4, 4, 4, 20, 1, 1)
    tensors = [torch.zeros(n, dtype=torch.float32) for n in sizes]
    tensors.insert(1, torch.zeros(2, dtype=torch.float64))
    buckets = distributed._buckets(tensors)
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[4, 4], [2], [4], [20], [1, 1]]


def test_alone_everything_is_as_it_was():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.agree(3, 0) == (3, 0)
    assert distributed.gather("x") == ["x"]
    assert distributed.from_main(lambda: 5) == 5
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
