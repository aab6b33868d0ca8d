"""The events of a run, delivered to its listeners."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from fl_runtime.types import Event, Listener

log = logging.getLogger(__name__)


class Events:
    """Delivers events to listeners one at a time and in order, in a thread of its own.

    A slow listener delays only the other listeners, and one that raises an exception does not stop the run.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = listeners
        self._queue: queue.SimpleQueue[Event | threading.Event | None] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._thread = threading.Thread(target=self._deliver, name="fl-events", daemon=True)
        self._thread.start()

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Queue an event. It never blocks, and may be called under any lock."""
        self._queue.put(Event(kind, time.time(), round, site, data))

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
        while (event := self._queue.get()) is not None:
            if isinstance(event, threading.Event):
                event.set()
                continue
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # the run must not end because of a listener
                    log.exception("a listener failed at event %s", event.kind)
