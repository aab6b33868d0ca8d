"""Calls in which nothing happens any more, although their connection stands: they are ended, and made again.

A connection that loses or damages bytes can leave a call at both ends waiting for the other. So the other end says
now and then that it is there, and a call in which nothing has been heard for too long is given up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fl_runtime.errors import ConnectionLostError
from fl_runtime.transport.base import Call


class WatchedCall:
    """A call that ends with ConnectionLostError when nothing comes for `silence_s` while its replies are waited for.
    It is a context that ends being watched."""

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
                    f"nothing has come from the server for {self._silence_s:g} s", where=error.where, fix=error.fix
                ) from None
            raise
        finally:
            self._waiting_since = None

    def moved(self) -> None:
        """Something has happened other than a reply: a part of the request has gone out."""
        if self._waiting_since is not None:
            self._waiting_since = time.monotonic()

    def cancel(self, *, broken: bool = False) -> None:
        self._call.cancel(broken=broken)

    def left_s(self) -> float:
        """How long it may still be silent; gives it up when that is over."""
        since = self._waiting_since
        if since is None:
            return self._silence_s
        left = since + self._silence_s - time.monotonic()
        if left <= 0:
            self._silent = True
            self._call.cancel(broken=True)
        return left


class Watchman:
    """Watches calls from a thread of its own, which sleeps while none of them can have been silent for too long."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._calls: set[WatchedCall] = set()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._watch, name="fl-silence", daemon=True).start()

    def begin(self, call: Call, *, watched: bool) -> WatchedCall:
        """watched: the other end says in this call that it is there, or answers it at once."""
        found = WatchedCall(call, self._silence_s, self._end)
        if watched:
            with self._changed:
                self._calls.add(found)
                if len(self._calls) == 1:
                    self._changed.notify()
        return found

    def _end(self, call: WatchedCall) -> None:
        with self._changed:
            self._calls.discard(call)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = {call: call.left_s() for call in self._calls}
                self._calls = {call for call, seconds in left.items() if seconds > 0}
                self._changed.wait(min((left[call] for call in self._calls), default=None))
