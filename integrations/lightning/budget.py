"""Rounds in Lightning's own terms: how long the trainer must run, and what that means for learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

from fl_adapters.torch.progress import RoundBudget, advance_schedule, warn_if_schedule_ends_early

ENDLESS = -1
"""Lightning's value for "no limit"."""


def apply(budget: RoundBudget, trainer: Any) -> None:
    """Make the trainer run exactly the federation's budget. Call in `setup`, before the optimizers are made."""
    if budget.rounds is None:
        return
    epochs, steps = budget.epochs_per_round, budget.steps_per_round
    before = (trainer.max_epochs, trainer.max_steps)
    own = f"max_epochs={before[0]}" if before[1] == ENDLESS else f"max_steps={before[1]}"
    trainer.fit_loop.max_epochs = budget.rounds * epochs if epochs else ENDLESS
    trainer.fit_loop.epoch_loop.max_steps = budget.rounds * steps if steps else ENDLESS
    if (trainer.max_epochs, trainer.max_steps) != before:
        budget.announce(own)


def trainer_rounds(budget: RoundBudget, trainer: Any) -> int:
    """Number of rounds that the trainer's own length amounts to. Raises ConfigError for a trainer without an end."""
    return budget.rounds_within(
        epochs=_limit(trainer.max_epochs),
        steps=_limit(trainer.max_steps),
        per_epoch=steps_per_epoch(trainer),
        where="lightning Trainer",
        fix="max_steps or max_epochs of the Trainer",
    )


def at_end(trainer: Any, *, last_of_epoch: bool) -> bool:
    """Whether the batch that has just ended is the trainer's last."""
    if trainer.max_steps != ENDLESS and trainer.global_step >= trainer.max_steps:
        return True
    return last_of_epoch and trainer.max_epochs != ENDLESS and trainer.current_epoch + 1 >= trainer.max_epochs


def steps_per_epoch(trainer: Any) -> int | None:
    """Optimizer steps of an epoch. None for data without a length, and for a module that steps by itself."""
    batches = trainer.num_training_batches
    if math.isinf(batches) or not trainer.lightning_module.automatic_optimization:
        return None
    return math.ceil(batches / trainer.accumulate_grad_batches)


def warn_if_schedules_end_early(trainer: Any) -> None:
    """Warn about each learning-rate schedule of the user's that ends before the run does."""
    per_epoch, steps, epochs = steps_per_epoch(trainer), _limit(trainer.max_steps), _limit(trainer.max_epochs)
    if epochs is None and steps is not None and per_epoch:
        epochs = math.ceil(steps / per_epoch)
    if steps is None and epochs is not None and per_epoch:
        steps = epochs * per_epoch
    for config in _stepped_by_lightning(trainer):
        total, unit = (epochs, "epochs") if config.interval == "epoch" else (steps, "optimizer steps")
        warn_if_schedule_ends_early(config.scheduler, total, unit, frequency=config.frequency)


def advance_schedules(trainer: Any, epochs: int, steps: int) -> None:
    """Move the schedules on by so many epochs and optimizer steps."""
    for config in _stepped_by_lightning(trainer):
        count = epochs if config.interval == "epoch" else steps
        advance_schedule(config.scheduler, max(count, 0) // config.frequency)


def _stepped_by_lightning(trainer: Any) -> list[Any]:
    return list(trainer.lr_scheduler_configs) if trainer.lightning_module.automatic_optimization else []


def _limit(value: int | None) -> int | None:
    return None if value in (None, ENDLESS) else value
