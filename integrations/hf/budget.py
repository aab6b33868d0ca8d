"""Rounds in the terms of `transformers.Trainer`: how long it must run, and which step ends a round."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from fl_adapters.torch.progress import RoundBudget
from fl_runtime.errors import ConfigError


def apply(budget: RoundBudget, args: TrainingArguments, train_dataset: Any) -> None:
    """Set the trainer's length to the federation's budget.

    HF sizes its learning-rate schedule from it, so call this in `on_init_end`.
    """
    if train_dataset is not None:
        _refuse_epochs_without_length(budget, train_dataset)
    if budget.rounds is None:
        return
    before, in_steps = (args.num_train_epochs, args.max_steps), args.max_steps > 0
    own = f"max_steps={args.max_steps}" if in_steps else f"num_train_epochs={args.num_train_epochs:g}"
    if budget.steps_per_round is not None:
        args.max_steps = budget.rounds * budget.steps_per_round
    else:
        args.num_train_epochs = budget.rounds * _epochs(budget)
        args.max_steps = -1
    if (args.max_steps if in_steps or args.max_steps > 0 else args.num_train_epochs) != before[in_steps]:
        budget.announce(own)


def check(budget: RoundBudget, state: TrainerState, args: TrainingArguments, dataloader: Any) -> None:
    """Raise ConfigError, before the first step, if the trainer would run more or less than the budget."""
    _refuse_epochs_without_length(budget, dataloader)
    if budget.rounds is None:
        return
    per_round = budget.steps_per_round or _epochs(budget) * steps_per_epoch(args, dataloader)
    expected = budget.rounds * per_round
    if expected == state.max_steps:
        return
    in_epochs = f"num_train_epochs={budget.rounds * _epochs(budget)}"
    value = f"max_steps={expected}" if budget.every.steps else in_epochs
    twice = ", twice," if budget.phases == 2 else ""
    raise ConfigError(
        f"the job asks for {budget.rounds} rounds of {budget.every} each{twice}, {expected} optimizer steps, "
        f"but the trainer is about to run {state.max_steps}",
        where="trainer.add_callback() comes after the Trainer has read its arguments",
        fix=f"give the callback to the constructor, Trainer(callbacks=[...]), or set TrainingArguments({value})",
    )


def steps_per_epoch(args: TrainingArguments, dataloader: Any) -> int:
    """Optimizer steps of an epoch, as the Trainer counts them. The data must have a length."""
    return max(math.ceil(len(dataloader) / args.gradient_accumulation_steps), 1)


def trainer_rounds(budget: RoundBudget, state: TrainerState) -> int:
    """Number of rounds that the trainer's own length amounts to. The last one may be shorter."""
    in_steps = budget.every.steps is not None
    return budget.rounds_within(
        epochs=None if in_steps else state.num_train_epochs,
        steps=state.max_steps if in_steps else None,
        per_epoch=None,
        where="TrainingArguments",
        fix="max_steps or num_train_epochs",
    )


def ends_phase(budget: RoundBudget, state: TrainerState) -> bool:
    """Whether the optimizer step that was just made ends a round, or a phase of one."""
    if state.global_step >= state.max_steps:
        return True
    every = budget.every
    return _at_multiple_of(state, every.steps, every.epochs)


def epoch_ends_phase(budget: RoundBudget, state: TrainerState) -> bool:
    """Whether the epoch that just ended ends a round or a phase, even if it was cut short."""
    return budget.every.epochs is not None and math.ceil(state.epoch) % budget.every.epochs == 0


def rounds_done(budget: RoundBudget, state: TrainerState) -> int:
    """Number of whole rounds behind a trainer that resumed at `state`."""
    if budget.steps_per_round is not None:
        return state.global_step // budget.steps_per_round
    return int(state.epoch) // _epochs(budget)


def between_rounds(budget: RoundBudget, state: TrainerState) -> bool:
    """Whether a trainer that resumed at `state` stands exactly between two rounds."""
    return _at_multiple_of(state, budget.steps_per_round, budget.epochs_per_round)


def _at_multiple_of(state: TrainerState, steps: int | None, epochs: int | None) -> bool:
    if steps is not None:
        return state.global_step % steps == 0
    # HF sets epoch to n + k/k after the last step of an epoch, exactly
    return float(state.epoch).is_integer() and round(state.epoch) % (epochs or 1) == 0


def _epochs(budget: RoundBudget) -> int:
    return budget.epochs_per_round or 1


def _refuse_epochs_without_length(budget: RoundBudget, data: Any) -> None:
    if budget.every.epochs is not None and not has_length(data):
        raise ConfigError(
            f"every={str(budget.every)!r} needs a training set with a length",
            where="train_dataset",
            fix="count the round in optimizer steps: FederatedCallback(every=50)",
        )
