"""What an evaluator has found, as the score of a global model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.handlers import DecollateBatch, IgniteMetricHandler, PostProcessing

from fl_adapters.participant.metric_names import without_prefix


def scores_of(evaluator: Any) -> dict[str, float]:
    """The evaluator's metrics as plain numbers: "val_mean_dice" becomes "mean_dice".

    A metric with a value per class gives one for each, "mean_dice_1" and so on, numbered like MONAI numbers them;
    so does one whose mean alone is told but whose details per image and class are kept (`save_details`).
    """
    firsts = {name: _first_class(evaluator, name) for name in evaluator.state.metrics}
    found = plain_numbers(evaluator.state.metrics, firsts)
    for name, details in getattr(evaluator.state, "metric_details", {}).items():
        for key, number in _class_means(without_prefix(name), details, _first_class(evaluator, name)):
            found.setdefault(key, number)
    return found


@contextmanager
def unseen(evaluator: Any) -> Iterator[None]:
    """What is evaluated within this block leaves no trace: of the handlers that MONAI and Ignite come with, those alone
    run that the metrics need (no saver, logger, early stop or schedule), and the evaluator's state, with its best
    metric, is afterwards what it was. Handlers of the user's own run."""
    handlers, state = evaluator._event_handlers, vars(evaluator.state)
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}
    evaluator._event_handlers = defaultdict(list)
    for event, given in handlers.items():
        evaluator._event_handlers[event] = [item for item in given if _computes(item[0])]
    try:
        yield
    finally:
        evaluator._event_handlers = handlers
        state.clear()
        state.update(before)


def _computes(handler: Any) -> bool:
    hook = getattr(handler, "__wrapped__", handler)  # Ignite wraps those of every n-th event
    owner = getattr(hook, "__self__", hook)
    if isinstance(owner, (Metric, PostProcessing, DecollateBatch)):
        return True
    kind = owner if hasattr(owner, "__qualname__") else type(owner)
    return not kind.__module__.startswith(("monai.handlers.", "ignite.handlers.", "ignite.contrib."))


def plain_numbers(metrics: Mapping[str, Any], first_classes: Mapping[str, int] | None = None) -> dict[str, float]:
    """Metrics as plain numbers. first_classes: the number of a metric's first class, by its name; 0 by default."""
    found: dict[str, float] = {}
    inner = {key for value in metrics.values() if isinstance(value, Mapping) for key in value}
    for name, value in metrics.items():
        if name not in inner:  # Ignite lists the items of a mapping beside the mapping
            found.update(_numbers(without_prefix(name), value, (first_classes or {}).get(name, 0)))
    return found


def _numbers(name: str, value: Any, first: int) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{name}_{key}", item, first)
        return
    array = _array(value)
    if array is None:
        return
    if array.size == 1:
        yield name, float(array.reshape(()))
    elif array.ndim == 1:
        yield from ((f"{name}_{i}", float(number)) for i, number in enumerate(array, first))


def _class_means(name: str, details: Any, first: int) -> Iterator[tuple[str, float]]:
    """Means over the images of details [images, classes]; an image without a class counts for nothing there."""
    array = _array(details)
    if array is None or array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind != "f":
        return
    for i, column in enumerate(array.T, first):
        if np.isfinite(column).any():
            yield f"{name}_{i}", float(column[np.isfinite(column)].mean())


def _first_class(evaluator: Any, name: str) -> int:
    """The number of a metric's first class: 1 where it leaves the background out."""
    for handler, _, _ in evaluator._event_handlers[Events.EPOCH_COMPLETED]:
        metric = getattr(handler, "__self__", None)
        if isinstance(metric, IgniteMetricHandler) and metric._name == name:
            return int(not getattr(metric.metric_fn, "include_background", True))
    return 0


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """`value` as an array of numbers; None where it is something else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, (int, float, np.ndarray, np.generic, list, tuple)):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "fiub" else None
