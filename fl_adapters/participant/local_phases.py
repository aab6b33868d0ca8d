"""What a strategy that changes local training needs to know about a site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import PERSONAL_MODEL
from fl_runtime.errors import ConfigError


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
