"""What a run amounts to, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fl_runtime.errors import FederationError


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A closed round. seconds: from opening to commit. metrics: means over the sites, validation included.
    sites: whose updates counted. missing: participants without one. bytes: of all sites, headers included."""

    round: int
    seconds: float
    metrics: Mapping[str, float]
    sites: tuple[str, ...]
    missing: tuple[str, ...]
    bytes_up: int
    bytes_down: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RoundResult:
        return cls(**{**fields, "sites": tuple(fields["sites"]), "missing": tuple(fields["missing"])})


@dataclass(frozen=True)
class RunResult:
    """A whole run. error: None if every round finished."""

    rounds: tuple[RoundResult, ...] = field(default=())
    best_round: int | None = None
    error: FederationError | None = None
    bytes_up: int = 0
    bytes_down: int = 0
