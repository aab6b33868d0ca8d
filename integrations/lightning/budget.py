"""Rounds in Lightning's own terms: how long the trainer must run, and where in its loop a round ends."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from fl_adapters.participant.options import Every
from fl_adapters.torch import schedule
from fl_runtime.errors import ConfigError

ENDLESS = -1  # Lightning's way to say that there is no limit


@dataclass(frozen=True)
class Budget:
    """`rounds` times `every`, each `phases` times over; rounds is None where the trainer's own budget decides."""

    every: Every
    rounds: int | None
    phases: int = 1

    def apply(self, trainer: Any) -> None:
        """Make the trainer run exactly the federation's budget. Before the optimizers are made: in `setup`."""
        if self.rounds is None:
            return
        epochs, steps = self.every.epochs, self.every.steps
        trainer.fit_loop.max_epochs = self.rounds * self.phases * epochs if epochs else ENDLESS
        trainer.fit_loop.epoch_loop.max_steps = self.rounds * self.phases * steps if steps else ENDLESS

    def trainer_rounds(self, trainer: Any) -> int:
        """The rounds that the trainer's budget amounts to; the last may be shorter. ConfigError without an end."""
        per_epoch = steps_per_epoch(trainer)
        epochs, steps = _limit(trainer.max_epochs), _limit(trainer.max_steps)
        if self.every.steps is not None:
            by_epochs = epochs * per_epoch if epochs is not None and per_epoch else None
            return math.ceil(_least(steps, by_epochs) / (self.phases * self.every.steps))
        by_steps = math.ceil(steps / per_epoch) if steps is not None and per_epoch else None
        return math.ceil(_least(epochs, by_steps) / (self.phases * (self.every.epochs or 1)))

    def before(self, round: int, per_epoch: int | None) -> tuple[int | None, int | None]:
        """(epochs, optimizer steps) that a site has behind it when `round` begins; None where that is not known."""
        if self.every.steps is not None:
            steps = (round - 1) * self.phases * self.every.steps
            return steps // per_epoch if per_epoch else None, steps
        epochs = (round - 1) * self.phases * (self.every.epochs or 1)
        return epochs, epochs * per_epoch if per_epoch else None


@dataclass
class Progress:
    """Where a site stands in its round. Plain values, which checkpoints hold.

    began: global_step when it did. ends: global_step at which it ends, for a budget in steps. epochs: whole epochs
    of this round, or of this phase of it, behind us. in_epoch: whether there have been batches since. phase: of the
    round, counted from 0.
    """

    round: int = 0
    began: int = 0
    ends: int = 0
    epochs: int = 0
    in_epoch: bool = False
    phase: int = 0

    @classmethod
    def at(cls, round: int, global_step: int, every: Every) -> Progress:
        """The beginning of `round`."""
        return cls(round, global_step, global_step + (every.steps or 0))

    def batch_ended(self, *, last_of_epoch: bool) -> None:
        """Count one batch."""
        self.in_epoch = not last_of_epoch
        self.epochs += last_of_epoch

    def complete(self, every: Every, global_step: int) -> bool:
        """Whether the budget of the round is used up."""
        if every.steps is not None:
            return global_step >= self.ends
        return self.epochs >= (every.epochs or 1)

    def next(self, round: int, global_step: int, every: Every) -> Progress:
        """The round after, or another phase of the same. Budgets in steps go on from where this one should have ended:
        with several optimizers a batch makes several steps, and may end a round one step late."""
        ends = max(self.ends, global_step - (every.steps or 0)) + (every.steps or 0)
        phase = self.phase + 1 if round == self.round else 0
        return Progress(round, global_step, ends, 0, self.in_epoch, phase)

    def at_beginning(self, global_step: int) -> bool:
        """Whether nothing of the round is done as yet."""
        return global_step == self.began and not self.epochs and not self.phase


def at_end(trainer: Any, *, last_of_epoch: bool) -> bool:
    """Whether the batch that has just ended is the trainer's last."""
    if trainer.max_steps != ENDLESS and trainer.global_step >= trainer.max_steps:
        return True
    return last_of_epoch and trainer.max_epochs != ENDLESS and trainer.current_epoch + 1 >= trainer.max_epochs


def steps_per_epoch(trainer: Any) -> int | None:
    """Optimizer steps of an epoch; None for data without a length, and where the module steps by itself."""
    batches = trainer.num_training_batches
    if math.isinf(batches) or not trainer.lightning_module.automatic_optimization:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def warn_if_schedules_end_early(trainer: Any) -> None:
    """A learning-rate schedule with a horizon of its own is left alone; say so where it ends before the run does."""
    per_epoch, steps, epochs = steps_per_epoch(trainer), _limit(trainer.max_steps), _limit(trainer.max_epochs)
    if epochs is None and steps is not None and per_epoch:
        epochs = math.ceil(steps / per_epoch)
    if steps is None and epochs is not None and per_epoch:
        steps = epochs * per_epoch
    for config in _stepped_by_lightning(trainer):
        horizon = schedule.horizon_of(config.scheduler)
        total = epochs if config.interval == "epoch" else steps
        if horizon is not None and total is not None and horizon * config.frequency < total:
            what = "epochs" if config.interval == "epoch" else "optimizer steps"
            warnings.warn(
                f"the learning-rate schedule {type(config.scheduler).__name__} ends after {horizon * config.frequency} "
                f"of the {total} {what} of this federated run; size it by trainer.estimated_stepping_batches or "
                "trainer.max_epochs",
                stacklevel=2,
            )


def advance_schedules(trainer: Any, epochs: int, steps: int) -> None:
    """Move the schedules to where the other sites are."""
    for config in _stepped_by_lightning(trainer):
        count = epochs if config.interval == "epoch" else steps
        schedule.advance(config.scheduler, max(count, 0) // config.frequency)


def _stepped_by_lightning(trainer: Any) -> list[Any]:
    return list(trainer.lr_scheduler_configs) if trainer.lightning_module.automatic_optimization else []


def _limit(value: int | None) -> int | None:
    return None if value in (None, ENDLESS) else value


def _least(*limits: int | None) -> int:
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise ConfigError(
            "nobody says how long this run is: the job has no rounds, and the trainer's own budget is not known",
            where="lightning Trainer",
            fix="set rounds in the job (simulate --rounds N), or max_steps or max_epochs of the Trainer",
        )
    return min(known)
