"""Turns the events of a job into the records of its runs, for all of its trackers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from fl_adapters.environments.tracking.background import Background, say_on_stderr
from fl_adapters.environments.tracking.records import Begin, End, EndState, Metrics, Point, TrackedRun, Tracker
from fl_adapters.environments.tracking.targets import make_trackers
from fl_runtime.errors import AbortedError, ConfigError
from fl_runtime.text import printable
from fl_runtime.trainings import training_folder, training_name
from fl_runtime.types import Event

END_S = 60.0
"""Seconds that the trackers of a job have at its end for what they have not sent."""
_IDENTITY = "tracked.txt"


class Tracking:
    """Listener that sends a job to its trackers, behind a queue and a thread for each.

    Args:
        targets: The trackers: texts such as "mlflow:URI", or functions.
        job: Name of the job.
        identity: Text that no other job has, and that stays the same when this one is resumed.
        params: The job's settings.
        say: Shows a line about a tracker that fails.

    Raises:
        ConfigError: A tracker is unknown, or its package is missing.
    """

    def __init__(
        self,
        targets: Sequence[str | Tracker],
        job: str,
        identity: str,
        params: Mapping[str, Any],
        say: Callable[[str], None] = say_on_stderr,
    ) -> None:
        self._sinks = [Background(made.name, made.tracker, say=say) for made in make_trackers(targets)]
        self._job, self._identity = job, identity
        self._params = {name: _text(value) for name, value in params.items() if value not in (None, "", (), [], {})}
        self._runs: dict[int, TrackedRun] = {}
        self._points: dict[int, list[Point]] = {}

    @classmethod
    def of_folder(cls, targets: Sequence[str | Tracker], job: str, folder: Path, params: Mapping[str, Any]) -> Self:
        """Track a job whose folder is on this machine. A job that is resumed continues its tracked run.

        Args:
            targets: The trackers.
            job: Name of the job.
            folder: The job's folder. It keeps the identity of the job.
            params: The job's settings.

        Returns:
            The listener.
        """
        if not targets:
            return cls((), job, "", params)
        file = folder / _IDENTITY
        try:
            if not file.exists():
                file.write_text(uuid.uuid4().hex, encoding="utf-8")
            identity = file.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot track this run: {error}", where=str(file), fix="make it writable") from None
        return cls(targets, job, identity, params)

    def __call__(self, event: Event) -> None:
        """Take an event of the job. Never blocks.

        Args:
            event: The next event.
        """
        if not self._sinks:
            return
        number = event.data.get("training", 1)
        data = event.data
        match event.kind:
            case "started":
                self._begin(number)
            case "update" if data["status"] in ("used", "carried"):
                self._add(number, event, f"site/{printable(event.site, 64)}/", data.get("metrics"))
            case "report":
                self._add(number, event, f"site/{printable(event.site, 64)}/", data["metrics"])
            case "round_finished":
                costs = {name: data[name] for name in ("seconds", "bytes_up", "bytes_down")}
                self._add(number, event, "", data["metrics"])
                self._add(number, event, "round/", costs)
                self.flush(number)
            case "scored":
                self._add(number, event, "", data["metrics"])
                self.flush(number)

    @contextmanager
    def until_the_end(self, folder: Path) -> Iterator[None]:
        """Close when the block ends. An error in it means that the job failed, Ctrl-C that it was killed.

        Args:
            folder: Folder with what the job has left at the end of the block.
        """
        try:
            yield
        except (KeyboardInterrupt, AbortedError):
            self.close("killed", folder)
            raise
        except BaseException:
            self.close("failed", folder)
            raise
        self.close("finished", folder)

    def close(self, state: EndState | None, folder: Path, timeout_s: float = END_S) -> int:
        """Tell the trackers of the job's end, and wait until they have sent all. Says what was lost.

        Args:
            state: How the job ended; None if it goes on and is no longer followed.
            folder: Folder with what it has left.
            timeout_s: How long to wait at most for all trackers together, in seconds.

        Returns:
            Number of records that were not sent.
        """
        for number, run in self._runs.items():
            self.flush(number)
            if state is not None:
                ended = state if number == max(self._runs) else "finished"
                self._put(End(run, ended, training_folder(folder, number)))
        return sum(sink.close(timeout_s / len(self._sinks)) for sink in self._sinks)

    def _begin(self, number: int) -> None:
        if number not in self._runs:
            identity = self._identity if number == 1 else f"{self._identity}/{number}"
            self._runs[number] = TrackedRun(training_name(self._job, number), identity)
            self._put(Begin(self._runs[number], self._params))

    def _add(self, number: int, event: Event, prefix: str, metrics: Mapping[str, float | None] | None) -> None:
        points = self._points.setdefault(number, [])
        for name, value in (metrics or {}).items():
            if value is not None:  # what a line of events.jsonl has for NaN
                points.append(Point(f"{prefix}{printable(name, 200)}", float(value), event.round, event.time))

    def flush(self, number: int = 1) -> None:
        """Pass on the metrics that are known by now, without waiting for the end of a round.

        Args:
            number: Number of the training.
        """
        points = self._points.pop(number, [])
        if points:
            self._begin(number)  # a server that goes on with a run does not say again that it has started
            self._put(Metrics(self._runs[number], tuple(points)))

    def _put(self, record: Begin | Metrics | End) -> None:
        for sink in self._sinks:
            sink.put(record)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_listed)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Iterable) else str(value)
