"""Rounds in a trainer's own terms: the length of a run, where a site stands in it, the data and the schedules of both.

Nothing here knows a framework or a federation: these are counts, sums and learning-rate schedules of torch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils._pytree import tree_leaves

from fl_adapters.participant.options import Every, SiteSettings, announce_budget
from fl_adapters.torch.ranks import collectives as ranks
from fl_runtime.errors import ConfigError


@dataclass(frozen=True)
class RoundBudget:
    """The length of a federated run: `rounds` times `phases` times `every`.

    Attributes:
        every: Local budget of one phase, in whole epochs or in optimizer steps.
        rounds: Number of rounds that the job asks for. None if the trainer's own length decides.
        phases: How often a round trains its budget: twice for a strategy with personal models (Ditto), else once.
    """

    every: Every
    rounds: int | None
    phases: int = 1

    @classmethod
    def of(cls, settings: SiteSettings) -> RoundBudget:
        """Budget of the job, as it holds at this site."""
        return cls(settings.every, settings.rounds, settings.phases)

    @property
    def epochs_per_round(self) -> int | None:
        """Epochs of a round with all its phases. None if rounds are counted in steps."""
        return None if self.every.epochs is None else self.phases * self.every.epochs

    @property
    def steps_per_round(self) -> int | None:
        """Optimizer steps of a round with all its phases. None if rounds are counted in epochs."""
        return None if self.every.steps is None else self.phases * self.every.steps

    def announce(self, own: str) -> None:
        """Say on stderr, once at a site, that this length takes the place of the trainer's own.

        Args:
            own: The trainer's own length, as the user wrote it: "num_train_epochs=2".
        """
        if self.rounds is not None and ranks.is_rank_zero():
            announce_budget(self.rounds, self.every, own, phases=self.phases)

    def rounds_within(
        self, *, epochs: int | None, steps: int | None, per_epoch: int | None, where: str, fix: str
    ) -> int:
        """Count the rounds that fit into a trainer's own length. The last one may be shorter.

        Args:
            epochs: Epochs after which the trainer stops, or None if it has no such limit.
            steps: Optimizer steps after which the trainer stops, or None if it has no such limit.
            per_epoch: Optimizer steps of an epoch, or None if unknown.
            where: Name of the trainer, for the error.
            fix: What the user can set at the trainer so that its length is known, for the error.

        Returns:
            The number of rounds.

        Raises:
            ConfigError: If the trainer's length is unknown.
        """
        if self.steps_per_round is not None:
            limits = [steps, epochs * per_epoch if epochs is not None and per_epoch else None]
        else:
            limits = [epochs, math.ceil(steps / per_epoch) if steps is not None and per_epoch else None]
        known = [limit for limit in limits if limit is not None]
        if not known:
            raise ConfigError(
                "it is unknown how long this run is: the job sets no number of rounds, and the trainer has no length",
                where=where,
                fix=f"set rounds in the job (simulate --rounds N), or {fix}",
            )
        return math.ceil(min(known) / (self.steps_per_round or self.epochs_per_round or 1))

    def before(self, round: int, per_epoch: int | None) -> tuple[int | None, int | None]:
        """Epochs and optimizer steps that a site has made when a round begins.

        Args:
            round: Number of the round, counted from 1.
            per_epoch: Optimizer steps of an epoch, or None if unknown.

        Returns:
            A pair (epochs, steps). Either is None if it cannot be told without `per_epoch`.
        """
        if self.steps_per_round is not None:
            steps = (round - 1) * self.steps_per_round
            return steps // per_epoch if per_epoch else None, steps
        epochs = (round - 1) * (self.epochs_per_round or 1)
        return epochs, epochs * per_epoch if per_epoch else None


@dataclass
class Progress:
    """Where a site stands in its round. Plain values, so that checkpoints can hold it.

    Attributes:
        round: Number of the round, counted from 1.
        steps: Optimizer steps of the whole run so far, as the trainer counts them.
        began: Value of `steps` when this round, or this phase of it, began.
        ends: Value of `steps` at which it ends, for a budget in steps.
        epochs: Whole epochs made in this round, or in this phase of it.
        in_epoch: Whether batches have been trained since the last epoch ended.
        phase: Phase of the round, counted from 0.
    """

    round: int = 0
    steps: int = 0
    began: int = 0
    ends: int = 0
    epochs: int = 0
    in_epoch: bool = False
    phase: int = 0

    @classmethod
    def at(cls, round: int, steps: int, every: Every) -> Progress:
        """Beginning of `round` for a trainer that has made `steps` optimizer steps."""
        return cls(round, steps, steps, steps + (every.steps or 0))

    @property
    def at_beginning(self) -> bool:
        """Whether nothing of the round has been trained yet."""
        return self.steps == self.began and not self.epochs and not self.phase

    def batch_ended(self, *, last_of_epoch: bool) -> None:
        """Count a batch that has been trained."""
        self.in_epoch = not last_of_epoch
        self.epochs += last_of_epoch

    def complete(self, every: Every) -> bool:
        """Whether the budget of this phase is used up."""
        if every.steps is not None:
            return self.steps >= self.ends
        return self.epochs >= (every.epochs or 1)

    def next(self, round: int, every: Every) -> Progress:
        """Beginning of `round`, or of the next phase if that is the current round.

        A budget in steps goes on from where this phase should have ended: with several optimizers a batch makes
        several steps, and may end a round one step late.
        """
        ends = max(self.ends, self.steps - (every.steps or 0)) + (every.steps or 0)
        phase = self.phase + 1 if round == self.round else 0
        return Progress(round, self.steps, self.steps, ends, 0, self.in_epoch, phase)


class Tally:
    """Losses and examples of the round so far.

    Attributes:
        examples: Size of the training set over all ranks. None if unknown: then the examples of each batch are counted.
        rows: Examples that this rank has seen in the round, if they are counted.
    """

    def __init__(self, examples: int | None = None) -> None:
        self.examples = examples
        self.rows = 0
        self._loss: torch.Tensor | float = 0.0
        self._batches = 0

    def add_loss(self, loss: torch.Tensor | float | None) -> None:
        """Add the loss of one batch, if it has one. A tensor stays on its device, so that no step waits for it."""
        if loss is not None:
            wide = loss.float() if isinstance(loss, torch.Tensor) and loss.element_size() < 4 else loss
            self._loss = self._loss + wide
            self._batches += 1

    def num_examples(self) -> int:
        """Weight of this site's update: the size of the training set, else the examples seen by all ranks."""
        return self.examples or max(self.rows * ranks.world_size(), 1)

    def mean_loss(self, factor: float = 1) -> dict[str, float]:
        """Training metrics of the round.

        Args:
            factor: What each loss was divided by before it was added, such as the batches of an accumulated step.

        Returns:
            `{"train_loss": mean over the batches}`, or an empty dict if no batch was counted. The mean of a round that
                diverged is NaN or infinite.
        """
        return {"train_loss": float(self._loss) * factor / self._batches} if self._batches else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the losses and examples so far, with a reference to the live sum of the losses."""
        return {"rows": self.rows, "loss": self._loss, "batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from losses and examples of an earlier process.

        Args:
            state: What `state_dict` returned there; empty if that process kept no count.
        """
        if state:
            self.rows, self._loss, self._batches = state["rows"], state["loss"], state["batches"]

    def reset(self) -> None:
        """Begin the next round, or the next phase."""
        self.rows, self._loss, self._batches = 0, 0.0, 0


