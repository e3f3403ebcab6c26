"""How a run ends early: stopped by a signal, or since process 0 failed. Needs no torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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


class StopSignals:
    """Notices SIGINT and SIGTERM, so that the step that runs can be finished.

    A second signal ends the process at once. Signals reach only the main thread; in another one
    this does nothing.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def noticed(self) -> Iterator[None]:
        """Notice signals for as long as the block lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Interrupted(number, "stopped at once by a second signal; no checkpoint written")
        self.received = number


class MainProcessError(RuntimeError):
    """Process 0 failed at something that it does for all; raised in the others."""
