"""How often a round's local budget is trained."""

from __future__ import annotations

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.local_terms import PERSONAL_MODEL
from fl_runtime.errors import ConfigError


def local_phases(strategy: str | None) -> int:
    """2 where the job's strategy trains a personal model after the global one (Ditto), else 1."""
    try:
        return 2 if strategy and PERSONAL_MODEL in make_strategy(strategy).requires else 1
    except ConfigError:  # one that this version does not know; the handshake says what it needs
        return 1
