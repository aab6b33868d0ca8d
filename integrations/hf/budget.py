"""Rounds in the trainer's own terms: how long it must run, and where in its loop a round ends."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from fl_adapters.participant.options import Every
from fl_adapters.torch.schedule import advance, horizon_of
from fl_runtime.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """`rounds` times `every`, each `phases` times over; rounds is None where the trainer's own budget decides."""

    every: Every
    rounds: int | None
    phases: int = 1

    def apply(self, args: TrainingArguments, train_dataset: Any) -> None:
        """Make the trainer run exactly the federation's budget. Only before HF has read it: in `on_init_end`."""
        if train_dataset is not None:
            self._check_length(train_dataset)
        if self.rounds is None:
            return
        if self.every.steps is not None:
            args.max_steps = self.rounds * self.phases * self.every.steps
        else:
            args.num_train_epochs = self.rounds * self.phases * self._epochs
            args.max_steps = -1

    def check(self, state: TrainerState, args: TrainingArguments, dataloader: Any) -> None:
        """Raise ConfigError, before the first step, where the trainer would run more or less than the budget."""
        self._check_length(dataloader)
        expected = None if self.rounds is None else self.rounds * self.steps_per_round(args, dataloader)
        if expected is None or expected == state.max_steps:
            return
        epochs = self.rounds * self.phases * self._epochs  # type: ignore[operator]
        value = f"max_steps={expected}" if self.every.steps else f"num_train_epochs={epochs}"
        twice = ", twice," if self.phases == 2 else ""
        raise ConfigError(
            f"the job asks for {self.rounds} rounds of {self.every} each{twice}, {expected} optimizer steps, "
            f"but the trainer is about to run {state.max_steps}",
            where="trainer.add_callback() comes after the Trainer has read its arguments",
            fix=f"give the callback to the constructor, Trainer(callbacks=[...]), or set TrainingArguments({value})",
        )

    def steps_per_round(self, args: TrainingArguments, dataloader: Any) -> int:
        """Optimizer steps of a full round, as the Trainer counts them."""
        if self.every.steps is not None:
            return self.phases * self.every.steps
        return self.phases * self._epochs * max(math.ceil(len(dataloader) / args.gradient_accumulation_steps), 1)

    def trainer_rounds(self, state: TrainerState) -> int:
        """The rounds that the trainer's own budget amounts to; the last may be shorter."""
        if self.every.steps is not None:
            return math.ceil(state.max_steps / (self.phases * self.every.steps))
        return math.ceil(state.num_train_epochs / (self.phases * self._epochs))

    def reached(self, state: TrainerState) -> bool:
        """Whether the optimizer step that has just been made ends a round, or a phase of one."""
        if state.global_step >= state.max_steps:
            return True
        if self.every.steps is not None:
            return state.global_step % self.every.steps == 0
        # HF sets epoch to n + k/k after the last step of an epoch, exactly
        return float(state.epoch).is_integer() and round(state.epoch) % self._epochs == 0

    def reached_by_epoch(self, state: TrainerState) -> bool:
        """Whether the epoch that has just ended ends a round or phase, also where it ended before its last step."""
        return self.every.epochs is not None and math.ceil(state.epoch) % self.every.epochs == 0

    def rounds_done(self, state: TrainerState) -> int:
        """Full rounds behind a trainer that stands at `state` (after a resume)."""
        if self.every.steps is not None:
            return state.global_step // (self.phases * self.every.steps)
        return int(state.epoch) // (self.phases * self._epochs)

    def _check_length(self, data: Any) -> None:
        if self.every.epochs is not None and not has_length(data):
            raise ConfigError(
                f"every={str(self.every)!r} needs a training set with a length",
                where="train_dataset",
                fix="count the round in optimizer steps: FederatedCallback(every=50)",
            )

    @property
    def _epochs(self) -> int:
        return self.every.epochs or 1


def warn_if_schedule_ends_early(scheduler: Any, max_steps: int) -> None:
    """A learning-rate schedule that the user made is left alone; say so where it ends before the run does."""
    horizon = horizon_of(getattr(scheduler, "scheduler", scheduler))
    if horizon is not None and horizon < max_steps:
        warnings.warn(
            f"the learning-rate schedule ends after {horizon} of the {max_steps} optimizer steps of this run; "
            "size it for the whole run, or let the Trainer make it",
            stacklevel=2,
        )


def advance_schedule(scheduler: Any, steps: int) -> None:
    """Move the schedule `steps` optimizer steps on, to where the other sites are."""
    advance(getattr(scheduler, "scheduler", scheduler), steps)  # accelerate wraps it
