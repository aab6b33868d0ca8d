"""Exact restarts of `transformers.Trainer`: its position between two rounds, and what cannot be restarted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import not_restartable
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import plain_schedule
from fl_adapters.torch.restart import TorchSnapshot, refuse_inexact, refuse_parts, samplers_of

from . import trainer as hf

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


class EpochCount(Protocol):
    """Holder of the number of epochs that earlier processes have trained."""

    epochs_before: int


class Position:
    """Where a Trainer stands between two rounds, as a `Snapshot`. Loading it moves the trainer there.

    HF counts the epochs of this process from 0: `count.epochs_before` is set to those of the processes before.
    """

    def __init__(self, trainer: Trainer, state: TrainerState, loader: Any, count: EpochCount) -> None:
        self._trainer, self._state, self._count = trainer, state, count
        callbacks = trainer.callback_handler.callbacks
        self._stateful: list[Any] = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self._samplers = [part for part in samplers_of(loader) if isinstance(part, SeedableRandomSampler)]

    def save(self) -> State:
        """Counts of the trainer, states of other callbacks, and the seeds of the data's order."""
        before = self._count.epochs_before
        return {
            "state": {name: getattr(self._state, name) for name in _POSITION if hasattr(self._state, name)},
            "callbacks": [callback.state()["attributes"] for callback in self._stateful],
            "orders": [sampler.initial_seed - before for sampler in self._samplers],
        }

    def load(self, state: State) -> None:
        """Move the trainer to where `save` was called in another process."""
        for name, value in state["state"].items():
            setattr(self._state, name, value)
        before = self._count.epochs_before = round(self._state.epoch or 0)
        for callback, attributes in zip(self._stateful, state["callbacks"], strict=True):
            for name, value in attributes.items():
                setattr(callback, name, value)
        for sampler, seed in zip(self._samplers, state["orders"], strict=True):
            sampler.initial_seed = seed + before  # to which it adds the number of the epoch
        hf.set_first_step(self._trainer, self._state.global_step)


def snapshot_of(trainer: Trainer, live: LiveModel, scheduler: Any, position: Position) -> TorchSnapshot:
    """State of this training that outlives a round and does not travel."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return TorchSnapshot(live, {"schedule": scheduler, **({"scaler": scaler} if scaler is not None else {})}, position)


def refuse(trainer: Trainer, state: TrainerState, every: Every, model: Any, scheduler: Any, loader: Any) -> None:
    """Raise ConfigError, before round 1, for a training that cannot be restarted exactly."""
    refuse_inexact(model, loader)
    resumed = f"resume_from_checkpoint, at step {state.global_step}" if state.global_step > 0 else None
    refuse_parts(every, "HF", resumed, "call trainer.train() without resume_from_checkpoint")
    if hasattr(plain_schedule(scheduler), "is_better") or trainer.args.lr_scheduler_type in _BY_METRIC:
        raise not_restartable("a schedule that follows a metric is not saved yet", "choose one that follows the steps")
    _refuse_other_samplers(samplers_of(loader)[1:], loader)


def _refuse_other_samplers(samplers: Sequence[Any], loader: Any) -> None:
    parts = [*samplers, getattr(loader, "dataset", None)]
    others = [part for part in parts if hasattr(part, "set_epoch") and not isinstance(part, SeedableRandomSampler)]
    if others:
        raise not_restartable(
            f"{type(others[0]).__name__} has an order of HF's own count of epochs, which begins at 0 in a new process",
            "use a data set and a sampler without set_epoch, such as HF's own",
        )
