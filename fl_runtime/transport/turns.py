"""Turns: who may transfer a large payload at full speed. They bound what is on its way at a server.

A few transfers have a turn, and the others wait in the order in which they asked. While somebody waits,

- a turn that has brought 128 MiB goes to the end of the queue, so that a large model does not hold up small ones, and
- a transfer that falls behind, because its line is slow or stands still, loses its turn and goes on without. It needs
  little memory then, since what it sends is read faster than it arrives. If it is fast again, it asks again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from fl_runtime.transport.waiting import Clock, SystemClock

SMALL_BYTES = 2**22
"""Payloads of up to so many bytes need no turn: they take no more memory than one that has it."""

TURN_BYTES = 2**27
"""How much a transfer brings in one turn if others wait, in bytes."""

PACE_BYTES, PACE_S = 2**22, 0.25
"""A transfer that needs longer for so many bytes is slow: one of less than 134 Mbit/s."""

_SHARE_BYTES = 12 * 2**20  # of a transfer that has a turn: frames that arrive, are read and are decrypted
_LEAST_WINDOW_BYTES, _MOST_WINDOW_BYTES = 5 * 2**14, 7 * 2**20
_OWN_MIB = 96
MEMORY_MIB, LEAST_MEMORY_MIB = 256, 128
"""A server's own memory in MiB, beside mapped files: the default, and the least that can be asked for."""


@dataclass(frozen=True)
class TransferMemory:
    """How a server divides its memory for data in transit.

    Half of it is for windows, which all sites may fill, also those that wait. The other half is for turns.

    Attributes:
        window_bytes: What one call may send ahead of what the server has read. 7 MiB fill a line of 1 Gbit/s with a
            round-trip time of 58 ms.
        turns: Number of transfers that have a turn at the same time.
    """

    window_bytes: int
    turns: int

    @classmethod
    def of(cls, memory_mib: int, sites: int) -> TransferMemory:
        """Divide a server's memory.

        Args:
            memory_mib: The server's own memory, beside mapped files, in MiB; at least 128. Of these, 96 are what it
                takes without transfers.
            sites: Expected number of sites.
        """
        half = (max(memory_mib, LEAST_MEMORY_MIB) - _OWN_MIB) * 2**20 // 2
        window = min(max(half // max(sites, 1), _LEAST_WINDOW_BYTES), _MOST_WINDOW_BYTES)
        return cls(window, max(half // _SHARE_BYTES, 2))


class Turns:
    """The turns of one server. Threads may share it.

    Nobody watches over the turns but those who wait: each of them looks when the next transfer may have fallen behind.

    Args:
        count: Number of transfers that have a turn at the same time; None for any number.
        clock: Measures the pace of transfers; None for this machine's.
    """

    def __init__(self, count: int | None, clock: Clock | None = None) -> None:
        self._count: float = float("inf") if count is None else count
        self._clock: Clock = clock or SystemClock()
        self._changed = threading.Condition()
        self._holders: list[Turn] = []
        self._queue: deque[Turn] = deque()

    def ask(self, nbytes: int) -> Turn:
        """Ask for a turn.

        Args:
            nbytes: What is left to transfer, in bytes.

        Returns:
            The turn, whose `wait` must be called. Small transfers go on without one.
        """
        turn = Turn(self)
        if nbytes > SMALL_BYTES:
            self.queue(turn)
        return turn

    def queue(self, turn: Turn) -> None:
        """Put a transfer at the end of the queue. Used by `Turn` alone, like all below."""
        with self._changed:
            self._queue.append(turn)
            self._pass_on()

    def holds(self, turn: Turn) -> bool:
        return turn in self._holders

    def wait(self, turn: Turn, timeout_s: float) -> bool:
        deadline = self._clock.now() + timeout_s
        with self._changed:
            while turn in self._queue:
                self._pass_on()
                left_s = deadline - self._clock.now()
                if turn not in self._queue:
                    break
                if left_s <= 0:
                    return False
                self._clock.wait(self._changed, min(left_s, self._first_behind_s()))
            return True

    def moved(self, turn: Turn, nbytes: int) -> None:
        with self._changed:
            now = self._clock.now()
            turn.brought += nbytes
            turn.paced += nbytes
            held = turn in self._holders
            if turn.paced >= PACE_BYTES:
                if not held and turn not in self._queue and now - turn.since <= PACE_S:
                    self._queue.append(turn)  # it has lost its turn, and is fast again
                    self._pass_on()
                turn.since, turn.paced = now, 0
            if held and turn.brought >= TURN_BYTES and self._queue:
                self._holders.remove(turn)
                self._queue.append(turn)
                self._pass_on()

    def end(self, turn: Turn) -> None:
        with self._changed:
            if turn in self._queue:
                self._queue.remove(turn)
            if turn in self._holders:
                self._holders.remove(turn)
            self._pass_on()
            self._changed.notify_all()

    def _first_behind_s(self) -> float:
        """Seconds until the first transfer may have fallen behind."""
        since = min((holder.since for holder in self._holders), default=0.0)
        return max(since + PACE_S - self._clock.now(), 0.0)

    def _pass_on(self) -> None:
        """Give the turns that are free, and those of transfers that are behind, to the first in the queue."""
        now = self._clock.now()
        while self._queue:
            if len(self._holders) >= self._count:
                slowest = min(self._holders, key=lambda holder: holder.since)
                if now - slowest.since < PACE_S:
                    return
                self._holders.remove(slowest)
                slowest.since, slowest.paced = now, 0
            turn = self._queue.popleft()
            turn.since, turn.paced, turn.brought = now, 0, 0
            self._holders.append(turn)
            self._changed.notify_all()


class Turn:
    """One transfer: in turn, waiting for it, or going on without.

    Attributes:
        since: When it was last known to be fast, in seconds of the clock.
        paced: Bytes since then.
        brought: Bytes in this turn.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.since, self.paced, self.brought = 0.0, 0, 0

    @property
    def held(self) -> bool:
        """Whether it is this transfer's turn."""
        return self._turns.holds(self)

    def wait(self, timeout_s: float) -> bool:
        """Wait while this transfer is in the queue.

        Args:
            timeout_s: Longest wait, in seconds.

        Returns:
            True if it may go on.
        """
        return self._turns.wait(self, timeout_s)

    def beats(self, beat_s: float, beat: bytes) -> Iterator[bytes]:
        """Wait until the transfer may go on.

        Args:
            beat_s: Seconds between signs of life to the other side.
            beat: The message that is one.

        Yields:
            The sign of life, as long as it takes.
        """
        while not self.wait(beat_s):
            yield beat

    def moved(self, nbytes: int) -> None:
        """Note that a part has been transferred. The transfer may have to wait again before the next one.

        Args:
            nbytes: Length of the part.
        """
        self._turns.moved(self, nbytes)

    def end(self) -> None:
        """Give the turn up, or leave the queue. May be called by any thread, and more than once."""
        self._turns.end(self)

    def __enter__(self) -> Turn:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


UNLIMITED = Turns(None)
"""Turns for callers that need not wait, such as those in the same process."""
