import os
import signal

import pytest
import torch
from classifiers import batches, network

from limpq_ext import finetune
from limpq_ext.training.checkpoint import Checkpoint
from limpq_ext.training.loop import Recording
from limpq_ext.training.signals import Interrupted


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="cannot train on an empty data set"):
        finetune(network(), [], epochs=1)


def test_a_loss_that_becomes_nan_ends_the_training():
    data = [(x * float("nan"), t) for x, t in batches()]
    with pytest.raises(ValueError, match=r"step 1: the loss became nan; .* in the batch itself"):
        finetune(network(), data, epochs=1)


def test_a_loader_without_a_length_is_an_error():
    with pytest.raises(ValueError, match="the loader has no length"):
        finetune(network(), iter(batches()), epochs=1)


class Loader:
    """Batches, numbered, and a length that may be wrong."""

    def __init__(self, counts, length):
        self.counts, self.length, self.given = list(counts), length, []

    def __len__(self):
        return self.length

    def __iter__(self):
        self.given.append([])
        count = self.counts[len(self.given) - 1]
        for number, batch in enumerate(batches(count) if count else []):
            self.given[-1].append(number)
            yield batch


def test_a_loader_that_gives_fewer_batches_than_its_length_begins_every_epoch_at_its_first():
    loader = Loader([3, 2, 5], length=5)
    with pytest.warns(UserWarning, match=r"the loader gave") as warned:
        records = finetune(network(), loader, epochs=3, lr=0.01)
    assert [str(warning.message) for warning in warned] == [
        "epoch 1: the loader gave 3 batches, but its length is 5, by which the learning rate falls"
    ]
    assert loader.given == [[0, 1, 2], [0, 1], [0, 1, 2, 3, 4]]
    assert [(record["epoch"], record["step"]) for record in records] == [(1, 3), (2, 5), (3, 10)]


def test_a_loader_that_gives_more_batches_than_its_length_begins_every_epoch_at_its_first():
    loader = Loader([4, 4], length=2)
    records = finetune(network(), loader, epochs=2, lr=0.01)
    assert loader.given == [[0, 1], [0, 1]]
    assert [record["step"] for record in records] == [2, 4]


@pytest.mark.filterwarnings("ignore:epoch .* the loader gave")
@pytest.mark.parametrize("log_steps", [0, 1, 3])
@pytest.mark.parametrize("stop", [2, 3, 4, 5])
def test_a_training_with_short_epochs_goes_on_where_it_was_stopped(tmp_path, stop, log_steps):
    def train(counts, recording=None, on_step=None):
        model = network()
        options = {"recording": recording, "on_step": on_step, "lr": 0.1}
        records = finetune(model, Loader(counts, length=4), epochs=3, **options)
        return [r["loss"] for r in records], [r["step"] for r in records], model.state_dict()

    def interrupt(done, total):
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    recording = Recording(Checkpoint(tmp_path / "checkpoint"), log_steps=log_steps)
    whole = train([3, 2, 4])
    with pytest.raises(Interrupted):
        train([3, 2, 4], recording, interrupt)
    # The loader starts anew in the epoch that was stopped.
    losses, steps, state = train([3, 2, 4][stop > 3 :], recording)
    assert losses == pytest.approx(whole[0], rel=1e-12)
    assert steps == whole[1] == [3, 5, 9]
    assert all(torch.equal(whole[2][name], value) for name, value in state.items())


def test_an_epoch_without_a_batch_is_an_error():
    with pytest.raises(ValueError, match="epoch 2: the loader gave no batches"):
        finetune(network(), Loader([2, 0], length=2), epochs=2)
