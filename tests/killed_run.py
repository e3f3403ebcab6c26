"""A run that kills itself at seeded moments, again and again, until it is left alone.

    python killed_run.py RECIPE OUT --kills N --seed S

Alone, it forks a child for every attempt. Under torchrun, one process of every attempt kills itself
and torchrun starts all again.
"""

import argparse
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from limpq_ext.app import run as pipeline
from limpq_ext.app.recipe import load_recipe
from limpq_ext.data.datasets import load_data
from limpq_ext.training.distributed import process_group


class Quiet:
    """A reporter that kills the process after some steps."""

    def __init__(self, steps=None):
        self.left = steps

    def say(self, line):
        print(line, flush=True)

    @contextmanager
    def stage(self, title):
        yield self.on_step

    def on_step(self, done, total):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                kill()


def kill():
    print("killed", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_call(owner, name, number, *, after):
    """Kill this process around a call of a function."""
    original = getattr(owner, name)
    calls = 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            kill()
        result = original(*arguments, **options)
        if calls == number and after:
            kill()
        return result

    setattr(owner, name, counted)


def most_steps(kills):
    """A run has 54 steps and a checkpoint after every third."""
    return max(6, 100 // kills)


def arm(chance, kills):
    """Choose a moment, the earlier the more there are, and give the reporter that brings it."""
    calls = max(4, 40 // kills)
    kind = chance.choice(("step", "write", "rename", "time"))
    if kind == "step":
        return Quiet(chance.randint(1, most_steps(kills)))
    if kind == "write":  # the temporary file is complete, and stays behind
        kill_at_call(os, "fsync", chance.randint(1, calls), after=False)
    elif kind == "rename":
        kill_at_call(Path, "replace", chance.randint(1, calls), after=chance.random() < 0.5)
    else:
        signal.signal(signal.SIGALRM, lambda *_: kill())
        signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.05, 12 / kills))
    return Quiet()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    if "RANK" in os.environ:
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        chance = random.Random(f"{options.seed} {attempt}")
        victim = chance.randrange(int(os.environ["WORLD_SIZE"]))
        steps = chance.randint(1, most_steps(options.kills))
        mine = victim == int(os.environ["RANK"]) and attempt < options.kills
        with process_group("cpu"):
            pipeline.run(recipe, options.out, reporter=Quiet(steps if mine else None))
        return
    load_data(recipe.data.name)  # imported once for all attempts
    for attempt in range(options.kills + 1):
        child = os.fork()
        if child == 0:
            reporter = Quiet()
            if attempt < options.kills:
                reporter = arm(random.Random(f"{options.seed} {attempt}"), options.kills)
            pipeline.run(recipe, options.out, reporter=reporter)
            sys.stdout.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not killed and status != 0:
            sys.exit(f"attempt {attempt} ended with status {status}")
        time.sleep(0.01)


if __name__ == "__main__":
    main()
