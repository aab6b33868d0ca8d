"""The calls about the authority's roots: participants learn of new ones, and an admin has them handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fl_runtime.errors import ConnectionLostError
from fl_runtime.server.federation.queue import JobQueue
from fl_runtime.server.federation.requests import BEAT_S, field
from fl_runtime.server.federation.roots import RootsAtServer
from fl_runtime.transport.base import Peer
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.identity import Identity

_Fields = Mapping[str, Any]


class RootCalls:
    """Answers the calls about roots.

    Args:
        roots: The server's roots.
        queue: The jobs, whose `changed` wakes those who wait for new roots.
        audit: The log that new roots are put on.
        end_invalid_calls: Ends the calls whose certificate does not count any more.
    """

    def __init__(
        self, roots: RootsAtServer, queue: JobQueue, audit: AuditLog, end_invalid_calls: Callable[[], object]
    ) -> None:
        self._roots, self._queue, self._audit, self._end_invalid_calls = roots, queue, audit, end_invalid_calls

    def newer(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Answer what is newer than the caller's statement; wait for it if the caller says so."""
        number = field(fields, "number", int)
        if self._roots.note(caller.name, number, peer.certificate):
            self._audit.write("new root taken up", caller, number=number, address=peer.address)
        while True:
            with self._queue.changed:  # while it is held, nobody is told of new roots
                offer = self._roots.offer(caller.name, number, peer.certificate)
                if offer is None and fields.get("wait") is True:
                    self._queue.changed.wait(BEAT_S)
                    if self._queue.closed:
                        raise ConnectionLostError("the server is being stopped", fix="wait until it is back")
                    offer = self._roots.offer(caller.name, number, peer.certificate)
            if offer is not None or fields.get("wait") is not True:
                yield offer or {}
                return
            yield {"waiting": True}

    def hand_out(self, caller: Identity, peer: Peer, fields: _Fields) -> Iterator[_Fields]:
        """Take up new roots, and hand them out; without any, only tell who has taken up the newest."""
        if "package" in fields:
            before = self._roots.number
            self._roots.install(field(fields, "package", dict))
            if self._roots.number != before:
                self._audit.write("new roots", caller, number=self._roots.number, roots=self._roots.fingerprints)
                self._end_invalid_calls()
        with self._queue.changed:
            self._queue.changed.notify_all()
        yield self._roots.standing()
