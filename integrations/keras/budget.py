"""Rounds in the terms of `fit`: how many epochs they take, and at which batch a round ends."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import keras

from fl_adapters.participant.options import Every
from fl_runtime.errors import ConfigError

from .fit_call import FitCall
from .optimizer import optimizers


@dataclass(frozen=True)
class Budget:
    """`rounds` times `every`, within this `fit`.

    rounds: of the job; None where fit's own budget decides. accumulation: batches in an optimizer step.
    execution: batches in one call of the compiled function (steps_per_execution); hooks run between these only.
    phases: how often each round takes its `every`.
    """

    every: Every
    rounds: int | None
    accumulation: int
    execution: int
    phases: int = 1

    @classmethod
    def of(cls, model: Any, every: Every, rounds: int | None, phases: int = 1) -> Budget:
        accumulation = max([o.gradient_accumulation_steps or 1 for o in optimizers(model)], default=1)
        return cls(every, rounds, accumulation, int(model.steps_per_execution or 1), phases)

    @property
    def batches(self) -> int | None:
        """Batches in a phase of a round; None where it is counted in epochs."""
        return None if self.every.steps is None else self.every.steps * self.accumulation

    def check(self, fit: FitCall) -> None:
        """Raise ConfigError where no round could end where it should."""
        if self.batches is None:
            return
        if self.execution > 1 and (fit.steps is None or fit.steps % self.execution or self.batches % self.execution):
            length = "an unknown number of" if fit.steps is None else fit.steps
            raise ConfigError(
                f"a round of {self.batches} batches cannot be told apart: Keras runs {self.execution} batches at once, "
                f"and {length} batches in an epoch",
                where=f"compile(steps_per_execution={self.execution})",
                fix=f"make every= and the batches of an epoch multiples of {self.execution}, use every='epoch', or "
                "leave steps_per_execution out",
            )
        if self.rounds is None and fit.steps is None:
            raise ConfigError(
                f"nobody knows how many rounds of {self.every} this training has: its data has no length",
                where="fit",
                fix="say how many rounds there are in the job, or pass steps_per_epoch= to fit",
            )

    def check_epochs(self, fit: FitCall, epoch: int, round: int, rounds: int, made: int = 0) -> None:
        """Raise ConfigError where fit, about to begin `epoch`, ends before the federation does.

        round: the one that begins; rounds: of the run; made: batches or epochs of this round that are done already.
        """
        needed = self._epochs(fit, (rounds - round + 1) * self.round_size - made)
        available = fit.epochs - epoch
        if self.rounds is None or needed is None or needed <= available:
            return
        twice = "twice " if self.phases == 2 else ""
        raise ConfigError(
            f"the federation has {rounds - round + 1} rounds of {twice}{self.every} before it, which takes {needed} "
            f"epochs of this data, but fit is about to run {max(available, 0)}",
            where=f"fit(epochs={fit.epochs})",
            fix=f"pass epochs={epoch + needed} to fit, or more: it stops after the last round",
        )

    def own_rounds(self, fit: FitCall, epoch: int) -> int:
        """The rounds that fit's own budget from `epoch` on amounts to; the last may be shorter."""
        epochs = fit.epochs - epoch
        if self.every.epochs is not None:
            return math.ceil(epochs / self.round_size)
        assert fit.steps is not None and self.batches is not None
        return math.ceil(epochs * fit.steps / self.round_size)

    def done(self, fit: FitCall, epochs: int) -> int:
        """Batches, or epochs, that are behind a fit which begins after so many epochs."""
        return epochs if self.batches is None else epochs * (fit.steps or 0)

    @property
    def size(self) -> int:
        """Of a phase: batches, or epochs."""
        return self.batches or self.every.epochs or 1

    @property
    def round_size(self) -> int:
        """Of a round: batches, or epochs."""
        return self.phases * self.size

    def _epochs(self, fit: FitCall, amount: int) -> int | None:
        if self.batches is None:
            return amount
        return None if fit.steps is None else math.ceil(amount / fit.steps)

    def warn_if_schedule_ends_early(self, model: Any, fit: FitCall, rounds: int) -> None:
        """A learning-rate schedule is the user's and left alone; say so where it ends before the run does."""
        batches = self.batches or (self.size * fit.steps if fit.steps else None)
        for optimizer in optimizers(model):
            horizon = _horizon(optimizer._learning_rate)
            if horizon is not None and batches is not None and horizon < rounds * batches // self.accumulation:
                warnings.warn(
                    f"the learning-rate schedule ends after {horizon} of the {rounds * batches // self.accumulation} "
                    "optimizer steps of this federated run; size it for the whole run",
                    stacklevel=2,
                )


def _horizon(schedule: Any) -> int | None:
    """After how many steps a schedule stays where it is; None where it does not end, or does not say."""
    schedules = keras.optimizers.schedules
    if isinstance(schedule, schedules.CosineDecay):
        return int(schedule.decay_steps + schedule.warmup_steps)
    if isinstance(schedule, schedules.PolynomialDecay) and not schedule.cycle:
        return int(schedule.decay_steps)
    return None
