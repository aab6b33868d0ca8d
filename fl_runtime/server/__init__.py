"""The server of one job: membership, course, journal and service. Runs no user code and no training framework."""

from __future__ import annotations

from fl_runtime.server.records.results import RoundResult, RunResult
from fl_runtime.server.server import Server

__all__ = ["RoundResult", "RunResult", "Server"]
