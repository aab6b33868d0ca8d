"""Exact restarts of `transformers.Trainer`: where it stands, and rounds whose order of data can be begun anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import refuse_inexact, refuse_parts, refused, samplers_of
from fl_adapters.torch.snapshot import TorchSnapshot

_POSITION = (
    "global_step",
    "epoch",
    "log_history",
    "best_metric",
    "best_model_checkpoint",
    "best_global_step",
    "total_flos",
    "num_input_tokens_seen",
)
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


class Position:
    """Where a Trainer stands, as a `Snapshot`; loading it moves the trainer there.

    epochs_before: those of processes before this one; the Trainer counts its own from 0.
    """

    def __init__(self, trainer: Trainer, state: TrainerState, loader: Any) -> None:
        self._trainer, self._state = trainer, state
        self._counting: list[Any] = [c for c in trainer.callback_handler.callbacks if isinstance(c, ExportableState)]
        self._shuffling = [part for part in samplers_of(loader) if isinstance(part, SeedableRandomSampler)]
        self.epochs_before = 0

    def save(self) -> State:
        return {
            "state": {name: getattr(self._state, name) for name in _POSITION if hasattr(self._state, name)},
            "callbacks": [callback.state()["attributes"] for callback in self._counting],
            "orders": [sampler.initial_seed - self.epochs_before for sampler in self._shuffling],
        }

    def load(self, kept: State) -> None:
        for name, value in kept["state"].items():
            setattr(self._state, name, value)
        self.epochs_before = round(self._state.epoch or 0)
        for callback, attributes in zip(self._counting, kept["callbacks"], strict=True):
            for name, value in attributes.items():
                setattr(callback, name, value)
        for sampler, seed in zip(self._shuffling, kept["orders"], strict=True):
            sampler.initial_seed = seed + self.epochs_before  # to which it adds the number of the epoch
        for name in ("_globalstep_last_logged", "_initial_global_step"):  # for the means that HF logs
            setattr(self._trainer, name, self._state.global_step)


def snapshot_of(trainer: Trainer, live: LiveModel, scheduler: Any, position: Position) -> TorchSnapshot:
    """All that outlives a round of this training and does not travel."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return TorchSnapshot(live, {"schedule": scheduler, **({"scaler": scaler} if scaler is not None else {})}, position)


def refuse(trainer: Trainer, state: TrainerState, every: Every, model: Any, scheduler: Any, loader: Any) -> None:
    """Raise ConfigError, before round 1, for what cannot be restarted exactly, with the reason."""
    refuse_inexact(model, loader)
    resumed = f"resume_from_checkpoint, at step {state.global_step}" if state.global_step > 0 else None
    refuse_parts(every, "HF", resumed, "call trainer.train() without resume_from_checkpoint")
    if hasattr(getattr(scheduler, "scheduler", scheduler), "is_better") or trainer.args.lr_scheduler_type in _BY_METRIC:
        raise refused("a schedule that follows a metric is not kept yet", "choose one that follows the steps")
    _refuse_other_samplers(samplers_of(loader)[1:], loader)


def _refuse_other_samplers(samplers: Sequence[Any], loader: Any) -> None:
    parts = [*samplers, getattr(loader, "dataset", None)]
    others = [part for part in parts if hasattr(part, "set_epoch") and not isinstance(part, SeedableRandomSampler)]
    if others:
        raise refused(
            f"{type(others[0]).__name__} has an order of HF's own count of epochs, which begins at 0 in a new process",
            "use a data set and a sampler without set_epoch, such as HF's own",
        )
