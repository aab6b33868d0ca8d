"""Rounds of a training loop of one's own: their batches, their optimizer steps, and the loop as a `TrainerPort`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State
from fl_adapters.torch.handshake.names import labels_of_config, names_of_data
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.local_work.correction import plain
from fl_adapters.torch.progress import (
    Progress,
    Tally,
    advance_schedule,
    plain_schedule,
    rows_of,
    warn_if_schedule_ends_early,
)
from fl_adapters.torch.restart import TorchSnapshot, refuse_inexact, refuse_parts, samplers_of, seed_round
from fl_adapters.torch.selection import unwrap
from fl_adapters.torch.trainer_port import Resumed, TrainerPort
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.errors import ConfigError
from fl_runtime.types import Metrics
from fl_runtime.wire.names import Names

_NO_MORE = object()


class TrainingData:
    """The batches of a whole training: passes over a loader, cut into rounds.

    Attributes:
        loader: What gives an epoch's batches each time it is iterated over.
        epochs: Length of the training, where no job decides.
        epochs_made: Passes that have been completed.
        steps_made: Optimizer steps that have been made, those of earlier processes of this site included.
    """

    def __init__(self, loader: Any, epochs: int) -> None:
        self.loader, self.epochs = loader, epochs
        self.epochs_made = self.steps_made = 0
        self._batches: Iterator[Any] | None = None
        self._taken = self._steps_before = 0  # batches of this epoch, and steps before it

    @property
    def used_up(self) -> bool:
        """Whether the loop's own length has been trained."""
        return self.epochs_made >= self.epochs

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch on this rank, or None if the loader has no length."""
        try:
            return len(self.loader)
        except TypeError:
            return None

    def next(self) -> tuple[Any, bool]:
        """Return (next batch, False), or (None, True) at the end of an epoch. The call after that begins a new one."""
        if self._batches is None:
            for part in samplers_of(self.loader):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(self.epochs_made)
            self._batches, self._taken, self._steps_before = iter(self.loader), 0, self.steps_made
        batch = next(self._batches, _NO_MORE)
        if batch is not _NO_MORE:
            self._taken += 1
            return batch, False
        self.end_epoch()
        return None, True

    def end_epoch(self) -> None:
        """Count the current epoch. Raises ConfigError if it had no batch, or no optimizer step was made in it."""
        self._batches = None
        if not self._taken:
            raise ConfigError(
                f"the training data has given no batch in epoch {self.epochs_made + 1}",
                where="FederatedLoop.rounds",
                fix="pass the DataLoader itself: a generator or iterator gives its batches only once",
            )
        if self.steps_made == self._steps_before:
            raise ConfigError(
                "an epoch has ended without a step of the optimizer that was given to FederatedLoop",
                where="the training loop",
                fix="give FederatedLoop the optimizer whose step() the loop calls",
            )
        self.epochs_made += 1

    def end_epoch_if_due(self) -> None:
        """Count the current epoch if its last batch has been taken, as far as the loader's length says so."""
        if self._batches is not None and self._taken == self.batches_per_epoch:
            next(self._batches, None)  # as a `for` loop does: samplers draw from their generator once more
            self.end_epoch()

    def cut_short(self, epochs: int) -> None:
        """Count epochs of a round that the loop's body has left early, by `break`."""
        self.epochs_made += epochs

    def begin_epoch(self) -> None:
        """Let the next batch be the first of an epoch, whether or not the current one has ended."""
        self._batches = None


