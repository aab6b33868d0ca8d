"""Listener that turns server events into the simulation's result, and one that passes events on to several others."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

from fl_adapters.environments.outcome import AFTER_THE_LAST_ROUND
from fl_runtime.types import Event, Listener


class RunTracker:
    """Listener that records which sites joined or left, and how far the run has come.

    Attributes:
        joined: Names of the sites that reached the server.
        first_dropout: Name of the site that dropped out first, or "" if none has.
        started: Start of round 1 in seconds of `time.monotonic`, or None before it.
    """

    def __init__(self) -> None:
        self.joined: set[str] = set()
        self.first_dropout = ""
        self._round, self._training = 0, 1
        self._finished = False
        self.started: float | None = None
        self._left: dict[str, bool] = {}
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            if event.kind == "joined":
                self.joined.add(event.site)
                self._left.pop(event.site, None)
            elif event.kind == "started":
                self._training, self._round, self._finished = event.data.get("training", 1), 0, False
            elif event.kind == "round_started":
                self._round = event.round
                self.started = self.started or time.monotonic()
            elif event.kind == "finished":
                self._finished = True
            elif event.kind == "left":
                self._left[event.site] = event.data["early"]
                if event.data["early"] and not self.first_dropout:
                    self.first_dropout = event.site
                self._changed.notify_all()

    def progress_of(self, site: str) -> str:
        """How far the run has come for a site, as the end of a sentence: "in round 3"."""
        if self._finished:
            return AFTER_THE_LAST_ROUND
        if site not in self.joined:
            return "before it joined"
        of_training = f" of training {self._training}" if self._training > 1 else ""
        return (f"in round {self._round}" if self._round else "before round 1") + of_training

    def left_early(self, site: str, timeout_s: float = 2.0) -> bool:
        """Whether a site left before the end of the run. Waits for its "left" event, which may still be on its way."""
        with self._changed:
            self._changed.wait_for(lambda: site in self._left, timeout_s)
            return self._left.get(site, True)


class FanOut:
    """Listener that passes each event to several listeners, one event at a time, whichever thread it comes from."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            for listener in tuple(self._listeners):
                try:
                    listener(event)
                except Exception as error:  # a user's listener must not end the run
                    self._listeners.remove(listener)
                    print(f"fl-adapters: a listener failed and gets no more events: {error!r}", file=sys.stderr)
