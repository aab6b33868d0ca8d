"""`FederatedCallback` for `transformers.Trainer`: its hooks, translated into the calls of a `TrainerRun`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import PrivateArguments
from fl_adapters.torch.selection import modules_in
from fl_adapters.torch.trainer_run import TrainerRun

from . import budget
from . import trainer as hf
from .export import Exporter
from .port import TransformersPort
from .scores import point_to_best

_FOLDERS = ("output_dir", "logging_dir")  # of TrainingArguments; transformers 5 has the first alone


class FederatedCallback(PrivateArguments, TrainerCallback):
    """Makes a `transformers.Trainer` a site of a federation.

    One `trainer.train()` spans all rounds. Afterwards the model holds the final global weights, or those of the best
    round with `load_best_model_at_end`. Give the callback to the constructor, so that the trainer's length and its
    learning-rate schedule are set to rounds x `every`; with `trainer.add_callback` they must fit already.

    Outside a federation, that is without a startup kit, it prints one line and stays out of the way. The callback
    holds no connection, lock or thread: the session belongs to the process. It may be pickled and copied.

    Args:
        kit: Folder of this site's startup kit. Default: `$FL_ADAPTERS_KIT`, which `fl-adapters run` and
            `fl-adapters simulate` set.
        every: Training between two exchanges: "epoch", "2 epochs", or a number of optimizer steps, counted like
            `state.global_step`. Default: the job's, else "epoch".
        exchange: What travels: "auto" (trained parameters and buffers; of a PEFT model the adapter alone),
            "trainable", "all", or a list of name patterns such as `["*.encoder.*"]`. Default: the job's, else "auto".
        keep_local: Name patterns of tensors that never leave this site, such as `["classifier.*"]`. They are added to
            the job's own.
        optimizer_state: What becomes of the moments when new global weights arrive: "keep", "reset" (the schedule goes
            on), or "average" over the sites. Default: the job's, else "keep".
        evaluate_global: Whether each global model is evaluated on `eval_dataset` as it arrives, so that the server can
            pick the best round. Default: yes if the trainer has an `eval_dataset`.
        num_examples: Weight of this site in the average. Default: the length of `train_dataset`, or the examples seen
            in the round if it has none.
        required: Raise ConfigError instead of training alone if there is no startup kit.
        dp_sgd: Differential privacy for single records: `DPSGD(max_grad_norm=1.0, epsilon=8)`, see `fl_adapters.DPSGD`.
            Default: none.
        agree: Whether lists of names that the adapter sees (label names, tokenizer) must be equal at all sites. A dict
            adds lists that it cannot see, such as `{"labels": ["cat", "dog"]}`. Default: yes.

    Raises:
        ConfigError: For an argument that cannot work. The hooks raise it too, before the first step, for features of
            the trainer that cannot be federated.

    Example:
        ```python
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[FederatedCallback()])
        trainer.train()
        trainer.save_model("final")
        ```
    """

    _run: TrainerRun[TransformersPort] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Join, move output folders of a simulated site, and set the trainer's length."""
        run = self._run = self._join(args, trains=False)
        if run is None:
            return
        with run.leaving_on_error():
            trainer = hf.calling_trainer()
            hf.refuse_unsupported(trainer, run.settings)
            budget.apply(run.budget, trainer.args, trainer.train_dataset)
            hf.copy_length(trainer.args, args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Make the handshake and take the first global model."""
        if self._run is None or not self._run.awaits_training():  # added after the constructor, or trained before
            if self._run is not None:
                self._run.release()  # of a training that was interrupted
            self._run = self._join(args, trains=True)
        run = self._run
        if run is None:
            return
        with run.leaving_on_error():
            trainer = hf.calling_trainer()
            hf.refuse_search(state)
            hf.refuse_unsupported(trainer, run.settings)
            budget.check(run.budget, state, trainer.args, trained["train_dataloader"])
            hf.warn_of_head(trainer)
            wanted = run.settings.evaluate_global
            port = TransformersPort(trainer, self, state, control, run, trained)
            run.begin(
                port,
                trainer.model,
                [trained["optimizer"]],
                rounds=budget.trainer_rounds(run.budget, state),
                evaluates=hf.has_validation_data(trainer) if wanted is None else wanted,
                best=hf.best_metric(trainer.args),
                initial_base=True,  # HF saves the adapter of a PEFT model alone
                others=modules_in(trainer),
            )
            port.warn_if_schedule_ends_early()
            if not run.over:
                hf.mark_run(state, run.joined.job)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Seed the data of the round, for exact restarts."""
        run = self._run
        if run is not None and run.begun and run.seed is not None:
            run.port.begin_epoch(run.seed, run.progress.began)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Seed the step, for exact restarts within a round."""
        run = self._run
        if run is not None and run.begun and run.seed is not None:
            run.port.begin_step(run.seed, run.progress.began)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Exchange if this step ends a round."""
        run = self._run
        if run is None or not run.begun:
            return
        if run.came_back:
            state.epoch = run.port.epoch_of_run(state.epoch)
        if not run.over and budget.ends_phase(run.budget, state):
            self._exchange(run, state, control, trained["train_dataloader"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Exchange if the epoch was cut short and ends a round."""
        run = self._run
        if run is None or not run.begun:
            return
        if run.port.evaluated == state.global_step:
            control.should_evaluate = False  # done at this step, right after the exchange
        unfinished = not run.over and state.global_step > run.progress.began and not control.should_training_stop
        if unfinished and budget.epoch_ends_phase(run.budget, state):
            self._exchange(run, state, control, trained["train_dataloader"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any) -> None:
        """Save a restart point beside the trainer's checkpoint, for exact restarts within a round."""
        run = self._run
        if run is not None and run.begun and not run.over:
            run.progress.steps = state.global_step
            run.save_within()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **evaluated: Any
    ) -> None:
        """Report the score of a global model, once all validation sets are evaluated."""
        run = self._run
        if run is None or not run.begun or not run.awaits_score:
            return
        score = run.port.scored(evaluated["metrics"], hf.validation_examples(evaluated["eval_dataloader"]))
        if score is not None:
            run.report(*score)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Put the final weights in place and leave the run."""
        run = self._run
        if run is None or not run.begun:
            return
        if not run.over:
            run.stop_early(run.port.where)
            return
        trainer = run.port.trainer
        best = run.finish(Exporter(trainer).export, end_with_best=trainer.args.load_best_model_at_end)
        if best is not None:
            point_to_best(trainer.args, state, best)
        hf.call_last(trainer, run.settle)

    def _join(self, args: TrainingArguments, *, trains: bool) -> TrainerRun[TransformersPort] | None:
        """Join the federation and move the trainer's output folders; None outside of one."""
        folders = {name: path for name in _FOLDERS if (path := getattr(args, name, None))}
        run: TrainerRun[TransformersPort] | None = TrainerRun.join(self.options, "transformers", folders, trains=trains)
        if run is not None:
            trainer = hf.calling_trainer()
            hf.keep_saves_apart(trainer, current_kit(self.options.kit))
            for name, path in run.joined.folders.items():
                setattr(args, name, path)
                setattr(trainer.args, name, path)
        return run

    def _exchange(
        self,
        run: TrainerRun[TransformersPort],
        state: TrainerState,
        control: TrainerControl,
        dataloader: Any,
    ) -> None:
        """End the round, or its first phase."""
        with run.leaving_on_error():
            port, steps, loss = run.port, state.global_step - run.progress.began, hf.loss_sum()
            port.control, run.progress.steps = control, state.global_step
            num_examples = self.options.num_examples or hf.training_examples(port.trainer.args, dataloader, steps)
            metrics = hf.round_metrics(loss, port.loss_before, steps)
            port.loss_before = loss
            run.exchange(num_examples, metrics, more=state.global_step < state.max_steps)
