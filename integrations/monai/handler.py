"""`FederatedHandler`: the events of a MONAI trainer, translated into a federation's session."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from ignite.engine import Events
from monai.handlers import LrScheduleHandler, ValidationHandler

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.site import TorchSite
from fl_runtime.errors import ConfigError

from . import engine as facts
from . import outputs, restart
from .budget import Budget, Progress, advance_schedules, made_a_step, warn_if_schedules_end_early
from .export import Exporter
from .scores import scores_of, unseen

_FRAMEWORK = "monai"


@dataclass
class _Tally:
    """What was seen since the round began."""

    loss: torch.Tensor | float = 0.0
    batches: int = 0
    rows: int = 0

    def add(self, engine: Any, *, count_rows: bool) -> None:
        loss = facts.loss_of(engine)
        if loss is not None:  # a tensor is summed up on its device: read once a round, so that no step waits for it
            self.loss = self.loss + loss
            self.batches += 1
        if count_rows:
            self.rows += facts.rows_in_batch(engine)

    def mean_loss(self) -> dict[str, float]:
        """{"train_loss": mean over the round}; empty where it is not known or not finite."""
        mean = float(self.loss) / self.batches if self.batches else math.nan
        return {"train_loss": mean} if math.isfinite(mean) else {}


@dataclass
class _Run:
    """Where this trainer stands in its run."""

    job: str
    settings: SiteSettings
    budget: Budget
    progress: Progress = field(default_factory=Progress)
    live: LiveModel | None = None  # from the first epoch on
    validation: ValidationHandler | None = None  # what scores the global models
    examples: int | None = None  # of the training set; None: count those of the round
    in_epoch: int = 0  # iterations of this epoch so far
    tally: _Tally = field(default_factory=_Tally)
    awaits_score: bool = False
    over: bool = False  # the final weights have arrived
    seed: int | None = None  # of the round, for exact restarts
    position: restart.Position | None = None  # likewise


class FederatedHandler:
    """Makes a MONAI trainer a site of a federation: `SupervisedTrainer(train_handlers=[..., FederatedHandler()])`.

    In a bundle `{"_target_": "fl_adapters.monai.FederatedHandler"}` among the handlers; or `attach(trainer)` by hand,
    before `trainer.run()`. One `run()` spans all rounds; afterwards the network holds the final global weights. The
    trainer's `max_epochs` is set to rounds x `every` when it starts. Without a startup kit the handler stays out of
    the way. The arguments are those of every adapter; see the README.

    A round of epochs is exchanged when its last epoch is completed, a round of optimizer steps when its last iteration
    is. There the handler runs before all others, wherever it stands in the list: so at the end of a round
    `ValidationHandler` scores the global model, a `CheckpointSaver` of the evaluator keeps exactly the weights that
    had that score, and one of the trainer saves the global weights. With `evaluate_global` every global model is
    validated, also where the interval of the `ValidationHandler` would not have it. Handlers of the iteration (an
    `EMAHandler`) see the weights as training left them; in a round of steps, its last iteration excepted.

    `state_dict()` says where the run stands, for a `CheckpointSaver` that saves the trainer too:
    `save_dict={..., "trainer": trainer, "federation": handler}`, and the same for the `CheckpointLoader`.

    Refused with the reason: trainers of several networks, lazily initialised parameters, the handler given twice.
    Holds no connection, lock or thread; may be pickled and copied.
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
        self._resumed: Mapping[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: live tensors stay behind."""
        return {"options": self.options, "_run": None, "_resumed": self._resumed}

    def attach(self, engine: Any) -> None:
        """Attach to a trainer that is not running. Raises ConfigError where another one is attached already."""
        if any(other is not self for other in facts.attached(engine, FederatedHandler)):
            raise ConfigError("FederatedHandler is given twice", where=type(engine).__name__, fix="give it once")
        facts.put_first(engine, Events.STARTED, self._started)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain values; empty outside a federation."""
        run = self._run
        if run is None or run.live is None:
            return {}
        return {"job": run.job, "progress": asdict(run.progress)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose weights, optimizer and trainer must be loaded too."""
        self._resumed = dict(state_dict)

    def _started(self, engine: Any) -> None:
        """Before all else, `CheckpointLoader` included: the length of the run, and our place before other handlers."""
        self._run = self._join()
        if self._run is None:
            return
        hooks: dict[Events, Callable[..., None]] = {
            Events.EPOCH_STARTED: self._epoch_started,
            Events.ITERATION_COMPLETED: self._iteration_completed,
            Events.EPOCH_COMPLETED: self._epoch_completed,
            Events.TERMINATE: self._terminated,
            Events.COMPLETED: self._completed,
            Events.EXCEPTION_RAISED: self._exception_raised,
        }
        for event, hook in hooks.items():
            facts.put_first(engine, event, hook)
        with self._site.leaving_on_error(self._forget):
            facts.refuse_unsupported(engine)
            self._run.budget.apply(engine)
            kit = current_kit(self.options.kit)
            outputs.move(engine, kit)
            for handler in facts.attached(engine, ValidationHandler):
                if handler.validator is not None:
                    outputs.move(handler.validator, kit)

    def _epoch_started(self, engine: Any) -> None:
        run = self._run
        if run is None:
            return
        run.in_epoch = 0
        if run.live is None:  # all handlers of STARTED have run: what there was to load is loaded
            length = engine.state.epoch_length
            run.in_epoch = engine.state.iteration % length if length else 0
            with self._site.leaving_on_error(self._forget):
                self._begin(run, engine)
                if run.over:
                    engine.terminate()
        if run.seed is not None and not run.progress.epochs and not run.over:
            restart.begin_round(engine, run.seed)

    def _iteration_completed(self, engine: Any) -> None:
        run = self._run
        if run is None or run.over:
            return
        run.in_epoch += 1
        run.tally.add(engine, count_rows=run.examples is None)
        run.progress.steps += made_a_step(engine)
        if run.settings.every.steps is not None and run.progress.complete(run.settings.every):
            with self._site.leaving_on_error(self._forget):
                last = run.budget.rounds is None and facts.at_last_iteration(engine)
                self._exchange(run, engine, in_iteration=True, more=not last)

    def _epoch_completed(self, engine: Any) -> None:
        run = self._run
        if run is None or run.over:
            return
        run.progress.epochs += 1
        last = run.budget.rounds is None and facts.has_ended(engine) and run.progress.steps > run.progress.began
        if run.progress.complete(run.settings.every) or last:
            with self._site.leaving_on_error(self._forget):
                self._exchange(run, engine, in_iteration=False, more=not last)
        if not run.over and run.budget.rounds is not None and facts.has_ended(engine):
            engine.state.max_epochs += 1  # epochs that were cut short: the rounds decide

    def _validated(self, evaluator: Any) -> None:
        run = self._run
        if run is None or not run.awaits_score:
            return
        run.awaits_score = False
        with self._site.leaving_on_error(self._forget):
            self._site.report(scores_of(evaluator), facts.validation_examples(evaluator))

    def _terminated(self, engine: Any) -> None:
        run = self._run
        if run is not None and not run.over:
            self._forget()
            where = f"at iteration {engine.state.iteration}, in round {run.progress.round}"
            self._site.leave(f"the trainer stopped {where}")

    def _completed(self, engine: Any) -> None:
        run = self._run
        if run is None:
            return
        with self._site.leaving_on_error(self._forget):
            if run.live is None:  # there was nothing to train: resumed from a checkpoint at the end of its budget
                self._begin(run, engine)
            if not run.over:
                raise ConfigError(
                    f"the trainer has ended, but the federation is in round {run.progress.round}",
                    where=f"MONAI trainer, epoch {engine.state.epoch} of {engine.state.max_epochs}",
                    fix="resume from an earlier checkpoint, or without one",
                )
            if run.awaits_score and run.validation is not None:
                run.validation(engine)
            if run.validation is not None and run.live is not None:
                self._site.cross_evaluate(run.live, lambda: self._evaluate(run, engine))
            self._finish(run, engine)

    def _exception_raised(self, engine: Any, error: Exception) -> None:
        run = self._forget()
        if run is not None and not isinstance(error, KeyboardInterrupt):  # an interrupted cell may be run again
            self._site.leave(f"{type(error).__name__}: {error}")
        if len(engine._event_handlers[Events.EXCEPTION_RAISED]) == 1:  # Ignite leaves raising it to the handlers
            raise error

    def _join(self) -> _Run | None:
        """Join the federation; None outside of one."""
        joined = self._site.join()
        if joined is None:
            return None
        settings = joined.settings
        return _Run(joined.job, settings, Budget(settings.every, settings.rounds, settings.phases))

    def _begin(self, run: _Run, engine: Any) -> None:
        """The handshake and the first task, wherever the trainer and the run stand after a restart."""
        facts.refuse_lazy_parameters(engine.network)
        run.validation = facts.validator_of(engine, run.settings)
        if run.validation is not None and not run.validation.validator.has_event_handler(self._validated):
            run.validation.validator.add_event_handler(Events.COMPLETED, self._validated)
        run.examples = self.options.num_examples or facts.training_examples(engine)
        live = run.live = LiveModel(engine.network, [engine.optimizer], run.settings)
        live.gradients.follow([engine.optimizer])
        rounds = run.budget.rounds or run.budget.trainer_rounds(engine)
        warn_if_schedules_end_early(engine, facts.attached(engine, LrScheduleHandler))
        resumed = None
        if run.settings.exact_restart:
            restart.refuse(engine, run.settings.every)
            run.position = restart.Position(engine)
        else:
            resumed = self._resumed_progress(run, engine)
        snapshot = run.position and restart.snapshot_of(engine, live, run.position)
        first = self._site.start(live, rounds=rounds, evaluates=run.validation is not None, snapshot=snapshot)
        number, run.seed = first.round, first.seed
        if first.kind == "final":
            live.load(first.arrays)
            run.progress, run.over, run.awaits_score = Progress(number), True, run.validation is not None
            return
        if resumed is not None and resumed.round > number:
            raise ConfigError(
                f"the checkpoint is of round {resumed.round}, but the federation is in round {number}",
                where=f"iteration {engine.state.iteration}",
                fix="resume from an earlier checkpoint, or without one",
            )
        if run.position is not None and run.position.came_back:
            run.progress = Progress(number, run.position.steps, run.position.steps)
        elif resumed is not None and resumed.round == number:
            run.progress = resumed
        else:
            self._catch_up(run, engine, resumed or Progress(), number)
        if run.progress.at_beginning:
            live.receive(first.task)
        else:  # we are in the middle of the round, with the weights of that moment
            live.resume(first.task)
        if run.position is not None and run.position.came_back:
            if run.validation is not None:  # as the process before would have, had it not died
                run.awaits_score = True
                run.validation(engine)
            restart.catch_up(engine)

    def _resumed_progress(self, run: _Run, engine: Any) -> Progress | None:
        """Where the checkpoint that the trainer resumes from stands; None without one. ConfigError where it does not
        lead into the run as it is."""
        if engine.state.iteration == 0:
            return None
        resumed, self._resumed = self._resumed, {}
        job = resumed.get("job")
        if job != run.job:
            raise ConfigError(
                f"the trainer has made {engine.state.iteration} iterations "
                + (f"of the run {job!r}, and this is {run.job!r}" if job else "and nothing says of which run"),
                where="MONAI trainer",
                fix="make a new trainer for each run, with weights of an earlier one if you like; to resume a run, "
                "save and load the handler together with the trainer: {'trainer': trainer, 'federation': handler, ...}",
            )
        return Progress(**resumed["progress"])

    def _catch_up(self, run: _Run, engine: Any, progress: Progress, number: int) -> None:
        """Go on with round `number`, in the first round or when the others have come further than this site."""
        run.progress = progress.next(number)
        if number > 1:
            warnings.warn(
                f"this site comes back behind round {number}, at iteration {engine.state.iteration}: it goes on with "
                "the round, and with the learning rate of the round",
                stacklevel=2,
            )
            epochs, iterations = run.budget.before(number, engine)
            schedules = facts.attached(engine, LrScheduleHandler)
            done = engine.state.epoch - 1 if engine.state.epoch else 0  # the one that begins now is not done
            advance_schedules(schedules, (epochs or 0) - done, (iterations or 0) - engine.state.iteration)

    def _exchange(self, run: _Run, engine: Any, *, in_iteration: bool, more: bool) -> None:
        """The end of a round: this site's weights out, the new global ones in, on every rank; or of its first phase,
        after which it goes on. more: whether the trainer does."""
        live = run.live
        assert live is not None
        if run.position is not None:
            run.position.steps = run.progress.steps
        result = LocalResult(
            num_examples=run.examples or max(run.tally.rows * facts.ranks(), 1),
            local_steps=run.progress.steps - run.progress.began,
            metrics=run.tally.mean_loss(),
        )
        came = self._site.exchange(live, result, more=more)
        if came is None:
            run.progress, run.tally = run.progress.next(run.progress.round), _Tally()
            return
        number, run.seed = came.round, came.seed
        epoch_ends = not in_iteration or run.in_epoch == engine.state.epoch_length
        if came.kind == "final":
            live.load(came.arrays)
            run.over, number = True, number + 1  # the task after the last round bears its number still
            facts.stop(engine, epoch_ends=epoch_ends)
        else:
            live.receive(came.task)
        run.progress, run.tally = run.progress.next(number), _Tally()
        engine.state.metrics.update(came.row)
        if run.validation is not None:
            run.awaits_score = True
            if not facts.validates_now(engine, run.validation, in_iteration=in_iteration, epoch_ends=epoch_ends):
                run.validation(engine)  # its end finds its way to _validated

    def _evaluate(self, run: _Run, engine: Any) -> None:
        """Score the network as it is by the bundle's own evaluator, which ends in `_validated`."""
        assert run.validation is not None
        run.awaits_score = True
        with unseen(run.validation.validator):
            run.validation(engine)

    def _finish(self, run: _Run, engine: Any) -> None:
        assert run.live is not None
        exporter = Exporter(engine.network, run.live.state)
        self._site.finish(run.live, exporter.export, exporter.load if run.validation is not None else None)
        self._run = None

    @property
    def _site(self) -> TorchSite:
        return TorchSite(self.options, _FRAMEWORK)

    def _forget(self) -> _Run | None:
        run, self._run = self._run, None
        if run is not None and run.live is not None:
            run.live.local.close()
        return run
