"""Joint training of twelve thousand steps on the digits recipe: memory does not grow."""

import itertools
import time

import pytest
import torch
from torch.nn import functional as F

from limpq_ext import JointTrainer, prepare
from limpq_ext.app.recipe import Recipe
from limpq_ext.app.session import Session
from limpq_ext.data.loading import make_loader
from limpq_ext.training.loop import Recording, run_epochs
from limpq_ext.training.metrics import Journal, Meter, MetricsFile, resident_bytes
from limpq_ext.training.optimizers import make_optimizer

STEPS = 12_000
WARM = 1_000
"""Steps after which nothing new is allocated."""


@pytest.mark.slow
def test_memory_does_not_grow_over_twelve_thousand_steps(tmp_path, capsys):
    recipe = Recipe()
    session = Session(recipe)
    model = prepare(session.create_model(), recipe.bits, example_input=session.example_input())
    model.train()
    optimizer = make_optimizer(model, lr=recipe.joint.lr)
    meter = Meter(torch.device("cpu"))
    trainer = JointTrainer(model, optimizer, F.cross_entropy, on_branch=meter.add_branch)
    loader = make_loader(session.data.train, batch_size=recipe.joint.batch_size, train=True)
    memory, times = [], [time.perf_counter()]

    def take_step(x, target):
        return torch.stack(list(trainer.step(x, target).losses.values())).mean()

    def on_step(done, total):
        if done % 500 == 0:
            times.append(time.perf_counter())
        if done % WARM == 0:
            memory.append(resident_bytes())

    journal = Journal("joint", [MetricsFile(tmp_path / "metrics.jsonl")])
    run_epochs(
        take_step,
        optimizer,
        loader,
        model=model,
        epochs=-(-STEPS // len(loader)),
        parts={"trainer": trainer},
        meter=meter,
        recording=Recording(journal=journal, log_steps=100),
        on_step=on_step,
    )
    with capsys.disabled():
        milliseconds = [2 * (b - a) for a, b in itertools.pairwise(times)]
        print("\nms per step:", " ".join(f"{value:.1f}" for value in milliseconds))
        print("RSS in MB:", " ".join(f"{value / 1e6:.1f}" for value in memory))
    assert trainer.steps >= STEPS
    assert memory[-1] - memory[0] < 16 * 2**20
