"""The dashboard's connection to a federation's server: one transport, and a thread that follows what there is."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_adapters.dashboard.federation.following import Follower
from fl_adapters.dashboard.federation.rights import Rights
from fl_adapters.dashboard.federation.view import Federation, read_status
from fl_adapters.extras import needs_trust_extra
from fl_runtime.client.control import ControlClient
from fl_runtime.errors import FederationError
from fl_runtime.transport.base import Transport


@dataclass(frozen=True)
class Seen:
    """What is known of the federation.

    Attributes:
        number: Grows with every change.
        federation: The newest that the server has told; None before its first answer.
        fault: Why the server does not tell more at this moment; None while it does.
        since: When it told last, in seconds since the epoch; 0 before its first answer.
    """

    number: int = 0
    federation: Federation | None = None
    fault: FederationError | None = None
    since: float = 0.0


class FederationConnection:
    """Follows a federation as one of its admins. May be used by any thread.

    Attributes:
        rights: What the admin may do.
    """

    def __init__(self, transport: Transport, rights: Rights) -> None:
        """Begin to follow the federation.

        Args:
            transport: Connection with the admin's kit, which this object closes.
            rights: What the admin may do.
        """
        self.rights = rights
        self._transport = transport
        self._changed = threading.Condition()
        self._seen = Seen()
        self._closed = threading.Event()
        self._status = Follower(transport, "Status", lambda: {"follow": True}, self._take, self._fail)

    @classmethod
    def of_kit(cls, folder: Path) -> FederationConnection:
        """Connect with an admin's startup kit.

        Args:
            folder: Folder of the kit.

        Returns:
            The connection. A server that is away is waited for.

        Raises:
            ConfigError: The folder is not the kit of an admin.
        """
        with needs_trust_extra():
            from fl_runtime.client.roots import RenewingTransport
            from fl_runtime.trust.kits import read_kit

            kit = read_kit(folder, kind="admin")
        return cls(RenewingTransport.of_kit(kit.folder, kit.addresses), Rights(kit.identity))

    @property
    def seen(self) -> Seen:
        """What is known of the federation at this moment."""
        return self._seen

    def wait(self, number: int, timeout_s: float) -> Seen:
        """Wait for something that changes.

        Args:
            number: Number of what is known already.
            timeout_s: How long to wait, in seconds.

        Returns:
            What is known, whether it has changed or not.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._seen.number != number or self._closed.is_set(), timeout_s)
            return self._seen

    @property
    def transport(self) -> Transport:
        """The connection itself, for further calls. Do not close it."""
        return self._transport

    def ask(self, call: str, **fields: Any) -> dict[str, Any]:
        """Make a call, and wait for its answer.

        Args:
            call: Name of the call.
            **fields: The request's fields.

        Returns:
            The answer's fields.

        Raises:
            FederationError: The server refused the call, or is out of reach.
        """
        return ControlClient(self._transport).ask(call, **fields)

    def close(self) -> None:
        """End all calls, and the thread."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._status.close()
        self._transport.close()

    def _take(self, answer: Mapping[str, Any]) -> bool:
        self._note(read_status(answer), None)
        return True

    def _fail(self, error: FederationError) -> None:
        self._note(None, error)

    def _note(self, federation: Federation | None, fault: FederationError | None) -> None:
        with self._changed:
            before = self._seen
            if federation is not None:
                self._seen = Seen(before.number + 1, federation, None, time.time())
            elif str(fault) != str(before.fault):
                self._seen = Seen(before.number + 1, before.federation, fault, before.since)
            self._changed.notify_all()
