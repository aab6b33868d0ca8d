"""The model and optimizer of one `fit`, as the federation sees them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fl_adapters.participant.local_work.local_work import LocalWork
from fl_adapters.participant.options import SiteSettings
from fl_adapters.participant.outputs import SiteHome
from fl_runtime.aggregation.corrections.local_terms import without_control
from fl_runtime.capabilities import GRADIENT_CORRECTION, PERSONAL_MODEL
from fl_runtime.types import Arrays, Task
from fl_runtime.wire.names import Facts

from .local_work import KerasLocalBackend
from .local_work.correction import can_correct
from .optimizer import KerasOptimizerState
from .state import KerasState


class LiveModel:
    """Weights and optimizer state in and out of a live model, by the site's settings.

    It holds the live variables, so it belongs to one `fit` and is never copied with the callback. Every method expects
    the variables to hold their values: under JAX, use the callback's `model` property first.

    Attributes:
        state: The variables that travel.
        moments: The state of the optimizer.
        corrections: The gradient correction, whose variables the optimizer has while the model trains.
        local: The changes of local training that the strategy requires.
        capabilities: What a strategy may require of this model.
        agreement: Facts that must be equal at all sites.
    """

    def __init__(self, model: Any, settings: SiteSettings, home: SiteHome) -> None:
        """Connect with a built and compiled model.

        Args:
            model: The model.
            settings: What holds at this site.
            home: The site's own folder.

        Raises:
            ConfigError: If no variable would travel, or the optimizer cannot follow `optimizer_state`.
        """
        self._settings = settings
        self.state = KerasState(model, settings.exchange, settings.keep_local)
        self.moments = KerasOptimizerState(model, self.state.variables)
        self.moments.check(settings.optimizer_state)
        self.corrections = KerasLocalBackend(model, self.state)
        self.local = LocalWork(self.corrections, phases=settings.phases)
        self.local.home = home
        correcting = {GRADIENT_CORRECTION, PERSONAL_MODEL} if can_correct(model) else set()
        self.capabilities = self.state.capabilities | correcting
        self.agreement: Facts = {**self.state.agreement(model), **self.moments.agreement(settings.optimizer_state)}
        self._final: Arrays | None = None

    def extras(self, weights: Arrays) -> Arrays:
        """Return what travels beside the weights of a round: averaged moments, and what the strategy requires."""
        with self.corrections.hidden():
            moments = self.moments.get() if self._settings.optimizer_state == "average" else {}
        return {**moments, **self.local.extras(weights)}

    def receive(self, task: Task) -> None:
        """Set the weights of a task, treat the optimizer by its policy, and begin the round's local work.

        Final weights are kept for `restore_final`.
        """
        self.state.set_state(task.arrays)
        with self.corrections.hidden():
            self._receive_moments(task)
        if task.kind == "final":
            self._final = {name: np.copy(array) for name, array in task.arrays.items()}
        else:
            self.local.begin(task)

    def resume(self, task: Task) -> None:
        """Continue in the middle of a task, with the weights and the optimizer that are in place."""
        self.local.begin(task, resumed=True)

    def restore_final(self) -> None:
        """Set the final weights again, whatever has been done to the model since."""
        assert self._final is not None
        self.state.set_state(self._final)

    def _receive_moments(self, task: Task) -> None:
        if self._settings.optimizer_state == "reset":
            self.moments.reset()
        elif self._settings.optimizer_state == "average":
            moments = {name: task.extras[name] for name in without_control(task.extras)}
            if moments:
                self.moments.set(moments)
