"""Result of one check of `fl-adapters doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: What was checked.
        status: "ok"; "note" for what may matter to some; "problem" for what keeps runs from working.
        detail: What was found.
        fix: What to do, or "".
    """

    name: str
    status: Status
    detail: str
    fix: str = ""
