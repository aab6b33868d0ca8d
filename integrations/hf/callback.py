"""`FederatedCallback`: the hooks of `transformers.Trainer`, translated into a federation's session."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.torch import ranks
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import seed_round
from fl_adapters.torch.site import Arrived, TorchSite
from fl_runtime.types import Arrays

from . import restart
from . import trainer as hf
from .budget import Budget, advance_schedule, warn_if_schedule_ends_early
from .export import Exporter
from .scores import plain_metrics, point_to_best, pooled

_FRAMEWORK = "transformers"
_FOLDERS = ("output_dir", "logging_dir")  # of TrainingArguments; transformers 5 has the first alone


@dataclass
class _Run:
    """Where this trainer stands in its run. Plain values, so that a copy of the callback carries them along."""

    job: str
    settings: SiteSettings
    budget: Budget
    evaluates: bool = False
    round: int = 0
    began: int = 0  # global_step at which the round began
    loss_before: float | None = None  # hf.loss_sum() at that step
    over: bool = False  # the final weights have arrived
    evaluated: int = -1  # global_step at which the global model was last evaluated
    awaits_score: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    scored_sizes: list[int] = field(default_factory=list)
    seed: int | None = None  # of the round, for exact restarts
    epochs_before: int = 0  # those of processes before this one; HF counts its own from 0


class FederatedCallback(TrainerCallback):
    """Makes a `transformers.Trainer` a site of a federation: `Trainer(..., callbacks=[FederatedCallback()])`.

    One `trainer.train()` spans all rounds; afterwards the model holds the final global weights, or the best round's
    with `load_best_model_at_end`. Give it to the constructor, so that the trainer's length and learning-rate
    schedule can be set to rounds x `every`; after `trainer.add_callback` they must fit already. Without a startup
    kit it stays out of the way. The arguments are those of every adapter; see the README.

    Holds no connection, lock or thread: the session belongs to the process. May be pickled and copied.
    Raises ConfigError, before the first step, for arguments and trainer features that cannot work.
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
        self._live: LiveModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_live": None}  # live tensors stay with the trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with self._site.leaving_on_error(self._forget):
            self._run = self._join(args)
            if self._run is not None:
                trainer = hf.calling_trainer()
                hf.refuse_unsupported(trainer, args, self._run.settings)
                self._run.budget.apply(args, trainer.train_dataset)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        with self._site.leaving_on_error(self._forget):
            run = self._run = self._run or self._join(args)
            if run is None:
                return
            trainer = hf.calling_trainer()
            hf.refuse_search(state)
            hf.refuse_unsupported(trainer, args, run.settings)
            run.budget.check(state, args, trained["train_dataloader"])
            wanted = run.settings.evaluate_global
            run.evaluates = hf.has_validation_data(trainer) if wanted is None else wanted
            if self._live is not None:
                self._live.local.close()  # of a training that was interrupted
            live = self._live = LiveModel(trained["model"], [trained["optimizer"]], run.settings)
            live.gradients.follow([trained["optimizer"]])
            rounds = run.budget.trainer_rounds(state)
            first = self._start(run, live, trainer, state, rounds, **trained)
            warn_if_schedule_ends_early(trained["lr_scheduler"], state.max_steps)
            steps_per_round = run.budget.steps_per_round(args, trained["train_dataloader"])
            self._begin(run, live, first, state, control, trained["lr_scheduler"], steps_per_round)
            if run.epochs_before and run.evaluates:  # as the process before would have, had it not died
                run.awaits_score = True
                trainer.evaluate()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        run = self._run
        if run is not None and run.seed is not None and state.global_step == run.began:
            seed_round(run.seed, trained["train_dataloader"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        run = self._run
        if run is not None:
            state.epoch += run.epochs_before
        if run is not None and not run.over and run.budget.reached(state):
            self._exchange(run, args, state, control, trained["train_dataloader"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        run = self._run
        if run is None:
            return
        if run.evaluated == state.global_step:
            control.should_evaluate = False  # done at this step, right after the exchange
        unfinished = not run.over and state.global_step > run.began and not control.should_training_stop
        if unfinished and run.budget.reached_by_epoch(state):
            self._exchange(run, args, state, control, trained["train_dataloader"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **evaluated: Any
    ) -> None:
        run = self._run
        if run is None or not run.awaits_score:
            return
        sets = hf.calling_trainer().eval_dataset
        names = list(sets) if isinstance(sets, dict) else []
        run.scores |= plain_metrics(evaluated["metrics"])
        run.scored_sizes.append(hf.validation_examples(evaluated["eval_dataloader"]))
        if len(run.scored_sizes) < len(names):
            return  # HF evaluates the next set now
        scores, sizes = pooled(run.scores, names, run.scored_sizes) if names else run.scores, run.scored_sizes
        run.awaits_score, run.evaluated, run.scores, run.scored_sizes = False, state.global_step, {}, []
        with self._site.leaving_on_error(self._forget):
            self._site.report(scores, sum(sizes))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        run, live, self._run, self._live = self._run, self._live, None, None
        if run is None or live is None:
            return
        live.local.close()
        if not run.over:
            reason = f"the trainer stopped at step {state.global_step} of {state.max_steps}, in round {run.round}"
            self._site.leave(reason)
            return
        live.restore_final()
        if run.awaits_score:  # something kept HF from evaluating: let nobody wait for this site's score
            self._site.report({}, 1)
        if run.evaluates:
            self._site.cross_evaluate(live, lambda: self._evaluate(run))
        best = self._best() if args.load_best_model_at_end else None
        exporter = Exporter(trained["model"], trained["processing_class"], live.state)
        self._site.finish(live, exporter.export, exporter.load if run.evaluates else None)
        if args.load_best_model_at_end:
            point_to_best(args, state, ranks.share(best[0] if best else None))
            live.load(best[1] if best else None)

    def _join(self, args: TrainingArguments) -> _Run | None:
        """Join the federation and move the trainer's output folders; None outside of one."""
        joined = self._site.join({name: path for name in _FOLDERS if (path := getattr(args, name, None))})
        if joined is None:
            return None
        for name, path in joined.folders.items():
            setattr(args, name, path)
        settings = joined.settings
        return _Run(joined.job, settings, Budget(settings.every, settings.rounds, settings.phases))

    def _start(
        self, run: _Run, live: LiveModel, trainer: Trainer, state: TrainerState, rounds: int, **trained: Any
    ) -> Arrived:
        if not run.settings.exact_restart:
            return self._site.start(live, rounds=rounds, evaluates=run.evaluates)
        scheduler, loader = trained["lr_scheduler"], trained["train_dataloader"]
        restart.refuse(trainer, state, run.settings.every, trained["model"], scheduler, loader)
        position = restart.Position(trainer, state, loader)
        snapshot = restart.snapshot_of(trainer, live, scheduler, position)
        first = self._site.start(live, rounds=rounds, evaluates=run.evaluates, snapshot=snapshot)
        run.epochs_before = position.epochs_before
        return first

    def _begin(
        self,
        run: _Run,
        live: LiveModel,
        first: Arrived,
        state: TrainerState,
        control: TrainerControl,
        scheduler: Any,
        steps_per_round: int,
    ) -> None:
        """Take the first task in, wherever the trainer and the run stand after a restart."""
        number = first.round
        run.round, run.began, run.loss_before, run.seed = number, state.global_step, hf.loss_sum(), first.seed
        if first.kind == "final":
            live.receive_final(first.task, more=True)  # HF makes a step before it looks
            run.over = control.should_training_stop = True
            return
        if state.global_step > 0 and not run.epochs_before:
            hf.check_checkpoint(state, run.job, run.budget.rounds_done(state), number)
        missing = (number - 1) * steps_per_round - state.global_step
        if missing >= 0:  # at the start of the round, or behind it; else in its middle, with the weights of that moment
            live.receive(first.task)
        else:
            live.resume(first.task)
        if missing > 0:
            warnings.warn(
                f"this site comes back {missing} steps behind round {number}: it goes on with the round, and with the "
                "learning rate of the round",
                stacklevel=2,
            )
            advance_schedule(scheduler, missing)
        hf.mark_run(state, run.job)

    def _exchange(
        self, run: _Run, args: TrainingArguments, state: TrainerState, control: TrainerControl, dataloader: Any
    ) -> None:
        """The end of a round: this site's weights out, the new global ones in, on every rank; or of its first phase."""
        live = self._live
        assert live is not None
        with self._site.leaving_on_error(self._forget):
            steps, loss = state.global_step - run.began, hf.loss_sum()
            result = LocalResult(
                num_examples=self.options.num_examples or hf.training_examples(args, dataloader, steps),
                local_steps=steps,
                metrics=hf.round_metrics(loss, run.loss_before, steps),
            )
            came = self._site.exchange(live, result, more=state.global_step < state.max_steps)
            if came is None:
                run.began, run.loss_before = state.global_step, loss
                return
            if came.kind == "final":
                live.receive_final(came.task)
                run.over = control.should_training_stop = True
            else:
                live.receive(came.task)
            hf.log_round(state, control, came.row, run.job)
            run.round, run.began, run.loss_before, run.seed = came.round, state.global_step, loss, came.seed
            if run.evaluates:
                run.awaits_score = control.should_evaluate = True

    def _evaluate(self, run: _Run) -> None:
        """Score the model as it is by the trainer's own evaluation, which ends in `on_evaluate`."""
        self._run, run.awaits_score = run, True
        with self._site.leaving_on_error(self._forget):
            hf.evaluate_unseen(hf.calling_trainer(), self)
        self._run = None

    def _best(self) -> tuple[int, Arrays] | None:
        """The best round and its weights, on rank 0."""

        def fetched() -> tuple[int, Arrays]:
            task = self._site.session().best()
            return task.version, {name: np.copy(array) for name, array in task.arrays.items()}

        return ranks.on_rank_zero(fetched)

    @property
    def _site(self) -> TorchSite:
        return TorchSite(self.options, _FRAMEWORK)

    def _forget(self) -> _Run | None:
        run, live, self._run, self._live = self._run, self._live, None, None
        if live is not None:
            live.local.close()
        return run
