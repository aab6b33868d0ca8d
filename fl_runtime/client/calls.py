"""Calls of a site that are repeated over broken connections while its patience lasts."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from fl_runtime.errors import ConnectionLostError, ProtocolError, StoreError, TransferDamagedError
from fl_runtime.transport.base import Transport
from fl_runtime.transport.waiting import SILENCE_S, Clock, Reminders, SystemClock, duration_text
from fl_runtime.transport.watchdog import Watchdog, WatchedCall

M = TypeVar("M", bound=Message)
R = TypeVar("R")

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
_DAMAGED_TRIES = 4
_TOLD_AT_ONCE_S = 60.0  # who is this patient is told at once that the server was never reached
_BEATS = 4  # signs of life to ask for within the longest silence of a call
_ALWAYS_ANSWERED = ("Join", "Submit", "Files", "Leave")
_random = random.Random()  # a generator of our own, so that the user's random state does not change


class PatientCalls:
    """The calls of one site, made by one thread at a time.

    A call that meets a broken connection is repeated until the server has been out of reach for `patience_s` seconds,
    with a line in the log now and then. A call that hears nothing for half a minute, or `patience_s` if that is less,
    counts as broken too, if the server promises signs of life. There is no other deadline.

    Attributes:
        patience_s: How long the server may be out of reach, in seconds.
    """

    def __init__(self, transport: Transport, patience_s: float, clock: Clock | None = None) -> None:
        self._transport, self.patience_s = transport, patience_s
        self._clock: Clock = clock or SystemClock()
        self._silence_s = min(patience_s, SILENCE_S)
        self._watchdog = Watchdog(self._silence_s)
        self._beats = False  # the server gives signs of life in every call that waits
        self._under_way: WatchedCall | None = None
        self._heard = 0  # number of messages from the server; while it grows, the server is within reach
        self._closed = False

    def expect_beats(self) -> float:
        """Expect signs of life from the server in every call that waits; returns how often to ask for, in seconds."""
        self._beats = True
        return self._silence_s / _BEATS

    def begin(self, method: str, requests: bytes | Iterator[bytes]) -> WatchedCall:
        """Begin a call once, without repeating it."""
        call = self._transport.call(method, requests)
        return self._watchdog.begin(call, watched=self._beats or method in _ALWAYS_ANSWERED)

    def replies(self, method: str, requests: bytes | Iterator[bytes]) -> Iterator[bytes]:
        """Make a call once; yields the server's messages."""
        with self.begin(method, requests) as call:
            self._under_way = call
            for message in call:
                self._heard += 1
                yield message

    def ask(self, method: str, request: Message, reply: type[M], patience_s: float | None = None) -> M:
        """The server's answer to a request; signs of life that come before it are skipped."""
        waits = "waiting" in reply.DESCRIPTOR.fields_by_name

        def call() -> M:
            for message in self.replies(method, request.SerializeToString()):
                answer = parsed(reply, message)
                if not (waits and answer.HasField("waiting")):
                    return answer
            raise ConnectionLostError(f"the server ended the call {method} without an answer")

        return self.repeat(call, patience_s=patience_s)

    def repeat(
        self, attempt: Callable[[], R], *, progress: Callable[[], int] = int, patience_s: float | None = None
    ) -> R:
        """Repeat an attempt over broken connections, with pauses that grow and vary, while patience lasts.

        An attempt that was silent for all of that time is made once more: its connection may have been the cause.

        Args:
            attempt: Makes a call. It raises ConnectionLostError or StoreError if it may be repeated.
            progress: Returns how many bytes of the transfer have arrived so far. Damage is forgiven while it grows.
            patience_s: How long the server may be out of reach, in seconds; None for the site's own patience.

        Returns:
            What the attempt that succeeded returned.
        """
        patience_s = self.patience_s if patience_s is None else patience_s
        silence_s, reminders = min(patience_s, self._silence_s), Reminders()
        given_up_at: float | None = None
        pause_s, heard, damages, arrived, retry_granted = FIRST_PAUSE_S, self._heard, 0, 0, False
        while True:
            began = self._clock.now()
            try:
                result = attempt()
            except (ConnectionLostError, StoreError) as error:  # a server whose disk is full may be back soon
                if isinstance(error, TransferDamagedError):
                    arrived, previous = progress(), arrived
                    damages = 1 if arrived > previous else damages + 1
                if self._closed or damages == _DAMAGED_TRIES:
                    raise
                now = self._clock.now()
                if given_up_at is None and not self._heard and patience_s >= _TOLD_AT_ONCE_S:
                    log.warning("%s; waiting up to %s", error.what, duration_text(patience_s))
                silent = now - began >= silence_s and not retry_granted
                if given_up_at is None or self._heard != heard or silent:
                    retry_granted = silent
                    given_up_at, pause_s, heard = now + patience_s, FIRST_PAUSE_S, self._heard
                if now > given_up_at:
                    what = f"{error.what}; gave up after {duration_text(patience_s)}"
                    raise type(error)(what, where=error.where, fix=error.fix) from None
                away_s = now - (given_up_at - patience_s)
                if reminders.due(away_s):
                    log.warning(
                        "the server has not answered for %s; waiting up to %s (%s)",
                        duration_text(away_s),
                        duration_text(patience_s),
                        error.what,
                    )
            else:
                if given_up_at is not None and reminders.any:
                    away_s = self._clock.now() - (given_up_at - patience_s)
                    log.warning("the server answers again, after %s", duration_text(away_s))
                return result
            self._clock.sleep(pause_s * _random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def progressed(self) -> None:
        """Note that a part of the request has gone out, so that the call under way does not count as silent."""
        if self._under_way is not None:
            self._under_way.progressed()

    def abandon(self) -> None:
        """End the call under way; the next one is made on another connection."""
        if self._under_way is not None:
            self._under_way.cancel(broken=True)

    def close(self) -> None:
        """Close the transport. A call under way in another thread is not repeated."""
        self._closed = True
        self._watchdog.close()
        self._transport.close()


def parsed(kind: type[M], message: bytes) -> M:
    """A message of the server. Raises ProtocolError if it is not one of this kind."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise ProtocolError(f"the server's answer is not a {kind.__name__} message") from None
