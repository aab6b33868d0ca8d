"""Calls that follow: made again when their connection is lost, and ended when nobody looks any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fl_runtime.client.control import ControlClient
from fl_runtime.errors import ConnectionLostError, FederationError
from fl_runtime.transport.base import Transport

log = logging.getLogger(__name__)

_AGAIN_S = 1.0  # how often a server is asked that answers such a call once
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0
_REFUSED_PAUSE_S = 5.0  # after a refusal, each of which is a line of the server's audit log


class Follower:
    """Makes one call that follows, in a thread of its own, until it is closed or nobody looks any more."""

    def __init__(
        self,
        transport: Transport,
        call: str,
        fields: Callable[[], Mapping[str, Any]],
        take: Callable[[Mapping[str, Any]], bool],
        fail: Callable[[FederationError], None],
        idle_s: float | None = None,
    ) -> None:
        """Begin to follow.

        Args:
            transport: Connection to the server; it stays open.
            call: Name of the call.
            fields: Returns the request's fields, each time the call is made.
            take: Called with the fields of each answer but signs of life. It returns whether to go on.
            fail: Called with the error when the server is away or refuses the call; it is made again.
            idle_s: Seconds after the last `touch` at which it ends; None to go on until it is closed.
        """
        self._client = ControlClient(transport)
        self._call, self._fields, self._take, self._fail, self._idle_s = call, fields, take, fail, idle_s
        self._touched = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"fl-dashboard-{call.lower()}", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it has ended, so that it tells nothing more."""
        return not self._thread.is_alive()

    def touch(self) -> None:
        """Note that somebody looks at what it tells."""
        self._touched = time.monotonic()

    def close(self) -> None:
        """End the call, and wait a moment for the thread."""
        self._closed.set()
        self._client.interrupt()
        self._thread.join(5)

    def _goes_on(self) -> bool:
        idle = self._idle_s is not None and time.monotonic() > self._touched + self._idle_s
        return not self._closed.is_set() and not idle

    def _follow(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while self._goes_on():
            try:
                for answer in self._client.answers(self._call, **self._fields()):
                    pause_s = _FIRST_PAUSE_S
                    if not self._goes_on() or ("waiting" not in answer and not self._take(answer)):
                        self._client.interrupt()
                        return
                self._closed.wait(_AGAIN_S)
            except FederationError as error:
                if not self._closed.is_set():
                    self._fail(error)
                    self._closed.wait(pause_s if isinstance(error, ConnectionLostError) else _REFUSED_PAUSE_S)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            except Exception as error:  # a page that never changes again would be worse than one that says why
                log.exception("an answer to %s could not be read", self._call)
                self._fail(FederationError(f"what the server tells could not be read: {error!r}"[:300]))
                self._closed.wait(_REFUSED_PAUSE_S)
