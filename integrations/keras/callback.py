"""`FederatedCallback`: the hooks of `model.fit`, translated into a federation's session."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.outputs import PERSONAL
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.session import Session
from fl_runtime.errors import ConfigError
from fl_runtime.types import Task

from . import neighbours, restart, scores
from .budget import Budget
from .export import export
from .fit_call import FitCall, calling_fit
from .live import LiveModel, ensure_built
from .run import Run

_FRAMEWORK = "keras"


class FederatedCallback(keras.callbacks.Callback):
    """Makes `model.fit` a site of a federation: `model.fit(..., callbacks=[FederatedCallback()])`.

    One `fit` spans all rounds and stops after the last one; it must be given enough epochs, since Keras cannot
    lengthen it. Afterwards the model holds the final global weights, or the best round's with
    `EarlyStopping(restore_best_weights=True)`. A round that ends with an epoch is exchanged before fit validates and
    before any other callback sees the epoch's end, so validation metrics and saved files describe the global model.
    Without a startup kit it stays out of the way. The arguments are those of every adapter; see the README.

    Holds no connection, lock or thread: the session belongs to the process. May be pickled and copied between calls
    of `fit`. Raises ConfigError, before the first step, for arguments and features that cannot work.
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
        super().__init__()
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
        self._fit: FitCall | None = None
        self._joined = False
        self._run: Run | None = None
        self._live: LiveModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_fit": None, "_joined": False, "_run": None, "_live": None}

    def set_model(self, model: Any) -> None:
        """The first that Keras calls of a fit: it joins the federation."""
        super().set_model(model)
        self._enter()

    def on_train_begin(self, logs: Any = None) -> None:
        self._enter()  # again, for a CallbackList that was made before fit
        if self._fit is None and self.options.required:
            raise ConfigError(
                "FederatedCallback works within model.fit only",
                where="on_train_begin",
                fix="for a loop of your own use fl_adapters.connect()",
            )
        with self._leaving_on_error():
            if self._joined and self._fit is not None and self._session().settings.exact_restart:
                self._begin_exactly(self._fit)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        with self._leaving_on_error():
            if self._joined and self._run is None:
                self._begin(epoch)
        if self._run is not None and self._live is not None:
            self._live.corrections.show()
            self._run.begin_epoch(epoch)
            if self._run.seed is not None and not self._run.epochs:
                restart.begin_round(self._run.fit, self._run.seed)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Not on_train_batch_end: Keras would wait for the result of every step to show it to the callbacks.
        run = self._run
        if run is None:
            return
        run.batch = batch
        if batch >= run.due:
            with self._leaving_on_error():
                self._exchange(run, run.before + batch)
                if run.awaits_score:
                    self._evaluate(run)
        if batch >= run.stops:
            run.stopping = self._model.stop_training = True  # takes effect after the step that is about to begin

    def on_test_begin(self, logs: Any = None) -> None:
        self._end_epoch()

    def on_test_end(self, logs: Any = None) -> None:
        run = self._run
        if run is not None and run.awaits_score:
            with self._leaving_on_error():
                self._report(run, scores.plain(logs), scores.examples_scored(self.model))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._end_epoch()
        run = self._run
        if run is None:
            return
        if self._live is not None:
            self._live.corrections.hide()  # before others save the model
        if run.awaits_score:
            with self._leaving_on_error():
                self._evaluate(run)
        run.arrived.setdefault(run.version, epoch)
        if run.over:
            self._model.stop_training = True
        if logs is not None:
            logs.update(run.logs())

    def on_train_end(self, logs: Any = None) -> None:
        with self._leaving_on_error():
            if self._joined and self._run is None and self._fit is not None:
                self._begin(self._fit.epochs)  # fit had no epoch left to run
            run, live, fit = self._run, self._live, self._fit
            if run is None or live is None or fit is None:
                return
            if run.over:
                self._finish(run, live)
            elif self._model.stop_training:
                self._session().leave(f"fit stopped in round {run.round} of {run.rounds}")
            else:
                raise ConfigError(
                    f"fit ended in round {run.round} of {run.rounds}, which is not complete",
                    where=f"fit(epochs={fit.epochs})",
                    fix=f"pass more epochs than {fit.epochs} to fit: it stops after the last round",
                )
        self._forget()

    def _enter(self) -> None:
        """A `fit` begins: join the federation, before any other callback has opened a file."""
        fit = calling_fit(self._model)
        if fit is None or fit.is_same(self._fit):
            return
        self._forget()
        neighbours.refuse_twice(self, fit.callbacks)
        self._fit = fit
        session = open_session(self.options, framework=_FRAMEWORK, fresh=True)
        if session is None:
            return
        self._joined = True
        with self._leaving_on_error():
            neighbours.move_outputs(fit.callbacks, session.output_dir)
            neighbours.put_first(self, fit.callbacks)

    def _begin_exactly(self, fit: FitCall) -> None:
        """`_begin` while fit can still be told with which epoch it begins."""
        restart.refuse(fit, self._session().settings.every)
        self._begin(fit.first)
        run = self._run
        assert run is not None
        if self.model._initial_epoch and run.evaluates:  # as the process before would have, had it not died
            run.awaits_score = True
            self._evaluate(run)
        if run.over:
            self.model._initial_epoch = fit.epochs  # no step more

    def _begin(self, epoch: int) -> None:
        """The handshake and the first task, wherever fit, which is about to begin `epoch`, and the run stand."""
        session, model, fit = self._session(), self.model, self._fit
        assert fit is not None
        settings = session.settings
        if settings.evaluate_global and fit.validation is None:
            raise ConfigError(
                "evaluate_global=True needs validation data", where="fit", fix="pass validation_data= to fit"
            )
        evaluates = settings.evaluate_global is not False and fit.validation is not None
        neighbours.refuse_unsupported(fit.callbacks, settings, evaluates=evaluates)
        ensure_built(model, fit)
        budget = Budget.of(model, settings.every, settings.rounds, settings.phases)
        budget.check(fit)
        if session.attempt == 1 and settings.rounds:
            budget.check_epochs(fit, epoch, 1, settings.rounds)
        model._initial_epoch = None if settings.exact_restart else getattr(model, "_initial_epoch", None)
        live = self._live = LiveModel(model, settings, session.home)
        restored = getattr(model, "_initial_epoch", None) or 0  # by BackupAndRestore
        rounds = session.register(
            live.state.get_state(),
            agreement=live.agreement,
            rounds=None if settings.rounds else budget.own_rounds(fit, 0 if restored else epoch),
            evaluates=evaluates,
            cross_evaluates=evaluates,
            restarts=settings.exact_restart,
            capabilities=live.capabilities,
        )
        budget.warn_if_schedule_ends_early(model, fit, rounds)
        run = self._run = Run(fit, budget, rounds, evaluates)
        snapshot = restart.FitSnapshot(model, live, epoch) if settings.exact_restart else None
        task = session.start(live.state.get_state, snapshot=snapshot)
        if snapshot is not None:
            snapshot.run, run.seed = run, session.round_seed
            if snapshot.epochs > epoch:
                restored, epoch = snapshot.epochs - epoch, snapshot.epochs
                model._initial_epoch = epoch
        run.take(task, session.local_round)
        self._take_first(run, live, task, epoch, restored)
        if live.corrections.attached:
            neighbours.refuse_saving_within_epochs(fit.callbacks)

    def _take_first(self, run: Run, live: LiveModel, task: Task, epoch: int, restored: int) -> None:
        if run.over:  # all rounds were done before; Keras makes one step before it stops, which is taken back
            live.receive(task)
            run.stopping = self._model.stop_training = True
            return
        made = run.budget.done(run.fit, restored) - (run.round - 1) * run.budget.round_size
        if restored and made >= run.budget.round_size:
            raise ConfigError(
                f"the backup has {restored} epochs behind it, but the federation is in round {run.round}",
                where="BackupAndRestore",
                fix="delete the backup folder: it is of another run",
            )
        if made > 0:  # in the middle of the round, with the weights of that moment
            run.before, run.epochs = (made, 0) if run.budget.batches else (0, made)
            live.resume(task)
        else:
            live.receive(task)
        if run.round > 1 and made < 0:
            warnings.warn(
                f"this site comes back in round {run.round} without the optimizer it had: it goes on with the one "
                "that it has now; keras.callbacks.BackupAndRestore keeps it",
                stacklevel=2,
            )
        run.budget.check_epochs(run.fit, epoch, run.round, run.rounds, max(made, 0))

    def _end_epoch(self) -> None:
        """The epoch's last step is done: before fit validates, or where it does not, before others see the end."""
        run, live = self._run, self._live
        if run is None or live is None or not run.epoch_open:
            return
        with self._leaving_on_error():
            model = self.model
            run.meter.close_epoch(model)
            run.end_epoch()
            if run.over:
                live.restore_final()
            elif run.complete() and (run.stopping or not model.stop_training):  # else somebody stopped within it
                self._exchange(run, run.before)

    def _exchange(self, run: Run, batches: int) -> None:
        """The end of so many batches: this site's weights out, the new global ones in; or the end of a phase."""
        model, live, session = self.model, self._live, self._session()
        assert live is not None
        metrics, seen = run.meter.read(model)
        if run.budget.batches is None:
            seen //= max(run.epochs, 1)
        examples = self.options.num_examples or run.fit.num_examples or seen
        if not examples:
            raise ConfigError(
                "nobody knows how many examples this site trains on",
                where="the data has no length, and train_step keeps no count",
                fix="pass FederatedCallback(num_examples=...)",
            )
        result = LocalResult(examples, batches // run.budget.accumulation, metrics)
        done = live.local.end_phase(result, more=not run.at_end)
        if done is None:
            run.next_phase()
            run.meter.begin(model)
            return
        weights = live.state.get_state()
        status = session.submit(weights, done, extras=live.extras(weights))
        live.local.submitted(status)
        task = session.next_task()
        live.receive(task)
        run.take(task, session.local_round)
        run.seed = session.round_seed
        run.next_round(session.stats)
        run.meter.begin(model)

    def _finish(self, run: Run, live: LiveModel) -> None:
        """All rounds are done: leave the final weights, or the best ones where the user asks for them, and results."""
        session, model, best = self._session(), self.model, None
        stoppers = neighbours.restoring(run.fit.callbacks)
        if stoppers:
            task = session.results.best()
            best = task.version, {name: np.copy(array) for name, array in task.arrays.items()}
        live.local.close()
        live.restore_final()
        self._cross_evaluate(run, live)
        if live.local.personal is not None:
            with live.local.personal.in_place():
                export(model, str(session.home.folder / PERSONAL))
        session.finish(
            export=lambda folder: export(model, folder), load=live.state.set_state if run.evaluates else None
        )
        if best is not None:
            live.state.set_state(best[1])
            for stopper in stoppers:  # it loads what it holds for the best, after this
                stopper.best_weights, stopper.best_epoch = model.get_weights(), run.arrived.get(best[0], 0)

    def _evaluate(self, run: Run) -> None:
        """Score the global model that has just arrived where fit's own validation does not."""
        assert run.fit.validation is not None
        self._report(run, *scores.evaluated(self.model, run.fit.validation))

    def _cross_evaluate(self, run: Run, live: LiveModel) -> None:
        """Where the job wants it, score every site's model in the place of the final one."""
        session = self._session()
        if not (session.settings.cross_site and run.evaluates):
            return
        while task := session.results.next_to_score():
            live.state.set_state(task.arrays)
            self._evaluate(run)
        live.restore_final()

    def _report(self, run: Run, metrics: dict[str, float], examples: int) -> None:
        run.awaits_score = False
        self._session().report(metrics, examples)

    def _session(self) -> Session:
        """This process's session; it does not belong to this object."""
        session = open_session(self.options, framework=_FRAMEWORK)
        if session is None:
            raise ConfigError("the startup kit is gone", where=f"{_FRAMEWORK}, in the middle of a run")
        return session

    @contextmanager
    def _leaving_on_error(self) -> Iterator[None]:
        """An error in a hook ends this site's part in the run at once, not only when the process ends."""
        try:
            yield
        except BaseException as error:
            joined = self._joined
            self._forget()
            if joined:
                self._session().leave(f"{type(error).__name__}: {error}")
            raise

    def _forget(self) -> None:
        if self._live is not None:
            self._live.local.close()
        if self._run is not None and self._run.seed is not None:
            self._model._initial_epoch = None  # the next fit is the user's own
        self._fit, self._joined, self._run, self._live = None, False, None, None
