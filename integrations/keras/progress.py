"""Rounds in the terms of `fit`: how many epochs they take, at which batch one ends, and where a `fit` stands."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import keras

from fl_adapters.participant.options import Every, announce_budget
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import ConfigError

from .optimizer import optimizers
from .trainer import FitCall, learning_rate

_NEVER = 1 << 62


@dataclass(frozen=True)
class RoundBudget:
    """The length of a federated run within one `fit`: `rounds` times `phases` times `every`.

    Attributes:
        every: The local budget of one phase.
        rounds: Number of rounds in the job; None if fit's own length decides.
        accumulation: Batches in one optimizer step.
        execution: Batches in one call of the compiled function (`steps_per_execution`). Hooks run between calls only.
        phases: How often each round trains its budget: twice with a personal model, else once.
    """

    every: Every
    rounds: int | None
    accumulation: int
    execution: int
    phases: int = 1

    @classmethod
    def of(cls, model: Any, every: Every, rounds: int | None, phases: int = 1) -> RoundBudget:
        """Budget of the job for a compiled model."""
        accumulation = max([o.gradient_accumulation_steps or 1 for o in optimizers(model)], default=1)
        return cls(every, rounds, accumulation, int(model.steps_per_execution or 1), phases)

    @property
    def batches(self) -> int | None:
        """Batches in a phase; None if rounds are counted in epochs."""
        return None if self.every.steps is None else self.every.steps * self.accumulation

    @property
    def size(self) -> int:
        """Length of a phase, in batches or in epochs."""
        return self.batches or self.every.epochs or 1

    @property
    def round_size(self) -> int:
        """Length of a round, in batches or in epochs."""
        return self.phases * self.size

    def check(self, fit: FitCall) -> None:
        """Raise ConfigError if rounds cannot end where they should in this `fit`."""
        if self.batches is None:
            return
        if self.execution > 1 and (fit.steps is None or fit.steps % self.execution or self.batches % self.execution):
            length = "an unknown number of" if fit.steps is None else fit.steps
            raise ConfigError(
                f"a round of {self.batches} batches cannot end on its last batch: Keras runs {self.execution} batches "
                f"at once, with {length} batches in an epoch",
                where=f"compile(steps_per_execution={self.execution})",
                fix=f"make every= and the batches of an epoch multiples of {self.execution}, use every='epoch', or "
                "leave steps_per_execution out",
            )
        if self.rounds is None and fit.steps is None:
            raise ConfigError(
                f"the number of rounds of {self.every} in this training is unknown, since its data has no length",
                where="fit",
                fix="set rounds in the job, or pass steps_per_epoch= to fit",
            )

    def check_epochs(self, fit: FitCall, epoch: int, round: int, rounds: int, trained: int = 0) -> None:
        """Raise ConfigError if fit ends before the federation does.

        Args:
            fit: The call of `fit`.
            epoch: The epoch that it is about to begin.
            round: The round that begins, counted from 1.
            rounds: Number of rounds of the run.
            trained: Batches or epochs of this round that have been trained already.
        """
        needed = self._epochs(fit, (rounds - round + 1) * self.round_size - trained)
        available = fit.epochs - epoch
        if self.rounds is None or needed is None or needed <= available:
            return
        twice = "twice " if self.phases == 2 else ""
        raise ConfigError(
            f"the federation still has {rounds - round + 1} rounds of {twice}{self.every}, which take {needed} epochs "
            f"of this data, but fit will run only {max(available, 0)}",
            where=f"fit(epochs={fit.epochs})",
            fix=f"pass epochs={epoch + needed} to fit, or more: it stops after the last round",
        )

    def announce(self, fit: FitCall, epoch: int) -> None:
        """Say on stderr that the job ends `fit`, which is about to begin `epoch`, before its last epoch."""
        if self.rounds is not None:
            needed = self._epochs(fit, self.rounds * self.round_size)
            if needed is not None and needed < fit.epochs - epoch:
                announce_budget(self.rounds, self.every, f"fit(epochs={fit.epochs})", phases=self.phases)

    def own_rounds(self, fit: FitCall, epoch: int) -> int:
        """Number of rounds in fit's own length from `epoch` on. The last round may be shorter."""
        epochs = fit.epochs - epoch
        if self.every.epochs is not None:
            return math.ceil(epochs / self.round_size)
        assert fit.steps is not None and self.batches is not None
        return math.ceil(epochs * fit.steps / self.round_size)

    def length_of(self, fit: FitCall, epochs: int) -> int:
        """Return the batches or epochs that a `fit` has trained after so many epochs."""
        return epochs if self.batches is None else epochs * (fit.steps or 0)

    def warn_if_schedule_ends_early(self, model: Any, fit: FitCall, rounds: int) -> None:
        """Warn if a learning-rate schedule, which is the user's and left alone, ends before the run does."""
        batches = self.batches or (self.size * fit.steps if fit.steps else None)
        for optimizer in optimizers(model):
            horizon = _horizon(learning_rate(optimizer))
            if horizon is not None and batches is not None and horizon < rounds * batches // self.accumulation:
                warnings.warn(
                    f"the learning-rate schedule ends after {horizon} of the {rounds * batches // self.accumulation} "
                    "optimizer steps of this federated run; size it for the whole run",
                    stacklevel=2,
                )

    def _epochs(self, fit: FitCall, amount: int) -> int | None:
        if self.batches is None:
            return amount
        return None if fit.steps is None else math.ceil(amount / fit.steps)


