"""Rounds in Ignite's own terms: how long the trainer must run, and where in its loop a round ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from monai.handlers import LrScheduleHandler

from fl_adapters.participant.options import Every
from fl_adapters.torch import schedule
from fl_runtime.errors import ConfigError

ENDLESS = 2**31 - 1
"""Epochs of a run whose length in epochs is not known: it ends with the last round."""


@dataclass(frozen=True)
class Budget:
    """`rounds` times `every`, each `phases` times over; rounds is None where the trainer's own budget decides."""

    every: Every
    rounds: int | None
    phases: int = 1

    def apply(self, engine: Any) -> None:
        """Make the trainer run exactly the federation's budget. While `STARTED` is fired."""
        if self.rounds is None:
            return
        if self.every.epochs is not None:
            engine.state.max_epochs = self.rounds * self.phases * self.every.epochs
        else:
            per_epoch = steps_per_epoch(engine)
            steps = self.rounds * self.phases * (self.every.steps or 0)
            engine.state.max_epochs = math.ceil(steps / per_epoch) if per_epoch else ENDLESS

    def trainer_rounds(self, engine: Any) -> int:
        """The rounds that the trainer's own budget amounts to; the last may be shorter. ConfigError if unknown."""
        epochs, per_epoch = engine.state.max_epochs, steps_per_epoch(engine)
        if self.every.epochs is not None:
            return math.ceil(epochs / (self.phases * self.every.epochs))
        if per_epoch is None:
            raise ConfigError(
                "nobody says how many rounds this run has: the job has none, and an epoch has no known length",
                where="MONAI trainer",
                fix="set rounds in the job (simulate --rounds N), or epoch_length of the trainer",
            )
        return math.ceil(epochs * per_epoch / (self.phases * (self.every.steps or 1)))

    def before(self, round: int, engine: Any) -> tuple[int | None, int | None]:
        """(epochs, iterations) that a site has behind it when `round` begins; None where that is not known."""
        length, per_epoch = engine.state.epoch_length, steps_per_epoch(engine)
        if self.every.epochs is not None:
            epochs = (round - 1) * self.phases * self.every.epochs
            return epochs, epochs * length if length else None
        steps = (round - 1) * self.phases * (self.every.steps or 0)
        if not length or not per_epoch:
            return None, steps * accumulation(engine)
        epochs, left = divmod(steps, per_epoch)
        return epochs, epochs * length + min(left * accumulation(engine), length)


@dataclass
class Progress:
    """Where a site stands in its run. Plain values, which checkpoints hold.

    steps: of the optimizer, so far. began: what they were when the round did. epochs: whole epochs of this round
    behind us. phase: of the round, counted from 0; began and epochs are those of the phase.
    """

    round: int = 0
    steps: int = 0
    began: int = 0
    epochs: int = 0
    phase: int = 0

    @property
    def at_beginning(self) -> bool:
        """Whether nothing of the round is done as yet."""
        return self.steps == self.began and not self.epochs and not self.phase

    def complete(self, every: Every) -> bool:
        """Whether the budget of the round is used up."""
        if every.steps is not None:
            return self.steps - self.began >= every.steps
        return self.epochs >= (every.epochs or 1)

    def next(self, round: int) -> Progress:
        """The beginning of `round`, or of the next phase of this one."""
        return Progress(round, self.steps, self.steps, phase=self.phase + 1 if round == self.round else 0)


def accumulation(engine: Any) -> int:
    """Batches to an optimizer step."""
    return int(getattr(engine, "accumulation_steps", 1))


def steps_per_epoch(engine: Any) -> int | None:
    """Optimizer steps of an epoch; None for data without a length."""
    length = engine.state.epoch_length
    return math.ceil(length / accumulation(engine)) if length else None


def made_a_step(engine: Any) -> bool:
    """Whether the iteration that has just ended made an optimizer step, by the rule of `SupervisedTrainer`."""
    batches, length = accumulation(engine), engine.state.epoch_length
    if batches == 1:
        return True
    number = (engine.state.iteration - 1) % length + 1 if length else engine.state.iteration
    return bool(number % batches == 0 or number == length)


def warn_if_schedules_end_early(engine: Any, handlers: Iterable[LrScheduleHandler]) -> None:
    """A learning-rate schedule with a horizon of its own is left alone; say so where it ends before the run does."""
    epochs, length = engine.state.max_epochs, engine.state.epoch_length
    if epochs == ENDLESS:
        return
    for handler in handlers:
        horizon = schedule.horizon_of(handler.lr_scheduler)
        total = epochs if handler.epoch_level else epochs * length if length else None
        if horizon is not None and total is not None and horizon < total:
            what = "epochs" if handler.epoch_level else "iterations"
            warnings.warn(
                f"the learning-rate schedule {type(handler.lr_scheduler).__name__} ends after {horizon} of the {total} "
                f"{what} of this federated run; make it as long as the rounds take",
                stacklevel=2,
            )


def advance_schedules(handlers: Iterable[LrScheduleHandler], epochs: int, iterations: int) -> None:
    """Move the schedules on, to where the other sites are."""
    for handler in handlers:
        schedule.advance(handler.lr_scheduler, max(epochs if handler.epoch_level else iterations, 0))