class StepCounter:
    """Counts the steps of optimizers while it is open."""

    def __init__(self, optimizers: list[Any], data: TrainingData) -> None:
        def count(*_: Any) -> None:
            data.steps_made += 1

        self._handles = [plain(optimizer).register_step_post_hook(count) for optimizer in optimizers]

    def __enter__(self) -> StepCounter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class LocalRound:
    """One round of local training, or one phase of it. Iterate over it for its batches, once.

    Attributes:
        number: Number of the round, counted from 1.
        metrics: Further metrics of the training for the history, which your loop may set.
    """

    def __init__(self, data: TrainingData, progress: Progress, every: Every, tally: Tally, *, bounded: bool) -> None:
        self.number = progress.round
        self.metrics: dict[str, float] = {}
        self._data, self._progress, self._every, self._tally = data, progress, every, tally
        self._bounded = bounded  # the loop's own length decides
        self._iterated = False

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """Add the loss of one batch: the mean over the round goes into the history as `train_loss`.

        Args:
            loss: A number, or a tensor with one element, which stays on its device.

        Raises:
            ConfigError: For a tensor with several elements.
        """
        if isinstance(loss, torch.Tensor) and loss.numel() != 1:
            raise ConfigError(
                f"add_loss() got {loss.numel()} losses",
                where=f"round {self.number}",
                fix="give their mean: loss.mean()",
            )
        self._tally.add_loss(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def __iter__(self) -> Iterator[Any]:
        self._iterated = True
        data, progress = self._data, self._progress
        if self._every.epochs is not None:
            data.begin_epoch()
        while not (progress.complete(self._every) or (self._bounded and data.used_up)):
            batch, ended = data.next()
            if ended:
                progress.batch_ended(last_of_epoch=True)
                continue
            yield batch
            progress.steps = data.steps_made
            progress.batch_ended(last_of_epoch=False)
            if self._tally.examples is None:
                self._tally.rows += rows_of(batch)
        if self._every.steps is not None:
            data.end_epoch_if_due()

    def end(self) -> None:
        """Count the round. Raises ConfigError if the loop's body has not trained on its batches."""
        self._progress.steps = self._data.steps_made
        if not self._iterated:
            raise ConfigError(
                f"the body of the loop has not taken the batches of round {self.number}",
                where="FederatedLoop.rounds",
                fix="write `for batch in round:` where the loop had `for batch in loader:`",
            )
        if self._progress.steps == self._progress.began and not (self._bounded and self._data.used_up):
            raise ConfigError(
                f"round {self.number} has ended without a step of the optimizer that was given to FederatedLoop",
                where="the training loop",
                fix="give FederatedLoop the optimizer whose step() the loop calls",
            )
        if self._every.epochs is not None and not (self._bounded and self._data.used_up):
            self._data.cut_short(self._every.epochs - self._progress.epochs)


@dataclass
class LoopPort(TrainerPort):
    """A training loop of one's own as `TrainerRun` sees it.

    Attributes:
        run: The run that the loop takes part in.
        data: Its batches.
        model: Its module.
        evaluate: Scores the model as it is: metrics and number of examples.
        note: Takes the row about the last exchange.
        stateful: Objects whose state exact restarts restore, by name.
        schedule: Learning-rate schedule that the loop steps, or None.
        counts_epochs: Whether the schedule counts epochs, and not optimizer steps.
        checkpoint: What the loop has loaded from its own checkpoint, or an empty mapping.
    """

    run: TrainerRun[LoopPort]
    data: TrainingData
    model: nn.Module
    evaluate: Callable[[], tuple[Metrics, int]]
    note: Callable[[Mapping[str, float]], None]
    stateful: Mapping[str, Any]
    schedule: Any
    counts_epochs: bool
    checkpoint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.data.steps_made

    @property
    def where(self) -> str:
        return f"step {self.steps}"

    @property
    def steps_per_epoch(self) -> int | None:
        """Unknown: how many batches make a step is the loop's affair."""
        return None

    @property
    def training_data(self) -> Any:
        return self.data.loader

    def stop(self) -> None:
        """Nothing to do: the loop looks at `run.over` before each round."""

    def log(self, row: Mapping[str, float]) -> None:
        self.note(row)

    def validate(self) -> None:
        self.run.report(*self.evaluate())

    def resumed(self) -> Resumed | None:
        if not self.checkpoint:
            return None
        progress = Progress(**self.checkpoint["progress"])
        self.data.steps_made = progress.steps
        return Resumed(
            job=self.checkpoint["job"],
            progress=progress,
            within_round=not progress.at_beginning,
            where=f"FederatedLoop.load_state_dict, at step {progress.steps}",
            fix="begin a new run from the checkpoint's weights, without load_state_dict",
        )

    def names(self) -> dict[str, Names]:
        config = getattr(unwrap(self.model), "config", None)
        return labels_of_config(config) | names_of_data(getattr(self.data.loader, "dataset", None))

    def advance_schedules(self, epochs: int | None, steps: int | None) -> None:
        target, made = (epochs, self.data.epochs_made) if self.counts_epochs else (steps, self.data.steps_made)
        if self.schedule is not None and target is not None:
            advance_schedule(plain_schedule(self.schedule), target - made)

    def snapshot(self, live: LiveModel) -> TorchSnapshot:
        refuse_inexact(self.model, self.data.loader)
        resumed = self.checkpoint and "FederatedLoop.load_state_dict"
        refuse_parts(self.run.settings.every, "FederatedLoop", resumed or None, "start without load_state_dict")
        return TorchSnapshot(live, {n: plain_schedule(part) for n, part in self.stateful.items()}, self)

    def save(self) -> State:
        """Epochs and optimizer steps so far, for exact restarts."""
        return {"epochs": self.data.epochs_made, "steps": self.data.steps_made}

    def load(self, state: State) -> None:
        """Go on from the epochs and steps of an earlier process."""
        self.data.epochs_made, self.data.steps_made = state["epochs"], state["steps"]

    def begin_round(self) -> None:
        """Seed the data of the round, for exact restarts."""
        if self.run.seed is not None:
            seed_round(self.run.seed, self.data.loader)

    def warn_if_schedule_ends_early(self, rounds: int | None) -> None:
        """Warn if a schedule that counts epochs ends before the run does."""
        per_round = self.run.budget.epochs_per_round if self.counts_epochs else self.run.budget.steps_per_round
        if self.schedule is not None and rounds and per_round:
            unit = "epochs" if self.counts_epochs else "optimizer steps"
            warn_if_schedule_ends_early(plain_schedule(self.schedule), rounds * per_round, unit)
