"""Exact restarts of a MONAI trainer: the position of its engine, and the data and transforms of a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ignite.handlers import EarlyStopping, EMAHandler
from ignite.handlers.param_scheduler import BaseParamScheduler
from monai.data.utils import set_rnd
from monai.handlers import LrScheduleHandler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fl_adapters.participant.options import Every
from fl_adapters.participant.restart import not_restartable
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import TorchSnapshot, refuse_inexact, refuse_parts, seed_round

from . import trainer as monai

_FOREIGN: dict[type, tuple[str, str]] = {
    LRScheduler: ("a schedule in a handler of your own is out of reach", "step it by monai.handlers.LrScheduleHandler"),
    BaseParamScheduler: ("Ignite's schedules are not saved yet", "use monai.handlers.LrScheduleHandler"),
    EMAHandler: ("the average of an EMAHandler is not saved yet", "leave it out"),
    EarlyStopping: ("the patience of an EarlyStopHandler is not saved", "leave it out, and set patience in the job"),
}


class StepCount(Protocol):
    """Holder of the number of optimizer steps made so far."""

    steps_made: int


@dataclass
class Position:
    """Where a trainer stands between two epochs, as a `Snapshot`.

    Attributes:
        engine: The trainer.
        count: Holder of its optimizer steps, which Ignite does not count.
    """

    engine: Any
    count: StepCount

    def save(self) -> State:
        """Epochs, iterations and optimizer steps so far."""
        state = self.engine.state
        begun = 0 if state.iteration else state.epoch  # before round 1 the first epoch has begun, but nothing is done
        return {"epoch": state.epoch - begun, "iteration": state.iteration, "steps": self.count.steps_made}

    def load(self, state: State) -> None:
        """Move the trainer to where `save` was called in another process."""
        if state["epoch"] > 0:  # else the process before died in the first epoch, which has begun here too
            self.engine.state.epoch, self.engine.state.iteration = state["epoch"], state["iteration"]
            self.count.steps_made = state["steps"]


def snapshot_of(engine: Any, live: LiveModel, position: Position) -> TorchSnapshot:
    """State of this training that outlives a round and does not travel."""
    schedules = monai.attached(engine, LrScheduleHandler)
    parts = {f"schedule {index}": handler.lr_scheduler for index, handler in enumerate(schedules)}
    if getattr(engine, "scaler", None) is not None:
        parts["scaler"] = engine.scaler
    return TorchSnapshot(live, parts, position)


def catch_up(engine: Any) -> None:
    """After a restart: run the handlers that were still to run at that epoch's end, and count the epoch that begins."""
    for handler in monai.attached(engine, LrScheduleHandler):
        if handler.epoch_level:
            handler(engine)
    engine.state.epoch += 1


def refuse(engine: Any, every: Every) -> None:
    """Raise ConfigError, before round 1, for a training that cannot be restarted exactly."""
    refuse_inexact(engine.network, engine.data_loader)
    resumed = f"CheckpointLoader, at iteration {engine.state.iteration}" if engine.state.iteration > 0 else None
    refuse_parts(every, "Ignite", resumed, "load no checkpoint of the trainer")
    for kind, (reason, fix) in _FOREIGN.items():
        if monai.attached(engine, kind):
            raise not_restartable(reason, fix)
    if any(isinstance(h.lr_scheduler, ReduceLROnPlateau) for h in monai.attached(engine, LrScheduleHandler)):
        raise not_restartable(
            "a schedule that follows a metric is not saved yet", "choose one that follows steps or epochs"
        )
    data = getattr(engine.data_loader, "dataset", None)
    if type(data).__name__ == "SmartCacheDataset":
        raise not_restartable("a SmartCacheDataset replaces its items from epoch to epoch", "use a CacheDataset")


def begin_round(engine: Any, seed: int) -> None:
    """Seed the random states of the round, at `EPOCH_STARTED`; its data begin after that."""
    seed_round(seed, engine.data_loader)
    set_rnd(getattr(engine.data_loader, "dataset", None), seed % 2**32)  # random transforms have states of their own
    monai.begin_data_anew(engine)
