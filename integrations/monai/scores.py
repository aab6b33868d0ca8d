"""Metrics of an evaluator as the score of a global model."""

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

from fl_adapters.participant.local_result import without_prefix
from fl_adapters.participant.options import BestMetric

from .trainer import event_handlers, metric_name, set_event_handlers


def scores_of(evaluator: Any) -> dict[str, float]:
    """The evaluator's metrics as plain numbers: "val_mean_dice" becomes "mean_dice".

    A metric with a value per class gives one number for each, "mean_dice_1" and so on, numbered as MONAI does. So does
    a metric that reports its mean alone, but keeps details per image and class (`save_details`).
    """
    firsts = {name: _first_class(evaluator, name) for name in evaluator.state.metrics}
    numbers = plain_numbers(evaluator.state.metrics, firsts)
    for name, details in getattr(evaluator.state, "metric_details", {}).items():
        for key, number in _class_means(without_prefix(name), details, _first_class(evaluator, name)):
            numbers.setdefault(key, number)
    return numbers


def key_metric(evaluator: Any) -> BestMetric | None:
    """The evaluator's key metric. None without one, and if `metric_cmp_fn` does not say which values are better."""
    name, better = getattr(evaluator.state, "key_metric_name", None), getattr(evaluator, "metric_cmp_fn", None)
    if not name or better is None:
        return None
    try:
        higher, lower = bool(better(1.0, 0.0)), bool(better(0.0, 1.0))
    except Exception:  # the user's own function, made for other values
        return None
    if higher and name.endswith("loss"):  # the default of `metric_cmp_fn`, which nobody means for a loss
        return None
    return None if higher == lower else BestMetric(without_prefix(name), "max" if higher else "min")


@contextmanager
def unseen(evaluator: Any) -> Iterator[None]:
    """Evaluate within this block without a trace.

    Of the handlers of MONAI and Ignite only those run that the metrics need: no saver, logger, early stop or schedule.
    Handlers of the user's own run. The evaluator's state, with its best metric, is restored afterwards.
    """
    handlers, state = event_handlers(evaluator), vars(evaluator.state)
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in state.items()}
    computing: dict[Any, list[tuple[Any, Any, Any]]] = defaultdict(list)
    for event, given in handlers.items():
        computing[event] = [item for item in given if _computes(item[0])]
    set_event_handlers(evaluator, computing)
    try:
        yield
    finally:
        set_event_handlers(evaluator, handlers)
        state.clear()
        state.update(before)


def _computes(handler: Any) -> bool:
    """Whether a handler computes metrics, or is not from MONAI or Ignite."""
    hook = getattr(handler, "__wrapped__", handler)  # Ignite wraps those of every n-th event
    owner = getattr(hook, "__self__", hook)
    if isinstance(owner, (Metric, PostProcessing, DecollateBatch)):
        return True
    kind = owner if hasattr(owner, "__qualname__") else type(owner)
    return not kind.__module__.startswith(("monai.handlers.", "ignite.handlers.", "ignite.contrib."))


def plain_numbers(metrics: Mapping[str, Any], first_classes: Mapping[str, int] | None = None) -> dict[str, float]:
    """Metrics as plain numbers. `first_classes` has the number of a metric's first class, by its name; else 0."""
    numbers: dict[str, float] = {}
    inner = {key for value in metrics.values() if isinstance(value, Mapping) for key in value}
    for name, value in metrics.items():
        if name not in inner:  # Ignite lists the items of a mapping beside the mapping
            numbers.update(_numbers(without_prefix(name), value, (first_classes or {}).get(name, 0)))
    return numbers


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
    """Means over the images of details [images, classes]. An image without a class is left out of that class."""
    array = _array(details)
    if array is None or array.ndim != 2 or array.shape[1] < 2 or array.dtype.kind != "f":
        return
    for i, column in enumerate(array.T, first):
        if np.isfinite(column).any():
            yield f"{name}_{i}", float(column[np.isfinite(column)].mean())


def _first_class(evaluator: Any, name: str) -> int:
    """Number of a metric's first class: 1 if it leaves the background out, else 0."""
    for handler, _, _ in event_handlers(evaluator)[Events.EPOCH_COMPLETED]:
        metric = getattr(handler, "__self__", None)
        if isinstance(metric, IgniteMetricHandler) and metric_name(metric) == name:
            return int(not getattr(metric.metric_fn, "include_background", True))
    return 0


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """`value` as an array of numbers, or None if it is something else."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if not isinstance(value, (int, float, np.ndarray, np.generic, list, tuple)):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        return None
    return array if array.dtype.kind in "fiub" else None
