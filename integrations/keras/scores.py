"""Losses, example counts and scores, from the metrics that Keras keeps while it trains and evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from .state import assign, to_host
from .trainer import loss_tracker


class RoundMeter:
    """Mean loss and number of examples of a round, from Keras's running mean of the loss.

    It reads the model at the ends of rounds and epochs only, so that no step waits for the device.
    """

    def __init__(self) -> None:
        self._before = self._closed = np.zeros(2)

    def begin(self, model: Any) -> None:
        """Begin a round in the middle of an epoch."""
        self._before, self._closed = _loss(model), np.zeros(2)

    def close_epoch(self, model: Any) -> None:
        """Note the end of an epoch, before Keras resets its metrics."""
        self._closed = self._closed + _loss(model) - self._before
        self._before = _loss(model)

    def begin_epoch(self) -> None:
        """Note that Keras has reset its metrics for a new epoch."""
        self._before = np.zeros(2)

    def read(self, model: Any) -> tuple[dict[str, float], int]:
        """Return ({"train_loss": mean over the round}, examples in the round); ({}, 0) if Keras keeps no loss."""
        total, count = self._closed + _loss(model) - self._before
        return ({"train_loss": float(total / count)} if count > 0 else {}), max(round(float(count)), 0)


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


def _loss(model: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """(sum of the loss over examples, examples) since Keras last reset its metrics."""
    tracker = loss_tracker(model)
    if tracker is None:
        return np.zeros(2)
    return np.array([float(to_host(tracker.total)), float(to_host(tracker.count))])
