"""The simulation's own ears: what it remembers of a run, and how all listeners hear of it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from fl_adapters.environments.outcome import AFTER_THE_LAST_ROUND
from fl_runtime.types import Event, Listener


class Watch:
    """A listener that remembers what the simulation itself needs to know.

    joined: sites that reached the server. first_out: the first site that dropped out early, "" if none has.
    started: when round 1 began, monotonic seconds.
    """

    def __init__(self) -> None:
        self.joined: set[str] = set()
        self.first_out = ""
        self._round = 0
        self._finished = False
        self.started: float | None = None
        self._left: dict[str, bool] = {}
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            if event.kind == "joined":
                self.joined.add(event.site)
            elif event.kind == "round_started":
                self._round = event.round
                self.started = self.started or time.monotonic()
            elif event.kind == "finished":
                self._finished = True
            elif event.kind == "left":
                self._left[event.site] = event.data["early"]
                if event.data["early"] and not self.first_out:
                    self.first_out = event.site
                self._changed.notify_all()

    def stage(self, site: str) -> str:
        """How far the run has come, as seen by a site: such as "in round 3"."""
        if self._finished:
            return AFTER_THE_LAST_ROUND
        if site not in self.joined:
            return "before it joined"
        return f"in round {self._round}" if self._round else "before round 1"

    def left_early(self, site: str, timeout_s: float = 2.0) -> bool:
        """Whether a site that is known to have left did so early; waits for the event that says so."""
        with self._changed:
            self._changed.wait_for(lambda: site in self._left, timeout_s)
            return self._left.get(site, True)


class FanOut:
    """One listener made of several, called by the server's threads and by the simulation, one event at a time."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            for listener in tuple(self._listeners):
                try:
                    listener(event)
                except Exception as error:  # somebody's listener must not end the run
                    self._listeners.remove(listener)
                    print(f"fl-adapters: a listener failed and is left out from now on: {error!r}", file=sys.stderr)
