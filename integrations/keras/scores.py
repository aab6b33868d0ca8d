"""Losses, examples and scores, read off the metrics that Keras keeps while it trains and evaluates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from .state import assign, to_host


class RoundMeter:
    """Mean loss and number of examples of a round, from Keras's running mean of the loss; read at its ends only."""

    def __init__(self) -> None:
        self._before = self._closed = np.zeros(2)

    def begin(self, model: Any) -> None:
        """A round begins here, within an epoch."""
        self._before, self._closed = _loss(model), np.zeros(2)

    def close_epoch(self, model: Any) -> None:
        """An epoch is over, and Keras has not set its metrics back yet."""
        self._closed = self._closed + _loss(model) - self._before
        self._before = _loss(model)

    def begin_epoch(self) -> None:
        """Keras has set its metrics back."""
        self._before = np.zeros(2)

    def read(self, model: Any) -> tuple[dict[str, float], int]:
        """({"train_loss": mean over the round}, examples in the round); ({}, 0) where Keras keeps no loss."""
        total, count = self._closed + _loss(model) - self._before
        known = count > 0 and math.isfinite(total)
        return ({"train_loss": float(total / count)} if known else {}), max(round(float(count)), 0)


def evaluated(model: Any, validation: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    """(metrics, examples) of the model as it is, on fit's validation data; the metrics of the training go on after."""
    kept = [to_host(variable) for variable in model.metrics_variables]
    training = keras.backend.backend() == "torch" and model.training
    scores = model.evaluate(**validation, verbose=0, return_dict=True)
    examples = examples_scored(model)
    model.reset_metrics()
    for variable, value in zip(model.metrics_variables, kept, strict=False):  # evaluating may have built more
        assign(variable, value)
    if training:
        model.train()
    return plain(scores), examples


def examples_scored(model: Any) -> int:
    """How many examples the evaluation that has just ended has seen, as far as Keras keeps count."""
    return max(round(float(_loss(model)[1])), 1)


def plain(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The finite numbers among a hook's logs."""
    numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float | np.number)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _loss(model: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """(sum of the loss over examples, examples) since Keras last set its metrics back."""
    tracker = getattr(model, "_loss_tracker", None)
    if tracker is None:
        return np.zeros(2)
    return np.array([float(to_host(tracker.total)), float(to_host(tracker.count))])
