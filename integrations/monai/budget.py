"""Rounds in Ignite's own terms: how long the trainer must run, and what that means for learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from monai.handlers import LrScheduleHandler

from fl_adapters.torch.progress import RoundBudget, advance_schedule, warn_if_schedule_ends_early

ENDLESS = 2**31 - 1
"""Epochs of a run whose length in epochs is unknown. It ends with the last round."""


def apply(budget: RoundBudget, engine: Any) -> None:
    """Make the trainer run exactly the federation's budget. Call while `STARTED` is fired."""
    if budget.rounds is None:
        return
    before = engine.state.max_epochs
    if budget.epochs_per_round is not None:
        engine.state.max_epochs = budget.rounds * budget.epochs_per_round
    else:
        per_epoch, steps = steps_per_epoch(engine), budget.rounds * (budget.steps_per_round or 0)
        engine.state.max_epochs = math.ceil(steps / per_epoch) if per_epoch else ENDLESS
    if engine.state.max_epochs != before:
        budget.announce(f"max_epochs={before}")


def trainer_rounds(budget: RoundBudget, engine: Any) -> int:
    """Number of rounds that the trainer's own length amounts to. Raises ConfigError if that is unknown."""
    return budget.rounds_within(
        epochs=engine.state.max_epochs,
        steps=None,
        per_epoch=steps_per_epoch(engine),
        where="MONAI trainer",
        fix="epoch_length of the trainer",
    )


def accumulation(engine: Any) -> int:
    """Number of batches whose gradients make one optimizer step."""
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
    """Warn about each learning-rate schedule of the user's that ends before the run does."""
    epochs, length = engine.state.max_epochs, engine.state.epoch_length
    if epochs == ENDLESS:
        return
    iterations = epochs * length if length else None
    for handler in handlers:
        total, unit = (epochs, "epochs") if handler.epoch_level else (iterations, "iterations")
        warn_if_schedule_ends_early(handler.lr_scheduler, total, unit)


def advance_schedules(engine: Any, handlers: Iterable[LrScheduleHandler], epochs: int, steps: int | None) -> None:
    """Move the schedules to where a site stands that has made so many epochs and optimizer steps."""
    done = max(engine.state.epoch - 1, 0)  # the epoch that begins now is not done
    missing = _iterations(engine, epochs, steps) - engine.state.iteration
    for handler in handlers:
        advance_schedule(handler.lr_scheduler, max(epochs - done if handler.epoch_level else missing, 0))


def _iterations(engine: Any, epochs: int, steps: int | None) -> int:
    """Iterations of a site that has made so many epochs, and optimizer steps in all; 0 if unknown."""
    length, per_epoch = engine.state.epoch_length, steps_per_epoch(engine)
    if not length or not per_epoch:
        return (steps or 0) * accumulation(engine)
    in_epoch = (steps or 0) - epochs * per_epoch
    return int(epochs * length + min(in_epoch * accumulation(engine), length))
