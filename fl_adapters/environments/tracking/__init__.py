"""Tracking: a run's settings, metrics and results, sent to MLflow, Weights & Biases, TensorBoard or a function."""

from fl_adapters.environments.tracking.records import Begin, End, EndState, Metrics, Point, Record, TrackedRun, Tracker
from fl_adapters.environments.tracking.tracking import Tracking

__all__ = ["Begin", "End", "EndState", "Metrics", "Point", "Record", "TrackedRun", "Tracker", "Tracking"]
