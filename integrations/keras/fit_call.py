"""What a callback is not told: the call of `fit` that its hook belongs to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import keras


@dataclass(frozen=True)
class FitCall:
    """One call of `fit`, as it runs. Holds its live objects: keep it no longer than the call.

    callbacks: Keras's list of all callbacks. validation: arguments of `model.evaluate` for fit's own validation data.
    first: the epoch that it begins with, as its caller says.
    """

    epochs: int
    iterator: Any
    callbacks: Any
    validation: Mapping[str, Any] | None
    first: int = 0

    @property
    def steps(self) -> int | None:
        """Batches in an epoch; None where the data has no length, at least until an epoch is over."""
        steps = self.iterator.num_batches
        return None if steps is None else int(steps)

    @property
    def num_examples(self) -> int | None:
        """Size of the training set; None where the data does not tell it."""
        data = self.iterator.data_adapter
        batches, size = data.num_batches, data.batch_size
        if not batches or not size:
            return None
        partial = data.partial_batch_size
        return int((batches - 1) * size + partial if partial else batches * size)

    def is_same(self, other: FitCall | None) -> bool:
        return other is not None and other.iterator is self.iterator


def calling_fit(model: Any) -> FitCall | None:
    """The `fit` of `model` whose hook is running; None within `evaluate`, `predict` or a loop of the user's own.

    Keras tells a callback neither its data nor the other callbacks, but both are on the call stack.
    """
    callbacks: Any = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        local = frame.f_locals
        if callbacks is None and isinstance(local.get("self"), keras.callbacks.CallbackList):
            callbacks = local["self"]
        if local.get("self") is model and "epoch_iterator" in local:
            return _call(local, callbacks) if frame.f_code.co_name == "fit" and callbacks is not None else None
        frame = frame.f_back
    return None


def _call(local: Mapping[str, Any], callbacks: Any) -> FitCall:
    validation = None
    if local.get("validation_data") is not None:
        validation = {
            "x": local["val_x"],
            "y": local["val_y"],
            "sample_weight": local["val_sample_weight"],
            "batch_size": local["validation_batch_size"] or local["batch_size"],
            "steps": local["validation_steps"],
        }
    return FitCall(int(local["epochs"]), local["epoch_iterator"], callbacks, validation, int(local["initial_epoch"]))