@dataclass
class Progress:
    """Where a `fit` stands in its run.

    Attributes:
        fit: The call of `fit`.
        budget: The length of a round.
        rounds: Number of rounds of the run.
        round: The current round, counted from 1 over the rounds that this site trains.
        epoch: The current epoch, counted from 0 as `fit` does.
        batch: First batch, within the epoch, of the compiled call that runs now; -1 before the first.
        before: Batches of this phase in earlier epochs, less the batches of this epoch that belong to the phase before.
        epochs: Epochs of this phase that have ended.
        phase: Phase of the round, counted from 0.
        due: Batch within the epoch before which this phase ends.
        stops: Batch within the epoch from which on a step is the last one of the run.
        epoch_open: Whether an epoch is running.
        over: Whether the final weights have arrived.
    """

    fit: FitCall
    budget: RoundBudget
    rounds: int
    round: int = 0
    epoch: int = 0
    batch: int = -1
    before: int = 0
    epochs: int = 0
    phase: int = 0
    due: int = _NEVER
    stops: int = _NEVER
    epoch_open: bool = False
    over: bool = False

    def begin_epoch(self, epoch: int) -> None:
        """Note that `fit` begins an epoch."""
        self.epoch, self.batch, self.epoch_open = epoch, -1, True
        self._aim()

    def end_epoch(self) -> None:
        """Note that the last step of the epoch is done. The last compiled call may have run fewer batches."""
        trained = self.batch + self.budget.execution if self.batch >= 0 else 0
        self.before += min(trained, self.fit.steps or trained)
        self.epochs += 1
        self.epoch_open = False
        self.due = self.stops = _NEVER

    @property
    def phase_complete(self) -> bool:
        """Whether the epoch that has just ended completes a phase. The last one of fit's own budget may be shorter."""
        if self.at_end and self.round == self.rounds:
            return True
        return (self.before if self.budget.batches else self.epochs) >= self.budget.size

    @property
    def at_end(self) -> bool:
        """Whether the epoch that has just ended is fit's last one, and fit's own length decides."""
        return self.budget.rounds is None and not self.epoch_open and self.epoch + 1 >= self.fit.epochs

    def steps(self) -> StepCount:
        """Return how far the round is, in batches. May be called by another thread."""
        per_phase = self.budget.batches or self.budget.size * (self.fit.steps or 0)
        earlier = self.before if self.budget.batches else self.epochs * (self.fit.steps or 0)
        batches = max(earlier + (self.batch + 1 if self.epoch_open else 0), 0)
        return StepCount(self.phase * per_phase + batches, self.budget.phases * per_phase)

    def begin_within_round(self, trained: int) -> None:
        """Continue in the middle of the round, after so many of its batches or epochs."""
        self.before, self.epochs = (trained, 0) if self.budget.batches else (0, trained)

    def begin_phase(self, phase: int) -> None:
        """Count from here on for a new phase of the round: 0 in a new round."""
        self.before, self.epochs, self.phase = -self.batch if self.epoch_open else 0, 0, phase
        self._aim()

    def _aim(self) -> None:
        if self.over and self.epoch_open:  # the run has ended before this fit: no exchange, and no further step
            self.due, self.stops = _NEVER, 0
        elif self.budget.batches is not None and self.epoch_open:
            self.due = self.budget.batches - self.before
            last = self.round == self.rounds and self.phase + 1 == self.budget.phases
            self.stops = self.due - self.budget.execution if last else _NEVER


def _horizon(schedule: Any) -> int | None:
    """Number of steps after which a schedule stays constant; None if it never does, or does not say."""
    schedules = keras.optimizers.schedules
    if isinstance(schedule, schedules.CosineDecay):
        return int(schedule.decay_steps + schedule.warmup_steps)
    if isinstance(schedule, schedules.PolynomialDecay) and not schedule.cycle:
        return int(schedule.decay_steps)
    return None
