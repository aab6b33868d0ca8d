"""Where a run is tracked, as users write it: `mlflow:URI`, `wandb[:PROJECT]`, `tensorboard[:DIR]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from fl_adapters.environments.tracking.records import Tracker
from fl_runtime.errors import ConfigError

_TOOLS = ("mlflow", "wandb", "tensorboard")
_FORMS = "write mlflow:URI, wandb, wandb:PROJECT, tensorboard or tensorboard:DIR"


def _checked(value: Any) -> Any:
    """One target or several, as a tuple. Raises ConfigError for what names no tool."""
    targets = (value,) if isinstance(value, str) else value
    if not isinstance(targets, (tuple, list)) or not all(isinstance(item, str) for item in targets):
        raise ConfigError(
            f"a job cannot be tracked by {value!r}",
            where="track",
            fix=f"{_FORMS}; functions go to the environment, as Simulation(trackers=[...])",
        )
    for target in targets:
        tool, _, place = target.partition(":")
        if tool not in _TOOLS or not target.isprintable() or (tool == "mlflow" and not place):
            raise ConfigError(f"a run cannot be tracked by {target[:200]!r}", where="track", fix=_FORMS)
        if tool == "mlflow" and urlsplit(place).password and not place.startswith("sqlite"):
            raise ConfigError(
                "the address of MLflow has a password, which would be written to the run's files",
                where="track",
                fix="take it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            )
    return tuple(targets)


Targets = Annotated[tuple[str, ...], BeforeValidator(_checked)]
"""Field of a job: one target or several."""


def make_tracker(target: str | Tracker) -> tuple[str, Tracker]:
    """Make the tracker of a target. Its package is imported now; nothing is sent yet.

    Args:
        target: A target as text, or a tracker.

    Returns:
        Its name for messages, and the tracker.

    Raises:
        ConfigError: The text names no tool, or the tool's package is missing or not set up.
    """
    if not isinstance(target, str):
        return getattr(target, "__name__", type(target).__name__), target
    tool, _, place = _checked(target)[0].partition(":")
    if tool == "mlflow":
        from fl_adapters.environments.tracking.mlflow import MlflowTracker

        return tool, MlflowTracker(place)
    if tool == "wandb":
        from fl_adapters.environments.tracking.wandb import WandbTracker

        return tool, WandbTracker(place or "fl-adapters")
    from fl_adapters.environments.tracking.tensorboard import TensorboardTracker

    return tool, TensorboardTracker(place or "tensorboard")


def make_trackers(targets: Sequence[str | Tracker]) -> list[tuple[str, Tracker]]:
    """Make the trackers of several targets; see `make_tracker`. The same text twice makes one.

    Args:
        targets: The targets.

    Returns:
        Name and tracker of each.
    """
    return [make_tracker(target) for target in dict.fromkeys(targets)]
