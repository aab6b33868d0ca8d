"""The jobs in a server's folder: queue and archive in one. Each job's own folder says where it stands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from fl_runtime.errors import AbortedError, ConfigError, FederationError, NewerFormatError
from fl_runtime.server.courses.initial import INITIAL_FILE
from fl_runtime.server.records.results import RunResult
from fl_runtime.store.stores import SharedFiles
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trust.files import write_file
from fl_runtime.trust.identity import Identity, check_name
from fl_runtime.types import RunSettings
from fl_runtime.version import VERSION, check_format, later_data, stamp

JobState = Literal["queued", "running", "finished", "failed", "aborted"]
_ENDED: tuple[JobState, ...] = ("finished", "failed", "aborted")
_JOB, _OUTCOME = "job.json", "outcome.json"
_MODELS = {"last": "model", "best": "best"}  # folders of a job
FORMAT = 1
"""Format number of job.json, which stands for all files in the folder of a job that have none of their own."""
_CURRENT = ".current.json"  # where versions before the queue named the job that was running


@dataclass(frozen=True)
class JobRecord:
    """A job of the federation, and where it stands.

    Attributes:
        settings: The job's settings.
        submitter: Who submitted it.
        federation: Name of the federation.
        number: Place in the order of submission, from 1.
        priority: Jobs with a higher one start first.
        state: "queued", "running", or how it ended.
        submitted_at: When it was submitted, in seconds since the epoch.
        started_at: When it was first started, likewise; None if it was not.
        ended_at: When it ended, likewise; None if it has not.
    """

    settings: RunSettings
    submitter: Identity
    federation: str
    number: int
    priority: int = 0
    state: JobState = "queued"
    submitted_at: float = 0.0
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def name(self) -> str:
        """Name of the job, which is that of its folder."""
        return self.settings.name

    @property
    def ended(self) -> bool:
        """Whether it has finished, failed, or was aborted."""
        return self.state in _ENDED

    def facts(self) -> dict[str, Any]:
        """The record as JSON values for people and programs, without the settings."""
        return {
            "job": self.name,
            "state": self.state,
            "app": self.settings.app,
            "sites": list(self.settings.sites),
            "submitted_by": str(self.submitter),
            "submitter": self.submitter.uri,
            "priority": self.priority,
            "submitted_at": self.submitted_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
        }


class JobArchive:
    """The records of all jobs in a folder. The caller serialises all calls.

    Each change is written before it is visible. The folder therefore survives a kill at any instruction.

    Attributes:
        folder: The folder, with one folder for each job.
    """

    def __init__(self, folder: Path, federation: str, shared: SharedFiles) -> None:
        """Read all jobs of a folder. A job that cannot be read is recorded as failed.

        Args:
            folder: The folder; it need not exist yet.
            federation: Name of the federation whose jobs they are.
            shared: Keeps the records for other servers.

        Raises:
            NewerFormatError: A later version wrote a job of it.
            ConfigError: The folder belongs to another federation.
            StoreError: The disk fails.
        """
        self.folder, self._federation, self._files = folder, federation, shared
        self._records: dict[str, JobRecord] = {}
        self._unreadable: dict[str, FederationError] = {}
        try:
            files = sorted(folder.glob(f"*/{_JOB}")) if folder.is_dir() else []
            running = _named_by_earlier_version(folder)
            for file in files:
                self._take_up(file, running)
            if running and not (folder / running / _JOB).is_file():
                self._note_unreadable(running, FederationError("its folder is gone"))
            (folder / _CURRENT).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error

    def _take_up(self, file: Path, running: str | None) -> None:
        name = file.parent.name
        try:
            record = _read(file, self._federation, running)
        except NewerFormatError:  # not a job to give up: it goes on once that version is back
            raise
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            if not (file.parent / _OUTCOME).exists():
                self._note_unreadable(name, FederationError(f"its settings cannot be read: {error!r}"))
            return
        if record.federation != self._federation:
            raise ConfigError(
                f"this folder holds the job {name} of the federation {record.federation}, not of {self._federation}",
                where=str(self.folder),
                fix="give each federation's server a folder of its own with --data",
            )
        outcome = self.outcome(name)
        if outcome is not None and not record.ended:  # killed between writing the one and the other
            record = replace(record, state=_state_after(outcome), ended_at=time.time())
        self._records[name] = record
        if record.state == "finished":  # the server before may have been killed before it did this
            self.forget_tensors(name)

    def _note_unreadable(self, name: str, error: FederationError) -> None:
        fix = "submit it again under another name"
        self._unreadable[name] = ConfigError(error.what, where=str(self.folder / name), fix=fix)

    @property
    def unreadable(self) -> Mapping[str, FederationError]:
        """Name of each job that could not be read -> why. They have not ended, and cannot go on."""
        return self._unreadable

    def all(self) -> tuple[JobRecord, ...]:
        """All jobs that can be read, in the order of their submission."""
        return tuple(sorted(self._records.values(), key=lambda record: record.number))

    def in_state(self, *states: JobState) -> tuple[JobRecord, ...]:
        """The jobs in one of the given states, in the order of their submission."""
        return tuple(record for record in self.all() if record.state in states)

    def get(self, name: str) -> JobRecord | None:
        """The job of this name, or None if there is none."""
        return self._records.get(name)

    def add(self, settings: RunSettings, submitter: Identity, priority: int) -> JobRecord:
        """Put a new job into the queue.

        Args:
            settings: Its settings.
            submitter: Who submits it.
            priority: Jobs with a higher one start first.

        Returns:
            Its record, which is on the disk.

        Raises:
            ConfigError: There is a job of this name, or another file where its folder should be.
            StoreError: It cannot be written.
        """
        folder = self.folder / settings.name
        if settings.name in self._records or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise ConfigError(f"a job {settings.name} exists already", where="name", fix="choose another name")
        number = max((record.number for record in self._records.values()), default=0) + 1
        record = JobRecord(settings, submitter, self._federation, number, priority, submitted_at=time.time())
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it will hold what sites send
        except OSError as error:
            raise disk_error(error, folder) from error
        return self._save(record)

    def started(self, name: str) -> JobRecord:
        """Note that a job runs from now on. Returns its record."""
        record = self._records[name]
        first = record.started_at if record.started_at is not None else time.time()
        return self._save(replace(record, state="running", started_at=first, ended_at=None))

    def ended(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Note that a job has ended.

        Args:
            name: Name of the job.
            outcome: Its outcome as JSON values, whose "error" is None if it finished.

        Raises:
            StoreError: It cannot be written.
        """
        if (self.folder / name).is_dir():
            self._write(self.folder / name / _OUTCOME, json.dumps(outcome).encode())
        self._unreadable.pop(name, None)
        record = self._records.get(name)
        if record is not None:
            self._save(replace(record, state=_state_after(outcome), ended_at=time.time()))

    def ended_without_a_round(self, name: str, submitter: object, error: FederationError) -> None:
        """Note that a job has ended before it could run, or go on.

        Args:
            name: Name of the job.
            submitter: Who submitted it.
            error: Why it ended.

        Raises:
            StoreError: It cannot be written.
        """
        training = {"folder": str(self.folder / name), **RunResult().to_json()}
        facts = {"job": name, "submitted_by": str(submitter), **training, "trainings": [training]}
        self.ended(name, {**facts, "error": error.to_wire()})

    def reopened(self, name: str) -> JobRecord:
        """Put a job that failed or was aborted back into the queue. Returns its record."""
        folder = self.folder / name
        record = self._save(replace(self._records[name], state="queued", ended_at=None))
        for place in (folder, *folder.glob("[0-9]*")):  # its first training, and the others
            for model in ("model", "best"):  # outdated as soon as the job goes on
                shutil.rmtree(place / model, ignore_errors=True)
        return record

    def result(self, name: str, which: str) -> Path:
        """The file of a global model that a job has left, from which another job may begin.

        Args:
            name: Name of the job.
            which: "last" or "best".

        Returns:
            The file.

        Raises:
            ConfigError: There is no such job, it has not ended, or it has left no such model.
        """
        record = self._records.get(name)
        if record is None:
            raise ConfigError(
                f"there is no job {name[:100]!r} here to begin from",
                where="initial",
                fix="see `fl-adapters job list`; a job that was deleted took its models along",
            )
        if not record.ended:
            raise ConfigError(
                f"the job {name} is {record.state} and has no result yet",
                where="initial",
                fix="submit this job once that one has ended",
            )
        self._files.restore_results(self.folder / name)
        file = self.folder / name / _MODELS[which] / "model.safetensors"
        if not file.is_file():
            raise ConfigError(
                f"the job {name} has left no {which} model in tensors",
                where="initial",
                fix="see its files with `fl-adapters job show`; a model of trees cannot be begun from",
            )
        return file

    def made_by(self, name: str, which: str) -> tuple[str, ...]:
        """The sites whose updates made a global model that a job has left.

        Args:
            name: Name of the job.
            which: "last" or "best".

        Returns:
            Their names; none if the job's outcome does not tell.
        """
        outcome = self.outcome(name) or {}
        rounds = outcome.get("rounds") or ()
        number = outcome.get("best_round") if which == "best" else rounds[-1]["round"] if rounds else None
        return next((tuple(found["sites"]) for found in rounds if found["round"] == number), ())

    def take_initial(self, record: JobRecord) -> None:
        """Give a job its own copy of the earlier result that it begins with, unless it has one or needs none.

        Args:
            record: The job. The copy survives the deletion of the job that it comes from.

        Raises:
            ConfigError: The earlier job is gone.
            StoreError: The copy cannot be made.
        """
        origin, copy = record.settings.initial_job, self.folder / record.name / INITIAL_FILE
        if origin is None or copy.exists() or (copy.parent / "server").exists():
            return
        file = self.result(origin["job"], origin["model"])
        try:
            try:
                copy.hardlink_to(file)
            except OSError:  # another disk, or one without links
                partial = copy.with_suffix(".partial")
                shutil.copyfile(file, partial)
                partial.replace(copy)
        except OSError as error:
            raise disk_error(error, copy) from error

    def forget_tensors(self, name: str) -> None:
        """Delete the tensor files that a finished job was run with. Its models are among its results."""
        folder = self.folder / name
        with suppress(OSError):
            (folder / INITIAL_FILE).unlink(missing_ok=True)
        for place in (folder, *folder.glob("[0-9]*")):
            if any((place / "model").glob("*")):
                for path in (place / "server" / "blobs").glob("*.safetensors"):
                    with suppress(OSError):  # Windows does not delete mapped files; the next start does
                        path.unlink()

    def delete(self, name: str) -> None:
        """Delete a job and its folder. It is off the list before its files go."""
        folder = self.folder / name
        self._files.forget(folder)
        del self._records[name]
        try:
            (folder / _JOB).unlink(missing_ok=True)
            shutil.rmtree(folder)
        except OSError as error:
            raise disk_error(error, folder) from error

    def outcome(self, name: str) -> Mapping[str, Any] | None:
        """The outcome of a job that has ended, as JSON values; None if there is none."""
        try:
            check_name(name, "job")
            outcome = json.loads((self.folder / name / _OUTCOME).read_text("utf-8"))
            return outcome if isinstance(outcome, dict) else None
        except (OSError, ValueError, ConfigError):
            return None

    def _save(self, record: JobRecord) -> JobRecord:
        values = {
            **stamp(FORMAT),
            "settings": asdict(record.settings),
            "submitter": record.submitter.uri,
            "federation": record.federation,
            "number": record.number,
            "priority": record.priority,
            "state": record.state,
            "submitted_at": record.submitted_at,
            "started_at": record.started_at,
            "ended_at": record.ended_at,
        }
        if not record.ended:  # before the state changes: an outcome without the state of an end is taken for the end
            self._files.remove(self.folder / record.name / _OUTCOME)
            (self.folder / record.name / _OUTCOME).unlink(missing_ok=True)
        self._write(self.folder / record.name / _JOB, json.dumps(values, indent=1).encode())
        self._records[record.name] = record
        return record

    def _write(self, file: Path, data: bytes) -> None:
        self._files.keep(file, data)
        write_file(file, data)


