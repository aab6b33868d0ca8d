"""How often a round trains its budget, by the job's strategy."""

from __future__ import annotations

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.corrections.local_terms import PERSONAL_MODEL
from fl_runtime.errors import ConfigError


def local_phases(strategy: str | None) -> int:
    """Return how many phases of local training a round has.

    Args:
        strategy: The job's strategy as text, such as "ditto:mu=0.1"; None for the default.

    Returns:
        2 for a strategy that trains a personal model after the global one (Ditto), else 1.
    """
    try:
        return 2 if strategy and PERSONAL_MODEL in make_strategy(strategy).requires else 1
    except ConfigError:  # a strategy of a later version: the handshake names what it needs
        return 1
