"""Downloads the result files of a job from the server of a federation."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fl_adapters.environments.report import write_report
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConfigError, ConnectionLostError, ProtocolError, TransferDamagedError
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.trainings import EVENTS, training_folder
from fl_runtime.trust.files import file_digest, write_file
from fl_runtime.types import RunSettings

_PART = ".part"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,254}")
_PAUSE_S = 0.2


def download(control: ControlClient, job: str, folder: Path, *, patience_s: float = 30.0) -> list[Path]:
    """Download the result files of a job that has ended: models, history, events and figures.

    A download that was interrupted goes on where it stopped, also in another process. Files that are there and whole
    are not fetched again. Every file is compared with the server's SHA-256 digest before it gets its name. The
    job file, and the report of each training, are made here, from the job's settings and events.

    Args:
        control: Connection to the server, as an admin or as a site of the job.
        job: Name of the job.
        folder: Folder to write to. It is made if it does not exist.
        patience_s: How long the server may be out of reach, in seconds.

    Returns:
        The files, the job file, and the reports.

    Raises:
        ConfigError: There is no such job, or it has not ended.
        ConnectionLostError: The server is out of reach.
        StoreError: A file cannot be written.
        TransferDamagedError: A file is not what the server says.
    """
    shown = control.ask("ShowJob", job=job, patience_s=patience_s)
    if "files" not in shown:
        raise ConfigError(f"the job {job} has not ended", fix="wait for its end: fl-adapters job follow")
    files = [_fetched(control, job, folder, item, patience_s) for item in _checked(shown["files"])]
    files.append(folder / "job.yml")
    write_file(files[-1], job_file(shown["settings"]).encode())
    return [*files, *(write_report(file.parent) for file in files if file.name == EVENTS)]


def event_files(control: ControlClient, job: str, most_bytes: int | None = None) -> Iterator[bytes]:
    """Download the events of a job so far, training by training. Each has a file of its own.

    Args:
        control: Connection to the server, as an admin or as a site of the job.
        job: Name of the job.
        most_bytes: Most bytes of one file; None for no limit.

    Yields:
        The contents of each file of events. Its last line may not be whole yet.

    Raises:
        ConfigError: There are no events of the first training.
        ConnectionLostError: The server is out of reach.
        ProtocolError: A file is larger.
    """
    for number in itertools.count(1):
        file, data = training_folder(Path(), number) / EVENTS, bytearray()
        try:
            for piece in control.stream("Download", job=job, file=file.as_posix()):
                data += piece
                if most_bytes is not None and len(data) > most_bytes:
                    raise too_many_events(job, most_bytes)
        except ConfigError:  # there is no such training, but of the first one there must be events
            if number == 1:
                raise
            return
        yield bytes(data)


def too_many_events(job: str, most_bytes: int) -> ProtocolError:
    """Return the error for events of a job that take too much room.

    Args:
        job: Name of the job.
        most_bytes: The limit.
    """
    return ProtocolError(
        f"the events of the job {job} have more than {most_bytes >> 20} MiB",
        fix="download its results after its end: fl-adapters job download",
    )


def event_key(event: Mapping[str, Any]) -> tuple[float, str, str]:
    """Return what tells an event from all others of its job.

    Args:
        event: The event, as a line of events.jsonl or as it is followed.

    Raises:
        KeyError: A field is missing.
        TypeError: It is no event.
        ValueError: Its time is no number.
    """
    return float(event["time"]), str(event["kind"]), str(event["site"])


def job_file(settings: Any) -> str:
    """Return the job file of settings that a server has sent. Fields with their default values are left out."""
    given = settings if isinstance(settings, dict) else {}
    fields = {}
    for item in dataclasses.fields(RunSettings):
        usual = {} if item.default is dataclasses.MISSING else item.default
        if item.name in given and given[item.name] not in (usual, list(usual) if isinstance(usual, tuple) else usual):
            fields[item.name] = given[item.name]
    fields.pop("submitted_by", None)
    if isinstance(earlier := fields.pop("initial_job", None), dict):
        fields["initial"] = {name: earlier.get(name) for name in ("job", "model")}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def stays_below(path: str) -> bool:
    """Return whether the path of a result file stays below the folder that it is written to, on every system."""
    return all(_NAME.fullmatch(part) for part in path.split("/"))


def _checked(files: Any) -> list[Mapping[str, Any]]:
    """The server's list of files; ProtocolError unless each stays below the folder that it is written to."""
    kinds = {"path": str, "size_bytes": int, "sha256": str}
    entries: list[Any] = files if isinstance(files, list) else [None]
    for item in entries:
        whole = isinstance(item, dict) and all(isinstance(item.get(key), kind) for key, kind in kinds.items())
        if not whole or not stays_below(item["path"]):
            raise ProtocolError(f"the server names a result file in a way that is not accepted: {item!r:.200}")
    return entries


def _fetched(control: ControlClient, job: str, folder: Path, item: Mapping[str, Any], patience_s: float) -> Path:
    path = folder / str(item["path"])
    part = path.with_name(path.name + _PART)
    try:
        if path.is_file() and file_digest(path) == item["sha256"]:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(control, job, item, part, patience_s)
        if file_digest(part) != item["sha256"]:
            part.unlink()
            raise TransferDamagedError(
                f"{item['path']} did not arrive as the server has it", where=f"job {job}", fix="download it again"
            )
        part.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def _fetch(control: ControlClient, job: str, item: Mapping[str, Any], part: Path, patience_s: float) -> None:
    """Append to the part of a file until it is whole. Lost connections are made again."""
    wanted, lost_since = item["size_bytes"], None
    with part.open("ab") as file:
        if file.tell() > wanted:
            file.truncate(0)
            file.seek(0)
        while file.tell() < wanted or wanted == 0:
            try:
                for piece in control.stream("Download", job=job, file=item["path"], **{"from": file.tell()}):
                    file.write(piece[: wanted - file.tell()])
                    lost_since = None
                return
            except ConnectionLostError:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() > lost_since + patience_s:
                    raise
            time.sleep(_PAUSE_S)
