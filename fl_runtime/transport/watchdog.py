"""Watchdog: ends calls that have been silent for too long although their connection stands.

A connection that loses or damages bytes can leave both ends of a call waiting for each other. The server therefore
sends a sign of life in every call that waits (feature "beats"). A call without any is cancelled, and its caller makes
it again on a new connection.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fl_runtime.errors import ConnectionLostError
from fl_runtime.transport.base import Call
from fl_runtime.transport.threads import start_thread


class WatchedCall:
    """A call that ends with ConnectionLostError after too long a wait for its next reply.

    Use it as a context manager: leaving the `with` block ends the watch, not the call.

    Args:
        call: The call to watch.
        silence_s: Longest wait for a reply, in seconds.
        forget: Called with this object to end the watch.
    """

    def __init__(self, call: Call, silence_s: float, forget: Callable[[WatchedCall], None]) -> None:
        self._call, self._silence_s, self._forget = call, silence_s, forget
        self._waiting_since: float | None = None
        self._silent = False

    def __enter__(self) -> WatchedCall:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget(self)

    def __iter__(self) -> WatchedCall:
        return self

    def __next__(self) -> bytes:
        self._waiting_since = time.monotonic()
        try:
            return next(self._call)
        except ConnectionLostError as error:
            if self._silent:
                raise ConnectionLostError(
                    f"the server has sent nothing for {self._silence_s:g} s", where=error.where, fix=error.fix
                ) from None
            raise
        finally:
            self._waiting_since = None

    def progressed(self) -> None:
        """Restart the wait, because a part of the request has been sent."""
        if self._waiting_since is not None:
            self._waiting_since = time.monotonic()

    def cancel(self, *, broken: bool = False) -> None:
        """End the call, see `Call.cancel`."""
        self._call.cancel(broken=broken)

    def left_s(self) -> float:
        """Return the seconds that the call may still be silent; cancel it if there are none left."""
        since = self._waiting_since
        if since is None:
            return self._silence_s
        left_s = since + self._silence_s - time.monotonic()
        if left_s <= 0:
            self._silent = True
            self._call.cancel(broken=True)
        return left_s


class Watchdog:
    """Watches calls from one thread, which sleeps until the earliest time at which a call can be overdue.

    Args:
        silence_s: Longest wait for a reply, in seconds.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._calls: set[WatchedCall] = set()
        self._changed = threading.Condition()
        self._closed = False
        start_thread(self._watch, "fl-silence")

    def begin(self, call: Call, *, watched: bool) -> WatchedCall:
        """Start to watch a call.

        Args:
            call: The call, just started.
            watched: Whether the server sends signs of life in this call, or answers it at once. False: the call may
                be silent for any time.

        Returns:
            The call to use in its place.
        """
        watched_call = WatchedCall(call, self._silence_s, self._end)
        if watched:
            with self._changed:
                self._calls.add(watched_call)
                if len(self._calls) == 1:
                    self._changed.notify()
        return watched_call

    def _end(self, call: WatchedCall) -> None:
        with self._changed:
            self._calls.discard(call)

    def close(self) -> None:
        """End the thread; the calls themselves go on."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left_s = {call: call.left_s() for call in self._calls}
                self._calls = {call for call, seconds in left_s.items() if seconds > 0}
                self._changed.wait(min((left_s[call] for call in self._calls), default=None))
