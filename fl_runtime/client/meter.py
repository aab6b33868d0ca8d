"""Measurements of a site's exchanges: bytes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fl_runtime.client.site_client import SiteClient


@dataclass(frozen=True)
class RoundStats:
    """Measurements of the last exchange.

    Attributes:
        round: Number of the round; 0 before the first exchange.
        bytes_up: Message bytes sent to the server.
        bytes_down: Message bytes received from the server.
        seconds: Time from submitting the update to receiving the next task, waiting for other sites included.
    """

    round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    def log_row(self) -> dict[str, float]:
        """Return the exchange as a row for the framework's own loggers: `federation_round`, bytes and seconds."""
        return {
            "federation_round": self.round,
            "federation_bytes_up": self.bytes_up,
            "federation_bytes_down": self.bytes_down,
            "federation_seconds": round(self.seconds, 6),
        }


class TransferMeter:
    """Measures exchanges: bytes and seconds from the submitted update to the next task."""

    def __init__(self, client: SiteClient) -> None:
        self._client = client
        self._began, self._up, self._down = 0.0, 0, 0
        self.stats = RoundStats()

    def begin(self) -> None:
        """Begin to measure: the update is about to be sent."""
        self._began, self._up, self._down = time.monotonic(), self._client.bytes_up, self._client.bytes_down

    def end(self, round: int) -> None:
        """Set `stats`: the task after `round` has arrived."""
        up, down = self._client.bytes_up - self._up, self._client.bytes_down - self._down
        self.stats = RoundStats(round, up, down, time.monotonic() - self._began)
