"""Exact restarts of Lightning's Trainer: the position of its loops, the data of a round, and points within a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import SINCE_CHECKPOINT, not_restartable, since_checkpoint
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import RoundData, TorchSnapshot, refuse_inexact, refuse_parts
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.errors import ConfigError

from . import trainer as lightning
from .framework import callback_classes


@dataclass
class Position:
    """Where a Trainer stands, and the states of its other callbacks, as a `Snapshot`.

    Attributes:
        trainer: The Trainer.
        module: The module that it trains.
        own: Our own callbacks, which have no state between rounds.
        batch: Number of the batch that training goes on with, for a point within an epoch; None between two epochs.
    """

    trainer: Any
    module: Any
    own: list[Any]
    batch: int | None = None

    def save(self) -> State:
        """Counts of the loops, as they will be when the last batch of the epoch has ended."""
        loop, stepped = self.trainer.fit_loop.epoch_loop, self.trainer.global_step > 0
        return {
            # Lightning has not counted this epoch yet, since its last batch is still ending
            "epochs": self.trainer.current_epoch + 1 if stepped else 0,
            "batches": lightning.batches_ready(self.trainer)[0],
            "stepped": lightning.batches_that_stepped(self.trainer) + 1 if stepped else 0,
            "automatic": loop.automatic_optimization.optim_progress.state_dict(),
            "manual": loop.manual_optimization.optim_step_progress.state_dict(),
            "states": [[type(callback).__name__, callback.state_dict()] for callback in self._callbacks()],
            **({} if self.batch is None else self._within(self.batch)),
        }

    def load(self, state: State) -> None:
        """Move the trainer to where `save` was called in another process."""
        loop, epochs = self.trainer.fit_loop.epoch_loop, self.trainer.fit_loop.epoch_progress
        for progress, count in (
            (epochs.current, state["epochs"]),
            (epochs.total, state["epochs"]),
            (loop.batch_progress.total, state["batches"]),
        ):
            progress.ready = progress.started = progress.processed = progress.completed = count
        lightning.set_batches_that_stepped(self.trainer, state["stepped"])
        loop.automatic_optimization.optim_progress.load_state_dict(state["automatic"])
        loop.manual_optimization.optim_step_progress.load_state_dict(state["manual"])
        self._load_callbacks(state)
        self.batch = state.get("batch")
        if self.batch is not None:
            self._load_within(state)

    def _within(self, batch: int) -> dict[str, Any]:
        """Counts of an epoch that goes on with `batch`, and what it has accumulated so far."""
        every = self.trainer.accumulate_grad_batches if self.module.automatic_optimization else 0
        accumulated = batch % every if every else True
        total, current = lightning.batches_ready(self.trainer)
        savers = self.trainer.checkpoint_callbacks
        return {
            "epochs": self.trainer.current_epoch,
            "batch": batch,
            "batches": total - (current - batch),  # the next batch may have been fetched
            "stepped": lightning.batches_that_stepped(self.trainer),
            "gradients": [parameter.grad for parameter in self._parameters()] if accumulated else [],
            "logged": lightning.logged_state(self.trainer, self.module),
            "saving": [lightning.saving_state(saver) for saver in savers],
        }

    def _load_within(self, state: State) -> None:
        for parameter, gradient in zip(self._parameters(), state["gradients"], strict=False):
            parameter.grad = gradient
        lightning.set_logged_state(self.trainer, self.module, state["logged"])
        for saver, saved in zip(self.trainer.checkpoint_callbacks, state["saving"], strict=True):
            lightning.set_saving_state(saver, saved)

    def _parameters(self) -> list[Any]:
        return [p for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"]]

    def _callbacks(self) -> list[Any]:
        """All callbacks but our own, in an order that another process gives them too."""
        return [callback for callback in self.trainer.callbacks if all(callback is not own for own in self.own)]

    def _load_callbacks(self, state: State) -> None:
        callbacks = self._callbacks()
        if "states" not in state:  # a point of an earlier version
            stateful = [callback for callback in callbacks if callback.state_dict()]
            for index, callback in enumerate(stateful):
                callback.load_state_dict(state["callbacks"][f"{index} {type(callback).__name__}"])
            return
        here, before = [type(callback).__name__ for callback in callbacks], [name for name, _ in state["states"]]
        if here != before:
            raise ConfigError(
                f"this Trainer has the callbacks {', '.join(here) or 'none'}, but that of the process before had "
                f"{', '.join(before) or 'none'}",
                where="Trainer(callbacks=...)",
                fix="start the site again with the same script",
            )
        for callback, (_, saved) in zip(callbacks, state["states"], strict=True):
            if saved:
                callback.load_state_dict(saved)


class RestartHooks(*callback_classes()):  # type: ignore[misc]
    """Hooks for exact restarts, which Lightning calls before those of all other callbacks.

    Where a checkpoint of the script's own was saved, a restart point follows right before the next batch begins: all
    hooks of the batch before have run then, and so has a validation that was due.
    """

    def __init__(self, run: TrainerRun[Any], position: Position, data: RoundData) -> None:
        self._run, self._position, self._data = run, position, data
        self._saved = False
        self._begin_there: Callable[[], None] | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Seed the epoch and its data. In a process that comes back, go to the batch where training goes on."""
        run = self._run
        if not run.begun or run.seed is None:
            return
        self._data.begin_epoch(run.seed, run.progress.epochs)
        if run.came_back_within and self._position.batch is not None:
            lightning.begin_data_anew(trainer, skipped=self._position.batch)
            self._begin_there = lightning.begin_within_epoch(trainer, self._position.batch)
        elif trainer.current_epoch == 0:  # later epochs begin their data after this hook, the first has begun them
            lightning.begin_data_anew(trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save a point if the script has saved a checkpoint, and seed the batch."""
        run = self._run
        if not run.begun or run.seed is None:
            return
        if self._begin_there is not None:
            self._begin_there()
            self._begin_there = None
            run.go_on_within()
            self._position.batch = None
            lightning.count_begun(trainer)
        elif self._saved:
            self._save(trainer, batch_idx)
        self._saved = False
        self._data.begin_step(run.seed, run.progress.epochs, batch_idx)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Note that a checkpoint with the state of training is saved. Lightning calls no hook if it has none."""
        self._saved = self._data.within

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save a point at SIGTERM, after which Lightning ends training between two batches."""
        run = self._run
        if lightning.is_sigterm(exception) and run.begun and self._data.within and lightning.within_epoch(trainer):
            self._save(trainer, lightning.batches_ready(trainer)[1])
        self._leave(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the trainer and its data back to the script."""
        self._leave(trainer)

    def _save(self, trainer: Any, batch: int) -> None:
        self._position.batch = batch
        self._run.progress.steps = trainer.global_step
        self._run.save_within()
        self._position.batch = None

    def _leave(self, trainer: Any) -> None:
        self._data.end()
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]


