"""Exact restarts of a MONAI trainer: where its engine stands, and the data and transforms of a round begun anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ignite.handlers import EarlyStopping, EMAHandler
from ignite.handlers.param_scheduler import BaseParamScheduler
from monai.data.utils import set_rnd
from monai.handlers import LrScheduleHandler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fl_adapters.participant.options import Every
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import refuse_inexact, refuse_parts, refused, seed_round
from fl_adapters.torch.snapshot import TorchSnapshot

from . import engine as facts

_FOREIGN: dict[type, tuple[str, str]] = {
    LRScheduler: ("a schedule in a handler of your own is out of reach", "step it by monai.handlers.LrScheduleHandler"),
    BaseParamScheduler: ("Ignite's schedules are not kept yet", "use monai.handlers.LrScheduleHandler"),
    EMAHandler: ("the average of an EMAHandler is not kept yet", "leave it out"),
    EarlyStopping: ("the patience of an EarlyStopHandler is not kept", "leave it out, and set patience in the job"),
}


@dataclass
class Position:
    """Where a trainer stands between two epochs, as a `Snapshot`. steps: of the optimizer, so far. came_back: something
    was loaded."""

    engine: Any
    steps: int = 0
    came_back: bool = False

    def save(self) -> State:
        state = self.engine.state
        started = 0 if state.iteration else state.epoch  # the first epoch has begun, and nothing of it is done
        return {"epoch": state.epoch - started, "iteration": state.iteration, "steps": self.steps}

    def load(self, kept: State) -> None:
        if kept["epoch"] > 0:  # else we are in the first epoch already, as the process before was
            self.engine.state.epoch, self.engine.state.iteration = kept["epoch"], kept["iteration"]
            self.steps, self.came_back = kept["steps"], True


def snapshot_of(engine: Any, live: LiveModel, position: Position) -> TorchSnapshot:
    """All that outlives a round of this training and does not travel."""
    schedules = facts.attached(engine, LrScheduleHandler)
    parts = {f"schedule {index}": handler.lr_scheduler for index, handler in enumerate(schedules)}
    if getattr(engine, "scaler", None) is not None:
        parts["scaler"] = engine.scaler
    return TorchSnapshot(live, parts, position)


def catch_up(engine: Any) -> None:
    """After a `load` with something to load: what other handlers had not done at that epoch's end, and the epoch that
    Ignite has begun."""
    for handler in facts.attached(engine, LrScheduleHandler):
        if handler.epoch_level:
            handler(engine)
    engine.state.epoch += 1


def refuse(engine: Any, every: Every) -> None:
    """Raise ConfigError, before round 1, for what cannot be restarted exactly, with the reason."""
    refuse_inexact(engine.network, engine.data_loader)
    resumed = f"CheckpointLoader, at iteration {engine.state.iteration}" if engine.state.iteration > 0 else None
    refuse_parts(every, "Ignite", resumed, "load no checkpoint of the trainer")
    for kind, (reason, fix) in _FOREIGN.items():
        if facts.attached(engine, kind):
            raise refused(reason, fix)
    if any(isinstance(h.lr_scheduler, ReduceLROnPlateau) for h in facts.attached(engine, LrScheduleHandler)):
        raise refused("a schedule that follows a metric is not kept yet", "choose one that follows steps or epochs")
    data = getattr(engine.data_loader, "dataset", None)
    if type(data).__name__ == "SmartCacheDataset":
        raise refused("a SmartCacheDataset replaces its items from epoch to epoch", "use a CacheDataset")


def begin_round(engine: Any, seed: int) -> None:
    """Seed what the round draws from, at `EPOCH_STARTED`; its data begin after that."""
    seed_round(seed, engine.data_loader)
    set_rnd(getattr(engine.data_loader, "dataset", None), seed % 2**32)  # random transforms have states of their own
    engine._dataloader_iter, engine._init_iter = None, 0  # else Ignite asks that of the epoch before for one batch more
