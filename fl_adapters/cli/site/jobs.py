"""The jobs of a site daemon: each waits for approval and room, runs, is started again if it dies, and ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.cli.site.records import JobFolder
from fl_adapters.cli.site.resources import Place
from fl_adapters.environments.processes import describe_status
from fl_adapters.participant.departure import ScriptNote
from fl_adapters.participant.policy_gate import KitPolicyGate, LeaveReason

RESTARTS = 3
"""Number of times that a script is started again; what has ended it so often will end it again."""

_STEADY_S = 600.0  # a script that ran for so long before it died is given all restarts anew
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0

Phase = Literal["waits for approval", "waits for room", "running", "pausing", "leaving"]


@dataclass
class SiteJob:
    """One job of the daemon. Used by one thread.

    Attributes:
        assignment: The job.
        folder: Its folder at the site.
        gate: The policy as it was read when the job came.
        command: The words of its command; empty before they are known.
        data: Where the site's data for it lie; "" if the policy does not say.
        phase: Where it stands.
        place: What it occupies at the site, if anything.
        occupied: Frees the place.
        started_at: When its script was started last, in monotonic seconds.
        resumes_at: When the script may be started (again), likewise; 0 for at once.
        deaths: How often the script has died since it last ran for long.
        since: When the job came or its script died last, likewise.
    """

    assignment: Assignment
    folder: JobFolder
    gate: KitPolicyGate
    command: Sequence[str] = ()
    data: str = ""
    phase: Phase = "waits for room"
    place: Place | None = None
    occupied: ExitStack = field(default_factory=ExitStack)
    started_at: float = 0.0
    resumes_at: float = 0.0
    deaths: int = 0
    since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Name of the job."""
        return self.assignment.job

    def free(self) -> None:
        """Give up the job's place."""
        self.occupied.close()
        self.place = None

    def begin(self) -> None:
        """Note that the script has been started."""
        self.phase, self.started_at = "running", time.monotonic()

    def pause_s(self) -> float:
        """Note that the script has died. Returns the seconds until it is to be started again."""
        self.since = time.monotonic()
        if self.since - self.started_at > _STEADY_S:
            self.deaths = 0
        self.deaths += 1
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self.deaths - 1), _LONGEST_PAUSE_S)
        self.phase, self.resumes_at = "pausing", self.since + pause_s
        return pause_s


def is_over(status: int, note: ScriptNote | None) -> bool:
    """Return whether a script that has ended is through with its job, so that nobody need be told.

    Args:
        status: Its exit status, negative for a signal.
        note: What it has left.
    """
    if note is None or note.state in ("taking part", "failed"):
        return False
    return status == 0 or note.state == "left"


def end_reason(status: int, note: ScriptNote | None, deaths: int) -> LeaveReason:
    """Return why a site leaves a job whose script has ended before its work was done.

    Args:
        status: Exit status of the script.
        note: What the script has left.
        deaths: How often it has died.
    """
    times = f" {deaths} times, the last time with" if deaths > 1 else " before the last round:"
    what = f"its command ended{times} {describe_status(status)}"
    if note is None or note.state != "failed":
        return LeaveReason.own(what)
    return LeaveReason(f"{what}; {note.reason}", f"{what}; {note.public}")
