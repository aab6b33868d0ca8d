"""A `transformers.Trainer` as `TrainerRun` sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import Progress, advance_schedule, plain_schedule, warn_if_schedule_ends_early
from fl_adapters.torch.restart import RoundData, TorchSnapshot
from fl_adapters.torch.trainer_port import Resumed, TrainerPort
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.wire.names import Names

from . import budget, restart
from . import trainer as hf
from .names import names_of_trainer
from .scores import Score


class TransformersPort(TrainerPort):
    """The Trainer of one training, with its state and control.

    Attributes:
        control: Flags of the hook that runs now, which HF reads when all callbacks have run.
        loss_before: `hf.loss_sum()` when the round, or this phase of it, began.
        evaluated: Step at which a global model was last evaluated; -1 before the first.
        epochs: Epochs of processes before this one (exact restarts).
    """

    def __init__(
        self,
        trainer: Trainer,
        callback: TrainerCallback,
        state: TrainerState,
        control: TrainerControl,
        run: TrainerRun[TransformersPort],
        trained: Mapping[str, Any],
    ) -> None:
        self.trainer, self.control = trainer, control
        self.loss_before = hf.loss_sum()
        self.evaluated = -1
        self.epochs = restart.EpochCount()
        self._round_data: RoundData | None = None
        self._callback, self._state = callback, state
        self._job, self._settings, self._budget = run.joined.job, run.settings, run.budget
        self._model, self._loader, self._scheduler = trainer.model, trained["train_dataloader"], trained["lr_scheduler"]
        self._score = Score()

    @property
    def steps(self) -> int:
        return self._state.global_step

    @property
    def where(self) -> str:
        return f"step {self._state.global_step} of {self._state.max_steps}"

    @property
    def steps_per_epoch(self) -> int | None:
        if self._settings.every.epochs is None:
            return None
        return budget.steps_per_epoch(self.trainer.args, self._loader)

    @property
    def training_data(self) -> Any:
        hf.warn_of_loss_over_tokens(self._model)
        return self._loader

    def stop(self) -> None:
        self.control.should_training_stop = True

    def log(self, row: Mapping[str, float]) -> None:
        hf.log_round(self.trainer, self._state, self.control, row, self._job)

    def validate(self) -> None:
        """Evaluate as `trainer.evaluate()` does; once training has ended, without a trace."""
        if self.control.should_training_stop:
            self.validate_unseen()
        else:
            self.trainer.evaluate()

    def validate_next(self) -> None:
        self.control.should_evaluate = True

    def validate_unseen(self) -> None:
        hf.evaluate_unseen(self.trainer, self._callback)

    def scored(self, metrics: Mapping[str, float], examples: int) -> tuple[dict[str, float], int] | None:
        """Score of the model so far evaluated, and the examples behind it; None until all sets are evaluated."""
        sets = self.trainer.eval_dataset
        score = self._score.add(metrics, examples, list(sets) if isinstance(sets, dict) else [])
        if score is not None:
            self.evaluated = self._state.global_step
        return score

    def resumed(self) -> Resumed | None:
        """The checkpoint of `resume_from_checkpoint`, whose place follows from the trainer's own counts."""
        state = self._state
        if state.global_step == 0:
            return None
        return Resumed(
            job=hf.run_of_checkpoint(state),
            progress=Progress.at(budget.rounds_done(self._budget, state) + 1, state.global_step, self._settings.every),
            within_round=not budget.between_rounds(self._budget, state),
            where=f"checkpoint at step {state.global_step}",
            fix="begin a new run from its weights: load them with from_pretrained, without resume_from_checkpoint",
        )

    def names(self) -> dict[str, Names]:
        return names_of_trainer(self.trainer)

    def advance_schedules(self, epochs: int | None, steps: int | None) -> None:
        advance_schedule(plain_schedule(self._scheduler), (steps or 0) - self.steps)

    def snapshot(self, live: LiveModel) -> TorchSnapshot:
        restart.refuse(self.trainer, self._state, self._settings.every, self._model, self._scheduler, self._loader)
        position = restart.Position(self.trainer, self._state, self._loader, self.epochs, self)
        data = self._round_data = restart.round_data(self.trainer, self._loader, self._settings)
        return restart.snapshot_of(self.trainer, live, self._scheduler, position, data.cost)

    def begin_epoch(self, seed: int, began: int) -> None:
        """Seed the epoch that begins now, in jobs with `exact_restart`.

        Args:
            seed: Seed of the round.
            began: Optimizer step at which the round began.
        """
        if self._round_data is not None:
            per_epoch = budget.steps_per_epoch(self.trainer.args, self._loader)
            number = (self.steps - began) // per_epoch
            skipped = self.epochs.begin()
            self._round_data.begin_epoch(seed, number)
            if self._round_data.within:
                self._loader.skip_batches = skipped

    def begin_step(self, seed: int, began: int) -> None:
        """Seed the optimizer step that begins now; arguments as in `begin_epoch`."""
        if self._round_data is not None:
            self._round_data.begin_step(seed, self.steps - began)

    def epoch_of_run(self, epoch: float) -> float:
        """Number of epochs since the run began, from the number that HF counts in this process."""
        return self.epochs.of_run(epoch, len(self._loader))

    def warn_if_schedule_ends_early(self) -> None:
        """Warn if a schedule that the user made ends before the run does."""
        warn_if_schedule_ends_early(plain_schedule(self._scheduler), self._state.max_steps, "optimizer steps")
