"""One `fit` as a participant in a federation, from joining to leaving."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.outputs import PERSONAL
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.registry import leaving_on_error, open_session, running_session
from fl_adapters.participant.session import Session
from fl_runtime.client.meter import RoundStats
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Task
from fl_runtime.wire.names import Names, names_of

from . import neighbours, restart, scores
from .export import export
from .live import LiveModel
from .progress import Progress, RoundBudget
from .trainer import FitCall, counts_examples, ensure_built, raw_model, restored_epoch, set_restored_epoch

FRAMEWORK = "keras"


class FitRun:
    """One call of `fit` as a participant. The callback's hooks call it in this order:

    1. `join`, before any other callback has opened a file.
    2. `prepare_exact_restart`, in `on_train_begin`; it acts for jobs with `exact_restart` only.
    3. In each epoch `begin_epoch`, `begin_batch` for each batch, `end_training` when the epoch's last step is done,
       before fit validates and before other callbacks see the epoch's end, `report` when fit has validated, and
       `end_epoch`. Exchanges happen within `begin_batch` and `end_training`.
    4. `end`, in `on_train_end`.

    Every method may block for as long as other sites train. An error in one of them ends this site's part in the run.
    The session belongs to the process: a FitRun holds live variables, but no connection.

    Attributes:
        fit: The call of `fit`.
        active: Whether this site takes part. False after `end` and after an error.
        awaits_score: Whether the global model in place still has to be scored here.
    """

    def __init__(self, callback: keras.callbacks.Callback, options: Options, fit: FitCall) -> None:
        self.fit, self.active, self.awaits_score = fit, True, False
        self._callback, self._options, self._model = callback, options, raw_model(callback)
        self._live: LiveModel | None = None
        self._progress: Progress | None = None
        self._meter = scores.RoundMeter()
        self._evaluates = False
        self._stopping = False  # whether this run, not the user's code, ends the fit
        self._seed: int | None = None
        self._version = 0  # of the global model that arrived last
        self._row: dict[str, float] = {}
        self._epoch_of_version: dict[int, int] = {}  # version -> epoch at whose end that global model was in place

    @classmethod
    def join(cls, callback: keras.callbacks.Callback, options: Options, fit: FitCall) -> FitRun | None:
        """Join the federation, put `callback` before the others, and move their output to this site's folder.

        Args:
            callback: The callback whose hooks call the run.
            options: The script's arguments.
            fit: The call of `fit`.

        Returns:
            The run, or None outside a federation.
        """
        neighbours.refuse_twice(callback, fit.callbacks)
        session = open_session(options, framework=FRAMEWORK, fresh=True)
        if session is None:
            return None
        run = cls(callback, options, fit)
        with run._leaving_on_error():
            neighbours.move_outputs(fit.callbacks, session.output_dir)
            neighbours.put_around(callback, fit.callbacks)
        return run

    def prepare_exact_restart(self) -> None:
        """Begin now in jobs with exact restarts, while the epoch with which fit begins can still be set."""
        with self._leaving_on_error():
            settings = self._session.settings
            if not settings.exact_restart:
                return
            restart.refuse(self.fit, settings.every)
            progress = self._begin(self.fit.first)
            model = self._updated_model
            if restored_epoch(model) and self._evaluates:  # the previous process died before it scored this model
                self._evaluate()
            if progress.over:
                set_restored_epoch(model, self.fit.epochs)  # no further step

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch; before the first one, make the handshake and take the first task."""
        with self._leaving_on_error():
            progress = self._begin(epoch) if self._progress is None else self._progress
            self._current_live.corrections.show()
            progress.begin_epoch(epoch)
            self._row = dict.fromkeys(RoundStats().log_row(), 0.0)
            self._meter.begin_epoch()
            if self._seed is not None and not progress.epochs:
                restart.begin_round(self.fit, self._seed)

    def begin_batch(self, batch: int) -> None:
        """Exchange if a round ends before this batch, and stop fit after the last step of the run."""
        progress = self._progress
        assert progress is not None
        progress.batch = batch
        if batch >= progress.due:
            with self._leaving_on_error():
                self._exchange(progress.before + batch)
                if self.awaits_score:
                    self._evaluate()
        if batch >= progress.stops:
            self._stop_fit()

    def end_training(self) -> None:
        """Exchange if this epoch's last step ends a round. A second call in the epoch does nothing."""
        progress = self._progress
        if progress is None or not progress.epoch_open:
            return
        with self._leaving_on_error():
            self._meter.close_epoch(self._updated_model)
            progress.end_epoch()
            if progress.over:
                self._current_live.restore_final()
            elif progress.phase_complete and (self._stopping or not self._model.stop_training):
                self._exchange(progress.before)  # not if the user stopped fit: the round is incomplete

    def report(self, logs: Any) -> None:
        """Report fit's own validation, if the global model awaits a score."""
        if self.awaits_score:
            with self._leaving_on_error():
                self._report(scores.numbers(logs), scores.examples_scored(self._updated_model))

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """End an epoch, once fit has validated.

        Returns:
            The row for the logs: number of the global model in place, bytes and seconds of this epoch's exchanges.
        """
        progress = self._progress
        assert progress is not None
        with self._leaving_on_error():
            self._current_live.corrections.hide()  # before other callbacks save the model
            if self.awaits_score:
                self._evaluate()
        self._epoch_of_version.setdefault(self._version, epoch)
        if progress.over:
            self._model.stop_training = True
        return {**self._row, "federation_round": float(self._version)}

    def end(self) -> None:
        """Finish the run with the final weights in place, or leave it if fit stopped early.

        Raises:
            ConfigError: If fit had too few epochs.
        """
        with self._leaving_on_error():
            progress = self._begin(self.fit.epochs) if self._progress is None else self._progress  # no epoch was left
            if progress.over:
                self._finish()
            elif self._model.stop_training:
                self._session.leave(LeaveReason.own(f"fit stopped in round {progress.round} of {progress.rounds}"))
            else:
                raise ConfigError(
                    f"fit ended in round {progress.round} of {progress.rounds}, which is not complete",
                    where=f"fit(epochs={self.fit.epochs})",
                    fix=f"pass more epochs than {self.fit.epochs} to fit: it stops after the last round",
                )
        self.close()

    def close(self) -> None:
        """Give model and optimizer back to the user. The session stays as it is."""
        self.active = False
        if self._live is not None:
            self._live.local.close()
        if self._seed is not None:
            set_restored_epoch(self._model, None)  # the next fit is the user's own
        self._live = self._progress = None
        self.awaits_score = False

    @property
    def _session(self) -> Session:
        return running_session(self._options, framework=FRAMEWORK)

    @property
    def _updated_model(self) -> Any:
        """The model with up-to-date variables. Under JAX, reading `callback.model` updates them."""
        return self._callback.model

    @property
    def _current_live(self) -> LiveModel:
        assert self._live is not None
        return self._live

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        with leaving_on_error(self._fail):
            yield

    def _fail(self, reason: BaseException) -> None:
        if self.active:
            self.close()
            self._session.leave(reason)

    def _begin(self, epoch: int) -> Progress:
        """Make the handshake and take the first task. `epoch` is the one that fit begins next."""
        session, model, fit = self._session, self._updated_model, self.fit
        settings = session.settings
        self._evaluates = self._scores_global_models(settings)
        neighbours.refuse_unsupported(fit.callbacks, settings, evaluates=self._evaluates)
        ensure_built(model, fit)
        if not (self._options.num_examples or fit.num_examples or counts_examples(model)):
            raise _uncounted()
        budget = RoundBudget.of(model, settings.every, settings.rounds, settings.phases)
        budget.check(fit)
        if session.attempt == 1 and settings.rounds:
            budget.check_epochs(fit, epoch, 1, settings.rounds)
            budget.announce(fit, epoch)
        if settings.exact_restart:
            set_restored_epoch(model, None)
        live = self._live = LiveModel(model, settings, session.home)
        restored = restored_epoch(model) or 0  # by BackupAndRestore
        rounds = session.register(
            live.state.get_state(),
            agreement={**live.agreement, **_classes(fit)},
            rounds=None if settings.rounds else budget.own_rounds(fit, 0 if restored else epoch),
            evaluates=self._evaluates,
            cross_evaluates=self._evaluates,
            restarts=settings.exact_restart,
            capabilities=live.capabilities,
            terms=settings.terms("weights", neighbours.best_metric(fit.callbacks)),
        )
        budget.warn_if_schedule_ends_early(model, fit, rounds)
        progress = self._progress = Progress(fit, budget, rounds)
        snapshot = restart.FitSnapshot(model, live, progress, epoch) if settings.exact_restart else None
        task = session.start(live.state.get_state, snapshot=snapshot, steps=progress.steps)
        if snapshot is not None:
            self._seed = session.round_seed
            if snapshot.epochs > epoch:
                restored, epoch = snapshot.epochs - epoch, snapshot.epochs
                set_restored_epoch(model, epoch)
        self._accept_task(task, session)
        self._begin_first_task(task, epoch, restored)
        if live.corrections.attached:
            neighbours.refuse_saving_within_epochs(fit.callbacks)
        return progress

    def _scores_global_models(self, settings: SiteSettings) -> bool:
        has_data = self.fit.validation is not None
        if settings.evaluate_global and not has_data:
            raise ConfigError(
                "evaluate_global=True needs validation data", where="fit", fix="pass validation_data= to fit"
            )
        return has_data and settings.evaluate_global is not False

    def _accept_task(self, task: Task, session: Session) -> None:
        progress = self._progress
        assert progress is not None
        self._version = task.version
        progress.round, progress.over = session.local_round, task.kind == "final"

    def _begin_first_task(self, task: Task, epoch: int, restored: int) -> None:
        live, progress = self._current_live, self._progress
        assert progress is not None
        budget = progress.budget
        if progress.over:  # Keras makes one more step before it stops; `restore_final` undoes it
            live.receive(task)
            self._stop_fit()
            return
        trained = budget.length_of(self.fit, restored) - (progress.round - 1) * budget.round_size
        if restored and trained >= budget.round_size:
            raise ConfigError(
                f"the backup was made after {restored} epochs, but the federation is in round {progress.round}",
                where="BackupAndRestore",
                fix="delete the backup folder, which belongs to another run",
            )
        if trained > 0:  # the backup was made in the middle of the round
            progress.begin_within_round(trained)
            live.resume(task)
        else:
            live.receive(task)
        if progress.round > 1 and trained < 0:
            warnings.warn(
                f"this site rejoins in round {progress.round} with a new optimizer state, since the earlier one was "
                "not saved; add keras.callbacks.BackupAndRestore to save it",
                stacklevel=2,
            )
        budget.check_epochs(self.fit, epoch, progress.round, progress.rounds, max(trained, 0))

    def _exchange(self, batches: int) -> None:
        """End a phase of the round after so many batches; with the last phase, exchange the weights."""
        model, live, session, progress = self._updated_model, self._current_live, self._session, self._progress
        assert progress is not None
        result = live.local.end_phase(self._local_result(model, progress, batches), more=not progress.at_end)
        if result is None:
            progress.begin_phase(progress.phase + 1)
            self._meter.begin(model)
            return
        weights = live.state.get_state()
        live.local.submitted(session.submit(weights, result, extras=live.extras(weights)))
        task = session.next_task()
        live.receive(task)
        self._accept_task(task, session)
        self._seed, self.awaits_score = session.round_seed, self._evaluates
        progress.begin_phase(0)
        for name, value in session.stats.log_row().items():
            self._row[name] += value
        self._meter.begin(model)

    def _local_result(self, model: Any, progress: Progress, batches: int) -> LocalResult:
        metrics, seen = self._meter.read(model)
        if progress.budget.batches is None:
            seen //= max(progress.epochs, 1)
        examples = self._options.num_examples or self.fit.num_examples or seen
        if not examples:
            raise _uncounted()
        return LocalResult(examples, batches // progress.budget.accumulation, metrics)

    def _stop_fit(self) -> None:
        """Ask fit to stop. It still makes one step."""
        self._stopping = self._model.stop_training = True

    def _finish(self) -> None:
        """Leave the results, and the final weights, or the best ones if the user asks for them, in the model."""
        session, model, live, best = self._session, self._updated_model, self._current_live, None
        stoppers = neighbours.restoring_callbacks(self.fit.callbacks)
        if stoppers:
            task = session.results.best()
            if task is not None:
                best = task.version, {name: np.copy(array) for name, array in task.arrays.items()}
        live.local.close()
        live.restore_final()
        if session.settings.cross_site and self._evaluates:
            session.results.cross_evaluate(self._score)
            live.restore_final()
        if live.local.personal is not None:
            with live.local.personal.in_place():
                export(model, str(session.home.folder / PERSONAL))
        session.finish(
            export=lambda folder: export(model, folder), load=live.state.set_state if self._evaluates else None
        )
        if best is not None:
            live.state.set_state(best[1])
            for stopper in stoppers:  # after this hook, it loads what it holds as the best
                stopper.best_weights, stopper.best_epoch = model.get_weights(), self._epoch_of_version.get(best[0], 0)
        neighbours.keep_result(self.fit.callbacks, live.state)

    def _score(self, arrays: Arrays) -> tuple[dict[str, float], int]:
        self._current_live.state.set_state(arrays)
        assert self.fit.validation is not None
        return scores.evaluated(self._updated_model, self.fit.validation)

    def _evaluate(self) -> None:
        """Score the global model that has just arrived, if fit will not validate it itself."""
        assert self.fit.validation is not None
        self._report(*scores.evaluated(self._updated_model, self.fit.validation))

    def _report(self, metrics: dict[str, float], examples: int) -> None:
        self.awaits_score = False
        self._session.report(metrics, examples)


def _classes(fit: FitCall) -> dict[str, Names]:
    names = fit.class_names
    return {"classes of the training data": names_of(names)} if names else {}


def _uncounted() -> ConfigError:
    return ConfigError(
        "the number of examples that this site trains on is unknown: the data does not tell its size, and a train_step "
        "of your own may count batches instead",
        where="fit",
        fix="pass FederatedCallback(num_examples=...)",
    )
