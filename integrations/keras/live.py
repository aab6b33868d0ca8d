"""The model and optimizer of one `fit`, as the federation sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_adapters.options import SiteSettings
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task

from .fit_call import FitCall
from .optimizer import OptimizerState
from .state import KerasState


class LiveModel:
    """Holds the live variables, so it belongs to one `fit` and is never copied along with the callback.

    Every method expects the variables to hold their values: under JAX, go through the callback's `model` first.
    """

    def __init__(self, model: Any, settings: SiteSettings) -> None:
        self._settings = settings
        self.state = KerasState(model, settings.exchange, settings.keep_local)
        self.moments = OptimizerState(model, self.state.variables)
        self.moments.check(settings.optimizer_state)
        policy = settings.optimizer_state
        self.agreement = {**self.state.agreement(model), **self.moments.agreement(policy)}
        self._final: Arrays | None = None

    def extras(self) -> Arrays:
        """The optimizer moments that travel beside the weights; empty unless they are averaged."""
        return self.moments.get() if self._settings.optimizer_state == "average" else {}

    def receive(self, task: Task) -> None:
        """The weights of a task, then the policy for the optimizer. Final weights are kept for `restore_final`."""
        self.state.set_state(task.arrays)
        if self._settings.optimizer_state == "reset":
            self.moments.reset()
        elif self._settings.optimizer_state == "average" and task.extras:
            self.moments.set(task.extras)
        if task.kind == "final":
            self._final = {name: np.copy(array) for name, array in task.arrays.items()}

    def restore_final(self) -> None:
        """Back to the final weights, whatever has been done to the model since."""
        assert self._final is not None
        self.state.set_state(self._final)


def ensure_built(model: Any, fit: FitCall) -> None:
    """Make the variables of a model that TensorFlow would build within its first step. ConfigError if it cannot be."""
    if all(layer.built for layer in model._flatten_layers()):
        return
    try:
        model._symbolic_build(iterator=fit.iterator)
        fit.iterator.reset()
    except Exception as error:
        raise ConfigError(
            f"the model has no variables yet, and could not be built from the first batch: {error}",
            where=f"{type(model).__name__} {model.name!r}",
            fix="build it before fit: begin it with keras.Input, or call it on a batch once",
        ) from error
