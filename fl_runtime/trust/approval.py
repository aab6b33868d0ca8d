"""Decisions of a person at a site about single jobs, for policies with `approve: ask`.

A decision holds for the settings that the person saw. If a server sends others under the same name, there is none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError
from fl_runtime.trainings import job_of
from fl_runtime.trust.files import write_file
from fl_runtime.types import RunSettings

_FILE = "approval.json"
_DEFAULTS: Mapping[str, Any] = json.loads(json.dumps(asdict(RunSettings("", (), 0))))


@dataclass(frozen=True)
class Decision:
    """What somebody at the site said about a job.

    Attributes:
        approved: Whether the site takes part.
        reason: Why not, as the server and the other sites may read it; "" if nothing was said.
        settings: Digest of the job's settings.
        time: When it was made, in seconds since the epoch.
    """

    approved: bool
    reason: str
    settings: str
    time: float


def decide(folder: Path, settings: Mapping[str, Any], *, approved: bool, reason: str = "") -> None:
    """Write a decision.

    Args:
        folder: The site's folder for this job.
        settings: The job's settings as JSON values, as the person saw them.
        approved: Whether the site takes part.
        reason: Why not.

    Raises:
        StoreError: It cannot be written.
    """
    decision = Decision(approved, reason, _digest(settings), time.time())
    write_file(folder / _FILE, json.dumps(asdict(decision)).encode(), secret=True)


def decision_on(folder: Path, settings: Mapping[str, Any]) -> Decision | None:
    """Return the decision about a job.

    Args:
        folder: The site's folder for this job.
        settings: The settings that the server sends now.

    Returns:
        The decision, or None if nobody has decided about a job with these settings.

    Raises:
        ConfigError: The file is there and cannot be read.
    """
    path = folder / _FILE
    try:
        decision = Decision(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the decision about this job cannot be read: {error}", where=str(path), fix="delete it, and decide again"
        ) from None
    seen = (_digest(settings), _digest(settings, whole=True))  # versions before the first release took all of them
    return decision if decision.settings in seen else None


def _digest(settings: Mapping[str, Any], *, whole: bool = False) -> str:
    """Digest of a job's settings, which is the same in all trainings of the job.

    Settings that the job leaves at their defaults are left out unless `whole`. So a decision holds when server or site
    are upgraded meanwhile to a version with more settings.
    """
    own = {**settings, "name": job_of(str(settings["name"]))}
    if not whole:
        own = {name: value for name, value in own.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
