"""Exact restarts of `transformers.Trainer`: its position between two rounds, and what cannot be restarted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate.data_loader import SeedableRandomSampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fl_adapters.participant.options import Every, SiteSettings
from fl_adapters.participant.restart import SINCE_CHECKPOINT, not_restartable, since_checkpoint
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import plain_schedule
from fl_adapters.torch.restart import RoundData, TorchSnapshot, refuse_inexact, refuse_parts, samplers_of

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


@dataclass
class EpochCount:
    """Epochs of a run that was continued in a new process. HF counts those of the process, from 0.

    Attributes:
        before: Whole epochs that earlier processes have trained.
        skipped: Batches of the epoch after them that they have trained.
        begun: Epochs that this process has begun.
    """

    before: int = 0
    skipped: int = 0
    begun: int = 0

    def begin(self) -> int:
        """Count an epoch that begins. Return the batches of it that earlier processes have trained."""
        self.begun += 1
        return self.skipped if self.begun == 1 else 0

    def of_run(self, epoch: float, batches: int) -> float:
        """Return the epochs since the run began, for HF's count at a step and the batches of an epoch."""
        if self.skipped and self.begun == 1:
            epoch = (round(epoch * batches) + self.skipped) / batches
        return self.before + epoch


class Losses(Protocol):
    """Holder of the sum of losses at the beginning of the round.

    Attributes:
        loss_before: `hf.loss_sum()` when the round began.
    """

    loss_before: float | None


class Position:
    """Where a Trainer stands, as a `Snapshot`. Loading it moves the trainer there.

    HF counts the epochs of this process from 0: `epochs` gets those of the processes before.
    """

    def __init__(self, trainer: Trainer, state: TrainerState, loader: Any, epochs: EpochCount, losses: Losses) -> None:
        self._trainer, self._state, self._loader = trainer, state, loader
        self._epochs, self._losses = epochs, losses
        callbacks = trainer.callback_handler.callbacks
        self._stateful: list[Any] = [callback for callback in callbacks if isinstance(callback, ExportableState)]
        self._samplers = [part for part in samplers_of(loader) if isinstance(part, SeedableRandomSampler)]

    def save(self) -> State:
        """Counts of the trainer, states of other callbacks, and the seeds of the data's order."""
        before = self._epochs.before
        return {
            "state": {name: getattr(self._state, name) for name in _POSITION if hasattr(self._state, name)},
            "callbacks": [callback.state()["attributes"] for callback in self._stateful],
            "orders": [sampler.initial_seed - before for sampler in self._samplers],
            "loss": self._loss(),
        }

    def load(self, state: State) -> None:
        """Move the trainer to where `save` was called in another process."""
        for name, value in state["state"].items():
            setattr(self._state, name, value)
        epoch = self._state.epoch or 0.0
        before = self._epochs.before = int(epoch)
        if epoch > before:
            self._epochs.skipped = round((epoch - before) * len(self._loader))
        if self._losses.loss_before is not None:
            self._losses.loss_before -= state.get("loss") or 0.0  # this process counts its losses from 0
        for callback, attributes in zip(self._stateful, state["callbacks"], strict=True):
            for name, value in attributes.items():
                setattr(callback, name, value)
        for sampler, seed in zip(self._samplers, state["orders"], strict=True):
            sampler.initial_seed = seed + before  # to which it adds the number of the epoch
        hf.set_first_step(self._trainer, self._state.global_step)

    def _loss(self) -> float:
        """Sum of the losses in this round so far; 0 if it is unknown."""
        now, before = hf.loss_sum(), self._losses.loss_before
        return 0.0 if now is None or before is None else now - before


def round_data(trainer: Trainer, loader: Any, settings: SiteSettings) -> RoundData:
    """Data and random numbers of a round, and what a restart repeats."""
    return RoundData([loader], settings, _interval(trainer.args), _no_points_within(trainer.args, loader))


def _no_points_within(args: TrainingArguments, loader: Any) -> str | None:
    """Why there are no restart points within a round; None if there are."""
    if args.save_strategy == "no":
        return 'save_strategy="no" saves no checkpoints'
    if not hasattr(loader, "skip_batches"):
        return f"{type(loader).__name__} cannot skip batches"
    if len(loader) % args.gradient_accumulation_steps:
        return "the batches of an epoch are not a multiple of gradient_accumulation_steps"
    return None


def _interval(args: TrainingArguments) -> str:
    return since_checkpoint(args.save_steps, "save_steps") if args.save_strategy == "steps" else SINCE_CHECKPOINT


def snapshot_of(trainer: Trainer, live: LiveModel, scheduler: Any, position: Position, cost: str) -> TorchSnapshot:
    """State of this training that outlives a round and does not travel. `cost`: what a restart repeats."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    parts = {"schedule": scheduler, **({"scaler": scaler} if scaler is not None else {})}
    return TorchSnapshot(live, parts, position, cost)


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
