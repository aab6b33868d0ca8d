"""Passes records to a tracker in a thread of its own, so that a slow or failing tracker does not hold up the run."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from fl_adapters.environments.tracking.records import Metrics, Record, Tracker
from fl_runtime.errors import ConnectionLostError
from fl_runtime.text import printable

_MOST_RECORDS = 10_000
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_FAILING_S = 5.0
_BETWEEN_METRICS_S = 2.0  # rounds may take milliseconds, and a tracker takes some of the processor for each record


def say_on_stderr(text: str) -> None:
    """Write a line to stderr, as commands do that end with their run."""
    print(f"fl-adapters: {text}", file=sys.stderr, flush=True)


class Background:
    """Queue and thread of one tracker. Metrics of one run go at most every two seconds, as one record.

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
        self._held: deque[Record | None] = deque(maxlen=1)  # taken from the queue, but not part of the last batch
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
        while batch := self._batch():
            self._send(batch)
            for _ in batch:
                self._queue.task_done()
            if isinstance(batch[0], Metrics):
                self._closing.wait(_BETWEEN_METRICS_S)
        self._ended.set()

    def _batch(self) -> list[Record]:
        """Wait for the next record. Returns it, with the metrics of the same run that follow it; nothing at the end."""
        first = self._held.popleft() if self._held else self._queue.get()
        batch = [] if first is None else [first]
        while isinstance(first, Metrics) and not self._queue.empty():  # this thread alone takes from it
            record = self._queue.get()
            if not isinstance(record, Metrics) or record.run != first.run:
                self._held.append(record)
                break
            batch.append(record)
        return batch

    def _send(self, batch: Sequence[Record]) -> None:
        """Send records as one, again and again while the tracker's server or disk is away."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                self._tracker(_as_one(batch))
                self._failing = False
                return
            except (OSError, ConnectionLostError) as error:
                self._failing = True
                self._warn(f"{error}; tries again until the run ends")
                if time.monotonic() + pause_s > self._deadline:
                    self._lost += len(batch)
                    return
            except Exception as error:  # whatever a tracker raises, the run goes on
                if len(batch) > 1:  # one of them may be what it does not take
                    for record in batch:
                        self._send([record])
                    return
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


def _as_one(batch: Sequence[Record]) -> Record:
    """The record of a batch: itself, or the metrics of all of them."""
    first = batch[0]
    if not isinstance(first, Metrics):
        return first
    metrics = [record for record in batch if isinstance(record, Metrics)]
    return Metrics(first.run, tuple(point for record in metrics for point in record.points))
