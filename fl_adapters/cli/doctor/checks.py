"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding. A "problem" keeps runs from working; a "note" may matter to some."""

    name: str
    status: Status
    detail: str
    fix: str = ""