def jobs_of(folder: Path, federation: str) -> list[str]:
    """List the jobs of a federation in a folder, whatever else is in it.

    Args:
        folder: The folder; it need not exist.
        federation: Name of the federation.

    Returns:
        Names of the jobs that can be read.
    """
    found = []
    for file in sorted(folder.glob(f"*/{_JOB}")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, FederationError):
            record = _read(file, federation, None)
            if record.submitter.federation == record.federation == federation:
                found.append(record.name)
    return found


def _state_after(outcome: Mapping[str, Any]) -> JobState:
    error = outcome.get("error")
    if not error:
        return "finished"
    return "aborted" if error.get("code") == AbortedError.code else "failed"


def _read(file: Path, federation: str, running: str | None) -> JobRecord:
    found = json.loads(file.read_text("utf-8"))
    written_by = found.get("version")
    check_format(found.get("format"), FORMAT, "the job", where=str(file), version=written_by)
    known = {field.name for field in fields(RunSettings)}
    unknown = sorted(set(found["settings"]) - known)
    if unknown and isinstance(written_by, str) and written_by != VERSION:  # else the file is damaged
        raise later_data(f"the job has the settings {', '.join(unknown)}", str(file), written_by)
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found["settings"].items()
    }
    made = RunSettings(**settings)
    if made.name != file.parent.name:
        raise ValueError(f"it is the job {made.name!r}")
    state = found.get("state")
    if state is None:  # written before there was a queue: one job ran at a time
        state = "running" if made.name == running else "failed"
    if state not in get_args(JobState):
        raise ValueError(f"its state is {state!r}")
    return JobRecord(
        made,
        Identity.from_uri(found["submitter"]),
        str(found.get("federation", federation)),
        int(found.get("number", 0)),
        int(found.get("priority", 0)),
        state,
        float(found.get("submitted_at", file.stat().st_mtime)),
        found.get("started_at"),
        found.get("ended_at"),
    )


def _named_by_earlier_version(folder: Path) -> str | None:
    """Name of the job that a server of an earlier version was running in this folder, or None."""
    try:
        name = json.loads((folder / _CURRENT).read_text("utf-8"))["job"]
        check_name(name, "job")
        return str(name)
    except (FileNotFoundError, ValueError, KeyError, TypeError, ConfigError):
        return None
