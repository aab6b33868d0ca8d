"""What the job's strategy asks of local training, carried out on the model of one `fit`: corrected gradients, and a
personal model in a second phase."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fl_adapters.participant.control_variate import ControlVariate, put_control
from fl_adapters.participant.local_phases import SiteHome
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.state_file import State
from fl_runtime.aggregation.corrections.local_terms import LocalTerms
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array, Arrays, Task

from .correction import GradientCorrection, is_plain_sgd
from .optimizer import optimizers
from .personal import PersonalModel
from .state import KerasState


class LocalWork:
    """One `fit`'s part in the strategy. Does nothing until a task asks for something.

    home: where this site keeps what stays with it. The variables must hold their values.
    """

    def __init__(self, model: Any, state: KerasState, phases: int, home: SiteHome) -> None:
        self._model, self._phases, self._home = model, phases, home
        trained = {id(variable) for variable in model.trainable_variables}
        self._variables = {name: v for name, v in state.variables.items() if id(v) in trained}
        self.personal: PersonalModel | None = None
        self._gradients: GradientCorrection | None = None
        self._terms = LocalTerms()
        self._control: ControlVariate | None = None
        self._anchors: dict[str, Array] = {}
        self._whole = True
        self._global: LocalResult | None = None
        self._came: State | None = None  # the personal model of a process before this one

    @property
    def corrects(self) -> bool:
        """Whether the optimizer has variables of ours."""
        return self._gradients is not None

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The optimizer has its own variables only, within this block."""
        if self._gradients is None:
            yield
            return
        with self._gradients.hidden():
            yield

    def show(self) -> None:
        """An epoch begins."""
        if self._gradients is not None:
            self._gradients.show()

    def hide(self) -> None:
        """An epoch has ended: other callbacks may save the model."""
        if self._gradients is not None:
            self._gradients.hide()

    def begin(self, task: Task, *, whole: bool) -> None:
        """A round begins. whole: the task's weights are in the model; else this process goes on in the middle of it.

        Raises ConfigError where it cannot.
        """
        terms = self._terms = LocalTerms.from_config(task.config)
        self._global, self._whole = None, whole
        if (self._phases == 2) != (terms.personal_mu is not None):
            raise ConfigError(
                "the server's strategy and the job's name for it do not say the same of a personal model",
                where=f"task of round {task.round}",
                fix="install the same version of fl-adapters at the server and at all sites",
            )
        if terms.personal_mu is not None:
            self._prepare_personal(task.round, whole=whole)
        if not (terms.corrects or terms.personal_mu is not None):
            return
        self._anchors = {name: np.array(task.arrays[name]) for name in self._variables}
        offsets = self._offsets(task) if terms.control_variates else None
        self._correction().begin(mu=terms.proximal_mu, anchors=self._anchors, offsets=offsets)

    def phase_ended(self, phase: LocalResult, *, more: bool) -> LocalResult | None:
        """`fit` has used up the budget once. None: it does so once more, for the personal model, which is in the model
        now; else what to send with the weights that are in the model. more: whether `fit` goes on."""
        self._check_seen(phase)
        personal, mu = self.personal, self._terms.personal_mu
        if personal is None or mu is None or (not personal.active and not more):
            return phase
        with self.hidden():
            personal.swap()
        if personal.active:
            self._global = phase
            self._correction().begin(mu=mu, anchors=self._anchors)
            return None
        self._correction().begin()
        personal.save(self._home.folder)
        assert self._global is not None
        return self._global.with_personal(phase.metrics)

    def extras(self, weights: Arrays) -> Arrays:
        """What travels beside the `weights` of this round's update."""
        if self._control is None or self._gradients is None or not self._terms.control_variates:
            return {}
        if not self._whole:
            return self._control.end_without()
        if self._by_rates():
            return self._control.end_by_rates(weights, self._gradients.rates())
        return self._control.end_by_gradients(self._gradients.means())

    def submitted(self, status: str) -> None:
        """What the update counted as."""
        if self._control is not None:
            self._control.submitted(status)

    def kept(self) -> State:
        """What this training would have after a round whose update has been counted, for exact restarts."""
        control = None if self._control is None else self._control.kept()
        return {"control": control, "personal": None if self.personal is None else self.personal.kept()}

    def go_on(self, state: State) -> None:
        """From what `kept` gave to another process of this site; before `begin`."""
        put_control(self._home, state["control"])
        self._came = state["personal"]

    def close(self) -> None:
        """The optimizer is the user's again."""
        if self._gradients is not None:
            self._gradients.detach()
            self._gradients = None

    def _correction(self) -> GradientCorrection:
        if self._gradients is None:
            control = self._terms.control_variates
            sums = control and not self._by_rates()
            self._gradients = GradientCorrection(self._model, self._variables, offsets=control, gradients=sums)
            self._gradients.attach()
        return self._gradients

    def _by_rates(self) -> bool:
        return all(is_plain_sgd(optimizer) for optimizer in optimizers(self._model))

    def _offsets(self, task: Task) -> dict[str, Array]:
        """c - c_i."""
        if self._control is None:
            dtypes = {name: self._anchors[name].dtype for name in self._variables}
            self._control = ControlVariate(self._home, dtypes)
        return self._control.begin(task.arrays, task.extras)

    def _prepare_personal(self, number: int, *, whole: bool) -> None:
        if not whole:
            raise ConfigError(
                "a round with a personal model cannot be resumed in its middle",
                where=f"backup within round {number}",
                fix="delete the backup: the personal model is kept by itself",
            )
        if self.personal is None:
            with self.hidden():
                self.personal = PersonalModel(self._model)
            if self._came is not None:
                self.personal.go_on(self._came)
            elif not self._home.fresh:
                self.personal.load(self._home.folder)

    def _check_seen(self, phase: LocalResult) -> None:
        asked = self._terms.corrects or (self.personal is not None and self.personal.active)
        if asked and phase.local_steps and self._gradients is not None and not self._gradients.steps:
            raise ConfigError(
                "no gradient of this round has passed through the optimizer, so none could be corrected",
                where=type(self._model.optimizer).__name__,
                fix="use an optimizer of Keras, or a strategy that leaves gradients alone, such as fedavg",
            )
