"""Core types that all parts of the package share: tasks, updates, reports, settings, and the strategy protocol.

All dataclasses are frozen. Arrays in them are borrowed from their owner unless a docstring says otherwise.
"""

from __future__ import annotations

from fl_runtime.types.messages import (
    PARTICIPANTS,
    UPDATES,
    Array,
    Arrays,
    Content,
    Event,
    Listener,
    Metrics,
    Report,
    Settings,
    Summary,
    Task,
    TaskKind,
    Update,
    is_floating,
)
from fl_runtime.types.settings import (
    LARGEST_SEED,
    LONGEST_S,
    MODEL_SETTINGS,
    MOST_ROUNDS,
    MOST_SITES,
    PRODUCTION_PATIENCE_S,
    SERVER_SETTINGS,
    CohortRules,
    OwnPart,
    RunSettings,
    Terms,
)
from fl_runtime.types.statistics import StatisticsRules
from fl_runtime.types.strategy import Aggregator, Allocate, RoundPlan, ServerState, Strategy

__all__ = [
    "LARGEST_SEED",
    "LONGEST_S",
    "MODEL_SETTINGS",
    "MOST_ROUNDS",
    "MOST_SITES",
    "PARTICIPANTS",
    "PRODUCTION_PATIENCE_S",
    "SERVER_SETTINGS",
    "UPDATES",
    "Aggregator",
    "Allocate",
    "Array",
    "Arrays",
    "CohortRules",
    "Content",
    "Event",
    "Listener",
    "Metrics",
    "OwnPart",
    "Report",
    "RoundPlan",
    "RunSettings",
    "ServerState",
    "Settings",
    "StatisticsRules",
    "Strategy",
    "Summary",
    "Task",
    "TaskKind",
    "Terms",
    "Update",
    "is_floating",
]
