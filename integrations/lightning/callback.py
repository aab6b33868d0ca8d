"""`FederatedCallback`: the hooks of Lightning's `Trainer`, translated into a federation's session."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.torch.batches import rows_of
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.site import Arrived, TorchSite
from fl_runtime.errors import ConfigError

from . import outputs, restart
from . import trainer as lightning
from .budget import ENDLESS, Budget, Progress, advance_schedules, at_end, steps_per_epoch, warn_if_schedules_end_early
from .export import Exporter
from .framework import callback_classes

_FRAMEWORK = "lightning"
_FITTING = "fit"


@dataclass
class _Tally:
    """What was seen since the round began."""

    loss: torch.Tensor | None = None
    batches: int = 0
    rows: int = 0

    def add(self, outputs: Any, batch: Any, *, count_rows: bool) -> None:
        loss = lightning.loss_of(outputs)
        if loss is not None:  # summed up on the device: read once a round, so that no step waits for it
            self.loss = loss.float() if self.loss is None else self.loss + loss
            self.batches += 1
        if count_rows:
            self.rows += rows_of(batch)

    def mean_loss(self, factor: int) -> dict[str, float]:
        """{"train_loss": mean over the round}; empty where it is not known or not finite."""
        mean = float(self.loss) * factor / self.batches if self.loss is not None else math.nan
        return {"train_loss": mean} if math.isfinite(mean) else {}


@dataclass
class _Run:
    """Where this trainer stands in its run."""

    job: str
    settings: SiteSettings
    budget: Budget
    progress: Progress = field(default_factory=Progress)
    live: LiveModel | None = None  # from on_train_start on
    evaluates: bool = False
    counts_steps: bool = True  # whether a round may end within an epoch
    examples: int | None = None  # of the training set; None: count those of the round
    tally: _Tally = field(default_factory=_Tally)
    awaits_score: bool = False
    logged: Mapping[str, Any] = field(default_factory=dict)  # callback_metrics when validation began
    restore_intervals: Callable[[], None] | None = None
    over: bool = False  # the final weights have arrived
    seed: int | None = None  # of the round, for exact restarts


class FederatedCallback(*callback_classes()):  # type: ignore[misc]
    """Makes a Lightning `Trainer` a site of a federation: `Trainer(callbacks=[FederatedCallback()])`.

    For `lightning.pytorch` and for `pytorch_lightning`. One `trainer.fit()` spans all rounds; afterwards the module
    holds the final global weights. The trainer's length is set to rounds x `every` before the module makes its
    optimizers, so that `trainer.estimated_stepping_batches` covers the whole run. Without a startup kit it stays out
    of the way. The arguments are those of every adapter; see the README. Steps are counted as `trainer.global_step`
    counts them: every `step()` of every optimizer.

    A round is exchanged in `on_train_batch_end`: before validation, before any checkpoint of that step, and before
    `on_train_epoch_end`. So what `ModelCheckpoint` and `EarlyStopping` monitor at the end of a round is the score of
    the global model, and the file that goes with it holds exactly those weights. With `evaluate_global`, Lightning
    validates after every exchange, also where the trainer's own interval would not have it.

    Refused with the reason: FSDP, DeepSpeed and other split models, weight averaging callbacks, lazily initialised
    parameters, a Trainer that was used before. Holds no connection, lock or thread; may be pickled and copied.
    """

    def __init__(
        self,
        *,
        kit: str | None = None,
        every: str | int | None = None,
        exchange: str | Sequence[str] | None = None,
        keep_local: Sequence[str] = (),
        optimizer_state: str | None = None,
        evaluate_global: bool | None = None,
        num_examples: int | None = None,
        required: bool = False,
    ) -> None:
        self.options = Options(
            kit=kit,
            every=every,
            exchange=exchange,
            keep_local=keep_local,
            optimizer_state=optimizer_state,
            evaluate_global=evaluate_global,
            num_examples=num_examples,
            required=required,
        )
        self._run: _Run | None = None
        self._resumed: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: live tensors, and the module's methods that Lightning hangs on here, stay behind."""
        return {"options": self.options, "_run": None, "_resumed": self._resumed}

    @property
    def log(self) -> Any:
        """Not used: rounds are logged through the module."""
        return None

    @log.setter
    def log(self, log: Any) -> None:
        # Lightning gives each callback the module's `log` before it opens its loggers: the one moment to move them
        with suppress(ConfigError):  # said again in setup, once the other sites can be told
            outputs.move(log.__self__.trainer, current_kit(self.options.kit))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != _FITTING:
            return
        self._resumed = None
        self._run = self._join()
        if self._run is not None:
            with self._site.leaving_on_error(self._forget):
                lightning.refuse_unsupported(trainer, FederatedCallback)
                outputs.move(trainer, current_kit(self.options.kit))
                self._run.budget.apply(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._run is not None:
            with self._site.leaving_on_error(self._forget):
                self._begin(self._run, trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        run = self._run
        if run is not None and run.seed is not None and not run.progress.epochs:
            restart.begin_round(trainer, run.seed)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are complete and unscaled; Lightning clips them after this."""
        run = self._run
        if run is not None and run.live is not None:
            with self._site.leaving_on_error(self._forget):
                scale, may_skip = lightning.loss_scaling(trainer, optimizer)
                run.live.gradients.add(optimizer, scale=scale, may_skip=may_skip)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        run = self._run
        if run is None or run.over:
            return
        run.tally.add(outputs, batch, count_rows=run.examples is None)
        last = lightning.is_last_batch(trainer, batch_idx)
        run.progress.batch_ended(last_of_epoch=last)
        if not (last or run.counts_steps):
            return
        if run.progress.complete(run.settings.every, trainer.global_step) or at_end(trainer, last_of_epoch=last):
            with self._site.leaving_on_error(self._forget):
                more = not at_end(trainer, last_of_epoch=last)
                if self._exchange(run, trainer, pl_module, in_batch=True, more=more) and run.evaluates:
                    run.awaits_score, run.restore_intervals = True, lightning.validate_next(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        run = self._run
        if run is None or not run.awaits_score:
            return
        run.logged = dict(trainer.callback_metrics)
        if run.restore_intervals is not None:
            run.restore_intervals()
            run.restore_intervals = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        run = self._run
        if run is None or not run.awaits_score or trainer.sanity_checking:
            return
        run.awaits_score = False
        with self._site.leaving_on_error(self._forget):
            self._site.report(*lightning.validation_score(trainer, run.logged))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Only for an epoch that the module cut short (on_train_batch_start returned -1): no batch was its last."""
        run = self._run
        if run is None or run.over or not run.progress.in_epoch or run.settings.every.epochs is None:
            return
        run.progress.batch_ended(last_of_epoch=True)
        over = trainer.max_epochs != -1 and trainer.current_epoch >= trainer.max_epochs
        if run.progress.complete(run.settings.every, trainer.global_step) or over:
            with self._site.leaving_on_error(self._forget):
                exchanged = self._exchange(run, trainer, pl_module, in_batch=False, more=not over)
                if exchanged and run.evaluates:
                    run.awaits_score = True
                    lightning.validate_now(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        run = self._run
        if run is None:
            return
        if not run.over:
            self._forget()
            self._site.leave(f"the trainer stopped at step {trainer.global_step}, in round {run.progress.round}")
            return
        with self._site.leaving_on_error(self._forget):
            if run.awaits_score:
                lightning.validate_now(trainer)
            if run.evaluates and run.live is not None:
                self._site.cross_evaluate(run.live, lambda: self._evaluate(run, trainer))
            self._finish(run, trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Where there was nothing to train: resumed from a checkpoint at the end of its budget."""
        run = self._run
        if run is None:
            return
        with self._site.leaving_on_error(self._forget):
            self._begin(run, trainer, pl_module, evaluates=False)
            if not run.over:
                raise ConfigError(
                    f"the trainer had nothing to train, but the federation is in round {run.progress.round}",
                    where=f"step {trainer.global_step} of {trainer.max_steps}, epoch {trainer.current_epoch}",
                    fix="resume from an earlier checkpoint, or without one",
                )
            self._finish(run, trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        run = self._forget()
        if run is not None and not isinstance(exception, KeyboardInterrupt):  # an interrupted cell may be run again
            self._site.leave(f"{type(exception).__name__}: {exception}")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        run = self._run
        if run is not None and run.live is not None and "callbacks" in checkpoint:
            # by hand and not by state_dict(), whose owner Lightning refuses, in words of its own, to be given twice
            checkpoint["callbacks"][self.state_key] = {"job": run.job, "progress": asdict(run.progress)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def _join(self) -> _Run | None:
        """Join the federation; None outside of one."""
        joined = self._site.join()
        if joined is None:
            return None
        settings = joined.settings
        return _Run(joined.job, settings, Budget(settings.every, settings.rounds, settings.phases))

    def _begin(self, run: _Run, trainer: Any, module: Any, *, evaluates: bool | None = None) -> None:
        """The handshake and the first task, wherever the trainer and the run stand after a restart."""
        lightning.refuse_lazy_parameters(module)
        run.evaluates = lightning.evaluates(trainer, run.settings) if evaluates is None else evaluates
        run.counts_steps = run.settings.every.steps is not None or trainer.max_steps != ENDLESS
        run.examples = self.options.num_examples or lightning.training_examples(trainer)
        live = run.live = LiveModel(module, trainer.optimizers, run.settings)
        rounds = run.budget.rounds or run.budget.trainer_rounds(trainer)
        warn_if_schedules_end_early(trainer)
        first, came_back = self._start(run, live, trainer, module, rounds)
        number, run.seed = first.round, first.seed
        if first.kind == "final":
            live.load(first.arrays)
            run.progress = Progress(number, trainer.global_step)
            run.over, run.awaits_score = True, run.evaluates
            lightning.stop(trainer)
            return
        resumed = None if came_back else self._resumed_progress(run, trainer, number)
        if came_back:
            run.progress = Progress.at(number, trainer.global_step, run.settings.every)
        elif resumed is not None and resumed.round == number:
            run.progress = resumed
        else:
            self._catch_up(run, trainer, number)
        if run.progress.at_beginning(trainer.global_step):
            live.receive(first.task)
        else:  # we are in the middle of the round, with the weights of that moment
            live.resume(first.task)
        if came_back and run.evaluates:  # as the process before would have, had it not died
            run.awaits_score = True
            lightning.validate_now(trainer)

    def _start(self, run: _Run, live: LiveModel, trainer: Any, module: Any, rounds: int) -> tuple[Arrived, bool]:
        """(the first task, whether the trainer is now where a process before this one left it)."""
        if not run.settings.exact_restart:
            return self._site.start(live, rounds=rounds, evaluates=run.evaluates), False
        restart.refuse(trainer, module, run.settings.every)
        position = restart.Position(trainer, self)
        snapshot = restart.snapshot_of(trainer, live, position)
        return self._site.start(live, rounds=rounds, evaluates=run.evaluates, snapshot=snapshot), position.came_back

    def _resumed_progress(self, run: _Run, trainer: Any, number: int) -> Progress | None:
        """Where the checkpoint that the trainer resumes from stands; None without one. ConfigError where it does not
        lead into the run as it is."""
        if trainer.global_step == 0:
            return None
        state, where = self._resumed, f"ckpt_path, at step {trainer.global_step}"
        job = state["job"] if state else None
        if state is None or job != run.job:
            raise ConfigError(
                f"the checkpoint is {f'of the run {job!r}' if job else 'of no federated run'}, and this is {run.job!r}",
                where=where,
                fix="begin a new run from its weights: MyModule.load_from_checkpoint(path), then fit without ckpt_path",
            )
        progress = Progress(**state["progress"])
        if progress.round > number:
            raise ConfigError(
                f"the checkpoint is of round {progress.round}, but the federation is in round {number}",
                where=where,
                fix="resume from an earlier checkpoint, or without one",
            )
        return progress

    def _catch_up(self, run: _Run, trainer: Any, number: int) -> None:
        """Go on with round `number`, in the first round or when the others have come further than this site."""
        run.progress = Progress.at(number, trainer.global_step, run.settings.every)
        epochs, steps = run.budget.before(number, steps_per_epoch(trainer))
        if number > 1:
            warnings.warn(
                f"this site comes back behind round {number}, at step {trainer.global_step}: it goes on with the round,"
                " and with the learning rate of the round",
                stacklevel=2,
            )
            advance_schedules(trainer, (epochs or 0) - trainer.current_epoch, (steps or 0) - trainer.global_step)

    def _exchange(self, run: _Run, trainer: Any, module: Any, *, in_batch: bool, more: bool) -> bool:
        """The end of a round: this site's weights out, the new global ones in, on every rank. False at the end of its
        first phase, after which it goes on. more: whether the trainer does."""
        live, every = run.live, run.settings.every
        assert live is not None
        result = LocalResult(
            num_examples=run.examples or max(run.tally.rows * trainer.world_size, 1),
            local_steps=trainer.global_step - run.progress.began,
            # Lightning divides the loss that it tells by the batches that it accumulates
            metrics=run.tally.mean_loss(trainer.accumulate_grad_batches if module.automatic_optimization else 1),
        )
        came = self._site.exchange(live, result, more=more)
        if came is None:
            run.progress = run.progress.next(run.progress.round, trainer.global_step, every)
            run.tally = _Tally()
            return False
        number, run.seed = came.round, came.seed
        if came.kind == "final":
            live.load(came.arrays)
            run.over, number = True, number + 1  # the task after the last round bears its number still
        else:
            live.receive(came.task)
        run.progress = run.progress.next(number, trainer.global_step, every)
        run.tally = _Tally()
        lightning.log_row(trainer, module, came.row, in_batch=in_batch)
        if run.over and not (in_batch and at_end(trainer, last_of_epoch=not run.progress.in_epoch)):
            lightning.stop(trainer)
        return True

    def _evaluate(self, run: _Run, trainer: Any) -> None:
        """Score the module as it is by Lightning's own validation, which ends in `on_validation_end`."""
        run.awaits_score = True
        with lightning.unseen(trainer, self):
            lightning.validate_now(trainer)

    def _finish(self, run: _Run, trainer: Any, module: Any) -> None:
        assert run.live is not None
        exporter = Exporter(trainer, module, run.live.state)
        self._site.finish(run.live, exporter.export, exporter.load if run.evaluates else None)
        self._run = None

    @property
    def _site(self) -> TorchSite:
        return TorchSite(self.options, _FRAMEWORK)

    def _forget(self) -> _Run | None:
        run, self._run = self._run, None
        return run
