"""The events of a run, delivered to its listeners."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fl_runtime.types import Event, Listener

log = logging.getLogger(__name__)


class Emitter(Protocol):
    """Takes the events of one run."""

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Queue an event. It never blocks, and may be called under any lock.

        Args:
            kind: What happened; see `Event`.
            round: Number of the round, 0 if the event belongs to none.
            site: Name of the site, "" if the event belongs to none.
            **data: Further facts; JSON values.
        """
        ...


class Events:
    """Delivers events to listeners one at a time and in order, in a thread of its own.

    A slow listener delays only the other listeners, and one that raises an exception does not stop the run.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._queue: queue.SimpleQueue[tuple[Event, Sequence[Listener]] | threading.Event | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._deliver, name="fl-events", daemon=True)
        self._thread.start()

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Queue an event; see `Emitter`."""
        self.deliver(Event(kind, time.time(), round, site, data), ())

    def deliver(self, event: Event, first: Sequence[Listener]) -> None:
        """Queue an event that the listeners in `first` receive before all others."""
        self._queue.put((event, first))

    def delivered(self, timeout_s: float | None = None) -> bool:
        """Wait until everything emitted so far has been delivered; False after `timeout_s` seconds.

        A listener must not call it.
        """
        mark = threading.Event()
        with self._lock:
            if not self._closed:
                self._queue.put(mark)
        if self._closed:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return mark.wait(timeout_s)

    def close(self) -> None:
        """Deliver everything emitted so far, and end the thread."""
        with self._lock:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _deliver(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            event, first = item
            for listener in (*first, *self._listeners):
                try:
                    listener(event)
                except Exception:  # the run must not end because of a listener
                    log.exception("a listener failed at event %s", event.kind)


class TrainingEvents:
    """The events of one training. They go to its own listeners, and to those of the job.

    From the second training on, `data["training"]` holds the number of the training.
    """

    def __init__(self, events: Events, number: int, listeners: Sequence[Listener]) -> None:
        self._events, self._number, self._listeners = events, number, listeners

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Queue an event; see `Emitter`."""
        numbered = {"training": self._number, **data} if self._number > 1 else data
        self._events.deliver(Event(kind, time.time(), round, site, numbered), self._listeners)


class Silent:
    """Takes events that nobody listens to."""

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Do nothing with the event; see `Emitter`."""
