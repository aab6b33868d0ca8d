"""The events of a job of a federation, copied into a folder, so that the pages of runs in a folder show it."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fl_adapters.dashboard.federation.following import Follower
from fl_adapters.environments.download import event_files, event_key, job_file, too_many_events
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.text import parse_json
from fl_runtime.trainings import EVENTS, training_folder
from fl_runtime.transport.base import Transport

_MOST_BYTES = 2**29
_LINE_CHARS = 2**24
_OVERLAP_S = 60.0  # how far events may stand out of order
IDLE_S = 30.0
"""Seconds after which a job is not followed any more if nobody looks at it."""


class JobEvents:
    """Copies a job's events into a folder while somebody looks at them.

    What the server has on disk is fetched first, then what happens is added as it happens.

    Attributes:
        folder: The folder, with events.jsonl and job.yml.
    """

    def __init__(self, transport: Transport, job: str, folder: Path) -> None:
        """Begin to copy.

        Args:
            transport: Connection to the server; it stays open.
            job: Name of the job, which is safe as the name of a folder.
            folder: Folder for the copy; created if missing.
        """
        self.folder = folder
        self._transport, self._job = transport, job
        self._lock = threading.Lock()
        self._fault: FederationError | None = None
        self._fetched = False
        self._ended = False
        self._training, self._bytes, self._next = 1, 0, 0
        self._latest: dict[tuple[float, str, str], None] = {}
        self._follower = self._begun()

    @property
    def fault(self) -> FederationError | None:
        """Why events are missing at this moment; None if none are."""
        return self._fault

    def touch(self, *, ended: bool) -> None:
        """Note that somebody looks at the job. A copy that had ended goes on if there may be more.

        Args:
            ended: Whether the job has ended, as the server says.
        """
        with self._lock:
            self._follower.touch()
            if self._follower.over and (not self._ended or not ended):
                self._ended, self._next = False, 0
                self._follower = self._begun()

    def close(self) -> None:
        """Stop copying. The folder stays."""
        self._follower.close()

    def _begun(self) -> Follower:
        return Follower(self._transport, "Watch", self._request, self._take, self._fail, IDLE_S)

    def _request(self) -> Mapping[str, Any]:
        if not self._fetched:
            self._fetch()
            self._fetched = True
        return {"job": self._job, "from": self._next}

    def _take(self, answer: Mapping[str, Any]) -> bool:
        self._fault = None
        if "ended" in answer:
            self._ended = True
            return False
        event = answer["event"]
        self._next = int(answer["number"]) + 1
        key = event_key(event)
        oldest = next(reversed(self._latest), (0.0, "", ""))[0] - _OVERLAP_S
        if key[0] >= oldest and key not in self._latest:
            if event["kind"] == "started":
                number = event["data"].get("training", 1)
                self._training = number if type(number) is int and 0 < number < 10**6 else self._training
            self._add(self._training, [json.dumps(event)])
            self._remember(key)
        return True

    def _fail(self, error: FederationError) -> None:
        self._fault = error

    def _fetch(self) -> None:
        """Fetch the events that the server has on disk, training by training, and the job's settings."""
        control = ControlClient(self._transport)
        settings = control.ask("ShowJob", job=self._job).get("settings")
        self._write(self.folder / "job.yml", job_file(settings), "w")
        with suppress(ConfigError):  # it has no events yet
            for number, data in enumerate(event_files(control, self._job, _MOST_BYTES), 1):
                self._take_file(number, data)

    def _take_file(self, number: int, data: bytes) -> None:
        lines = data.decode(errors="replace").splitlines()
        if data and not data.endswith(b"\n"):
            lines.pop()  # which is being written, and comes again as an event
        self._training = number
        self._add(number, lines)
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._remember(event_key(parse_json(line, limit_chars=_LINE_CHARS)))

    def _remember(self, key: tuple[float, str, str]) -> None:
        """Remember an event, and forget those that are too old to come again."""
        self._latest[key] = None
        while len(self._latest) > 1 and (first := next(iter(self._latest)))[0] < key[0] - 2 * _OVERLAP_S:
            del self._latest[first]

    def _add(self, training: int, lines: list[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        self._bytes += len(text)
        if self._bytes > _MOST_BYTES:
            raise too_many_events(self._job, _MOST_BYTES)
        self._write(training_folder(self.folder, training) / EVENTS, text, "a")

    def _write(self, path: Path, text: str, mode: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise disk_error(error, path) from error
