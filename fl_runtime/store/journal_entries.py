"""The rows of a run's journal as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash


@dataclass(frozen=True)
class ModelEntry:
    """A committed global model.

    Attributes:
        version: The round whose result it is; 0 for the initial model.
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
        digests: xxh3-64 of each tensor, in manifest order.
    """

    version: int
    blob: str
    layout: bytes
    digests: bytes


@dataclass(frozen=True)
class StrategyStateEntry:
    """The strategy's own state beside the newest model, such as a server optimizer's moments.

    Attributes:
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
    """

    blob: str
    layout: bytes


@dataclass(frozen=True)
class UpdateEntry:
    """An accepted update.

    Attributes:
        round: The round it was accepted for; in a buffered run, the site's own round.
        site: Name of the site.
        digest: Identifier of layout and contents, 16 bytes.
        blob: Name of the blob with its tensors.
        layout: Layout of its manifest, 16 bytes.
        header: The other fields of the update as JSON values.
    """

    round: int
    site: str
    digest: bytes
    blob: str
    layout: bytes
    header: Mapping[str, Any]


@dataclass(frozen=True)
class RoundEntry:
    """A round that was opened.

    Attributes:
        round: Its number.
        participants: Names of the sites that take part.
        opened_at: Time of opening, in seconds since the epoch.
        result: JSON values recorded when it closed; None while it is open.
    """

    round: int
    participants: tuple[str, ...]
    opened_at: float
    result: Mapping[str, Any] | None


def row_check(row: tuple[Any, ...], header: str) -> str:
    """The check sum of an update's row, as hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(repr((row, header)).encode())
