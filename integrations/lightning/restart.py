"""Exact restarts of Lightning's Trainer: where its loops stand, and the data of a round begun anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import refuse_inexact, refuse_parts, refused, seed_round
from fl_adapters.torch.snapshot import TorchSnapshot


@dataclass
class Position:
    """Where a Trainer stands between two epochs, and its other callbacks, as a `Snapshot`. own: the callback of ours,
    which has no state between rounds. came_back: something was loaded."""

    trainer: Any
    own: Any
    came_back: bool = False

    def save(self) -> State:
        loop = self.trainer.fit_loop.epoch_loop
        return {
            # saved while the last batch of an epoch ends, before Lightning has counted that epoch
            "epochs": self.trainer.current_epoch + 1 if self.trainer.global_step else 0,
            "batches": loop.batch_progress.total.ready,
            "stepped": loop._batches_that_stepped + 1 if self.trainer.global_step else 0,
            "automatic": loop.automatic_optimization.optim_progress.state_dict(),
            "manual": loop.manual_optimization.optim_step_progress.state_dict(),
            "callbacks": {key: callback.state_dict() for key, callback in self._callbacks().items()},
        }

    def load(self, state: State) -> None:
        loop = self.trainer.fit_loop.epoch_loop
        epochs = self.trainer.fit_loop.epoch_progress
        for progress, count in (
            (epochs.current, state["epochs"]),
            (epochs.total, state["epochs"]),
            (loop.batch_progress.total, state["batches"]),
        ):
            progress.ready = progress.started = progress.processed = progress.completed = count
        loop._batches_that_stepped = state["stepped"]
        loop.automatic_optimization.optim_progress.load_state_dict(state["automatic"])
        loop.manual_optimization.optim_step_progress.load_state_dict(state["manual"])
        for key, callback in self._callbacks().items():
            callback.load_state_dict(state["callbacks"][key])
        self.came_back = state["epochs"] > 0

    def _callbacks(self) -> dict[str, Any]:
        """Those with a state, by names that another process gives them too."""
        others = [callback for callback in self.trainer.callbacks if callback is not self.own and callback.state_dict()]
        return {f"{index} {type(callback).__name__}": callback for index, callback in enumerate(others)}


def snapshot_of(trainer: Any, live: LiveModel, position: Position) -> TorchSnapshot:
    """All that outlives a round of this training and does not travel."""
    parts = {f"schedule {index}": config.scheduler for index, config in enumerate(trainer.lr_scheduler_configs)}
    parts["precision"] = trainer.precision_plugin
    if trainer.datamodule is not None:
        parts["data"] = trainer.datamodule
    return TorchSnapshot(live, parts, position)


def refuse(trainer: Any, module: Any, every: Every) -> None:
    """Raise ConfigError, before round 1, for what cannot be restarted exactly, with the reason."""
    for loader in _loaders(trainer):
        refuse_inexact(module, loader)
    resumed = f"ckpt_path, at step {trainer.global_step}" if trainer.global_step > 0 else None
    refuse_parts(every, "Lightning", resumed, "call trainer.fit() without ckpt_path")
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise refused("a schedule that follows a metric is not kept yet", "choose one that follows steps or epochs")


def begin_round(trainer: Any, seed: int) -> None:
    """Seed what the round draws from, in `on_train_epoch_start`; its data begin after that."""
    for loader in _loaders(trainer):
        seed_round(seed, loader)
    if trainer.current_epoch == 0:  # later ones begin after this hook by themselves, the first before it
        iter(trainer.fit_loop._data_fetcher)


def _loaders(trainer: Any) -> list[Any]:
    return list(trainer.fit_loop._combined_loader.flattened)
