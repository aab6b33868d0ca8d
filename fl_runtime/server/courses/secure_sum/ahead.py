"""Shares for the masks of the next round, which leave with the updates of this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SharesAhead:
    """What a round needs in order to begin with training, if its participants are those of the round before.

    Attributes:
        round: The round that the shares are for.
        stage: The stage that they are for.
        processes: Site -> number of its process.
        shares: Site -> its message of shares.
    """

    round: int
    stage: str
    processes: Mapping[str, int]
    shares: Mapping[str, bytes]


def stage_after(stage: str, round: int) -> str:
    """Return the name of the stage that follows in the next round.

    Args:
        stage: The stage of a round.
        round: Number of that round.

    Returns:
        A name that differs from those of all other tries.
    """
    prefix, _, token = stage.rpartition(f"{round}-")
    return f"{prefix}{round + 1}-{token}"
