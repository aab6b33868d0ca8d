"""Lightning's `Trainer` as `TrainerRun` sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import Progress
from fl_adapters.torch.restart import TorchSnapshot
from fl_adapters.torch.trainer_port import Resumed, TrainerPort
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.wire.names import Names

from . import budget, restart
from . import trainer as lightning
from .names import names_of_fit


class LightningPort(TrainerPort):
    """The Trainer and the module of one fit.

    Attributes:
        counts_steps: Whether a round may end within an epoch.
        in_batch: Whether the hook that runs now belongs to a batch; else to the end of an epoch, or to no batch.
        at_end: Whether the trainer ends by itself after this batch.
        logged: Copy of `trainer.callback_metrics` from the moment when validation began.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callback: Any,
        run: TrainerRun[LightningPort],
        checkpoint: Mapping[str, Any] | None,
    ) -> None:
        self.counts_steps = run.settings.every.steps is not None or trainer.max_steps != budget.ENDLESS
        self.in_batch = self.at_end = False
        self.logged: Mapping[str, Any] = {}
        self._trainer, self._module, self._callback = trainer, module, callback
        self._run, self._checkpoint = run, checkpoint
        self._restore_intervals: Callable[[], None] | None = None

    @property
    def steps(self) -> int:
        return int(self._trainer.global_step)

    @property
    def where(self) -> str:
        return f"step {self._trainer.global_step} (epoch {self._trainer.current_epoch})"

    @property
    def steps_per_epoch(self) -> int | None:
        return budget.steps_per_epoch(self._trainer)

    @property
    def training_data(self) -> Any:
        loaders = lightning.training_loaders(self._trainer)
        return loaders[0] if len(loaders) == 1 else loaders

    def stop(self) -> None:
        if not (self.in_batch and self.at_end):
            lightning.stop(self._trainer)

    def log(self, row: Mapping[str, float]) -> None:
        lightning.log_row(self._trainer, self._module, row, in_batch=self.in_batch)

    def validate(self) -> None:
        lightning.validate_now(self._trainer)

    def validate_next(self) -> None:
        """Within a batch Lightning's own loop validates right after it; at an epoch's end that would be too late."""
        if self.in_batch:
            self._restore_intervals = lightning.validate_next(self._trainer)
        else:
            lightning.validate_now(self._trainer)

    def validate_unseen(self) -> None:
        with lightning.unseen(self._trainer, self._callback):
            lightning.validate_now(self._trainer)

    def validation_started(self) -> None:
        """Remember what training has logged, and give the trainer its own validation intervals back."""
        self.logged = dict(self._trainer.callback_metrics)
        if self._restore_intervals is not None:
            self._restore_intervals()
            self._restore_intervals = None

    def resumed(self) -> Resumed | None:
        """The checkpoint of `ckpt_path`, whose place the callback saved in it."""
        if self._trainer.global_step == 0:
            return None
        state = self._checkpoint or {"job": None, "progress": {}}
        progress = Progress(**state["progress"])
        progress.steps = self._trainer.global_step
        return Resumed(
            job=state["job"],
            progress=progress,
            within_round=not progress.at_beginning,
            where=f"ckpt_path, at step {self._trainer.global_step}",
            fix="begin a new run from its weights: MyModule.load_from_checkpoint(path), then fit without ckpt_path",
        )

    def names(self) -> dict[str, Names]:
        return names_of_fit(self._trainer, self._module)

    def advance_schedules(self, epochs: int | None, steps: int | None) -> None:
        done = self._trainer.current_epoch, self._trainer.global_step
        budget.advance_schedules(self._trainer, (epochs or 0) - done[0], (steps or 0) - done[1])

    def snapshot(self, live: LiveModel) -> TorchSnapshot:
        return restart.snapshot_of(self._trainer, self._module, self._callback, live, self._run)
