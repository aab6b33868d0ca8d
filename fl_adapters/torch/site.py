"""A site's session as the callback of a torch trainer uses it: rank 0 talks to the federation, every rank follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.outputs import PERSONAL
from fl_adapters.participant.registry import open_session, running_session
from fl_adapters.participant.session import Session
from fl_adapters.torch import ranks
from fl_adapters.torch.live_model import LiveModel
from fl_runtime.errors import FederationError
from fl_runtime.types import Arrays, Metrics, Task, Terms


@dataclass(frozen=True)
class Joined:
    """What the federation asks for. folders: output folders by the names they were given under, moved where they
    belong to this site alone."""

    job: str
    settings: SiteSettings
    folders: Mapping[str, str]


@dataclass(frozen=True)
class Arrived:
    """A task, as every rank sees it. task: rank 0's own, None on the others. kind: of the task. round: its turn at
    this site, see `Session.turn`.

    row: the federation's part of the framework's own logs: round, bytes and seconds of the exchange. seed: what the
    round's random states begin from, where the job asks for exact restarts.
    """

    task: Task | None
    kind: str
    round: int
    row: Mapping[str, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def arrays(self) -> Arrays | None:
        """The global weights, on rank 0; views of the session's buffer, valid until the next task."""
        return self.task.arrays if self.task else None


@dataclass(frozen=True)
class TorchSite:
    """Holds no session: that belongs to the process. All methods but `leave` and `session` are collective: every rank
    calls them. May block for as long as other sites take. Raise FederationError, on every rank."""

    options: Options
    framework: str

    def join(self, folders: Mapping[str, str] | None = None) -> Joined | None:
        """Open the session, a new one for each training; None outside a federation."""

        def opened() -> tuple[str, object, dict[str, str]] | None:
            session = open_session(self.options, framework=self.framework, fresh=True)
            if session is None:
                return None
            moved = {name: session.output_dir(path) for name, path in (folders or {}).items()}
            return session.job, session.settings.to_json(), moved

        told = ranks.share(ranks.on_rank_zero(opened))
        return None if told is None else Joined(told[0], SiteSettings.from_json(told[1]), told[2])

    def start(self, live: LiveModel, *, rounds: int, evaluates: bool, snapshot: Snapshot | None = None) -> Arrived:
        """The handshake and the first task. rounds: what the trainer's own budget amounts to. snapshot: of an adapter
        that can restart exactly, where the job asks for it; loaded when this returns, if there is something to load."""
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
        """A round's budget is used up: this site's weights out, and the next task in; the live model is not changed.

        None where the round has a second phase: it begins now, with the personal model in place of the global one, and
        takes the same budget again. more: whether the trainer goes on after this step; without that it has no such.
        """
        done = live.local.end_phase(result, more=more)
        if done is None:
            return None
        arrays, moments = live.arrays(), live.moments()

        def exchanged() -> Task:
            session = self.session()
            extras = {**moments, **live.local.extras(arrays)}  # before the state is saved, which has part in them
            status = session.submit(arrays, done, extras=extras, held_back=live.held_back)
            live.local.submitted(status)
            return session.next_task()

        return self._begun(live, ranks.on_rank_zero(exchanged))

    def report(self, metrics: Metrics, num_examples: int) -> None:
        """The score of the model that arrived last, on so many validation examples."""
        ranks.on_rank_zero(lambda: self.session().report(metrics, num_examples))

    def cross_evaluate(self, live: LiveModel, evaluate: Callable[[], None]) -> None:
        """Where the job wants it, once the final weights are in place and scored: every site's model in their place,
        one after the other, and the final weights again. evaluate(): scores the model as it is, and calls `report`; a
        model without a report counts as one without metrics."""
        if not live.cross_site:
            return
        live.keep_final()
        while self._load_next(live):
            evaluate()
        live.restore_final()

    def _load_next(self, live: LiveModel) -> bool:
        task = ranks.on_rank_zero(lambda: self.session().next_to_score())
        if not ranks.share(task is not None):
            return False
        live.load(task.arrays if task else None)
        return True

    def finish(self, live: LiveModel, export: Callable[[str], None], load: Callable[[Arrays], None] | None) -> None:
        """The normal end: see `Session.finish`. A personal model is exported to this site's own folder."""
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
        """The early end: the quorum decides whether the run goes on. Any rank may call it; rank 0's call counts."""
        if ranks.is_rank_zero():
            self.session().leave(reason)

    @contextmanager
    def leaving_on_error(self, forget: Callable[[], object | None]) -> Iterator[None]:
        """An error in a hook ends this site's part in the run at once, not only when the process ends.

        forget: makes the callback forget its run, and returns what it was; None if there was none.
        """
        try:
            yield
        except BaseException as error:
            if forget() is not None:
                with suppress(FederationError):  # the first error is the one to tell
                    self.leave(f"{type(error).__name__}: {error}")
            raise

    def session(self) -> Session:
        """Rank 0's session."""
        return running_session(self.options, framework=self.framework)

    def _begun(self, live: LiveModel, task: Task | None) -> Arrived:
        came = self._arrived(task)
        live.begin(task, over=came.kind == "final")
        return came

    def _arrived(self, task: Task | None) -> Arrived:
        facts = None
        if task is not None:
            session = self.session()
            facts = [task.kind, session.turn, session.stats.log_row(), session.round_seed]
        kind, number, row, seed = ranks.share(facts)
        return Arrived(task, kind, number, row, seed)
