"""Gradient corrections and personal models (FedProx, SCAFFOLD, Ditto) for the model of one `fit`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from fl_adapters.participant.local_work.backend import LocalBackend, StepRecord
from fl_runtime.types import Arrays

from ..optimizer import optimizers
from ..state import KerasState
from .correction import GradientCorrection, is_plain_sgd
from .standby_model import KerasStandbyModel


class KerasLocalBackend(LocalBackend):
    """A `LocalBackend` for a Keras model, whose variables must hold their values.

    The first call that needs a correction attaches it to the optimizer, at the start of a round; it stays there until
    `close`. From then on the optimizer has variables of the correction beside its own while the model trains.
    """

    def __init__(self, model: Any, state: KerasState) -> None:
        """Attach nothing as yet.

        Args:
            model: The built and compiled model.
            state: The variables of the model that travel.
        """
        self._model = model
        trained = {id(variable) for variable in model.trainable_variables}
        self._variables = {name: v for name, v in state.variables.items() if id(v) in trained}
        self._correction: GradientCorrection | None = None

    @property
    def attached(self) -> bool:
        """Whether the optimizer has variables of the correction."""
        return self._correction is not None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Leave the optimizer with its own variables only, within this block. The model must not train meanwhile."""
        self.hide()
        try:
            yield
        finally:
            self.show()

    def show(self) -> None:
        """Add the correction's variables to the optimizer's, before an epoch trains."""
        if self._correction is not None:
            self._correction.show()

    def hide(self) -> None:
        """Take the correction's variables off the optimizer, before other callbacks save the model."""
        if self._correction is not None:
            self._correction.hide()

    @property
    def names(self) -> Collection[str]:
        return self._variables.keys()

    @property
    def steps(self) -> int:
        return 0 if self._correction is None else self._correction.steps

    def share(self, value: Any) -> Any:
        return value

    def set_anchors(self, weights: Arrays | None, *, loaded: bool) -> None:
        assert weights is not None
        self._attach(offsets=False).set_anchors({name: weights[name] for name in self.names})

    def pull_to_anchors(self, mu: float) -> None:
        self._attach(offsets=False).begin(mu=mu)

    def add_offsets(self, offsets: Arrays | None) -> None:
        self._attach(offsets=True).begin(offsets=offsets)

    def leave_gradients(self) -> None:
        if self._correction is not None:
            self._correction.begin()

    def step_record(self) -> StepRecord:
        assert self._correction is not None
        if self._is_plain_sgd():
            return StepRecord(rates=self._correction.rates())
        return StepRecord(mean_gradients=self._correction.means())

    def standby_model(self) -> KerasStandbyModel:
        with self.hidden():
            return KerasStandbyModel(self._model)

    def close(self) -> None:
        if self._correction is not None:
            self._correction.detach()
            self._correction = None

    def _attach(self, *, offsets: bool) -> GradientCorrection:
        if self._correction is None:
            sums = offsets and not self._is_plain_sgd()
            self._correction = GradientCorrection(self._model, self._variables, offsets=offsets, gradients=sums)
            self._correction.attach()
        return self._correction

    def _is_plain_sgd(self) -> bool:
        return all(is_plain_sgd(optimizer) for optimizer in optimizers(self._model))
