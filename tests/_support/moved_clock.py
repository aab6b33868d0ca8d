"""A clock that stands still until the test moves it on."""

from __future__ import annotations

import threading
import time

_LOOK_S = 0.02


class MovedClock:
    """A `Clock` whose hours pass when the test says so. Waits look at it every few real milliseconds."""

    def __init__(self) -> None:
        self._lock, self._now = threading.Lock(), 1_000.0

    def now(self) -> float:
        with self._lock:
            return self._now

    def pass_by(self, seconds: float) -> None:
        """Let so much time pass at once."""
        with self._lock:
            self._now += seconds

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, _LOOK_S))

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        condition.wait(min(timeout_s, _LOOK_S))
