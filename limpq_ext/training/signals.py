"""How a run ends early: stopped by a signal, or since process 0 failed. Needs no torch."""

from __future__ import annotations


class Interrupted(SystemExit):
    """The training was stopped by a signal after it had finished its step.

    Uncaught, it ends the process with the conventional status, 128 + the signal's number.

    Attributes:
        reason: One sentence for the user.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(128 + number)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class MainProcessError(RuntimeError):
    """Process 0 failed at something that it does for all; raised in the others."""
