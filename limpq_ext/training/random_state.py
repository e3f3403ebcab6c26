"""The random generators of a process, whose states a checkpoint keeps."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_NUMPY_WORDS = 624  # of the Mersenne Twister, which NumPy reads without a look at its place


def random_states() -> dict[str, Any]:
    """The states of this process's random generators: torch (CPU and CUDA), NumPy, Python."""
    # The global generator is the one that augmentations use.
    name, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(words, np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Put the random generators of this process back into these states."""
    torch.set_rng_state(states["torch"])
    name, words, place, *rest = states["numpy"]
    if type(place) is not int or not 0 <= place <= len(words) == _NUMPY_WORDS:
        raise ValueError("random: numpy: is no state of its generator")
    np.random.set_state((name, words.numpy().astype(np.uint32), place, *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
