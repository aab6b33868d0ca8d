"""The lines of the server's audit log, as bounded and printable values for a page."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fl_adapters.dashboard.federation.following import Follower
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import FederationError, PermissionDeniedError
from fl_runtime.text import printable
from fl_runtime.transport.base import Transport
from fl_runtime.trust.identity import Identity

SHOWN = 100
"""Lines on a page."""
_IDLE_S = 30.0
_KNOWN = ("number", "time", "who", "action", "outcome", "rule", "error")


@dataclass(frozen=True)
class AuditLine:
    """A line of the audit log.

    Attributes:
        number: Its number; 0 if it cannot be read.
        time: When, as text in UTC.
        who: Who asked for it; "server" for the server itself.
        action: What was done or asked for.
        outcome: "done", "refused" or "damaged".
        facts: What else the line says.
    """

    number: int
    time: str
    who: str
    action: str
    outcome: str
    facts: str


@dataclass(frozen=True)
class AuditPage:
    """Lines of the audit log that follow each other.

    Attributes:
        lines: The lines, the newest first.
        begin: Where the oldest of them begins in the log, in bytes; 0 if no line is older.
    """

    lines: tuple[AuditLine, ...]
    begin: int


def read_lines(told: Mapping[str, Any]) -> AuditPage:
    """Read the server's answer to `ReadAudit`.

    Args:
        told: Its fields.

    Returns:
        The lines.
    """
    return AuditPage(tuple(_line(fields) for fields in reversed(told["lines"][-500:])), max(int(told["begin"]), 0))


class AuditTail:
    """The last lines of the audit log, which are followed while somebody looks at them."""

    def __init__(self, transport: Transport) -> None:
        """Make it; nothing is asked for yet.

        Args:
            transport: Connection to the server as an admin of the project; it stays open.
        """
        self._transport = transport
        self._lock = threading.Lock()
        self._follower: Follower | None = None
        self._page: AuditPage | None = None
        self._fault: FederationError | None = None

    def newest(self) -> tuple[AuditPage, FederationError | None]:
        """Return the last lines, and why newer ones may be missing.

        Raises:
            FederationError: The server refuses to tell them, or is away, and none are known.
        """
        with self._lock:
            if self._follower is None or self._follower.over:
                self._page = read_lines(ControlClient(self._transport).ask("ReadAudit", count=SHOWN))
                self._follower = Follower(
                    self._transport,
                    "ReadAudit",
                    lambda: {"count": SHOWN, "follow": True},
                    self._take,
                    self._fail,
                    _IDLE_S,
                )
            self._follower.touch()
            return self._page or AuditPage((), 0), self._fault

    def before(self, begin: int) -> AuditPage:
        """Return the lines before those of a page.

        Args:
            begin: `begin` of that page.

        Raises:
            FederationError: The server refuses to tell them, or is away.
        """
        return read_lines(ControlClient(self._transport).ask("ReadAudit", count=SHOWN, before=begin))

    def version(self) -> str:
        """Return a text that changes with the last lines."""
        try:
            page, fault = self.newest()
        except FederationError as error:
            return error.what
        return f"{page.lines[0].number if page.lines else 0} {fault.what if fault else ''}"

    def close(self) -> None:
        """End the call that follows the log."""
        if self._follower is not None:
            self._follower.close()

    def _take(self, answer: Mapping[str, Any]) -> bool:
        told, known = read_lines(answer), self._page
        newest = max((line.number for line in known.lines), default=0) if known is not None else 0
        added = tuple(line for line in told.lines if not line.number or line.number > newest)
        if known is None or len(added) == len(told.lines) >= SHOWN:
            self._page = told
        elif added:
            self._page = AuditPage((*added, *known.lines)[: 5 * SHOWN], known.begin)
        self._fault = None
        return True

    def _fail(self, error: FederationError) -> None:
        self._fault = error


def _line(fields: Mapping[str, Any]) -> AuditLine:
    try:
        who = str(Identity.from_uri(fields["who"])) if fields.get("who") else "server"
    except PermissionDeniedError:
        who = printable(str(fields["who"]), 200)
    facts = {key: value for key, value in fields.items() if key not in _KNOWN}
    texts = [str(fields[key]) for key in ("rule", "error") if fields.get(key)]
    texts += [f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items()]
    number = fields.get("number")
    return AuditLine(
        number if type(number) is int else 0,
        printable(str(fields.get("time", "")), 40),
        who,
        printable(str(fields.get("action", "")), 100),
        printable(str(fields.get("outcome", "")), 20),
        printable("; ".join(texts), 1000),
    )
