"""How long a site trains in each round, and how far it is: measured here, and told to the server while it lasts."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fl_runtime.client.calls import PatientCalls
from fl_runtime.errors import FederationError
from fl_runtime.transport.threads import start_thread
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

_NOTE = "training.json"
_LOOK_S = 1.0
_REPORTS_PER_S = 50
"""Most reports of all sites of a run together, in a second."""


@dataclass(frozen=True)
class StepCount:
    """How far the local training of a round is.

    Attributes:
        done: Steps so far: optimizer steps, boosting rounds, or whatever else the trainer counts.
        total: The round's budget in the same unit; 0 if unknown.
    """

    done: int
    total: int = 0


@dataclass(frozen=True)
class TrainingNote:
    """Where a script's training stands, left in its kit's folder for the command that started it at the site.

    Attributes:
        job: Name of the training.
        round: Number of the round that it trains, or has trained last.
        rounds: Number of rounds of the run.
        trains: Whether it trains now. Otherwise it waits for the server.
        done: Steps of the round so far; 0 if they are not counted.
        total: Steps of the whole round; 0 if unknown.
        train_s: Seconds that it has trained in the round.
    """

    job: str
    round: int
    rounds: int
    trains: bool
    done: int = 0
    total: int = 0
    train_s: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> TrainingNote | None:
        """Return the note in a folder, or None if there is none that can be read."""
        try:
            noted = json.loads((folder / _NOTE).read_text("utf-8")).items()
            known = {field.name for field in fields(cls)}  # a script of a later version may say more
            return cls(**{name: value for name, value in noted if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, folder: Path) -> None:
        """Write the note into a folder. A folder that cannot be written does not stop the training."""
        part = folder / f"{_NOTE}.part"
        with suppress(OSError):
            part.write_text(json.dumps(asdict(self)), "utf-8")
            part.replace(folder / _NOTE)


class LocalTraining:
    """Measures the local training of one site, and reports its steps.

    A thread asks the trainer for its steps and sends them in a short call of its own: once a second, or less often in
    runs with more than 50 sites. Rounds shorter than that are not reported. The thread that trains does nothing for it.
    What cannot be sent is forgotten.
    """

    def __init__(self, calls: PatientCalls) -> None:
        """Make an object that measures, and reports nothing before `share`.

        Args:
            calls: The site's calls.
        """
        self._calls = calls
        self._session: pb.Session | None = None
        self._report_s = 1.0
        self._allowed: Callable[[], bool] = bool
        self._steps: Callable[[], StepCount | None] = _unknown
        self._round, self._began, self._away_s = 0, 0.0, 0.0
        self._folder: Path | None = None
        self._job, self._rounds = "", 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self, session: pb.Session, sites: int) -> None:
        """Let `share` have an effect: the server takes reports.

        Args:
            session: The session of the site's process.
            sites: Number of sites in the run.
        """
        self._session, self._report_s = session, max(1.0, sites / _REPORTS_PER_S)

    def leave_notes(self, folder: Path, job: str, rounds: int) -> None:
        """Leave a `TrainingNote` in a folder of this machine, once a second while it changes. Call it before `share`.

        Args:
            folder: The folder.
            job: Name of the training.
            rounds: Number of rounds of the run.
        """
        self._folder, self._job, self._rounds = folder, job, rounds

    def share(self, steps: Callable[[], StepCount | None] | None, allowed: Callable[[], bool]) -> None:
        """Tell the server how long this site trains, and how far it is.

        Args:
            steps: Returns how far the trainer is, or None if it does not know. Called in another thread, at most once a
                second; an exception counts as None. None for a trainer that counts no steps.
            allowed: Whether the site's policy allows it now.
        """
        self._allowed = allowed
        tells = steps is not None and self._session is not None
        if not (tells or self._folder) or self._thread is not None:
            return
        self._steps = steps or _unknown
        self._thread = start_thread(self._report, "fl-steps")

    def begin(self, round: int) -> None:
        """Begin to measure: the task of a round has arrived."""
        self._round, self._began, self._away_s = round, time.monotonic(), 0.0

    def end(self) -> float:
        """End the round's training.

        Returns:
            Its seconds, without those of calls to the server; 0 if the policy keeps them, or if nothing was trained.
        """
        train_s = round(self._seconds(), 6) if self._round and self._allowed() else 0.0
        self._round = 0
        return train_s

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Leave the time of this block out of the measurement: the site waits for the server."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._away_s += time.monotonic() - began

    def close(self) -> None:
        """End the thread. May be called more than once."""
        self._closed.set()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._began - self._away_s, 0.0)

    def _report(self) -> None:
        last: tuple[int, StepCount] | None = None
        noted: TrainingNote | None = None
        told_at = -math.inf
        while not self._closed.wait(_LOOK_S):
            number, train_s, steps = self._round, self._seconds(), self._counted()
            if number != self._round:
                continue  # the round has changed while its steps were counted
            if self._folder is not None:
                noted = self._note(self._folder, number, train_s, steps, noted)
            trains = number > 0 and train_s >= self._report_s and self._allowed()
            if self._session is None or steps is None or not trains or (number, steps) == last:
                continue
            if time.monotonic() < told_at + self._report_s - _LOOK_S / 2:
                continue
            last, told_at = (number, steps), time.monotonic()
            self._tell(pb.TrainingSteps(round=number, done=steps.done, total=steps.total, train_s=train_s))

    def _tell(self, steps: pb.TrainingSteps) -> None:
        message = pb.SessionRequest(session=self._session, steps=steps).SerializeToString()
        try:
            with self._calls.begin("Attend", message) as call:
                for _ in call:
                    pass
        except FederationError as error:  # the calls of the site's own thread decide when to give up
            log.debug("the server was not told of steps: %s", error)

    def _note(
        self, folder: Path, number: int, train_s: float, steps: StepCount | None, before: TrainingNote | None
    ) -> TrainingNote:
        """Leave a note if it is another one than before; returns it."""
        if number:
            done, total = (steps.done, steps.total) if steps else (0, 0)
            note = TrainingNote(self._job, number, self._rounds, True, done, total, round(train_s, 3))
        else:
            note = replace(before, trains=False) if before else TrainingNote(self._job, 0, self._rounds, False)
        if note != before:
            note.write(folder)
        return note

    def _counted(self) -> StepCount | None:
        try:
            steps = self._steps()
        except Exception as error:  # the trainer's own thread may be in the middle of a change
            log.debug("steps cannot be counted now: %r", error)
            return None
        if steps is None or steps.done < 0:
            return None
        return steps if steps.done <= steps.total else StepCount(steps.done)


def _unknown() -> None:
    """Stand in for a trainer that counts no steps."""
