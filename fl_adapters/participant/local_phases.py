"""What a strategy that reaches into local training needs to know of a site, and what a phase of a round came to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import PERSONAL_MODEL
from fl_runtime.errors import ConfigError
from fl_runtime.types import Metrics


def local_phases(strategy: str | None) -> int:
    """2 where the job's strategy trains a personal model after the global one (Ditto), else 1."""
    try:
        return 2 if strategy and PERSONAL_MODEL in make_strategy(strategy).requires else 1
    except ConfigError:  # one that this version does not know; the handshake says what it needs
        return 1


@dataclass(frozen=True)
class SiteHome:
    """A site's place in a job. folder: for what stays with it. sites: how many the job has. fresh: this is its first
    process in this run, so that whatever lies in the folder is of another one."""

    folder: Path
    sites: int
    fresh: bool


@dataclass(frozen=True)
class Phase:
    """What training for one budget came to: what an update says of it."""

    num_examples: int
    local_steps: int
    metrics: Metrics

    def with_personal(self, metrics: Metrics) -> Phase:
        """Also the metrics of the personal model's phase: its "train_loss" is "train_personal_loss"."""
        own = {name.replace("train_", "train_personal_", 1): value for name, value in metrics.items()}
        return replace(self, metrics={**own, **self.metrics})
