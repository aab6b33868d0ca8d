"""The daemon's connection to the server: asks for jobs, and says of which jobs the site takes no part."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.participant.departure import ScriptNote
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConnectionLostError, FederationError, ProtocolError
from fl_runtime.trainings import number_of
from fl_runtime.trust.audit import Witness
from fl_runtime.wire.software import OWN

_PAUSE_S = 1.0  # between two questions
_LOOK_S = 60.0  # between two looks at which jobs run
_LINES_KEPT = 200
_REPEAT_S = 300.0  # between two lines about the same trouble


@dataclass(frozen=True)
class Refusal:
    """What the server is to know of a job in which the site takes no part, or no longer.

    Attributes:
        job: Name of the job.
        reason: Why, as the server may see it.
        note: What the job's last script has left; None if no script has joined.
    """

    job: str
    reason: str
    note: ScriptNote | None = None

    def fields(self) -> dict[str, Any]:
        """Fields of the call."""
        spoken_for = {"training": number_of(self.note.job), "attempt": self.note.attempt} if self.note else {}
        return {"job": self.job, "reason": self.reason, **spoken_for}


@dataclass(frozen=True)
class LogLine:
    """A line of the site's own log that its policy shares.

    Attributes:
        job: Name of the job.
        text: The line. It quotes nothing of the script.
        level: "info" or "warning".
    """

    job: str
    text: str
    level: str


class JobFeed:
    """Asks for jobs in a thread of its own, from the first `update` until `close`.

    A lost connection is made again for ever.

    Attributes:
        arrived: Assigned jobs that the daemon has not taken yet. A job may come more than once.
        heard: Names of the jobs whose refusal the server has heard.
        seen: When the server was last asked which jobs run, in monotonic seconds, and what it said of each, by name.
            None before that.
        contact: When the server has answered last.
    """

    def __init__(
        self,
        control: ControlClient,
        witness: Witness,
        say: Callable[..., None],
        wake: threading.Event,
        on_refusal: Callable[[FederationError, int], None],
    ) -> None:
        """Make a feed that does not ask yet.

        Args:
            control: The connection to the server, which the feed closes.
            witness: Compares the audit logs of site and server.
            say: Shows a line to people; see `log_lines.say`.
            wake: Is set when something has arrived.
            on_refusal: Called with the error when an answer of the server is refused, and with how many were refused
                since the last such call. It is called at most once in five minutes.
        """
        self.arrived: deque[Assignment] = deque()
        self.heard: deque[str] = deque()
        self.seen: tuple[float, Mapping[str, Mapping[str, Any]]] | None = None
        self.contact = Contact(say, on_refusal)
        self._control, self._witness, self._wake = control, witness, wake
        self._request: Mapping[str, Any] = {}
        self._refusals: deque[Refusal] = deque()
        self._lines: deque[LogLine] = deque(maxlen=_LINES_KEPT)
        self._changed, self._closed, self._wanted = threading.Event(), threading.Event(), threading.Event()
        self._asking = False  # whether the call under way is the one that waits for a job
        self._thread = threading.Thread(target=self._work, name="fl-jobs", daemon=True)

    def update(self, running: list[str], resources: Mapping[str, int]) -> None:
        """Say what the site does now. The first call begins the questions.

        Args:
            running: Names of the jobs that the server should not assign.
            resources: What the site has: slots, gpus and memory_bytes.
        """
        request = {"running": sorted(running), "resources": dict(resources)}
        if request == self._request:
            return
        self._request = request
        self._interrupt()
        if not self._thread.ident:
            self._thread.start()

    def refuse(self, refusal: Refusal) -> None:
        """Tell the server, at the first opportunity, that the site takes no part in a job."""
        self._refusals.append(refusal)
        self._interrupt()

    def share(self, line: LogLine) -> None:
        """Show a line to those who follow the job, at the first opportunity. Old ones are dropped in an outage."""
        self._lines.append(line)
        self._interrupt()

    def look(self) -> None:
        """Ask at the first opportunity which jobs run."""
        self._wanted.set()
        self._interrupt()

    def close(self) -> None:
        """Ask no more, and close the connection."""
        self._closed.set()
        self._interrupt()
        self._control.close()
        if self._thread.ident:
            self._thread.join()

    def _interrupt(self) -> None:
        self._changed.set()
        if self._asking:  # other calls are short, and would be made twice
            self._control.interrupt()

    def _work(self) -> None:
        while not self._closed.is_set():
            self._changed.clear()
            try:
                self._tell_lines()
                self._tell_refusals()
                self._look()
                self._ask()
            except FederationError as error:
                if not self._changed.is_set() and not self._closed.is_set():  # otherwise this object has interrupted it
                    self._report(error)
            except Exception as error:  # whatever it is, the site must go on asking
                self._report(ProtocolError(f"the server's answer cannot be used: {error!r}"))
            self._closed.wait(_PAUSE_S)

    def _report(self, error: FederationError) -> None:
        """Show a trouble. If this site refuses the server's answer, end the call, and have the refusal recorded."""
        self.contact.report(error.what if isinstance(error, ConnectionLostError) else str(error))
        if not error.from_peer and not isinstance(error, ConnectionLostError):
            self._control.interrupt()
            self.contact.record(error)

    def _tell_lines(self) -> None:
        while self._lines:
            line = self._lines[0]
            try:
                self._control.ask("TellLog", **asdict(line))
            except ConnectionLostError:
                raise
            except FederationError:  # the job has ended, the quota is used up, or the server is an older one
                pass
            if self._lines and self._lines[0] is line:
                self._lines.popleft()

    def _tell_refusals(self) -> None:
        while self._refusals:
            refusal = self._refusals[0]
            try:
                self._control.ask("RefuseJob", **refusal.fields())
            except ConnectionLostError:
                raise
            except FederationError as error:  # the job has ended meanwhile
                self.contact.say(f"the server does not wait for this site any more ({error.what})", refusal.job)
            self._refusals.popleft()
            self.heard.append(refusal.job)
            self._wake.set()

    def _look(self) -> None:
        began = time.monotonic()
        if not self._wanted.is_set() and self.seen is not None and began - self.seen[0] < _LOOK_S:
            return
        self._wanted.clear()
        status = self._control.ask("Status", log=self._witness.statement(), software=OWN.to_json())
        self.contact.answered()
        self._witness.take(status.get("log"), "server")
        jobs = status.get("jobs", [{"state": "running", **status["running"]}] if status["running"] else [])
        self.seen = began, {str(job["job"]): job for job in jobs if job["state"] == "running"}
        self._wake.set()

    def _ask(self) -> None:
        self._asking = True
        try:
            if self._changed.is_set():
                return
            told = {"log": self._witness.statement(), "software": OWN.to_json()}
            for answer in self._control.answers("Assignment", **self._request, **told):
                if "waiting" not in answer:
                    assignment = Assignment.of(answer)
                    self._witness.take(answer.get("log"), "server")
                    self.arrived.append(assignment)
                    self._wake.set()
                self.contact.answered()
                if self._changed.is_set():
                    return
        finally:
            self._asking = False


