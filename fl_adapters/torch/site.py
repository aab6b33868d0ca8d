"""A site's session on all ranks of a torch trainer: rank 0 talks to the federation, the others follow."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import BestMetric, Options, SiteSettings
from fl_adapters.participant.outputs import PERSONAL
from fl_adapters.participant.policy_gate import LeaveReason, policy_gate_of
from fl_adapters.participant.registry import open_session, running_session
from fl_adapters.participant.results import Export
from fl_adapters.participant.session import Session
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.ranks import collectives as ranks
from fl_runtime.client.local_training import StepCount
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.calibration import Participation
from fl_runtime.types import Arrays, Metrics, Task
from fl_runtime.wire.names import Names


@dataclass(frozen=True)
class JoinedRun:
    """The run that a site has joined, the same on every rank.

    Attributes:
        job: Name of the run.
        settings: Settings that hold at this site.
        folders: Name -> output folder to use in place of the one that `join` was given under this name. Folders of a
            simulated site lie below its run.
    """

    job: str
    settings: SiteSettings
    folders: Mapping[str, str]


@dataclass(frozen=True)
class ArrivedTask:
    """A task that has arrived at this site.

    Attributes:
        task: The task, on rank 0 alone.
        kind: Kind of the task: "train" or "final".
        round: Number of rounds this site has trained, this one included; see `Session.local_round`.
        row: Round, bytes and seconds of the last exchange, for the framework's own logs.
        seed: Seed of the round's random states in jobs with `exact_restart`, else None.
    """

    task: Task | None
    kind: str
    round: int
    row: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def arrays(self) -> Arrays | None:
        """The global weights, on rank 0: views of the session's buffer, valid until the next task."""
        return self.task.arrays if self.task else None


