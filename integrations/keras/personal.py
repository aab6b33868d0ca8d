"""A site's personal model beside the global one, in the same Keras model and the same `fit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fl_adapters.participant.outputs import PERSONAL_FILE
from fl_adapters.participant.state_file import State
from fl_runtime.errors import StateMismatchError
from fl_runtime.store.tensorfile import read_tensors, write_tensors
from fl_runtime.types import Array
from fl_runtime.wire.manifest import Manifest, differences

from .names import named_variables
from .optimizer import build, initial_values, optimizers
from .state import assign, to_host


class PersonalModel:
    """A second set of weights and of optimizer state. One set is in the model and its optimizer, the other on the host.

    The weights are all that training changes: trained variables and what trained layers keep beside them, also where
    they do not travel. It begins as a copy of the model as it is, with an optimizer that has made no step; the
    optimizer's step counter goes with its set, and with it the place in a `LearningRateSchedule`.

    The variables must hold their values, and the optimizer no others than its own.
    """

    def __init__(self, model: Any) -> None:
        (self._optimizer,) = optimizers(model)
        build(model, self._optimizer)
        self._live = {n: v.variable for n, v in named_variables(model).items() if v.role in ("trainable", "buffer")}
        self._other = {name: to_host(variable) for name, variable in self._live.items()}
        values = zip(self._optimizer.variables, initial_values(model, self._optimizer), strict=True)
        self._state = [np.array(np.broadcast_to(value, tuple(variable.shape))) for variable, value in values]
        self.active = False

    def swap(self) -> None:
        """The set in the model goes out, the other comes in."""
        self._other = {name: _exchanged(variable, self._other[name]) for name, variable in self._live.items()}
        rate = self._optimizer._learning_rate  # belongs to the training loop, and to both
        self._state = [
            value if variable is rate else _exchanged(variable, value)
            for variable, value in zip(self._optimizer.variables, self._state, strict=True)
        ]
        self.active = not self.active

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The personal model is in the model within this block, wherever it was."""
        swaps = not self.active
        if swaps:
            self.swap()
        try:
            yield
        finally:
            if swaps:
                self.swap()

    def save(self, folder: Path) -> None:
        """Keep the weights for another process of this site; while the global model is in the model."""
        write_tensors(folder / PERSONAL_FILE, self._other)

    def load(self, folder: Path) -> bool:
        """The weights that `save` kept; False if there are none. The optimizer begins anew.

        Raises StateMismatchError for those of another model.
        """
        if not (folder / PERSONAL_FILE).exists():
            return False
        arrays = read_tensors(folder / PERSONAL_FILE)
        if lines := differences(Manifest.of(self._other), Manifest.of(arrays)):
            raise StateMismatchError(
                "the personal model that was kept here is of another model:\n" + "\n".join(lines),
                where=str(folder / PERSONAL_FILE),
                fix="delete it, or build the model as before",
            )
        self._other = {name: np.array(array) for name, array in arrays.items()}
        return True

    def kept(self) -> State:
        """The weights and the optimizer's state, for exact restarts; while the global model is in the model."""
        return {"weights": self._other, "state": self._state}

    def go_on(self, state: State) -> None:
        """From what `kept` gave to another process of this site."""
        self._other, self._state = state["weights"], state["state"]


def _exchanged(variable: Any, value: Array) -> Array:
    before = to_host(variable)
    assign(variable, value)
    return before
