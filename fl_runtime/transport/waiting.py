"""Waiting for another participant: the clock that measures it, and the moments at which a line about it is due."""

from __future__ import annotations

import threading
import time
from typing import Protocol

SILENCE_S = 30.0
"""Longest time in which nothing arrives in a call that waits, before the call is made again. Longer than any beat."""

_FIRST_REMINDER_S, _LONGEST_REMINDER_S = 60.0, 3600.0


class Clock(Protocol):
    """Monotonic time, and waits that are measured by it. A test passes one that it moves on itself."""

    def now(self) -> float:
        """Return the time in seconds. Only differences have a meaning."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return after so many seconds of this clock.

        Args:
            seconds: How long to sleep.
        """
        ...

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Wait for a condition's notification, at most for so many seconds of this clock.

        Args:
            condition: The condition, whose lock the caller holds.
            timeout_s: Longest wait, in seconds.
        """
        ...


class SystemClock:
    """The monotonic clock of this machine. A `Clock`."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        condition.wait(timeout_s)


class Reminders:
    """When a line on the screen is due that something is still waited for: after a minute, then at growing intervals
    of up to an hour."""

    def __init__(self) -> None:
        self._next_s = _FIRST_REMINDER_S

    @property
    def any(self) -> bool:
        """Whether a line was due since the wait began."""
        return self._next_s > _FIRST_REMINDER_S

    @property
    def next_s(self) -> float:
        """After how many seconds of waiting the next line is due."""
        return self._next_s

    def due(self, waited_s: float) -> bool:
        """Whether a line is due now. Each is due once.

        Args:
            waited_s: How long has been waited so far, in seconds.

        Returns:
            True if it is.
        """
        if waited_s < self._next_s:
            return False
        while self._next_s <= waited_s:
            self._next_s += min(self._next_s, _LONGEST_REMINDER_S)
        return True


def duration_text(seconds: float) -> str:
    """A duration as people say it: "45 s", "5 min", "2 h 5 min", "24 h", "3 days".

    Args:
        seconds: The duration, at least 0.

    Returns:
        The text, exact to about a hundredth.
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours <= 48:
        return f"{hours} h {minutes} min" if minutes and hours < 24 else f"{hours} h"
    return f"{round(hours / 24)} days"
