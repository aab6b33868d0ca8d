"""How long a site trains in each round, and how far it is: measured here, and told to the server while it lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fl_runtime.client.calls import PatientCalls
from fl_runtime.errors import FederationError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

log = logging.getLogger(__name__)

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
        self._interval_s = 1.0
        self._allowed: Callable[[], bool] = bool
        self._steps: Callable[[], StepCount | None] = _unknown
        self._round, self._began, self._away_s = 0, 0.0, 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self, session: pb.Session, sites: int) -> None:
        """Let `share` have an effect: the server takes reports.

        Args:
            session: The session of the site's process.
            sites: Number of sites in the run.
        """
        self._session, self._interval_s = session, max(1.0, sites / _REPORTS_PER_S)

    def share(self, steps: Callable[[], StepCount | None] | None, allowed: Callable[[], bool]) -> None:
        """Tell the server how long this site trains, and how far it is.

        Args:
            steps: Returns how far the trainer is, or None if it does not know. Called in another thread, at most once a
                second; an exception counts as None. None for a trainer that counts no steps.
            allowed: Whether the site's policy allows it now.
        """
        self._allowed = allowed
        if steps is None or self._session is None or self._thread is not None:
            return
        self._steps = steps
        self._thread = threading.Thread(target=self._report, name="fl-steps", daemon=True)
        self._thread.start()

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
        while not self._closed.wait(self._interval_s):
            number, train_s, steps = self._round, self._seconds(), self._counted()
            trains = number > 0 and train_s >= self._interval_s and self._allowed()
            if not trains or steps is None or (number, steps) == last or number != self._round:
                continue
            last = number, steps
            told = pb.TrainingSteps(round=number, done=steps.done, total=steps.total, train_s=train_s)
            message = pb.SessionRequest(session=self._session, steps=told).SerializeToString()
            try:
                with self._calls.begin("Attend", message) as call:
                    for _ in call:
                        pass
            except FederationError as error:  # the calls of the site's own thread decide when to give up
                log.debug("the server was not told of steps: %s", error)

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
