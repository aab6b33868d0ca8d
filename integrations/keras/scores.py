"""Losses, example counts and scores, from the metrics that Keras keeps while it trains and evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from .state import assign, to_host
from .trainer import loss_tracker

_Sums = dict[str, np.ndarray[Any, np.dtype[Any]]]  # metric -> (sum, count)
_LOSS = ""  # Keras's own loss, which no metric of a model can be named


class RoundMeter:
    """Mean loss and number of examples of a round, from Keras's running mean of the loss.

    Where a `train_step` of the model's own leaves that empty, the model's own `Mean` metrics take its place. It reads
    the model at the ends of rounds and epochs only, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self._before: _Sums = {}
        self._closed: _Sums = {}

    def begin(self, model: Any) -> None:
        """Begin a round in the middle of an epoch."""
        self._before, self._closed = _sums(model), {}

    def close_epoch(self, model: Any) -> None:
        """Note the end of an epoch, before Keras resets its metrics."""
        self._closed, self._before = self._since_begin(model), _sums(model)

    def begin_epoch(self) -> None:
        """Note that Keras has reset its metrics for a new epoch."""
        self._before = {}

    def read(self, model: Any) -> tuple[dict[str, float], int]:
        """Return the means over the round, such as {"train_loss": 0.3}, and its examples, 0 if Keras counts none."""
        sums = self._since_begin(model)
        total, count = sums.pop(_LOSS)
        if count > 0:
            return {"train_loss": float(total / count)}, max(round(float(count)), 0)
        return {f"train_{name}": float(total / count) for name, (total, count) in sums.items() if count > 0}, 0

    def _since_begin(self, model: Any) -> _Sums:
        none = np.zeros(2)
        return {
            name: self._closed.get(name, none) + now - self._before.get(name, none)
            for name, now in _sums(model).items()
        }


def evaluated(model: Any, validation: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """Evaluate the model as it is; the running metrics of the training continue afterwards.

    Args:
        model: The model, within a running `fit`.
        validation: Arguments of `model.evaluate`.

    Returns:
        The metrics and the number of examples.
    """
    training_metrics = [to_host(variable) for variable in model.metrics_variables]
    training = keras.backend.backend() == "torch" and model.training
    scores = model.evaluate(**validation, verbose=0, return_dict=True)
    examples = examples_scored(model)
    model.reset_metrics()
    for variable, value in zip(model.metrics_variables, training_metrics, strict=False):  # evaluate may build more
        assign(variable, value)
    if training:
        model.train()
    return numbers(scores), examples


def examples_scored(model: Any) -> int:
    """Number of examples in the evaluation that has just ended; 1 if Keras keeps no count."""
    return max(round(float(_loss(model)[1])), 1)


def numbers(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers among a hook's logs, NaN and infinity included: a model that diverged must not score well."""
    return {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float | np.number)}


def _sums(model: Any) -> _Sums:
    """The running sum and count of Keras's own loss, and of the model's own `Mean` metrics."""
    own = [
        metric for metric in model.metrics if type(metric) is keras.metrics.Mean and metric is not loss_tracker(model)
    ]
    sums = {one.name: np.array([float(to_host(one.total)), float(to_host(one.count))]) for one in own}
    return {**sums, _LOSS: _loss(model)}


def _loss(model: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """(sum of the loss over examples, examples) since Keras last reset its metrics."""
    tracker = loss_tracker(model)
    if tracker is None:
        return np.zeros(2)
    return np.array([float(to_host(tracker.total)), float(to_host(tracker.count))])
