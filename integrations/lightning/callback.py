"""`FederatedCallback` for Lightning's `Trainer`: its hooks, translated into the calls of a `TrainerRun`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import PrivateArguments
from fl_adapters.torch.progress import rows_of
from fl_adapters.torch.selection import modules_in
from fl_adapters.torch.trainer_run import TrainerRun
from fl_runtime.errors import ConfigError

from . import budget, outputs
from . import trainer as lightning
from .export import Exporter
from .framework import callback_classes
from .port import LightningPort


class FederatedCallback(PrivateArguments, *callback_classes()):  # type: ignore[misc]
    """Makes a Lightning `Trainer` a site of a federation, for `lightning.pytorch` and for `pytorch_lightning`.

    One `trainer.fit()` spans all rounds. Afterwards the module holds the final global weights. The trainer's length is
    set to rounds x `every` before the module makes its optimizers, so that `trainer.estimated_stepping_batches` covers
    the whole run.

    A round is exchanged in `on_train_batch_end`: before validation, before any checkpoint of that step, and before
    `on_train_epoch_end`. What `ModelCheckpoint` and `EarlyStopping` monitor at the end of a round is therefore the
    score of the global model, and the saved file holds exactly those weights. With `evaluate_global`, Lightning
    validates after every exchange, even if the trainer's own interval would skip it.

    Outside a federation, that is without a startup kit, it prints one line and stays out of the way. The callback
    holds no connection, lock or thread. It may be pickled and copied; a copy begins anew.

    Args:
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which the commands `run` and `simulate`
            of `fl-adapters` set.
        every: Training between two exchanges: "epoch", "2 epochs", or a number of steps as `trainer.global_step`
            counts them, that is every `step()` of every optimizer. Default: the job's, else "epoch".
        exchange: What travels: "auto" (trained parameters and buffers), "trainable", "all", or a list of name patterns
            such as `["encoder.*"]`. Names are those of the module. Default: the job's, else "auto".
        keep_local: Name patterns of tensors that never leave this site, such as `["head.*"]`. They are added to the
            job's own.
        optimizer_state: What becomes of the moments of all optimizers when new global weights arrive: "keep",
            "reset", or "average" over the sites. Schedules go on. Default: the job's, else "keep".
        evaluate_global: Whether each global model is validated, so that the server can pick the best round. Default:
            yes if the trainer has validation data and the module a `validation_step`.
        num_examples: Weight of this site in the average. Default: the training examples that an epoch uses, or those
            seen in the round if the data have no length.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        dp_sgd: Differential privacy for single records: `DPSGD(max_grad_norm=1.0, epsilon=8)`, see `fl_adapters.DPSGD`.
            Default: none.
        agree: Whether lists of names that the adapter sees (label names, tokenizer) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Raises:
        ConfigError: For an argument that cannot work. The hooks raise it too, before the first step, for what cannot
            be federated: FSDP1 and DeepSpeed, weight averaging callbacks, lazily initialised parameters, and a Trainer
            that was used before.

    Example:
        ```python
        trainer = Trainer(max_epochs=10, callbacks=[FederatedCallback()])
        trainer.fit(module, train_loader, val_loader)
        ```
    """

    _run: TrainerRun[LightningPort] | None = None
    _resumed: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the run behind, and the module's methods that Lightning sets on a callback."""
        return {"options": self.options, "_run": None, "_resumed": self._resumed}

    @property
    def log(self) -> Any:
        """Not used: rounds are logged through the module."""
        return None

    @log.setter
    def log(self, log: Any) -> None:
        # Lightning gives each callback the module's `log` before it opens its loggers: the one moment to move them
        with suppress(ConfigError):  # raised again in `setup`, after joining, when the other sites can be told
            outputs.move(log.__self__.trainer, current_kit(self.options.kit))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join, move output folders of a simulated site, and set the trainer's length."""
        if stage != "fit":
            return
        self._resumed = None
        run = self._run = TrainerRun.join(self.options, "lightning")
        if run is not None:
            with run.leaving_on_error():
                lightning.refuse_unsupported(trainer, FederatedCallback)
                outputs.move(trainer, current_kit(self.options.kit))
                budget.apply(run.budget, trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the handshake and take the first global model."""
        if self._run is not None:
            self._begin(self._run, trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Correct the gradients, which are complete and unscaled here. Lightning clips them after this hook."""
        run = self._run
        if run is not None and run.begun:
            scale, may_skip = lightning.loss_scaling(trainer, optimizer)
            run.correct(optimizer, scale=scale, may_skip=may_skip)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, and exchange if it ends a round."""
        run = self._run
        if run is None or not run.begun or run.over:
            return
        run.tally.add_loss(lightning.loss_of(outputs))
        if run.tally.examples is None:
            run.tally.rows += rows_of(batch)
        last = lightning.is_last_batch(trainer, batch_idx)
        run.progress.batch_ended(last_of_epoch=last)
        if not (last or run.port.counts_steps):
            return
        run.progress.steps = trainer.global_step
        ends = budget.at_end(trainer, last_of_epoch=last)
        if ends or run.progress.complete(run.settings.every):
            self._exchange(run, trainer, pl_module, in_batch=True, at_end=ends)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Prepare to tell what this validation logs from what training has logged."""
        run = self._run
        if run is not None and run.begun and run.awaits_score:
            run.port.validation_started()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the score of the global model."""
        run = self._run
        if run is not None and run.begun and run.awaits_score and not trainer.sanity_checking:
            with run.leaving_on_error():
                run.report(*lightning.validation_score(trainer, run.port.logged))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Exchange if the module cut the epoch short (`on_train_batch_start` returned -1): no batch was its last."""
        run = self._run
        if run is None or not run.begun or run.over:
            return
        if not run.progress.in_epoch or run.settings.every.epochs is None:
            return
        run.progress.batch_ended(last_of_epoch=True)
        run.progress.steps = trainer.global_step
        ends = trainer.max_epochs != budget.ENDLESS and trainer.current_epoch >= trainer.max_epochs
        if ends or run.progress.complete(run.settings.every):
            self._exchange(run, trainer, pl_module, in_batch=False, at_end=ends)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the run, with the final weights in place if they have arrived."""
        run = self._run
        if run is None or not run.begun:
            return
        if run.over:
            run.finish(Exporter(trainer, pl_module).export)
        else:
            run.stop_early(run.port.where)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the final weights if there was nothing to train: resumed from a checkpoint at the end of its budget."""
        run = self._run
        if run is not None and run.active:
            self._begin(run, trainer, pl_module, evaluates=False)
            run.finish(Exporter(trainer, pl_module).export)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the final weights back: hooks of the user's own may have changed them, or statistics, meanwhile."""
        if stage == "fit" and self._run is not None:
            self._run.settle()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the run with the error."""
        if self._run is not None:
            self._run.fail(exception)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the place in the run."""
        run = self._run
        if run is not None and run.begun and "callbacks" in checkpoint:
            # not by state_dict(): Lightning refuses two callbacks with a state, with a message of its own
            checkpoint["callbacks"][self.state_key] = run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the place that a checkpoint holds, for `on_train_start`."""
        self._resumed = state_dict

    def _begin(
        self, run: TrainerRun[LightningPort], trainer: Any, module: Any, *, evaluates: bool | None = None
    ) -> None:
        with run.leaving_on_error():
            lightning.refuse_lazy_parameters(module)
            scores = lightning.evaluates(trainer, run.settings) if evaluates is None else evaluates
            rounds = run.budget.rounds or budget.trainer_rounds(run.budget, trainer)
            budget.warn_if_schedules_end_early(trainer)
            run.begin(
                LightningPort(trainer, module, self, run, self._resumed),
                module,
                trainer.optimizers,
                rounds=rounds,
                evaluates=scores,
                examples=lightning.training_examples(trainer),
                best=lightning.best_metric(trainer),
                others=modules_in(module),
                follow=False,  # Lightning clips after `on_before_optimizer_step`, and that comes before `step`
            )

    def _exchange(
        self, run: TrainerRun[LightningPort], trainer: Any, module: Any, *, in_batch: bool, at_end: bool
    ) -> None:
        """End the round, or its first phase."""
        run.port.in_batch, run.port.at_end = in_batch, at_end
        # Lightning divides a step's loss by the batches that it accumulates
        factor = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        with run.leaving_on_error():
            run.exchange(run.tally.num_examples(), run.tally.mean_loss(factor), more=not at_end)
