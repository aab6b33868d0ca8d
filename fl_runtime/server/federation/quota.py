"""Quotas: how much of the server's time, memory and disk one participant may use.

Every allowance is far above what an honest participant needs, whatever its adapter, and however often it reconnects.
It is a token bucket: an amount that may be used at once, and what comes back every second. The calls of a round are
paid for by updates that count, and by first reports on a model, so that rounds may be as short as they like.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fl_runtime.errors import ConnectionLostError, FederationError, PermissionDeniedError
from fl_runtime.transport.base import Resource
from fl_runtime.trust.identity import Identity

CALLS_A_JOB = 8
"""Calls that one participant may have open for each of its jobs, so that nobody uses up the threads of others. A site's
process needs 3, and its daemon one. As many again may have been ended by their caller a moment ago."""
MOST_SLOTS = 32
"""Jobs that one site may run at a time. What it says beyond that is not believed."""
HELD_EACH = 6
"""Refusals for calls over the quota that may be held back at a time, per participant."""
HOLD_S = 1.0
"""How long such a refusal is held back, so that a client that calls in a loop slows down.

A refused call of one large message is held back for less. Without that, the messages of a loop arrive faster than gRPC
frees those that have been refused, and the server holds two for each of its calls.
"""

_SMALL_BYTES = 2**18  # first messages of up to so many bytes do not take turns with others once they have arrived
_TURN_S = 10.0
_BYTES_A_CALL = 2**17  # this many bytes of a refused call count like another refused call
_HELD_BYTES_A_S = 2**24  # for how long the refusal of a large message is held back
_DEBT_S = 10.0  # a participant is refused for at most so long after a call that cost too much


@dataclass(frozen=True)
class Allowance:
    """How much of something one participant may use.

    Attributes:
        at_once: The most that may be used at once.
        per_s: What comes back every second.
        earned: What comes back with each update of the participant that counts, and each first report on a model.
    """

    at_once: float
    per_s: float
    earned: float = 0.0


_ROUND = Allowance(1_000, 20, earned=8)
_SCORE = Allowance(200, 20, earned=8)  # each is written to the journal, which takes about 5 ms
_START = Allowance(200, 2)
_CONTROL = Allowance(100, 5)

CALLS: Mapping[str, Allowance] = {
    "Next": _ROUND,
    "Submit": _ROUND,
    "Score": _SCORE,
    "Join": _START,
    "Register": _START,
    "Leave": _START,
    "Files": _START,
    "Attend": Allowance(300, 5),
    "Tunnel": Allowance(60, 2),
    "Assignment": Allowance(300, 5),
}
"""Calls by their name. All others, those of admins, have 100 at once and 5 a second."""

USED: Mapping[Resource, Allowance] = {
    "tensors": Allowance(600_000, 10_000),
    "registered bytes": Allowance(4 * 2**20, 2**14),
    "metric bytes": Allowance(8 * 2**20, 2**16, earned=2**12),
}
"""What calls use, whether they are refused afterwards or not."""

REFUSED = Allowance(2_000, 20, earned=20)
"""Calls that are refused or bring nothing new. Every 128 KiB of such a call count like one more."""


class Quotas:
    """The quotas of all participants. May be used by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._quotas: dict[str, _Quota] = {}

    def account(self, who: Identity, method: str, *, void: str = "") -> CallAccount:
        """Open the account of one call.

        Args:
            who: Who is calling.
            method: Name of the call.
            void: Identifier of the caller's certificate if that is not valid. Its calls are counted apart from those
                of the participant that it names.

        Returns:
            The account. Nothing is counted yet.
        """
        with self._lock:
            return CallAccount(self._quotas.setdefault(f"{who.name} {void}", _Quota()), who, method)

    @contextmanager
    def held(self, who: Identity) -> Iterator[bool]:
        """Count a refusal that is being held back. Yields whether it may be, since each takes a thread."""
        with self._lock:
            quota = self._quotas.setdefault(f"{who.name} ", _Quota())
            may = quota.held < HELD_EACH
            quota.held += may
        try:
            yield may
        finally:
            with self._lock:
                quota.held -= may


