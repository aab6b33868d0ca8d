"""The length of an upload's frames: as long as the server takes them, shorter where the line needs long for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fl_runtime.transport.waiting import Clock, SystemClock
from fl_runtime.wire.frames import SHORTEST_FRAME_BYTES

_LONG_S, _SHORT_S = 0.1, 0.025


class FramePace:
    """Chooses the length of frames by the time that each takes to be sent.

    The server holds what has arrived of a frame until it is whole. So slow lines, of which there may be many at a time,
    send short ones.

    Args:
        longest_bytes: Most data bytes of a frame.
        clock: Measures how long a frame takes; None for this machine's.
    """

    def __init__(self, longest_bytes: int, clock: Clock | None = None) -> None:
        self._longest, self._bytes = longest_bytes, longest_bytes
        self._clock: Clock = clock or SystemClock()

    def frame_bytes(self) -> int:
        """Return the most data bytes of the next frame."""
        return self._bytes

    def sent(self, messages: Iterable[bytes]) -> Iterator[bytes]:
        """Pass messages on, and measure how long the consumer takes for each."""
        for message in messages:
            began = self._clock.now()
            yield message
            took_s = self._clock.now() - began
            if took_s > _LONG_S:
                self._bytes = max(self._bytes // 2, min(SHORTEST_FRAME_BYTES, self._longest))
            elif took_s < _SHORT_S:
                self._bytes = min(self._bytes * 2, self._longest)
