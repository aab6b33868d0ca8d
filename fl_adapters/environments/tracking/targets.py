"""Where a run is tracked, as users write it: `mlflow:URI`, `wandb[:PROJECT]`, `tensorboard[:DIR]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from fl_adapters.environments.tracking.records import Record, Tracker
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
        if tool == "mlflow":
            _check_address(place)
    return tuple(targets)


def _check_address(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        complete = parts.scheme not in ("http", "https") or (bool(parts.hostname) and parts.port != 0)
    except ValueError:  # a port that is no number, or a broken IPv6 address
        complete = False
    if not complete:
        raise ConfigError(
            f"{uri[:200]!r} is no address of an MLflow server",
            where="track",
            fix="write mlflow:http://HOST:PORT, such as mlflow:http://127.0.0.1:5000",
        )
    if parts.password and parts.scheme != "sqlite":
        raise ConfigError(
            "the address of MLflow has a password, which would be written to the run's files",
            where="track",
            fix="take it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


Targets = Annotated[tuple[str, ...], BeforeValidator(_checked)]
"""Field of a job: one target or several."""


@dataclass(frozen=True)
class NamedTracker:
    """A tracker with its name for messages.

    Attributes:
        name: Such as "mlflow".
        tracker: The tracker itself.
    """

    name: str
    tracker: Tracker

    def __call__(self, record: Record) -> None:
        """Pass a record on; see `Tracker`."""
        self.tracker(record)


def _made(target: str | Tracker, must_answer: bool) -> NamedTracker:
    if isinstance(target, NamedTracker):
        return target
    if not isinstance(target, str):
        return NamedTracker(getattr(target, "__name__", type(target).__name__), target)
    tool, _, place = _checked(target)[0].partition(":")
    if tool == "mlflow":
        from fl_adapters.environments.tracking.mlflow import MlflowTracker

        mlflow = MlflowTracker(place)
        if must_answer:
            mlflow.check_answer()
        return NamedTracker(tool, mlflow)
    if tool == "wandb":
        from fl_adapters.environments.tracking.wandb import WandbTracker

        return NamedTracker(tool, WandbTracker(place or "fl-adapters"))
    from fl_adapters.environments.tracking.tensorboard import TensorboardTracker

    return NamedTracker(tool, TensorboardTracker(place or "tensorboard"))


def make_trackers(targets: Sequence[str | Tracker], *, must_answer: bool = True) -> tuple[NamedTracker, ...]:
    """Make the trackers of several targets. Their packages are imported now; nothing is sent yet.

    Args:
        targets: The targets: texts, or trackers. The same one twice makes one.
        must_answer: Whether a server that cannot be reached now is an error.

    Returns:
        The trackers. They are targets, too: making them again returns them.

    Raises:
        ConfigError: A text names no tool, a tool's package is missing or not set up, or its server does not answer.
    """
    return tuple(_made(target, must_answer) for target in dict.fromkeys(targets))
