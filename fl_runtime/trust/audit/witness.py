"""Participants note the last lines of each other's audit logs, so that a log that was deleted is noticed."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

from fl_runtime.errors import PermissionDeniedError
from fl_runtime.trust.audit.lines import LOG_FILE, NOTED, LineMark
from fl_runtime.trust.audit.log import AuditLog
from fl_runtime.trust.identity import Identity

log = logging.getLogger(__name__)

_COMPARED = "log compared"


class Witness:
    """Notes the last lines of other participants' audit logs in the participant's own log.

    Each note is a line with the action "log noted" and the fields `of` (identity) and `line` (number and digest).
    `verify(..., witnesses=...)` looks up every one of them.
    """

    def __init__(self, audit: AuditLog, folder: Path, own: Identity) -> None:
        """Read the notes that are in the log.

        Args:
            audit: The participant's own log.
            folder: Folder of that log.
            own: The participant.
        """
        self._audit, self._own = audit, own
        self._lock = threading.Lock()
        self._noted = _notes(folder / LOG_FILE)
        self._reported: dict[str, int] = {}  # number of the note below which a log was reported to end, by URI

    def statement(self, listener: Identity | None = None) -> dict[str, Any]:
        """Return what this participant tells another one: the last line of its log, and of the other's as noted here.

        Args:
            listener: The other one; None for the one that was noted last.

        Returns:
            JSON values, for `take` of the other one.
        """
        with self._lock:
            noted = self._noted.get(listener.uri) if listener else next(reversed(self._noted.values()), None)
            of = next((uri for uri, mark in reversed(self._noted.items()) if mark is noted), "")
        told = {"of": self._own.uri, **self._audit.last_line().to_json()}
        return told if noted is None else {**told, "noted": noted.to_json(), "noted_of": of}

    def take(self, statement: object, kind: str, teller: Identity | None = None) -> None:
        """Note what another participant tells of its log, and record it if one of the two logs has lost lines.

        Args:
            statement: What `statement` of the other one has returned. Anything else is ignored.
            kind: Kind of participant that may tell it: "server" or "site".
            teller: Who tells it, if that is known from a certificate; None to believe the statement.
        """
        mark = LineMark.of(statement)
        if mark is None or not isinstance(statement, dict):
            return
        try:
            who = Identity.from_uri(str(statement.get("of", "")))
        except PermissionDeniedError:
            return
        if who.kind != kind or who.federation != self._own.federation or teller not in (None, who):
            return
        about_this_log = statement.get("noted_of", self._own.uri) == self._own.uri  # servers that take turns have two
        noted = LineMark.of(statement.get("noted")) if about_this_log else None
        if noted is not None and noted.number > (end := self._audit.last_line().number):
            self._record(who, f"{who} has noted line {noted.number} of this log, which ends with line {end}", noted)
        self._note(who, mark)

    def _note(self, who: Identity, mark: LineMark) -> None:
        with self._lock:
            before = self._noted.get(who.uri)
            if before == mark or (before is not None and self._reported.get(who.uri) == before.number >= mark.number):
                return
            lost = before is not None and mark.number <= before.number
            if before is not None and lost:  # the higher note stays, and is told to the other one
                self._reported[who.uri] = before.number
            else:
                self._noted.pop(who.uri, None)
                self._noted[who.uri] = mark
        if before is not None and lost:
            what = f"the audit log of {who} ends with line {mark.number}; line {before.number} of it was noted before"
            self._record(who, what, before)
        else:
            self._audit.write(NOTED, self._own, of=who.uri, line=mark.to_json())

    def _record(self, who: Identity, what: str, noted: LineMark) -> None:
        log.warning("%s. Lines were removed", what)
        self._audit.write(_COMPARED, who, rule="lines of a log stay", error=what, noted=noted.to_json())


def _notes(path: Path) -> dict[str, LineMark]:
    """Return the last note about each participant, by URI."""
    notes, action = {}, NOTED.encode()
    with open(path, "rb") as file:
        for line in file:
            if action not in line:
                continue
            try:
                fields = json.loads(line)
                mark = LineMark.of(fields["line"])
                if fields["action"] == NOTED and mark is not None:
                    notes[str(fields["of"])] = mark
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return notes
