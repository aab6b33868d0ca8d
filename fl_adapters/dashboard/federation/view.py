"""What a federation's server tells an admin, as bounded and printable values for pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fl_adapters.environments.download import job_file, stays_below
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.text import printable
from fl_runtime.trust.identity import Identity
from fl_runtime.types.needs import GIB

JobState: TypeAlias = Literal["queued", "running", "finished", "failed", "aborted"]

_NAME_CHARS, _TEXT_CHARS = 100, 2000
_MOST_SITES, _MOST_JOBS, _MOST_FILES = 10_000, 5_000, 10_000
_SETTINGS_CHARS = 100_000


@dataclass(frozen=True)
class Site:
    """A site of the federation.

    Attributes:
        name: Its name.
        state: What it does at this moment, such as "connected; waits for a job" or "absent".
        version: Version of its fl-adapters; "" if it has told none.
        misfit: Why that version does not go with the server's; "" if it does.
        room: What room it has for jobs, such as "2 jobs, 4 GPUs, 64 GiB"; "" if it has not told.
    """

    name: str
    state: str
    version: str = ""
    misfit: str = ""
    room: str = ""

    @property
    def connected(self) -> bool:
        """Whether the site is connected at this moment."""
        return self.state.startswith("connected")


@dataclass(frozen=True)
class Job:
    """A job of the federation, and where it stands.

    Attributes:
        name: Its name.
        state: "queued", "running", or how it ended.
        app: What it runs at the sites.
        sites: Names of its sites, in its order.
        submitted_by: Who submitted it, for people.
        submitter: The identity of whoever submitted it; None if the server is too old to tell.
        priority: Jobs with a higher one start first.
        submitted_at: When it was submitted, in seconds since the epoch; 0 if that is not known.
        started_at: When it was first started, likewise.
        ended_at: When it ended, likewise.
        phase: What its run does, such as "training"; "" unless it runs.
        round: The round under way, or the one closed last.
        rounds: Number of rounds planned; 0 before the handshake.
        site_states: What each of its sites does at this moment; empty unless it runs.
        error: Why it failed or was aborted; None if it did not.
        waits_for: What it waits for in the queue; "" if it does not.
    """

    name: str
    state: str
    app: str = ""
    sites: tuple[str, ...] = ()
    submitted_by: str = ""
    submitter: Identity | None = None
    priority: int = 0
    submitted_at: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0
    phase: str = ""
    round: int = 0
    rounds: int = 0
    site_states: Mapping[str, str] = field(default_factory=dict)
    error: FederationError | None = None
    waits_for: str = ""

    @property
    def ended(self) -> bool:
        """Whether it has finished, failed, or was aborted."""
        return self.state in ("finished", "failed", "aborted")

    @property
    def progress(self) -> float | None:
        """Share of the rounds that are done, from 0 to 1; None unless it runs and the number is known."""
        return min(max((self.round - 1) / self.rounds, 0.0), 1.0) if self.rounds and self.state == "running" else None

    @property
    def says(self) -> str:
        """Where the job stands, in a few words."""
        if self.state == "running" and self.phase:
            return f"{self.phase}, round {self.round} of {self.rounds or '?'}"
        if self.state == "queued" and self.waits_for:
            return f"queued, waits for {self.waits_for}"
        if self.error is not None:
            return f"{self.state}: {self.error.what}"
        return f"finished, {self.round} rounds" if self.state == "finished" else self.state


@dataclass(frozen=True)
class ResultFile:
    """A result file of a job that has ended.

    Attributes:
        path: Its path below the job's folder at the server.
        size_bytes: Its size.
        sha256: Its SHA-256 digest in hexadecimal.
    """

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class JobDetails:
    """A job with its settings and results.

    Attributes:
        job: The job.
        settings: Its job file, as YAML.
        files: Its result files, once it has ended.
    """

    job: Job
    settings: str
    files: tuple[ResultFile, ...]


@dataclass(frozen=True)
class Federation:
    """A federation at one moment.

    Attributes:
        name: Its name.
        version: Version of the server's fl-adapters.
        sites: Its sites.
        jobs: Its jobs: those that run, those that wait in the order of their start, and those that ended last.
        older: Number to ask for jobs that ended earlier; 0 if there are none, or the server is too old to tell.
    """

    name: str
    version: str
    sites: tuple[Site, ...]
    jobs: tuple[Job, ...]
    older: int = 0

    def job(self, name: str) -> Job | None:
        """Return the job of this name, or None if the server has told of none."""
        return next((job for job in self.jobs if job.name == name), None)


def read_status(told: Mapping[str, Any]) -> Federation:
    """Read the server's answer to `Status`.

    Args:
        told: Its fields. Those that cannot be read are left out, since texts in them may be of others.

    Returns:
        The federation at that moment.
    """
    names = _texts(told.get("sites"), _MOST_SITES)
    states, versions = _by_name(told.get("site_states")), _by_name(told.get("site_versions"))
    misfits, rooms = _by_name(told.get("misfits")), _mapping(told.get("site_rooms"))
    sites = [
        Site(name, states.get(name, "absent"), versions.get(name, ""), misfits.get(name, ""), _room(rooms.get(name)))
        for name in names
    ]
    listed = told.get("jobs")
    jobs = [read_job(item) for item in (listed if isinstance(listed, list) else [])[-_MOST_JOBS:]]
    jobs.sort(key=_place)
    older = max(_whole(told.get("older")), 0)
    return Federation(_text(told.get("federation")), _text(told.get("version")), tuple(sites), tuple(jobs), older)


def read_job(told: object) -> Job:
    """Read what the server tells of one job, in `Status` or `ShowJob`.

    Args:
        told: The fields of the job.

    Returns:
        The job. What cannot be read has its default.
    """
    fields = _mapping(told)
    error = fields.get("error")
    return Job(
        name=_text(fields.get("job")),
        state=_text(fields.get("state")) or ("running" if "phase" in fields else ""),
        app=_text(fields.get("app"), 300),
        sites=tuple(_texts(fields.get("sites"), _MOST_SITES)),
        submitted_by=_text(fields.get("submitted_by"), 300),
        submitter=_identity(fields.get("submitter") or _mapping(fields.get("settings")).get("submitted_by")),
        priority=_whole(fields.get("priority")),
        submitted_at=_number(fields.get("submitted_at")),
        started_at=_number(fields.get("started_at")),
        ended_at=_number(fields.get("ended_at")),
        phase=_text(fields.get("phase")),
        round=_whole(fields.get("round", fields.get("rounds_done"))),
        rounds=_whole(fields.get("rounds")),
        site_states=_by_name(fields.get("site_states")),
        error=FederationError.from_wire(_by_name(error, _TEXT_CHARS)) if isinstance(error, dict) else None,
        waits_for=_text(fields.get("waits_for"), 500),
    )


def read_details(told: Mapping[str, Any]) -> JobDetails:
    """Read the server's answer to `ShowJob`.

    Args:
        told: Its fields.

    Returns:
        The job with its settings and result files.
    """
    text = job_file(told.get("settings"))
    files = told.get("files")
    listed = [_file(item) for item in (files if isinstance(files, list) else [])[:_MOST_FILES]]
    known = tuple(item for item in listed if item is not None)
    return JobDetails(read_job(told), printable(text, _SETTINGS_CHARS, lines=True), known)


def _place(job: Job) -> tuple[int, float, float]:
    """Where a job stands in the list: those that run, those that wait in the order of their start, then the others."""
    if job.state == "queued":
        return 1, -job.priority, job.submitted_at
    return (0, -job.started_at, 0.0) if job.state == "running" else (2, -(job.ended_at or job.submitted_at), 0.0)


def _file(told: object) -> ResultFile | None:
    fields = _mapping(told)
    path, digest = fields.get("path"), fields.get("sha256")
    if not isinstance(path, str) or not stays_below(path) or not isinstance(digest, str):
        return None
    return ResultFile(path, _whole(fields.get("size_bytes")), digest)


def _room(told: object) -> str:
    fields = _mapping(told)
    slots, gpus = _whole(fields.get("slots")), fields.get("gpus")
    memory = _whole(fields.get("memory_bytes"))
    parts = [f"{slots} job{'s'[: slots != 1]} at a time"] if slots else []
    parts += [f"{gpus} GPU{'s'[: gpus != 1]}"] if type(gpus) is int else []
    parts += [f"{memory / GIB:.3g} GiB"] if memory else []
    return ", ".join(parts)


def _identity(uri: object) -> Identity | None:
    try:
        return Identity.from_uri(uri) if isinstance(uri, str) else None
    except PermissionDeniedError:
        return None


def _text(value: object, limit_chars: int = _NAME_CHARS) -> str:
    return printable(value, limit_chars) if isinstance(value, str) else ""


def _texts(value: object, most: int) -> Iterator[str]:
    names = value if isinstance(value, list) else []
    yield from (_text(name) for name in names[:most] if isinstance(name, str))


def _by_name(value: object, limit_chars: int = 300) -> dict[str, str]:
    pairs = list(_mapping(value).items())[:_MOST_SITES]
    return {_text(name): _text(text, limit_chars) for name, text in pairs if isinstance(text, str)}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def _whole(value: object) -> int:
    return value if type(value) is int and abs(value) < 2**60 else 0
