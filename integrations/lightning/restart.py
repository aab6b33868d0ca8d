"""Exact restarts of Lightning's Trainer: the position of its loops, and the data of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import not_restartable
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import TorchSnapshot, refuse_inexact, refuse_parts, seed_round

from . import trainer as lightning


@dataclass
class Position:
    """Where a Trainer stands between two epochs, and the states of its other callbacks, as a `Snapshot`.

    Attributes:
        trainer: The Trainer.
        own: Our own callback, which has no state between rounds.
    """

    trainer: Any
    own: Any

    def save(self) -> State:
        """Counts of the loops, as they will be when the last batch of the epoch has ended."""
        loop, stepped = self.trainer.fit_loop.epoch_loop, self.trainer.global_step > 0
        return {
            # Lightning has not counted this epoch yet, since its last batch is still ending
            "epochs": self.trainer.current_epoch + 1 if stepped else 0,
            "batches": loop.batch_progress.total.ready,
            "stepped": lightning.batches_that_stepped(self.trainer) + 1 if stepped else 0,
            "automatic": loop.automatic_optimization.optim_progress.state_dict(),
            "manual": loop.manual_optimization.optim_step_progress.state_dict(),
            "callbacks": {key: callback.state_dict() for key, callback in self._callbacks().items()},
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
        for key, callback in self._callbacks().items():
            callback.load_state_dict(state["callbacks"][key])

    def _callbacks(self) -> dict[str, Any]:
        """Other callbacks with a state, by names that another process gives them too."""
        others = [callback for callback in self.trainer.callbacks if callback is not self.own and callback.state_dict()]
        return {f"{index} {type(callback).__name__}": callback for index, callback in enumerate(others)}


def snapshot_of(trainer: Any, live: LiveModel, position: Position) -> TorchSnapshot:
    """State of this training that outlives a round and does not travel."""
    parts = {f"schedule {index}": config.scheduler for index, config in enumerate(trainer.lr_scheduler_configs)}
    parts["precision"] = trainer.precision_plugin
    if trainer.datamodule is not None:
        parts["data"] = trainer.datamodule
    return TorchSnapshot(live, parts, position)


def refuse(trainer: Any, module: Any, every: Every) -> None:
    """Raise ConfigError, before round 1, for a training that cannot be restarted exactly."""
    for loader in lightning.training_loaders(trainer):
        refuse_inexact(module, loader)
    resumed = f"ckpt_path, at step {trainer.global_step}" if trainer.global_step > 0 else None
    refuse_parts(every, "Lightning", resumed, "call trainer.fit() without ckpt_path")
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise not_restartable(
            "a schedule that follows a metric is not saved yet", "choose one that follows steps or epochs"
        )


def begin_round(trainer: Any, seed: int) -> None:
    """Seed the random states of the round, in `on_train_epoch_start`; its data begin after that."""
    for loader in lightning.training_loaders(trainer):
        seed_round(seed, loader)
    if trainer.current_epoch == 0:  # later epochs begin their data after this hook, the first has begun them before it
        lightning.begin_data_anew(trainer)