@dataclass(frozen=True)
class TorchSite:
    """The federation as a torch trainer reaches it. Holds no session: that belongs to the process.

    All methods but `leave` and `session` are collective: every rank calls them, and a FederationError on rank 0 is
    raised on every rank. They may block for as long as other sites take.

    Attributes:
        options: The script's own arguments.
        framework: Name of the framework, which must be the same at all sites.
    """

    options: Options
    framework: str

    def join(self, folders: Mapping[str, str] | None = None, *, trains: bool = True) -> JoinedRun | None:
        """Open a new session for one training.

        Args:
            folders: Output folders of the trainer, by any names.
            trains: Whether the training begins now. If not, the settings are those of the process's latest run.

        Returns:
            The run, or None outside a federation.
        """

        def join() -> tuple[str, object, dict[str, str]] | None:
            session = open_session(self.options, framework=self.framework, fresh=trains)
            if session is None:
                if self.options.dp_sgd is not None:
                    print("fl-adapters: outside a federation dp_sgd has no effect: no noise is added", file=sys.stderr)
                return None
            moved = {name: session.output_dir(path) for name, path in (folders or {}).items()}
            for name, path in moved.items():
                if os.path.isdir((folders or {})[name]):  # what exists under the old name is expected under the new one
                    os.makedirs(path, exist_ok=True)
            return session.job, session.settings.to_json(), moved

        fields = ranks.share(ranks.on_rank_zero(join))
        return None if fields is None else JoinedRun(fields[0], SiteSettings.from_json(fields[1]), fields[2])

    def awaits(self, joined: JoinedRun) -> bool:
        """Whether the process's session is that of a joined run, and its training has not begun."""

        def waiting() -> bool:
            session = self.session()
            return session.job == joined.job and not (session.registered or session.closed)

        return bool(ranks.share(ranks.on_rank_zero(waiting)))

    def start(
        self,
        live: LiveModel,
        names: Callable[[], Mapping[str, Names]],
        *,
        rounds: int | None,
        evaluates: bool,
        best: BestMetric | None = None,
        snapshot: Snapshot | None = None,
        data: Any = None,
        steps: Callable[[], StepCount | None] | None = None,
    ) -> ArrivedTask:
        """Make the handshake and receive the first task.

        Args:
            live: The model. Its weights become the initial global ones if the server asks this site for them.
            names: Returns lists of names that must be equal at all sites that give them. Called on rank 0 alone.
            rounds: Number of rounds that the trainer's own length amounts to.
            evaluates: Whether this site scores each global model.
            best: Metric by which the trainer picks its best model. It is proposed where the job is silent.
            snapshot: Saves and loads the adapter's state, in jobs with `exact_restart`. In a process that replaces
                another one, the saved state has been loaded when this returns.
            data: DataLoader of the training set, for DP-SGD.
            steps: Returns how far the trainer is within the round; see `Session.start`.

        Returns:
            The first task.

        Raises:
            ConfigError: If the model, the data or the job do not allow DP-SGD.
        """
        arrays, facts = live.arrays(), live.agreement(self.framework)

        def start() -> Task:
            session = self.session()
            live.local.home = session.home
            session.register(
                arrays,
                agreement={**facts, **names()},
                rounds=rounds,
                evaluates=evaluates,
                cross_evaluates=evaluates,
                restarts=snapshot is not None,
                capabilities=live.capabilities,
                terms=session.settings.terms(live.content, best),
                encoding=live.encoding,
            )
            if self.options.dp_sgd is not None:
                live.train_privately(
                    self.options.dp_sgd, data, self._ledger_host(session, self.options.dp_sgd.trainings)
                )
            return session.start(lambda: live.arrays() if snapshot else arrays, snapshot=snapshot, steps=steps)

        return self._begin_task(live, ranks.on_rank_zero(start))

    def exchange(self, live: LiveModel, result: LocalResult, *, more: bool) -> ArrivedTask | None:
        """Send this site's weights, and wait for the next task. The live model is not changed.

        Args:
            live: The trained model.
            result: Result of the training since the last exchange.
            more: Whether the trainer could go on after this step. If not, a round has no second phase.

        Returns:
            The next task, or None if the round has a second phase. It begins now, with the personal model in place of
            the global one, and trains the same budget again.
        """
        round_result = live.local.end_phase(result, more=more)
        if round_result is None:
            return None
        if live.private is not None:
            round_result = live.private.spend(round_result)
        arrays, moments = live.arrays(), live.moments()

        def exchange() -> Task:
            session = self.session()
            extras = {**moments, **live.local.extras(arrays)}  # before `submit` saves a state that depends on them
            status = session.submit(arrays, round_result, extras=extras, held_back=live.held_back)
            live.local.submitted(status)
            return session.next_task()

        return self._begin_task(live, ranks.on_rank_zero(exchange))

    def save_within(self, state: State) -> None:
        """Save a restart point in the middle of a round. Not collective: `exact_restart` needs one process at a site.

        Args:
            state: What `TorchSnapshot.save_within` returned.
        """
        restart = self.session().restart
        if restart is not None:
            restart.save_within(state)

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of the model that arrived last.

        Args:
            metrics: Metrics on this site's own validation data.
            num_examples: Number of validation examples.
        """
        ranks.on_rank_zero(lambda: self.session().report(metrics, num_examples))

    def cross_evaluate(self, live: LiveModel, evaluate: Callable[[], None]) -> None:
        """Score every site's model here, if the job asks for it, and put the final weights back afterwards.

        Call it when the final weights are in the model, kept by `live.keep_final`, and have been scored.

        Args:
            live: The model.
            evaluate: Scores the live model as it is and calls `report`. A model without a report counts as one without
                metrics.
        """
        if not live.cross_site:
            return
        while self._load_next(live):
            evaluate()
        live.restore_final()

    def _load_next(self, live: LiveModel) -> bool:
        task = ranks.on_rank_zero(lambda: self.session().results.next_to_score())
        if not ranks.share(task is not None):
            return False
        live.load(task.arrays if task else None)
        return True

    def finish(self, live: LiveModel, export: Export) -> None:
        """Leave the run after its last round, and export the personal model, if any, to this site's own folder.

        Args:
            live: The model, with the final weights.
            export: Writes the live model to a folder in the framework's format. In a simulation one site writes the
                final and the best model with it, whether or not it has scored any. It is called on rank 0, and on
                every rank if the model is sharded.
        """
        live.local.close()
        personal = live.local.personal
        if live.sharded:
            functions: ranks.Functions = {"load": live.load, "export": lambda folder: export(ranks.share(folder))}
            ranks.on_rank_zero_with(
                functions,
                lambda call: self.session().finish(export=partial(call, "export"), load=partial(call, "load")),
            )
            return

        def leave() -> None:
            session = self.session()
            if personal is not None:
                with personal.in_place():
                    export(str(session.home.folder / PERSONAL))
            session.finish(export=export, load=live.state.set_state)

        ranks.on_rank_zero(leave)

    def leave(self, reason: BaseException | LeaveReason) -> None:
        """Leave the run early. The quorum decides whether the other sites go on.

        Not collective. On other ranks than 0 it does nothing.

        Args:
            reason: Why: an exception, or a reason with a public part.
        """
        if ranks.is_rank_zero():
            self.session().leave(reason)

    def session(self) -> Session:
        """Return the session. Only rank 0 may call this."""
        return running_session(self.options, framework=self.framework)

    def _ledger_host(self, session: Session, trainings: int) -> FilterHost:
        """Return this site as the place where DP-SGD spends its budget, and keeps the ledger of it."""
        kit = current_kit(self.options.kit)
        assert kit is not None  # there is a session
        folder, budget = kit.credentials or kit.folder, policy_gate_of(kit).budget
        plan = Participation.every_round(session.rounds, trainings)
        return FilterHost(session.name, session.job, Path(folder), budget=budget, participation=plan)

    def _begin_task(self, live: LiveModel, task: Task | None) -> ArrivedTask:
        arrived = self._share_task(task)
        if live.private is not None and task is not None and task.kind == "train":
            live.private.begin(task.round)
        live.apply_task_config(task, over=arrived.kind == "final")
        return arrived

    def _share_task(self, task: Task | None) -> ArrivedTask:
        facts = None
        if task is not None:
            session = self.session()
            facts = [task.kind, session.local_round, session.stats.log_row(), session.round_seed]
        kind, number, row, seed = ranks.share(facts)
        return ArrivedTask(task, kind, number, row, seed)
