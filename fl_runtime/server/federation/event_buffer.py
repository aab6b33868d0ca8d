"""The last events of a job, kept for callers that watch it."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from fl_runtime.types import Event

_EVENTS_KEPT = 20_000


class EventBuffer:
    """The last events of a job, numbered from 0, for callers that watch it. May be used by any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[Mapping[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._count = 0
        self._steps: dict[str, tuple[int, Mapping[str, Any]]] = {}  # site -> number and event, of the newest alone
        self._told = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no further event will come."""
        return self._closed

    def append(self, event: Event) -> None:
        """Add an event, as JSON values. Of "steps" the newest one of each site is kept."""
        values = {**asdict(event), "data": _json_values(dict(event.data))}
        with self._changed:
            if event.kind == "steps":
                self._told += 1
                self._steps[event.site] = self._told, values
            else:
                self._events.append(values)
                self._count += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Let the watchers end: no further event will come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def follow(
        self, number: int, beat_s: float, *, steps: bool = False
    ) -> Iterator[tuple[int, Mapping[str, Any] | None]]:
        """The events from a number on, until the buffer is closed.

        Args:
            number: Number of the first event. Older ones may have been dropped.
            beat_s: How long to wait for an event, in seconds, before None is yielded in its place.
            steps: Yield events of the kind "steps", too. They have the number of the event before them.

        Yields:
            Number and event, or number and None.
        """
        told = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._has_news, number, told if steps else None), beat_s)
                first = self._count - len(self._events)
                # a higher number than there are events was given by a server that has been restarted since
                number = max(number if number <= self._count else 0, first)
                events = list(self._events)[number - first :]
                passing = [event for at, event in self._steps.values() if at > told] if steps else []
                told, closed = self._told, self._closed
            for event in events:
                yield number, event
                number += 1
            for event in passing:
                yield number - 1, event
            if not events and not passing:
                if closed:
                    return
                yield number, None

    def _has_news(self, number: int, told: int | None) -> bool:
        """Whether there are events from a number on, or newer steps; None for steps that nobody asks for."""
        return number < self._count or self._closed or (told is not None and self._told > told)


def _json_values(value: Any) -> Any:
    """Return JSON values; "nan", "inf" and "-inf" stand for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(name): _json_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(item) for item in value]
    if isinstance(value, (str, int, type(None))) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