def snapshot_of(trainer: Any, module: Any, own: Any, live: LiveModel, run: TrainerRun[Any]) -> TorchSnapshot:
    """State of this training that outlives a round and does not travel. Adds `RestartHooks` to the trainer.

    Raises ConfigError, before round 1, for a training that cannot be restarted exactly.
    """
    _refuse(trainer, module, run.settings.every)
    loaders = lightning.training_loaders(trainer)
    intervals = lightning.saves_state(trainer)
    data = RoundData(loaders, run.settings, _cost(module, intervals), _no_points_within(trainer, run, intervals))
    position = Position(trainer, module, [own])
    hooks = RestartHooks(run, position, data)
    position.own.append(hooks)
    trainer.callbacks = [hooks, *trainer.callbacks]
    parts = {f"schedule {index}": config.scheduler for index, config in enumerate(trainer.lr_scheduler_configs)}
    parts["precision"] = trainer.precision_plugin
    if trainer.datamodule is not None:
        parts["data"] = trainer.datamodule
    return TorchSnapshot(live, parts, position, data.cost, loads_again=True)


def _refuse(trainer: Any, module: Any, every: Every) -> None:
    for loader in lightning.training_loaders(trainer):
        refuse_inexact(module, loader)
    resumed = f"ckpt_path, at step {trainer.global_step}" if trainer.global_step > 0 else None
    refuse_parts(every, "Lightning", resumed, "call trainer.fit() without ckpt_path")
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise not_restartable(
            "a schedule that follows a metric is not saved yet", "choose one that follows steps or epochs"
        )


def _no_points_within(trainer: Any, run: TrainerRun[Any], intervals: list[lightning.CheckpointInterval]) -> str | None:
    """Why there are no restart points within a round; None if there are."""
    if not trainer.checkpoint_callbacks:
        return "the Trainer has no ModelCheckpoint"
    if not intervals:
        return "a checkpoint of save_weights_only=True or save_top_k=0 holds no state of training"
    per_round = run.budget.epochs_per_round or 1
    within_epochs = any(interval.steps or interval.timed for interval in intervals) or (
        trainer.val_check_interval != 1.0 or trainer.check_val_every_n_epoch is None
    )
    if not within_epochs and all((interval.epochs or per_round) % per_round == 0 for interval in intervals):
        return "ModelCheckpoint saves at the ends of rounds alone (every_n_train_steps=N saves within them)"
    if trainer.reload_dataloaders_every_n_epochs:
        return "reload_dataloaders_every_n_epochs makes other data loaders within the run"
    if lightning.takes_batches_itself(trainer):
        return "training_step takes its batches from dataloader_iter"
    return None


def _cost(module: Any, intervals: list[lightning.CheckpointInterval]) -> str:
    # with manual optimization a batch may make several steps, and Lightning saves at multiples that it meets
    regular = [i.steps for i in intervals if i.steps and not i.picks and module.automatic_optimization]
    return since_checkpoint(min(regular), f"every_n_train_steps={min(regular)}") if regular else SINCE_CHECKPOINT