class Contact:
    """Knows when the server has answered last, and tells people of troubles.

    A trouble is told once when it begins, every so often while it lasts, and when it is over.

    Attributes:
        answered_at: When the server has answered last, in seconds since the epoch; None before that.
    """

    def __init__(self, say: Callable[..., None], on_refusal: Callable[[FederationError, int], None]) -> None:
        self.say, self._on_refusal = say, on_refusal
        self.answered_at: float | None = None
        self._trouble, self._told_at = "", 0.0
        self._recorded_at, self._unrecorded = -_REPEAT_S, 0

    def report(self, what: str) -> None:
        """Tell of a trouble.

        Args:
            what: What is wrong.
        """
        now = time.monotonic()
        if what != self._trouble or now - self._told_at > _REPEAT_S:
            self._trouble, self._told_at = what, now
            self.say(f"{what}; trying again")

    def record(self, error: FederationError) -> None:
        """Pass on a refusal, and those between only as a number: no server may fill the audit log, whatever it says."""
        now = time.monotonic()
        self._unrecorded += 1
        if now - self._recorded_at >= _REPEAT_S:
            refused, self._recorded_at, self._unrecorded = self._unrecorded, now, 0
            self._on_refusal(error, refused)

    def answered(self) -> None:
        """Note that the server has answered."""
        self.answered_at = time.time()
        if self._trouble:
            self._trouble = ""
            self.say("the server answers again")
