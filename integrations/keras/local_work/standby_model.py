"""A second set of weights and optimizer state for a Keras model, for a site's personal model."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_adapters.participant.local_work.backend import StandbyModel
from fl_adapters.participant.state_file import State
from fl_runtime.types import Array, Arrays

from ..names import named_variables
from ..optimizer import build, initial_values, optimizers
from ..preprocessing import deriving_again
from ..state import assign, to_host
from ..trainer import learning_rate


class KerasStandbyModel(StandbyModel):
    """A `StandbyModel` for a Keras model with one optimizer; the second set stays on the host.

    The optimizer's step counter belongs to its set, and with it the position in a `LearningRateSchedule`. A learning
    rate without schedule belongs to the training loop, so both sets use the same. The variables must hold their
    values, and the optimizer must have no variables but its own when this is made.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        (optimizer,) = optimizers(model)
        build(model, optimizer)
        self._live = {n: v.variable for n, v in named_variables(model).items() if v.role in ("trainable", "buffer")}
        self._weights = {name: to_host(variable) for name, variable in self._live.items()}
        self._rate = learning_rate(optimizer)
        self._variables = list(optimizer.variables)
        values = zip(self._variables, initial_values(model, optimizer), strict=True)
        self._state = [np.array(np.broadcast_to(value, tuple(variable.shape))) for variable, value in values]

    def swap(self) -> None:
        with deriving_again(self._model):
            self._weights = {name: _exchange(variable, self._weights[name]) for name, variable in self._live.items()}
        self._state = [
            value if variable is self._rate else _exchange(variable, value)
            for variable, value in zip(self._variables, self._state, strict=True)
        ]

    def weights(self) -> Arrays:
        return self._weights

    def set_weights(self, arrays: Arrays) -> None:
        self._weights = {name: np.array(array) for name, array in arrays.items()}

    def state_dict(self) -> State:
        return {"weights": self._weights, "state": self._state}

    def load_state_dict(self, state: State) -> None:
        self._weights, self._state = state["weights"], state["state"]


def _exchange(variable: Any, value: Array) -> Array:
    before = to_host(variable)
    assign(variable, value)
    return before