def size_of(loader: Any, batches: float, world_size: int) -> int | None:
    """Count the examples that an epoch takes from a data loader, over all ranks.

    Args:
        loader: A DataLoader of torch, or what stands for it.
        batches: Batches of an epoch on each rank; infinite for all of them.
        world_size: Number of ranks.

    Returns:
        The number of examples, at most the size of the data set; None for data without a length.
    """
    try:
        rows = len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None
    batch_size = getattr(loader, "batch_size", None)
    if not isinstance(batch_size, int) or math.isinf(batches):
        return rows
    return min(rows, int(batches) * batch_size * world_size)


def rows_of(batch: Any) -> int:
    """Number of examples in a batch: the length of the first tensor in it, else 1."""
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.ndim), 1)


def schedule_length(scheduler: Any) -> int | None:
    """Number of its own steps after which a learning-rate schedule ends, or None if it does not say."""
    for name in ("total_steps", "T_max", "total_iters", "t_total"):  # the last is MONAI's
        if isinstance(value := getattr(scheduler, name, None), int):
            return value
    for function in getattr(scheduler, "lr_lambdas", None) or ():
        value = getattr(function, "keywords", {}).get("num_training_steps")  # those of transformers
        if isinstance(value, int):
            return value
    return None


def plain_schedule(scheduler: Any) -> Any:
    """Return the scheduler of torch within accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)


def advance_schedule(scheduler: Any, steps: int) -> None:
    """Move a learning-rate schedule on by so many of its own steps. One that follows a metric stays where it is."""
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch expects an optimizer step before each
        for _ in range(steps):
            scheduler.step()


def warn_if_schedule_ends_early(scheduler: Any, total: int | None, unit: str, *, frequency: int = 1) -> None:
    """Warn if a learning-rate schedule that the user made ends before the run does. It is left as it is.

    Args:
        scheduler: A scheduler of torch, of transformers or of MONAI.
        total: Length of the run in the units that the scheduler counts, or None if unknown.
        unit: What the scheduler counts, for the message: "epochs", "optimizer steps".
        frequency: After how many units the scheduler makes a step.
    """
    length = schedule_length(scheduler)
    if length is not None and total is not None and length * frequency < total:
        warnings.warn(
            f"the learning-rate schedule {type(scheduler).__name__} ends after {length * frequency} of the {total} "
            f"{unit} of this federated run; make it as long as the run, or let the trainer size it",
            stacklevel=3,
        )
