"""A site's session on all ranks of a torch trainer: rank 0 talks to the federation, the others follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.outputs import PERSONAL
from fl_adapters.participant.registry import open_session, running_session
from fl_adapters.participant.session import Session
from fl_adapters.torch import ranks
from fl_adapters.torch.live_model import LiveModel
from fl_runtime.types import Arrays, Metrics, Task, Terms


@dataclass(frozen=True)
class Joined:
    """What a site knows once it has joined, the same on every rank.

    Attributes:
        job: Name of the run.
        settings: Settings that hold at this site.
        folders: Output folders to use, by the names under which `join` was given others. Those of a simulated site lie
            below its run.
    """

    job: str
    settings: SiteSettings
    folders: Mapping[str, str]


@dataclass(frozen=True)
class Arrived:
    """A task that has arrived at this site.

    Attributes:
        task: The task, on rank 0 alone.
        kind: Its kind: "train" or "final".
        round: Number of rounds this site has trained, this one included; see `Session.local_round`.
        row: Round, bytes and seconds of the last exchange, for the framework's own logs.
        seed: Seed of the round's random states, for jobs with `exact_restart`; else None.
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

    def join(self, folders: Mapping[str, str] | None = None) -> Joined | None:
        """Open a new session for one training; None outside a federation.

        Args:
            folders: Output folders of the trainer, by any names.
        """

        def opened() -> tuple[str, object, dict[str, str]] | None:
            session = open_session(self.options, framework=self.framework, fresh=True)
            if session is None:
                return None
            moved = {name: session.output_dir(path) for name, path in (folders or {}).items()}
            return session.job, session.settings.to_json(), moved

        joined = ranks.share(ranks.on_rank_zero(opened))
        return None if joined is None else Joined(joined[0], SiteSettings.from_json(joined[1]), joined[2])

    def start(
        self, live: LiveModel, *, rounds: int | None, evaluates: bool, snapshot: Snapshot | None = None
    ) -> Arrived:
        """Make the handshake and receive the first task.

        Args:
            live: The model. Its weights become the initial global ones if the server asks this site for them.
            rounds: Number of rounds that the trainer's own length amounts to.
            evaluates: Whether this site scores each global model.
            snapshot: State of an adapter that restarts exactly, for jobs with `exact_restart`. In a process that comes
                back it has been loaded when this returns.
        """
        arrays, facts = live.arrays(), live.agreement(self.framework)

        def started() -> Task:
            session = self.session()
            live.local.home = session.home
            session.register(
                arrays,
                agreement=facts,
                rounds=rounds,
                evaluates=evaluates,
                cross_evaluates=evaluates,
                restarts=snapshot is not None,
                capabilities=live.capabilities,
                terms=Terms(content=live.content),
                encoding=live.encoding,
            )
            return session.start(lambda: live.arrays() if snapshot else arrays, snapshot=snapshot)

        return self._begun(live, ranks.on_rank_zero(started))

    def exchange(self, live: LiveModel, result: LocalResult, *, more: bool) -> Arrived | None:
        """Send this site's weights, and wait for the next task. The live model is not changed.

        Args:
            live: The trained model.
            result: Result of the training since the last exchange.
            more: Whether the trainer could go on after this step. If not, a round has no second phase.

        Returns:
            The next task, or None if the round has a second phase. It begins now, with the personal model in place of
            the global one, and trains the same budget again.
        """
        done = live.local.end_phase(result, more=more)
        if done is None:
            return None
        arrays, moments = live.arrays(), live.moments()

        def exchanged() -> Task:
            session = self.session()
            extras = {**moments, **live.local.extras(arrays)}  # before `submit` saves a state that depends on them
            status = session.submit(arrays, done, extras=extras, held_back=live.held_back)
            live.local.submitted(status)
            return session.next_task()

        return self._begun(live, ranks.on_rank_zero(exchanged))

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """Report the score of the model that arrived last, on `num_examples` validation examples."""
        ranks.on_rank_zero(lambda: self.session().report(metrics, num_examples))

    def cross_evaluate(self, live: LiveModel, evaluate: Callable[[], None]) -> None:
        """Score every site's model here, if the job wants that; then put the final weights back.

        Called when the final weights are in the model and have been scored. `evaluate()` scores the model as it is and
        calls `report`. A model without a report counts as one without metrics.
        """
        if not live.cross_site:
            return
        live.keep_final()
        while self._load_next(live):
            evaluate()
        live.restore_final()

    def _load_next(self, live: LiveModel) -> bool:
        task = ranks.on_rank_zero(lambda: self.session().results.next_to_score())
        if not ranks.share(task is not None):
            return False
        live.load(task.arrays if task else None)
        return True

    def finish(self, live: LiveModel, export: Callable[[str], None], load: Callable[[Arrays], None] | None) -> None:
        """Leave the run after its last round; see `Session.finish`. Exports a personal model to this site's folder."""
        live.local.close()
        personal = live.local.personal

        def finished() -> None:
            session = self.session()
            if personal is not None:
                with personal.in_place():
                    export(str(session.home.folder / PERSONAL))
            session.finish(export=export, load=load)

        ranks.on_rank_zero(finished)

    def leave(self, reason: str) -> None:
        """Leave the run early: the quorum decides whether it goes on. Not collective; only rank 0 has a say."""
        if ranks.is_rank_zero():
            self.session().leave(reason)

    def session(self) -> Session:
        """The session, on rank 0."""
        return running_session(self.options, framework=self.framework)

    def _begun(self, live: LiveModel, task: Task | None) -> Arrived:
        arrived = self._arrived(task)
        live.begin(task, over=arrived.kind == "final")
        return arrived

    def _arrived(self, task: Task | None) -> Arrived:
        facts = None
        if task is not None:
            session = self.session()
            facts = [task.kind, session.local_round, session.stats.log_row(), session.round_seed]
        kind, number, row, seed = ranks.share(facts)
        return Arrived(task, kind, number, row, seed)
