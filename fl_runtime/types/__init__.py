"""Core types that all parts of the package share: tasks, updates, reports, settings, and the strategy protocol.

All dataclasses are frozen. Arrays in them are borrowed from their owner unless a docstring says otherwise.
"""

from __future__ import annotations

from fl_runtime.types.messages import (
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
from fl_runtime.types.settings import PRODUCTION_PATIENCE_S, RunSettings, Terms
from fl_runtime.types.strategy import Aggregator, Allocate, RoundPlan, ServerState, Strategy

__all__ = [
    "PRODUCTION_PATIENCE_S",
    "Aggregator",
    "Allocate",
    "Array",
    "Arrays",
    "Content",
    "Event",
    "Listener",
    "Metrics",
    "Report",
    "RoundPlan",
    "RunSettings",
    "ServerState",
    "Settings",
    "Strategy",
    "Summary",
    "Task",
    "TaskKind",
    "Terms",
    "Update",
    "is_floating",
]
