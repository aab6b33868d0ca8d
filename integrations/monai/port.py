"""A MONAI trainer as `TrainerRun` sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai.handlers import LrScheduleHandler, ValidationHandler

from fl_adapters.torch.handshake.names import names_of_data
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import Progress
from fl_adapters.torch.restart import TorchSnapshot
from fl_adapters.torch.trainer_port import Resumed, TrainerPort
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.wire.names import Names

from . import budget, restart
from . import trainer as monai
from .scores import unseen


class MonaiPort(TrainerPort):
    """The engine of one training, and the handler that validates its network.

    Attributes:
        validation: Handler that scores the global models, or None.
        steps_made: Optimizer steps so far, which Ignite does not count.
        in_epoch: Iterations of this epoch so far.
        in_iteration: Whether handlers of the iteration are still to run.
        epoch_ends: Whether the epoch ends with this iteration, or has ended.
    """

    def __init__(
        self,
        engine: Any,
        validation: ValidationHandler | None,
        run: TrainerRun[MonaiPort],
        checkpoint: Mapping[str, Any],
    ) -> None:
        self.validation = validation
        self.steps_made = 0
        self.in_iteration = self.epoch_ends = False
        length = engine.state.epoch_length
        self.in_epoch = engine.state.iteration % length if length else 0
        self._engine, self._every, self._checkpoint = engine, run.settings.every, checkpoint

    @property
    def steps(self) -> int:
        return self.steps_made

    @property
    def steps_per_epoch(self) -> int | None:
        return budget.steps_per_epoch(self._engine)

    @property
    def where(self) -> str:
        return f"iteration {self._engine.state.iteration}"

    def stop(self) -> None:
        monai.stop(self._engine, epoch_ends=self.epoch_ends)

    def log(self, row: Mapping[str, float]) -> None:
        self._engine.state.metrics.update(row)

    def validate(self) -> None:
        assert self.validation is not None
        self.validation(self._engine)  # its end reaches the handler's `_validated`

    def validate_next(self) -> None:
        """Leave it to the handler if its own interval has it validate these weights anyway."""
        assert self.validation is not None
        place = {"in_iteration": self.in_iteration, "epoch_ends": self.epoch_ends}
        if not monai.validates_now(self._engine, self.validation, **place):
            self.validation(self._engine)

    def validate_unseen(self) -> None:
        assert self.validation is not None
        with unseen(self.validation.validator):
            self.validation(self._engine)

    def resumed(self) -> Resumed | None:
        """The checkpoint that a `CheckpointLoader` loaded, whose place is in the state of the handler."""
        iteration = self._engine.state.iteration
        if iteration == 0:
            return None
        progress = Progress(**self._checkpoint.get("progress", {}))
        self.steps_made = progress.steps
        return Resumed(
            job=self._checkpoint.get("job"),
            progress=progress,
            within_round=not progress.at_beginning,
            where=f"MONAI trainer, iteration {iteration}",
            fix="make a new trainer for each run, with weights of an earlier one if you like; to resume a run, "
            "save and load the handler together with the trainer: {'trainer': trainer, 'federation': handler, ...}",
        )

    def names(self) -> dict[str, Names]:
        return names_of_data(getattr(self._engine.data_loader, "dataset", None))

    def advance_schedules(self, epochs: int | None, steps: int | None) -> None:
        handlers = monai.attached(self._engine, LrScheduleHandler)
        budget.advance_schedules(self._engine, handlers, epochs or 0, steps)

    def snapshot(self, live: LiveModel) -> TorchSnapshot:
        restart.refuse(self._engine, self._every)
        return restart.snapshot_of(self._engine, live, restart.Position(self._engine, self))
