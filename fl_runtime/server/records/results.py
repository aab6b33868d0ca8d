"""The results of a run, round by round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fl_runtime.aggregation.metrics.pooling import from_json, plain, to_json
from fl_runtime.errors import FederationError


@dataclass(frozen=True, slots=True)
class RoundResult:
    """The result of one closed round.

    Attributes:
        round: Number of the round, from 1.
        seconds: Time from opening to commit.
        metrics: Means over the sites, weighted by number of examples; validation metrics included.
        sites: Names of the sites whose updates counted, in the job's order.
        missing: Names of the participants without an update.
        bytes_up: Bytes of the updates of all sites, message headers included.
        bytes_down: Bytes of the tasks of all sites, message headers included.
    """

    round: int
    seconds: float
    metrics: Mapping[str, float]
    sites: tuple[str, ...]
    missing: tuple[str, ...]
    bytes_up: int
    bytes_down: int

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values.

        Returns:
            A new dict with a key for every attribute.
        """
        return {**asdict(self), "metrics": to_json(self.metrics)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> RoundResult:
        """The result that `to_json` was called on.

        Args:
            fields: What `to_json` returned, before or after a passage through JSON.

        Returns:
            An equal result.
        """
        sites, missing, metrics = tuple(fields["sites"]), tuple(fields["missing"]), plain(from_json(fields["metrics"]))
        return cls(**{**fields, "sites": sites, "missing": missing, "metrics": metrics})


@dataclass(frozen=True)
class RunResult:
    """The result of a run, so far or at its end.

    Attributes:
        rounds: The closed rounds, in order.
        best_round: Number of the round with the best model, or None if no round has a score of the best metric.
        no_best: Why there is no best round, as a human-readable message; "" if there is one.
        error: Why the run failed, or None if it did not.
        bytes_up: Bytes of all updates.
        bytes_down: Bytes of all tasks.
        files: What sites have sent beside the final model: `site` (whose files go with it), `names` (of the files) and
            `different` (site that sent other files -> their names). None if no site has sent any.
    """

    rounds: tuple[RoundResult, ...] = field(default=())
    best_round: int | None = None
    error: FederationError | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    no_best: str = ""
    files: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, without the error.

        Returns:
            A new dict with a key for every attribute but `error`.
        """
        return {
            "rounds": [item.to_json() for item in self.rounds],
            "best_round": self.best_round,
            "no_best": self.no_best,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "files": self.files,
        }
