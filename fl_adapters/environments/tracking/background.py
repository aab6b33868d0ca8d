"""Passes records to a tracker in a thread of its own, so that a slow or failing tracker does not hold up the run."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from fl_adapters.environments.tracking.records import Record, Tracker
from fl_runtime.errors import ConnectionLostError
from fl_runtime.text import printable

_MOST_RECORDS = 10_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_FAILING_S = 5.0


def say_on_stderr(text: str) -> None:
    """Write a line to stderr, as commands do that end with their run."""
    print(f"fl-adapters: {text}", file=sys.stderr, flush=True)


class Background:
    """Queue and thread of one tracker.

    Args:
        name: What the user calls the tracker, such as "mlflow"; it begins the warnings.
        tracker: Receives the records.
        most_records: Records that may wait. Further ones are lost.
        say: Shows a line to whoever runs this process.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        most_records: int = _MOST_RECORDS,
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self._name, self._tracker, self._say = name, tracker, say
        self._queue: queue.Queue[Record | None] = queue.Queue(most_records)
        self._lost = 0
        self._warned = self._failing = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._deadline = float("inf")
        threading.Thread(target=self._work, name=f"fl-track-{name}", daemon=True).start()

    def put(self, record: Record) -> None:
        """Queue a record. Never blocks: a record that finds no room is lost.

        Args:
            record: The record.
        """
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._lost += 1
            self._warn(f"more than {self._queue.maxsize} records wait; further ones are lost")

    def close(self, timeout_s: float) -> int:
        """Wait until all records are sent, and end the thread. Says so if records were lost.

        Args:
            timeout_s: How long to wait at most, in seconds. A tracker that is failing now gets 5 seconds of it.

        Returns:
            Number of records that were not sent.
        """
        timeout_s = min(timeout_s, _FAILING_S) if self._failing else timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
        self._ended.wait(max(0.0, self._deadline - time.monotonic()))
        waiting = 0 if self._ended.is_set() else max(1, self._queue.unfinished_tasks - 1)  # without the None
        lost = self._lost + waiting
        if lost:
            self._say(
                f"tracking: {self._name}: {lost} records of the run were not sent; the run's own folder has all of them"
            )
        return lost

    def _work(self) -> None:
        while (record := self._queue.get()) is not None:
            self._send(record)
            self._queue.task_done()
        self._ended.set()

    def _send(self, record: Record) -> None:
        """Send a record, again and again while the tracker's server or disk is away."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._tracker(record)
                self._failing = False
                return
            except (OSError, ConnectionLostError) as error:
                self._failing = True
                self._warn(f"{error}; tries again until the run ends")
                if time.monotonic() + pause_s > self._deadline:
                    self._lost += 1
                    return
            except Exception as error:  # whatever a tracker raises, the run goes on
                self._warn(repr(error))
                self._lost += 1
                return
            # when the run ends, try at once, and then a few times more
            if self._closing.is_set():
                time.sleep(pause_s := _FIRST_PAUSE_S)
            else:
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            text = f"{self._name} does not take the run's records; the run goes on without it: {printable(what, 300)}"
            self._say(f"tracking: {text}")