class CallAccount:
    """The account of one call. See `fl_runtime.transport.base.Account`.

    Attributes:
        over: Whether the call was refused because its caller is over the quota.
        crowded: Whether the quota in question is that of open calls.
    """

    def __init__(self, quota: _Quota, who: Identity, method: str) -> None:
        self._quota, self._who, self._method = quota, who, method
        self._bytes = 0
        self._reading = False  # whether this call has its caller's turn
        self._messages = 0
        self.over = self.crowded = False

    def begin(self) -> None:
        """Count the call, before anything of it is read. Raises PermissionDeniedError over the quota."""
        if not self._quota.take("refused", REFUSED, 0):
            raise self._refusal("refused calls, and calls that bring nothing new,", REFUSED)
        allowance = CALLS.get(self._method, _CONTROL)
        if not self._quota.take(self._method, allowance, 1):
            raise self._refusal(f"calls {self._method}", allowance)

    def counted(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the messages of the call, and count their bytes. First messages of one participant take turns."""
        if not self._quota.turn.acquire(timeout=_TURN_S):
            raise ConnectionLostError(f"another call of {self._who} is still being read", fix="call again")
        self._reading = True
        first = None
        try:
            first = next(requests, None)
            self._messages = 1
        finally:
            if first is None or len(first) <= _SMALL_BYTES:
                self.read()
        if first is not None:
            self._bytes += len(first)
            whole, first = [first], None
            yield whole.pop()  # nothing here holds on to it, however long the call stays open
        for message in requests:
            self._messages += 1
            self._bytes += len(message)
            yield message
            del message  # else it takes memory while the next one arrives

    @property
    def hold_s(self) -> float:
        """For how many seconds the refusal of this call should be held back."""
        if self.over:
            return HOLD_S
        large = self._messages == 1 and self._bytes > _SMALL_BYTES
        return min(self._bytes / _HELD_BYTES_A_S, HOLD_S) if large else 0.0

    def discard(self, requests: Iterator[bytes], hang_up: Callable[[], object]) -> None:
        """Read the first message of a call that is refused, which would take memory while the refusal is held back.

        Args:
            requests: The messages of the call.
            hang_up: Ends the call; called if it sends nothing.
        """
        if self._messages or self._method == "Tunnel":  # of a stream that is read, gRPC takes in as much again
            return
        timer = threading.Timer(_TURN_S, hang_up)
        timer.daemon = True
        timer.start()
        try:
            next(requests, None)
        finally:
            timer.cancel()

    def read(self) -> None:
        """Let other calls of the participant be read; see `Account`."""
        if self._reading:
            self._reading = False
            self._quota.turn.release()

    def refuse(self, error: FederationError) -> None:
        """Count the call as refused."""
        broken = isinstance(error, ConnectionLostError)  # the bytes of a broken transfer are the network's doing
        self._quota.charge("refused", REFUSED, 1 if broken else 1 + self._bytes / _BYTES_A_CALL)

    def spend(self, resource: Resource, amount: int) -> None:
        """Count what the call uses; see `Account`."""
        if not self._quota.take(resource, USED[resource], amount):
            raise self._refusal(f"{resource}", USED[resource])

    def earn(self) -> None:
        """Note that the call has brought the run on; see `Account`."""
        for name, allowance in (*CALLS.items(), *USED.items(), ("refused", REFUSED)):
            if allowance.earned:
                self._quota.charge(name, allowance, -allowance.earned)

    def void(self) -> None:
        """Note that the call brought nothing new; see `Account`."""
        self._quota.charge("refused", REFUSED, 1 + self._bytes / _BYTES_A_CALL)

    def _refusal(self, what: str, allowance: Allowance) -> PermissionDeniedError:
        self.over = True
        limit = f"{allowance.at_once:,.0f} at once and {allowance.per_s:,.0f} a second"
        return PermissionDeniedError(
            f"{self._who} is over its quota of {what}: {limit}",
            where=f"rule quota: {what} {limit}",
            fix="wait a minute; then run one process, which makes its calls one after another. Look for a loop that "
            "calls without a pause",
        )


class _Quota:
    """What is left to one participant.

    Attributes:
        held: Number of refusals that are being held back.
        turn: Held by the call whose first message is being read.
    """

    def __init__(self) -> None:
        self.held = 0
        self.turn = threading.Lock()
        self._lock = threading.Lock()
        self._left: dict[str, tuple[float, float]] = {}  # amount, and when it was so much, in monotonic seconds

    def take(self, name: str, allowance: Allowance, amount: float) -> bool:
        """Take an amount if it is there. False, and nothing is taken, if it is not."""
        with self._lock:
            left = self._refilled(name, allowance)
            if left < amount:
                return False
            self._left[name] = left - amount, time.monotonic()
            return True

    def charge(self, name: str, allowance: Allowance, amount: float) -> None:
        """Take an amount that has been used already, or give back a negative one."""
        with self._lock:
            left = self._refilled(name, allowance) - amount
            self._left[name] = max(left, -_DEBT_S * allowance.per_s), time.monotonic()

    def _refilled(self, name: str, allowance: Allowance) -> float:
        now = time.monotonic()
        left, at = self._left.get(name, (allowance.at_once, now))
        return min(left + (now - at) * allowance.per_s, allowance.at_once)
