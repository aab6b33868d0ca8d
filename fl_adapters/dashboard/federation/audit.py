"""The last lines of the server's audit log, followed while somebody looks at them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from fl_adapters.dashboard.audit_lines import SHOWN, AuditPage, read_lines
from fl_adapters.dashboard.federation.following import Follower
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import FederationError
from fl_runtime.transport.base import Transport

_IDLE_S = 30.0


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
