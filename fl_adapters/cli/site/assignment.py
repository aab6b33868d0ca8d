"""A job as the server assigns it to a site. Nothing in it is believed before it has been checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fl_runtime.errors import ConfigError, FederationError, ProtocolError
from fl_runtime.text import printable
from fl_runtime.trust.identity import Identity, check_name
from fl_runtime.types.needs import Needs

_APP_CHARS = 500


@dataclass(frozen=True)
class Assignment:
    """A job that waits for this site.

    Attributes:
        job: Name of the job. It can name a folder.
        app: App of the job; the site's policy maps it to a command.
        submitted_by: Identity (URI) of who submitted it, by the server's word; "" if unknown.
        index: Number of this site among those of the job, from 0.
        count: Number of sites in the job.
        settings: All settings of the job, with the fields of `RunSettings`.
    """

    job: str
    app: str
    submitted_by: str
    index: int
    count: int
    settings: Mapping[str, Any] = field(repr=False)

    @property
    def needs(self) -> Needs:
        """What the job needs at this site."""
        return Needs.of(self.settings.get("resources") or {})

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Assignment:
        """Read an answer of the server.

        Args:
            answer: Fields of an answer to the call "Assignment".

        Returns:
            The job.

        Raises:
            ProtocolError: The answer is not a job, or its name cannot name a folder.
        """
        try:
            check_name(answer["job"], "job")
            settings = answer.get("settings") or {}
            job, app, submitter = (str(answer[name]) for name in ("job", "app", "submitted_by"))
            app = printable(app, _APP_CHARS)
            index, count = int(answer["index"]), int(answer["count"])
            if 0 <= index < count and (not settings or settings["name"] == job):
                strategy = {} if settings else {"strategy": answer.get("strategy")}  # from an older server
                own = {"name": job, "app": app, "submitted_by": submitter}
                Needs.of(settings.get("resources") or {})  # raises ValueError
                return cls(job, app, submitter, index, count, {**settings, **strategy, **own})
        except (KeyError, TypeError, ValueError, ConfigError):
            pass
        raise ProtocolError(
            "the server assigns a job in a way that this site cannot read", fix="ask the server's operator"
        )

    @property
    def submitter(self) -> str:
        """Who submitted the job, for people to read."""
        try:
            return str(Identity.from_uri(self.submitted_by)) if self.submitted_by else "somebody unknown"
        except FederationError:
            return "somebody unknown"
