"""The records of a site's jobs: a folder for each, which survives the daemon."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fl_adapters.cli.site.assignment import Assignment
from fl_adapters.participant.departure import ScriptNote
from fl_runtime.errors import ConfigError, FederationError, NewerFormatError
from fl_runtime.trust.files import write_file
from fl_runtime.version import check_format, stamp

JobState = Literal["waits for approval", "waits for room", "running", "finished", "left", "refused", "ended"]

LOG_BYTES = 10_000_000
"""Size from which a log is moved aside."""

_OLDER_LOGS = 3
_FILE = "site.json"
_FORMAT = 1  # of site.json, for all files in the folder of a job that have no number of their own


@dataclass(frozen=True)
class JobFolder:
    """The folder of one job at a site: `jobs/<job>` below the daemon's state.

        site.json        what the server assigned, and where the job stands here
        approval.json    what somebody at the site has decided
        log.txt          output of the command; log.1.txt, log.2.txt, log.3.txt are older
        kit/             startup kit of the command
        model/, best/    the models that the site has
        sites/<site>/    outputs and state of the script

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def log(self) -> Path:
        """File with the output of the command."""
        return self.path / "log.txt"

    @property
    def logs(self) -> tuple[Path, ...]:
        """Files with the output of the command that are there, the oldest first."""
        older = (self.log.with_name(f"log.{number}.txt") for number in range(_OLDER_LOGS, 0, -1))
        return (*(path for path in older if path.exists()), self.log)

    @property
    def kit(self) -> Path:
        """Folder of the command's startup kit."""
        return self.path / "kit"

    @property
    def note(self) -> ScriptNote | None:
        """What the script has left for the daemon, or None if it has not joined the job."""
        return ScriptNote.read(self.kit)

    def write(self, job: Assignment, state: JobState, reason: str = "") -> None:
        """Record where a job stands. Raises StoreError if that is not possible.

        Args:
            job: The job.
            state: Where it stands.
            reason: Why it was refused or left, in full.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        fields = {**stamp(_FORMAT), **asdict(job), "state": state, "reason": reason, "time": time.time()}
        write_file(self.path / _FILE, json.dumps(fields, indent=1).encode(), secret=True)

    def read(self) -> tuple[Assignment, Mapping[str, Any]]:
        """Return the job, and the record with "state", "reason" and "time".

        Raises:
            NewerFormatError: A later version of the daemon wrote it.
            ConfigError: There is no such job, or its record cannot be read.
        """
        try:
            fields = json.loads((self.path / _FILE).read_text("utf-8"))
            check_format(fields.get("format"), _FORMAT, "the job", where=str(self.path), version=fields.get("version"))
            return Assignment.of(fields), fields
        except NewerFormatError:
            raise
        except FileNotFoundError:
            raise ConfigError(f"this site has had no job {self.path.name!r}", where=str(self.path.parent)) from None
        except (OSError, ValueError, AttributeError, FederationError) as error:
            raise ConfigError(f"the record of this job cannot be read: {error}", where=str(self.path / _FILE)) from None

    def rotate_log(self, most_bytes: int = LOG_BYTES) -> None:
        """Move a log that has become too large aside, and begin it anew. The command goes on writing to it.

        Args:
            most_bytes: Size from which it is moved.
        """
        try:
            if self.log.stat().st_size <= most_bytes:
                return
            names = [self.log.with_name(f"log.{number}.txt") for number in range(1, _OLDER_LOGS + 1)]
            for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
                if newer.exists():
                    newer.replace(older)
            shutil.copyfile(self.log, names[0])
            os.truncate(self.log, 0)  # the command holds the file open, and appends
        except OSError:  # a full disk must not end the daemon
            pass


def job_folders(state: Path) -> Iterator[JobFolder]:
    """Yield the folders of all jobs that a site has had, in the order of their names.

    Args:
        state: Folder of the daemon's state.
    """
    for path in sorted((state / "jobs").glob(f"*/{_FILE}")):
        yield JobFolder(path.parent)


def check_state(state: Path) -> None:
    """Check that no later version has written the jobs of a site.

    Args:
        state: Folder of the daemon's state.

    Raises:
        NewerFormatError: One has. The message names the version to install.
    """
    for folder in job_folders(state):
        try:
            folder.read()
        except NewerFormatError:
            raise
        except ConfigError:  # damaged; the server assigns the job again if it runs
            continue
