"""The model and optimizer of one `fit`, as the federation sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_adapters.participant.local_work.local_work import LocalWork
from fl_adapters.participant.options import SiteSettings
from fl_adapters.participant.outputs import SiteHome
from fl_runtime.aggregation.corrections.local_terms import GRADIENT_CORRECTION, PERSONAL_MODEL, without_control
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task

from .correction import can_correct
from .fit_call import FitCall
from .local_backend import KerasLocalBackend
from .optimizer import OptimizerState
from .state import KerasState


class LiveModel:
    """Holds the live variables, so it belongs to one `fit` and is never copied along with the callback.

    Every method expects the variables to hold their values: under JAX, go through the callback's `model` first.
    local: what the job's strategy asks of local training. home: where the site keeps what that leaves.
    """

    def __init__(self, model: Any, settings: SiteSettings, home: SiteHome) -> None:
        self._settings = settings
        self.state = KerasState(model, settings.exchange, settings.keep_local)
        self.moments = OptimizerState(model, self.state.variables)
        self.moments.check(settings.optimizer_state)
        policy = settings.optimizer_state
        self.corrections = KerasLocalBackend(model, self.state)
        self.local = LocalWork(self.corrections, phases=settings.phases)
        self.local.home = home
        correcting = {GRADIENT_CORRECTION, PERSONAL_MODEL} if can_correct(model) else set()
        self.capabilities = self.state.capabilities | correcting
        self.agreement = {**self.state.agreement(model), **self.moments.agreement(policy)}
        self._final: Arrays | None = None

    def extras(self, weights: Arrays) -> Arrays:
        """What travels beside these `weights` of a round: the optimizer's moments, if they are averaged, and what the
        strategy asks for."""
        with self.corrections.hidden():
            moments = self.moments.get() if self._settings.optimizer_state == "average" else {}
        return {**moments, **self.local.extras(weights)}

    def receive(self, task: Task) -> None:
        """The weights of a task, then the policy for the optimizer, then what the strategy asks of the round. Final
        weights are kept for `restore_final`."""
        self.state.set_state(task.arrays)
        with self.corrections.hidden():
            self._receive_moments(task)
        if task.kind == "final":
            self._final = {name: np.copy(array) for name, array in task.arrays.items()}
        else:
            self.local.begin(task)

    def resume(self, task: Task) -> None:
        """Go on in the middle of a task, with the weights and the optimizer that are there."""
        self.local.begin(task, resumed=True)

    def _receive_moments(self, task: Task) -> None:
        if self._settings.optimizer_state == "reset":
            self.moments.reset()
        elif self._settings.optimizer_state == "average":
            moments = {name: task.extras[name] for name in without_control(task.extras)}
            if moments:
                self.moments.set(moments)

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
