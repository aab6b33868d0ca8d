"""One federated training of a torch trainer, from joining to leaving, over a small port that a framework implements.

An adapter consists of hooks (of the framework, or of a loop of its own) and of a `TrainerPort`. The hooks call a
`TrainerRun`, which talks to the federation through rank 0 and asks the port for whatever the trainer must do. All
methods are collective unless they say otherwise: every rank of a site calls them, in the same order.

The calls of one training, in their order:

1. `TrainerRun.join(options, framework)` when the trainer is set up. It returns None outside a federation. `run.budget`
   says how long the trainer must run; the adapter sets the trainer's length, or refuses to start. Everything that can
   raise between here and the end belongs into `with run.leaving_on_error():`, so that the other sites hear of it.
2. `run.begin(port, model, optimizers, ...)` before the first batch, when the optimizers exist and checkpoints have
   been loaded. The handshake waits for the other sites. Afterwards the model holds the global weights of
   `run.progress.round` or, if the trainer resumed within a round, its own. If `run.over` is true then, the run had
   ended before this site came (back): the model holds the final weights, and the port was asked to stop.
3. While the trainer trains, the adapter keeps `run.progress` up to date (`steps`, `batch_ended`) and counts losses in
   `run.tally`. An adapter with exact restarts seeds each round's data from `run.seed` where the round begins.
4. `run.exchange(num_examples, metrics, more=...)` whenever `run.progress.complete(run.settings.every)`, or when the
   trainer ends. It sends the weights, waits for the others and sets the next global weights in place. Afterwards the
   port logs the round, is asked for validation (`validate_next`), and to stop after the last round (`run.over`).
5. `run.report(metrics, num_examples)` when a validation has ended and `run.awaits_score` is true.
6. `run.finish(export)` when the trainer has ended and `run.over` is true; `run.stop_early(where)` when it ended before.
   After an error in the trainer itself `run.fail(error)`.
7. `run.settle()` in the trainer's very last hook, after `finish`. Until then other code of the user's may still change
   the weights, such as a forward pass in training mode, which changes batch-norm statistics.

After any end `run.active` is false, and every further hook must do nothing. A `TrainerRun` may be pickled and copied:
a copy made before `begin` takes the original's place, a later one is inactive and holds no tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
from torch import nn

from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import BestMetric, Options, SiteSettings
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.registry import leaving_on_error
from fl_adapters.participant.results import Export
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.progress import Progress, RoundBudget, Tally
from fl_adapters.torch.ranks import collectives as ranks
from fl_adapters.torch.restart import TorchSnapshot, load_tensors
from fl_adapters.torch.site import ArrivedTask, JoinedRun, TorchSite
from fl_adapters.torch.trainer_port import Resumed, TrainerPort
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import ConfigError
from fl_runtime.types import Arrays, Metrics

P = TypeVar("P", bound=TrainerPort)


class TrainerRun(Generic[P]):
    """One training of this site within a federation. The module docstring lists the calls in their order.

    Attributes:
        joined: What the federation asks for: job, settings, output folders.
        budget: Length of the run in rounds, epochs and steps.
        active: Whether this site takes part. False once it has finished, left, or failed.
        begun: Whether the training has begun and not ended, so that `port` and `live` can be used.
        progress: Where the site stands in its round. The adapter keeps it up to date.
        tally: Losses and examples of the round. The adapter adds to it.
        evaluates: Whether each global model is scored here.
        awaits_score: Whether the model in place still has to be scored.
        over: Whether the final weights have arrived.
        seed: Seed of the round's random states, for jobs with `exact_restart`; else None.
    """

    def __init__(self, site: TorchSite, joined: JoinedRun) -> None:
        self.joined, self.budget = joined, RoundBudget.of(joined.settings)
        self.active, self.begun = True, False
        self.progress = Progress()
        self.tally = Tally()
        self.evaluates = self.awaits_score = False
        self.over = False
        self.seed: int | None = None
        self._site = site
        self._live: LiveModel | None = None
        self._port: P | None = None
        self._finished: LiveModel | None = None
        self._snapshot: TorchSnapshot | None = None

    @classmethod
    def join(
        cls, options: Options, framework: str, folders: Mapping[str, str] | None = None, *, trains: bool = True
    ) -> TrainerRun[P] | None:
        """Join the federation for one training.

        Args:
            options: The script's own arguments.
            framework: Name of the framework. It must be the same at all sites.
            folders: Output folders of the trainer, by any names. `joined.folders` has those to use instead.
            trains: Whether the training begins now. A run of a trainer that is only set up may have to be joined again
                once it `awaits_training` no more.

        Returns:
            The run, or None outside a federation.
        """
        site = TorchSite(options, framework)
        joined = site.join(folders, trains=trains)
        return None if joined is None else cls(site, joined)

    def __getstate__(self) -> dict[str, Any]:
        """Live tensors stay behind. A copy of a training that has begun does not take part."""
        active = self.active and not self.begun
        return {
            **self.__dict__,
            "active": active,
            "begun": False,
            "_live": None,
            "_port": None,
            "_finished": None,
            "_snapshot": None,
        }

    def awaits_training(self) -> bool:
        """Whether this run can still begin. Collective. False once another trainer of the process has used it."""
        return self.active and not self.begun and self._site.awaits(self.joined)

    @property
    def came_back(self) -> bool:
        """Whether a snapshot of an earlier process was loaded, so that the trainer goes on from there."""
        return self._snapshot is not None and self._snapshot.loaded

    @property
    def came_back_within(self) -> bool:
        """Whether a snapshot from the middle of a round was loaded."""
        return self._snapshot is not None and self._snapshot.within is not None

    @property
    def settings(self) -> SiteSettings:
        """Settings that hold at this site: the script's arguments, then the job's, then the defaults."""
        return self.joined.settings

    @property
    def live(self) -> LiveModel:
        """The model and its optimizers. Only between `begin` and the end."""
        assert self._live is not None
        return self._live

    @property
    def port(self) -> P:
        """The trainer. Only between `begin` and the end."""
        assert self._port is not None
        return self._port

    def begin(
        self,
        port: P,
        model: nn.Module,
        optimizers: Sequence[Any],
        *,
        rounds: int | None,
        evaluates: bool,
        examples: int | None = None,
        best: BestMetric | None = None,
        follow: bool = True,
        initial_base: bool = False,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Make the handshake and take the first task, wherever the trainer and the run stand after a restart.

        Args:
            port: The trainer.
            model: The module that is trained, in its wrapper (DDP, FSDP2) if it has one.
            optimizers: All its optimizers.
            rounds: Number of rounds that the trainer's own length amounts to. Used if the job does not set it.
            evaluates: Whether this site scores each global model.
            examples: Size of the training set over all ranks, or None if unknown.
            best: Metric by which the trainer picks its best model. It is proposed where the job is silent.
            follow: Correct gradients in a hook on each optimizer's own `step`. If False, the adapter calls `correct`.
            initial_base: Whether the trainer saves a PEFT adapter without its base. LoRA strategies that add to the
                base weights then end with the initial base, and an adapter that holds all that was learnt.
            others: Other modules that the optimizers may train, such as a loss with parameters, by name.

        Raises:
            ConfigError: If the model, the optimizers or the checkpoint do not fit the run.
            FederationError: If the sites do not fit together, or the run has failed.
        """
        with self.leaving_on_error():
            if self._live is not None:
                self._live.local.close()  # of a training that was interrupted
            self._port, self.evaluates = port, evaluates
            self.over = self.awaits_score = False
            self.tally = Tally(self._site.options.num_examples or examples)
            live = self._live = LiveModel(model, optimizers, self.settings, others, initial_base=initial_base)
            self.begun = True
            if follow:
                live.gradients.follow(optimizers)
            snapshot = self._snapshot = port.snapshot(live) if self.settings.exact_restart else None
            resumed = self._checked(port.resumed())
            data = port.training_data if self._site.options.dp_sgd else None
            first = self._site.start(
                live,
                port.names,
                rounds=rounds,
                evaluates=evaluates,
                best=best,
                snapshot=snapshot,
                data=data,
                steps=partial(self._steps, port),
            )
            if snapshot is not None and not port.steps:
                snapshot.loaded = False
            self._take_first(first, resumed)

    def correct(self, optimizer: Any, *, scale: Any = None, may_skip: bool = False) -> None:
        """Correct the gradients before a step of `optimizer`, as the strategy asks (FedProx, SCAFFOLD, Ditto).

        Only for adapters that began with `follow=False`. Not collective.

        Args:
            optimizer: The optimizer that is about to make a step.
            scale: Factor that the gradients still contain, or None.
            may_skip: Whether a gradient scaler may leave this step out.
        """
        if self._live is not None:
            with self.leaving_on_error():
                self._live.gradients.add(optimizer, scale=scale, may_skip=may_skip)

    def exchange(self, num_examples: int, metrics: Metrics, *, more: bool) -> bool:
        """End a round: send this site's weights, wait for the others, and set the new global weights in place.

        `progress.steps` must be up to date.

        Args:
            num_examples: Weight of this site in the average.
            metrics: Training metrics of the round, such as `train_loss`.
            more: Whether the trainer could go on after this step.

        Returns:
            False if the round has a second phase, which begins now with the personal model; else True.

        Raises:
            FederationError: If the run has failed, or the update was refused.
        """
        with self.leaving_on_error():
            local_steps = self.progress.steps - self.progress.began
            self.live.warn_of_unfrozen()
            arrived = self._site.exchange(self.live, LocalResult(num_examples, local_steps, metrics), more=more)
            self.tally.reset()
            if arrived is None:
                self.progress = self.progress.next(self.progress.round, self.settings.every)
                return False
            self._take_next(arrived)
            return True

    def save_within(self) -> None:
        """Save a restart point where the trainer has saved a checkpoint, in jobs with `exact_restart`.

        `progress` must be up to date. Does nothing between two rounds, where there is a point already.
        """
        if self._snapshot is not None and not (self.over or self.progress.at_beginning):
            with self.leaving_on_error():
                tally = self.tally.state_dict()
                state = self._snapshot.save_within(self.live.state.tensors, asdict(self.progress), tally)
                self._site.save_within(state)

    def go_on_within(self) -> None:
        """Set once more what was loaded from a point within the round, right before the trainer goes on there.

        For adapters whose trainer runs the hooks of an epoch's beginning again: what these changed is undone.
        """
        if self._snapshot is not None and self._snapshot.within is not None:
            with self.leaving_on_error():
                self._snapshot.load_again()
                load_tensors(self.live.state.tensors, self._snapshot.within.weights)
                self.live.state.derive()

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of the model in place. Does nothing if no score is awaited.

        Args:
            metrics: Validation metrics, means over all ranks.
            num_examples: Size of the validation set over all ranks.
        """
        if self.awaits_score:
            with self.leaving_on_error():
                self.awaits_score = False
                self._site.report(metrics, num_examples)

    def finish(self, export: Export, *, end_with_best: bool = False) -> int | None:
        """End the training after the last round. The model holds the final weights.

        Args:
            export: `export(folder)` writes the model as it is, in the framework's format. Called on rank 0 alone.
            end_with_best: Leave the weights of the best round in the model instead of the final ones.

        Returns:
            The best round's number, if `end_with_best` and there is a best round; else None.

        Raises:
            ConfigError: If the final weights have not arrived: the trainer had nothing more to train.
        """
        with self.leaving_on_error():
            if not self.over:
                raise ConfigError(
                    f"the trainer has ended, but the federation is in round {self.progress.round}",
                    where=self.port.where,
                    fix="resume from an earlier checkpoint, or without one",
                )
            live = self.live
            live.restore_final()
            if self.awaits_score:
                self.port.validate()
                live.restore_final()
            self.report({}, 1)  # if even that gave no score, let nobody wait for one
            if self.evaluates:
                self._site.cross_evaluate(live, self._score_unseen)
            best = self._best() if end_with_best else None
            self._site.finish(live, export)
            self.release()
            self._finished = live
            version: int | None = ranks.share(best[0] if best else None)
            if version is not None:
                live.load(best[1] if best else None)
                live.keep_final()
            return version

    def settle(self) -> None:
        """Put the weights with which `finish` ended into the model once more, and let go of the model.

        Not collective. Does nothing unless `finish` was the last call.
        """
        live, self._finished = self._finished, None
        if live is not None:
            live.restore_final()

    def stop_early(self, where: str) -> None:
        """Leave the run because the trainer has ended before the last round, by an early stop for example.

        The quorum decides whether the run goes on without this site. Not collective.

        Args:
            where: Where the trainer stands: "step 6 of 12".
        """
        self.release()
        self._site.leave(LeaveReason.own(f"the trainer stopped at {where}, in round {self.progress.round}"))

    def fail(self, error: BaseException) -> None:
        """Leave the run because of an error in the trainer. Not collective.

        Does nothing for a KeyboardInterrupt: an interrupted notebook cell may be run again.
        """
        if self.active:
            self.release()
            if not isinstance(error, KeyboardInterrupt):
                self._site.leave(error)

    @contextmanager
    def leaving_on_error(self) -> Iterator[None]:
        """Leave the run at once if the block raises, so that the other sites do not wait for this process to end."""
        with leaving_on_error(self._abandon):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the run for a checkpoint of the trainer, from which `Resumed` is made.

        Returns:
            `job` and `progress` as plain values; empty unless the training has begun.
        """
        return {"job": self.joined.job, "progress": asdict(self.progress)} if self.begun else {}

    def _abandon(self, error: BaseException) -> None:
        if self.active:
            self.release()
            self._site.leave(error)

    def _checked(self, resumed: Resumed | None) -> Resumed | None:
        """Refuse a checkpoint of another run."""
        if resumed is not None and resumed.job != self.joined.job:
            origin = f"of the run {resumed.job!r}" if resumed.job else "of no federated run"
            raise ConfigError(
                f"the checkpoint is {origin}, and this is {self.joined.job!r}", where=resumed.where, fix=resumed.fix
            )
        return resumed

    def _take_first(self, first: ArrivedTask, resumed: Resumed | None) -> None:
        live, port, number = self.live, self.port, first.round
        self.seed = first.seed
        if first.kind == "final":
            self.over = True
            live.receive_final(first.task)
            self.progress = Progress.at(number, port.steps, self.settings.every)
            self.awaits_score = self.evaluates
            port.stop()
            return
        if resumed is not None and resumed.progress.round > number:
            raise ConfigError(
                f"the checkpoint is of round {resumed.progress.round}, but the federation is in round {number}",
                where=resumed.where,
                fix="resume from an earlier checkpoint, or without one",
            )
        within_round = False
        within = self._snapshot.within if self._snapshot is not None else None
        if within is not None:
            self.progress = Progress(**within.progress)
            self.tally.load_state_dict(within.tally)
        elif self.came_back:
            self.progress = Progress.at(number, port.steps, self.settings.every)
        elif resumed is not None and resumed.progress.round == number:
            self.progress, within_round = resumed.progress, resumed.within_round
        else:
            self._catch_up(number)
        if within is not None:
            live.go_on(first.task, within.weights)
        elif within_round:
            live.resume(first.task)
        else:
            live.receive(first.task)
        # a model of which a part has been trained was scored before
        if (
            self.came_back and self.evaluates and within is None
        ):  # the previous process died before it scored this model
            self.awaits_score = True
            port.validate()

    def _catch_up(self, number: int) -> None:
        """Begin with round `number`: the first, or a later one if the other sites have gone on without this one."""
        port = self.port
        self.progress = Progress.at(number, port.steps, self.settings.every)
        if number == 1:
            return
        epochs, steps = self.budget.before(number, port.steps_per_epoch)
        behind = "" if steps is None else f"{max(steps - port.steps, 0)} steps "
        warnings.warn(
            f"this site comes back {behind}behind round {number}, at {port.where}: it goes on with the round, and with "
            "the learning rate of the round",
            stacklevel=3,
        )
        port.advance_schedules(epochs, steps)

    def _take_next(self, arrived: ArrivedTask) -> None:
        number, self.seed = arrived.round, arrived.seed
        if arrived.kind == "final":
            self.live.receive_final(arrived.task)
            self.over, number = True, number + 1  # the final task has the number of the last round
        else:
            self.live.receive(arrived.task)
        self.progress = self.progress.next(number, self.settings.every)
        self.port.log(arrived.row)
        if self.over:
            self.port.stop()
        if self.evaluates:
            self.awaits_score = True
            self.port.validate_next()

    def _steps(self, port: P) -> StepCount:
        """How far the round is. Called in a thread that sends it to the server while the trainer trains."""
        progress, every, phases = self.progress, self.settings.every, self.settings.phases
        per_epoch = None
        with suppress(TypeError):  # data without a length
            per_epoch = port.steps_per_epoch
        budget = every.steps or (every.epochs or 1) * (per_epoch or 0)
        return StepCount(port.steps - progress.began + progress.phase * budget, phases * budget)

    def _score_unseen(self) -> None:
        self.awaits_score = True
        self.port.validate_unseen()
        self.awaits_score = False

    def _best(self) -> tuple[int, Arrays] | None:
        """The best round and its weights, on rank 0; None if there is no best round."""

        def fetched() -> tuple[int, Arrays] | None:
            task = self._site.session().results.best()
            return None if task is None else (task.version, {n: np.copy(array) for n, array in task.arrays.items()})

        return ranks.on_rank_zero(fetched)

    def release(self) -> None:
        """End this object's part, and let go of the trainer and the model. Does nothing to the session."""
        self.active = self.begun = False
        if self._live is not None:
            self._live.local.close()
        self._live = self._port = self._snapshot = None
