"""The trainings of one job, one after another: the k-th training of a site's script meets the k-th of the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from google.protobuf.message import Message

from fl_runtime.errors import ConfigError, FederationError, ProtocolError, StoreError
from fl_runtime.server.calls.requests import DescribedLimit, first_request, session_job
from fl_runtime.server.records.events import Events, Silent, TrainingEvents
from fl_runtime.server.records.history import History
from fl_runtime.server.records.results import RunResult
from fl_runtime.server.trainings.training import Training, TrainingOptions
from fl_runtime.trainings import parsed_name, training_folder, training_name
from fl_runtime.transport.base import Peer
from fl_runtime.types import Listener, RunSettings
from fl_runtime.wire.fl.v1 import federation_pb2 as pb


class Trainings:
    """The trainings of one job. Its methods may be called from any thread.

    The first training exists from the start. The others begin when the first site joins them. Trainings that have ended
    are closed as soon as another one begins, and opened again for a restarted site, whose script comes by once more.
    """

    def __init__(
        self, settings: RunSettings, folder: Path, events: Events, options: TrainingOptions, *, record: bool
    ) -> None:
        """Open the trainings that the folder holds, or make the first one.

        Args:
            settings: The job's settings.
            folder: Folder of the job.
            events: Delivers the events of all trainings.
            options: What all trainings have in common.
            record: True to write a history into the folder of each training.

        Raises:
            ConfigError: The folder holds a run with other settings.
            StoreError: The folder cannot be written, or is damaged.
        """
        self._settings, self._folder, self._events, self._options = settings, folder, events, options
        self._record = record
        self._lock = threading.RLock()
        self._open: dict[int, Training] = {}
        self._histories: dict[int, History] = {}
        self._results: dict[int, RunResult] = {}
        self.count = 1
        while options.store.holds(self._run_folder(self.count + 1)):
            self.count += 1
        try:
            for number in range(1, self.count + 1):
                if number == self.count or not self._has_finished(number):
                    self._open[number] = self._opened(number)
            for number in range(1, self.count):
                if number in self._open and number + 1 in self._open:
                    self._open[number].precede(self._open[number + 1])
        except BaseException:
            self.close()
            self.close_histories()
            raise

    @property
    def newest(self) -> Training:
        """The training that began last."""
        with self._lock:
            return self._open[self.count]

    def begin(self) -> None:
        """Begin the trainings that have not ended."""
        with self._lock:
            for training in self._open.values():
                training.begin(self._ended)

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer one call of a site, in the training that it belongs to. See `fl_runtime.transport.base.Service`."""
        yield from self.answer(method, peer, first_request(method, requests, self.described_limit), requests)

    def answer(self, method: str, peer: Peer, request: Message, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Answer one call whose first message has been read; see `FederationService.answer`."""
        if isinstance(request, pb.JoinRequest):
            another = bool(request.follows) and request.follows != self._settings.name
            request.training = 1 if another else max(request.training, 1)
            training = self._entered(peer.name, request.training)
        else:
            training = self._named(session_job(request))
        yield from training.service.answer(method, peer, request, requests)

    def described_limit(self) -> DescribedLimit | None:
        """How long the description of tensors may be in any training; None if one has not begun."""
        return DescribedLimit.largest(training.service.described_limit() for training in self._all_open())

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until the last training has ended, and no site can begin another one.

        Args:
            timeout_s: How long to wait, in seconds; None for as long as it takes.

        Returns:
            True once that is so, False after the timeout.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            newest = self.newest
            if not newest.released.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return False
            if newest is self.newest:
                return True

    def fail(self, error: FederationError) -> None:
        """End all trainings that have not ended with an error that their sites get."""
        for training in self._all_open():
            training.run.state.fail(error)

    def site_left(self, name: str, reason: str) -> None:
        """Note that a site's process is known to be dead."""
        for training in self._all_open():
            training.run.membership.mark_gone(name, reason, early=True)

    def note_line(self, name: str, level: str, text: str) -> None:
        """Add a line of a site's own log to the events of the training that was opened last.

        Args:
            name: Name of the site.
            level: "info" or "warning".
            text: The line.
        """
        for training in self._all_open()[-1:]:
            training.run.state.events.emit("log", site=name, level=level, text=text)

    def refuse(self, name: str, reason: str, training: int, attempt: int | None) -> bool:
        """Note that a site takes part no more. The site speaks for a process that has ended, or for none.

        Args:
            name: Name of the site.
            reason: Why, for the events and error messages.
            training: Training that the process joined last, from 1.
            attempt: Number of the process there; None if the site has started none.

        Returns:
            False if another process of the site takes part, which goes on.
        """
        trainings = self._all_open()
        if any(_has_another_process(item, name, item.number == training, attempt) for item in trainings):
            return False
        for item in trainings:
            item.run.membership.mark_gone(name, reason, early=True)
        return True

    def expel(self, name: str, error: FederationError) -> None:
        """Exclude a site that may not take part any more. Its calls under way get the error."""
        for training in self._all_open():
            training.run.membership.expel(name, error)

    def result(self, number: int) -> RunResult:
        """The result of a training, as far as it has come."""
        with self._lock:
            if number in self._open:
                return self._open[number].result()
            if number not in self._results:
                training = self._visited(number)
                self._results[number] = training.result()
                training.close()
            return self._results[number]

    def export(self, number: int, folder: Path, which: Literal["final", "best"]) -> Path | None:
        """Write a global model of a training; see `Server.export`."""
        with self._lock:
            if number in self._open:
                return self._open[number].export(folder, which)
            training = self._visited(number)
            try:
                return training.export(folder, which)
            finally:
                training.close()

    def close(self) -> None:
        """Stop all trainings where their journals stand."""
        for training in self._all_open():
            training.close()

    def close_histories(self) -> None:
        """Close the files of the histories. Called once, after the last event has been delivered."""
        for history in self._histories.values():
            history.close()

    # -- entering a training -----------------------------------------------------------------------------------

    def _entered(self, site: str, number: int) -> Training:
        """The training that a site is about to join. It begins now if the site is the first to come to it."""
        with self._lock:
            failed = next((error for t in self._open.values() if (error := t.run.state.error)), None)
            if failed is not None:
                raise failed
            if number > self.count:
                self._begin_next(site, number)
            training = self._reopened(number)
            previous = self._open.get(number - 1)
        if previous is not None:
            previous.moved_on(site)
        self._close_idle()
        return training

    def _begin_next(self, site: str, number: int) -> None:
        newest, limit = self._open[self.count], self._settings.trainings
        member = newest.run.membership.members.get(site)
        with newest.run.state.lock:
            may_go_on = member is not None and member.attempt > 0 and bool(member.gone)
        older_end = all(t.run.ended.is_set() for t in self._open.values() if t is not newest)
        if number != self.count + 1 or not may_go_on or not older_end:
            raise ProtocolError(
                f"{site} cannot begin training {number}: it has not ended training {number - 1}",
                fix="start the site's script again",
            )
        if limit is not None and number > limit:
            raise ConfigError(
                f"the job holds {limit} training{'s'[: limit != 1]}; the script of {site} begins training {number}",
                where="trainings",
                fix=f"let the script train only {limit} time{'s'[: limit != 1]}, or raise trainings in the job",
            )
        if self._settings.names_initial:
            raise ConfigError(
                f"the job names its initial weights; the script of {site} begins training {number}, and only "
                "one training can begin with them",
                where="initial",
                fix="load the weights in the script, and leave initial out of the job",
            )
        training = self._opened(number)
        newest.precede(training)
        self._open[number], self.count = training, number
        training.begin(self._ended)

    def _named(self, job: str) -> Training:
        """The training of a session. One that was closed is opened, since the server may have been started again."""
        parsed = parsed_name(job)
        if parsed is not None and parsed[0] in ("", self._settings.name):
            number = parsed[1]
            training = self._open.get(number)  # without the lock, which is held while a model is read from the disk
            if training is not None:
                return training
            with self._lock:
                if 1 <= number <= self.count:
                    return self._reopened(number)
        raise ProtocolError(f"the job {job[:100]!r} does not run here any more", fix="start the site again")

    def _reopened(self, number: int) -> Training:
        if number not in self._open:
            self._open[number] = self._visited(number)
            self._open[number].begin(self._ended)
        return self._open[number]

    # -- opening and closing -----------------------------------------------------------------------------------

    def _run_folder(self, number: int) -> Path:
        return training_folder(self._folder, number) / "server"

    def _has_finished(self, number: int) -> bool:
        """Whether the run of this training has ended without an error."""
        journal = self._options.store.journal(self._run_folder(number))
        try:
            return journal.reader.finished()
        finally:
            journal.close()

    def _opened(self, number: int) -> Training:
        """Open a training, with a history if the job is recorded."""
        folder = training_folder(self._folder, number)
        listeners: list[Listener] = []
        if self._record:
            recorder = self._options.store.recorder(folder)
            self._histories[number] = History(folder)
            listeners = [self._histories[number], *([recorder] if recorder else [])]
        events = TrainingEvents(self._events, number, listeners)
        return Training(self._settings_of(number), folder, number, events, self._options)

    def _visited(self, number: int) -> Training:
        """Open a training that others follow. What happens in it leaves no events."""
        return Training(
            self._settings_of(number),
            training_folder(self._folder, number),
            number,
            Silent(),
            self._options,
            visited=True,
        )

    def _settings_of(self, number: int) -> RunSettings:
        return replace(self._settings, name=training_name(self._settings.name, number))

    def _close_idle(self) -> None:
        """Close the trainings before the newest that no site is in any more, so that memory does not grow."""
        with self._lock:
            idle = [training for number, training in self._open.items() if number < self.count and training.idle]
            for training in idle:
                self._results[training.number] = training.result()
                del self._open[training.number]
            histories = [self._histories.pop(t.number) for t in idle if t.number in self._histories]
        if histories:
            self._events.delivered()
        for training in idle:
            training.close()
        for history in histories:
            history.close()

    def _ended(self, training: Training) -> None:
        error = training.run.state.error
        if error is not None and not isinstance(error, StoreError):
            self.fail(error)

    def _all_open(self) -> list[Training]:
        with self._lock:
            return list(self._open.values())


def _has_another_process(training: Training, site: str, is_its_own: bool, attempt: int | None) -> bool:
    """Whether a process of the site takes part in a training, other than one with this number that was its own."""
    member = training.run.membership.members.get(site)
    if member is None:
        return False
    with training.run.state.lock:
        if is_its_own and attempt is not None:
            return member.attempt > attempt
        return member.attending > 0
