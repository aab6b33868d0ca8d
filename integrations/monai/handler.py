"""`FederatedHandler` for MONAI's trainers: their events, translated into the calls of a `TrainerRun`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Events
from monai.handlers import LrScheduleHandler, ValidationHandler

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import SharedArguments
from fl_adapters.torch.selection import modules_in
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.errors import ConfigError

from . import budget, outputs, restart
from . import trainer as monai
from .export import Exporter
from .port import MonaiPort
from .scores import key_metric, scores_of


class FederatedHandler(SharedArguments):
    """Makes a MONAI trainer a site of a federation.

    Give it to the trainer among its `train_handlers`, in a bundle as `{"_target_":
    "fl_adapters.monai.FederatedHandler"}`, or call `attach(trainer)` before `trainer.run()`. One `run()` spans all
    rounds. Afterwards the network holds the final global weights. The trainer's `max_epochs` is set to rounds x
    `every` when it starts.

    A round of epochs is exchanged when its last epoch is completed, a round of optimizer steps when its last iteration
    is. The handler runs there before all others, wherever it stands in the list. So at the end of a round
    `ValidationHandler` scores the global model, and a `CheckpointSaver`, of the evaluator or of the trainer, saves
    exactly those weights. With `evaluate_global` every global model is validated, even if the interval of the
    `ValidationHandler` would skip it. Handlers of the iteration, such as `EMAHandler`, see the weights as training
    left them; in a round of steps, the global ones after its last iteration.

    To resume a run, save and load the handler together with the trainer: `save_dict={..., "trainer": trainer,
    "federation": handler}` for the `CheckpointSaver`, and the same for the `CheckpointLoader`.

    Outside a federation, that is without a startup kit, the handler prints one line and stays out of the way. It
    holds no connection, lock or thread. It may be pickled and copied; a copy begins anew.

    Args:
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, set by `fl-adapters run`, `bundle run`
            with `--kit`, and `simulate`.
        every: Training between two exchanges: "epoch", "2 epochs", or a number of optimizer steps. Accumulated batches
            make one step. Default: the job's, else "epoch".
        exchange: What travels: "auto" (trained parameters and buffers of the network), "trainable", "all", or a list of
            name patterns such as `["encoder*"]`. Default: the job's, else "auto".
        keep_local: Name patterns of tensors that never leave this site, such as the statistics of its scanner's
            normalisation layers. They are added to the job's own.
        optimizer_state: What becomes of the optimizer's moments when new global weights arrive: "keep", "reset", or
            "average" over the sites. Default: the job's, else "keep".
        evaluate_global: Whether each global model is validated by the trainer's `ValidationHandler`, so that the server
            can pick the best round. Default: yes if there is one for the network that is trained.
        num_examples: Weight of this site in the average. Default: the images that an epoch uses, or those seen in the
            round if the data have no length.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        agree: Whether lists of names that the adapter sees (channels, label names) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Raises:
        ConfigError: For an argument that cannot work. The events raise it too, before the first iteration, for what
            cannot be federated: trainers of several networks, lazily initialised parameters, and a second handler.

    Example:
        ```python
        trainer = SupervisedTrainer(..., train_handlers=[ValidationHandler(1, evaluator), FederatedHandler()])
        trainer.run()
        ```
    """

    _run: TrainerRun[MonaiPort] | None = None
    _resumed: Mapping[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run behind."""
        return {"options": self.options, "_run": None, "_resumed": self._resumed}

    def attach(self, engine: Any) -> None:
        """Attach to a trainer that is not running.

        Args:
            engine: The trainer.

        Raises:
            ConfigError: If another FederatedHandler is attached already.
        """
        if any(other is not self for other in monai.attached(engine, FederatedHandler)):
            raise ConfigError("FederatedHandler is given twice", where=type(engine).__name__, fix="give it once")
        monai.put_first(engine, Events.STARTED, self._started)

    def state_dict(self) -> dict[str, Any]:
        """Return the trainer's place in its run, for a checkpoint.

        Returns:
            Plain values; empty outside a federation.
        """
        return {} if self._run is None else self._run.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose weights, optimizer and trainer must be loaded too.

        Args:
            state_dict: What `state_dict` gave.
        """
        self._resumed = dict(state_dict)

    def _started(self, engine: Any) -> None:
        """Join, set the trainer's length, and take the first place at its events; before any `CheckpointLoader`."""
        run = self._run = TrainerRun.join(self.options, "monai")
        if run is None:
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
            monai.put_first(engine, event, hook)
        monai.put_last(engine, Events.COMPLETED, self._settled)
        with run.leaving_on_error():
            monai.refuse_unsupported(engine)
            budget.apply(run.budget, engine)
            kit = current_kit(self.options.kit)
            outputs.move(engine, kit)
            for handler in monai.attached(engine, ValidationHandler):
                if handler.validator is not None:
                    outputs.move(handler.validator, kit)

    def _epoch_started(self, engine: Any) -> None:
        run = self._run
        if run is None or not run.active:
            return
        if not run.begun:  # all handlers of STARTED have run, so checkpoints are loaded
            self._begin(run, engine)
        else:
            run.port.in_epoch = 0
        if run.seed is not None and not run.progress.epochs and not run.over:
            restart.begin_round(engine, run.seed)

    def _iteration_completed(self, engine: Any) -> None:
        run = self._run
        if run is None or not run.begun or run.over:
            return
        port = run.port
        port.in_epoch += 1
        run.tally.add_loss(monai.loss_of(engine))
        if run.tally.examples is None:
            run.tally.rows += monai.rows_in_batch(engine)
        port.steps_made += budget.made_a_step(engine)
        run.progress.steps = port.steps_made
        if run.settings.every.steps is not None and run.progress.complete(run.settings.every):
            last = run.budget.rounds is None and monai.at_last_iteration(engine)
            self._exchange(run, engine, in_iteration=True, more=not last)

    def _epoch_completed(self, engine: Any) -> None:
        run = self._run
        if run is None or not run.begun or run.over:
            return
        run.progress.batch_ended(last_of_epoch=True)
        last = run.budget.rounds is None and monai.has_ended(engine) and run.progress.steps > run.progress.began
        if last or run.progress.complete(run.settings.every):
            self._exchange(run, engine, in_iteration=False, more=not last)
        if not run.over and run.budget.rounds is not None and monai.has_ended(engine):
            engine.state.max_epochs += 1  # epochs were cut short: the rounds decide

    def _validated(self, evaluator: Any) -> None:
        run = self._run
        if run is not None and run.begun and run.awaits_score:
            with run.leaving_on_error():
                run.report(scores_of(evaluator), monai.validation_examples(evaluator))

    def _terminated(self, engine: Any) -> None:
        run = self._run
        if run is not None and run.active and not run.over:
            run.stop_early(f"iteration {engine.state.iteration}")

    def _completed(self, engine: Any) -> None:
        run = self._run
        if run is None or not run.active:
            return
        if not run.begun:  # there was nothing to train: resumed from a checkpoint at the end of its budget
            self._begin(run, engine, epoch_ends=True)
        run.finish(Exporter(engine.network).export)

    def _settled(self, engine: Any) -> None:
        """Put the final weights back: other handlers may have changed them, or statistics, meanwhile."""
        if self._run is not None:
            self._run.settle()

    def _exception_raised(self, engine: Any, error: Exception) -> None:
        if self._run is not None:
            self._run.fail(error)
        if monai.is_only_handler(engine, Events.EXCEPTION_RAISED):  # Ignite leaves raising it to the handlers
            raise error

    def _begin(self, run: TrainerRun[MonaiPort], engine: Any, *, epoch_ends: bool = False) -> None:
        with run.leaving_on_error():
            monai.refuse_lazy_parameters(engine.network)
            validation = monai.validator_of(engine, run.settings)
            if validation is not None and not validation.validator.has_event_handler(self._validated):
                validation.validator.add_event_handler(Events.COMPLETED, self._validated)
            rounds = run.budget.rounds or budget.trainer_rounds(run.budget, engine)
            budget.warn_if_schedules_end_early(engine, monai.attached(engine, LrScheduleHandler))
            resumed, self._resumed = self._resumed, {}
            port = MonaiPort(engine, validation, run, resumed)
            port.epoch_ends = epoch_ends
            run.begin(
                port,
                engine.network,
                [engine.optimizer],
                rounds=rounds,
                evaluates=validation is not None,
                examples=monai.training_examples(engine),
                best=None if validation is None else key_metric(validation.validator),
                others=modules_in(engine),
            )
            if run.came_back:
                restart.catch_up(engine)

    def _exchange(self, run: TrainerRun[MonaiPort], engine: Any, *, in_iteration: bool, more: bool) -> None:
        """End the round, or its first phase."""
        port = run.port
        port.in_iteration = in_iteration
        port.epoch_ends = not in_iteration or port.in_epoch == engine.state.epoch_length
        run.exchange(run.tally.num_examples(), run.tally.mean_loss(), more=more)
