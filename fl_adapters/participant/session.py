"""One site's life in a federation, as every callback uses it: join, agree, exchange round by round, leave.

The session belongs to the process, not to the callback object: frameworks pickle, copy and replace callbacks, while
connections and threads cannot follow. Calls are synchronous, made by one thread at a time, and may block for as
long as the slowest site trains.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.outputs import RESTART, claimed_path, own_folder
from fl_adapters.participant.policy_gate import rules_of
from fl_adapters.participant.restart import RestartPoints, round_seed
from fl_adapters.participant.site_home import SiteHome
from fl_adapters.participant.swarm import CAPABILITY, SwarmSite, is_swarm
from fl_runtime.client import SiteClient
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.filters import check_repeatable
from fl_runtime.filters.base import Home
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.filters.site import SiteFilters
from fl_runtime.store.tensorfile import write_tensors
from fl_runtime.transport.base import Transport
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.trust.secure_stream import SecureStream
from fl_runtime.types import (
    CROSS_EVALUATION,
    EXACT_RESTART,
    Arrays,
    Content,
    Metrics,
    Report,
    Summary,
    Task,
    Terms,
    Update,
)
from fl_runtime.version import VERSION
from fl_runtime.wire.finite import Inspected, check_finite, check_weight, inspect
from fl_runtime.wire.manifest import Manifest


@dataclass(frozen=True)
class RoundStats:
    """Statistics of the last exchange.

    Attributes:
        round: Number of the round that it ended.
        bytes_up: Bytes that this site sent.
        bytes_down: Bytes that this site received.
        seconds: Time from submitting until the next task was here, including the wait for other sites.
    """

    round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0

    def log_row(self) -> dict[str, float]:
        """Return the exchange as a row for the framework's own loggers: `federation_round`, bytes and seconds."""
        return {
            "federation_round": self.round,
            "federation_bytes_up": self.bytes_up,
            "federation_bytes_down": self.bytes_down,
            "federation_seconds": round(self.seconds, 6),
        }


def session_capabilities(*, cross_evaluates: bool, restarts: bool, swarm: bool) -> frozenset[str]:
    """The capabilities that a session declares at the handshake, beside those of its adapter.

    Args:
        cross_evaluates: Whether the adapter evaluates the models of other sites after the last round.
        restarts: Whether the adapter can save and restore all of its state at round boundaries.
        swarm: Whether this site can aggregate a round itself.
    """
    declared = {CROSS_EVALUATION: cross_evaluates, EXACT_RESTART: restarts, CAPABILITY: swarm}
    return frozenset(name for name, available in declared.items() if available)


class Session:
    """One attempt of this site. Task arrays are views of a buffer that the next task overwrites.

    name, index, count, job: this site's place. attempt: 1, or more after a restart. settings: what holds here.
    rounds: of the run, known after `register`. stats: of the last exchange. home: for what stays with
    this site. turn: the round of the current task as a
    trainer counts that stands still while others train: where the server draws the sites of a round, how many rounds
    this site has been given (from the first that an attempt after a restart gets, which keeps its number); else the
    round itself.
    """

    def __init__(self, kit: Kit, options: Options, framework: str, transport: Transport) -> None:
        self._kit, self._framework = kit, framework
        self._rules = rules_of(kit)
        self._client = SiteClient(transport, kit.patience_s, same_machine=kit.simulated)
        welcome = self._client.join(kit.job)
        self.name, self.index, self.count = welcome.site, welcome.index, welcome.count
        self.job, self.attempt = str(welcome.settings["name"]), welcome.attempt
        self.settings = SiteSettings.resolve(options, welcome.settings)
        self.home = SiteHome(own_folder(kit, self.job), self.count, fresh=self.attempt == 1)
        self.rounds = 0
        self.stats = RoundStats()
        self.turn = 0
        self.pid = os.getpid()
        self.registered = False
        self.closed = False
        points = self.home.folder / RESTART
        self._points = RestartPoints(points, fresh=self.home.fresh) if self.settings.exact_restart else None
        self._snapshot: Snapshot | None = None
        self._task: Task | None = None
        self._kept_final = False  # the final task's arrays are copies
        self._to_score: Task | None = None
        self._content: Content = "weights"
        self._encoding = ""
        self._swarm: SwarmSite | None = None
        with self._allowed():
            self._rules.joined(welcome.settings, framework)
            if self.settings.exact_restart:
                check_repeatable(self._rules.filters)
            self._filters = SiteFilters(welcome.settings.get("filters", ()), self._rules.filters, self._home())
            if is_swarm(self.settings.strategy):
                deadline_s = float(welcome.settings["deadline_s"])
                self._swarm = SwarmSite(self._client, self.name, self.sealed, kit.patience_s, deadline_s)

    def output_dir(self, path: str) -> str:
        """Where the framework's own output belongs: below this site's folder in a simulation, else unchanged.

        Raises ConfigError for an absolute path that another site of the simulation writes to.
        """
        return claimed_path(Path(self._kit.run), self.name, path) if self._kit.simulated else path

    def register(
        self,
        state: Arrays,
        *,
        agreement: Mapping[str, str],
        rounds: int | None,
        evaluates: bool,
        cross_evaluates: bool = False,
        restarts: bool = False,
        capabilities: frozenset[str] = frozenset(),
        terms: Terms | None = None,
        encoding: str = "",
    ) -> int:
        """Register this site's model with the server, and wait until all sites have done so.

        Args:
            state: The tensors that will travel. Names, shapes and dtypes must be equal at all sites.
            agreement: Further facts that must be equal at all sites.
            rounds: Number of rounds in the trainer's own budget, used only if the job does not specify `rounds`.
            evaluates: Whether this site reports the score of every global model.
            cross_evaluates: Whether this site calls `next_to_score` after the last round.
            restarts: Whether this site passes a snapshot to `start`, so that it supports exact restarts.
            capabilities: The adapter's own capabilities.
            terms: Settings from the script for what the job leaves open, such as the strategy that fits its updates.
            encoding: Encoding of updates whose content is "encoded". The shapes of their arrays may differ from
                those of `state`; names and dtypes may not.

        Returns:
            The number of rounds of the run.

        Raises:
            StateMismatchError: The models of the sites differ. Raised at every site.
            HandshakeError: The sites disagree in something else. Raised at every site.
            UpdateRefusedError: `state` holds values that are not finite.
        """
        check_finite(state, where=f"the model of {self.name}, before round 1")
        terms = terms or Terms()
        with self._allowed():
            self._rules.handshake(list(state), terms)
        shared = {
            **agreement,
            "every": str(self.settings.every),
            "optimizer_state": self.settings.optimizer_state,
        }
        self._filters.agree(state, weights=terms.content == "weights")
        shared |= self._filters.agreement
        info = {"framework": self._framework, "python": platform.python_version(), "fl-adapters": VERSION}
        info |= {"filters": shown} if (shown := self._filters.described()) else {}
        self.rounds = self._client.register(
            Manifest.of(state),
            agreement=shared,
            info=self._rules.info(info),
            capabilities=capabilities
            | session_capabilities(cross_evaluates=cross_evaluates, restarts=restarts, swarm=self._swarm is not None),
            rounds=0 if self.settings.rounds else rounds or 0,
            evaluates=evaluates,
            terms=terms,
        )
        self._content, self._encoding = terms.content, encoding
        self.registered = True
        return self.rounds

    def start(
        self, state: Callable[[], Arrays], extras: Arrays | None = None, snapshot: Snapshot | None = None
    ) -> Task:
        """The first task: kind "train", or "final" when the run is over already (a site that comes late).

        state() is called only where this site's own weights become the initial model, or a part of it; extras travel
        beside them. snapshot: of who registers with `restarts`. Where the job asks for that, it is
        saved before anything is sent, and in a process that comes back it has been loaded when the task is here.
        """
        self._snapshot = snapshot
        if self._points is not None and self._points.empty:
            self._save_point(None, {})
        if self._swarm is not None:
            self._swarm.start()
        task = self._next()
        if self._points is not None and self.attempt > 1:
            self._load_point(self._points, task)
        if task.kind == "initial":
            arrays = state()
            self._send(self._update(task, arrays, LocalResult(1, 0, {}), extras or {}), self._filters.initial)
            task = self._next()
        return self._received(task)

    def submit(
        self,
        arrays: Arrays,
        result: LocalResult,
        *,
        extras: Arrays | None = None,
        held_back: tuple[str, ...] = (),
    ) -> str:
        """Send this round's result; returns what it counted as: used, late, carried or duplicate.

        held_back: patterns of agreed tensors that are not among `arrays`, since this round does not change them.
        Arrays are borrowed for the call. Raises UpdateRefusedError, before anything is sent, for values that are
        not finite or num_examples below 1.
        """
        task = self._current()
        where = f"update of {self.name}, round {task.round}"
        check_weight(result.num_examples, where)
        inspected = inspect(arrays, extras or {}, where)
        self._began, self._up, self._down = time.monotonic(), self._client.bytes_up, self._client.bytes_down
        update = self._update(task, arrays, result, extras or {})
        if held_back:
            update = replace(update, encoding=json.dumps([ExcludeVars(held_back).settings()]))
        self._save_point(task, arrays)
        return self._send(update, lambda update: self._filters.outgoing(update, task), inspected)

    def next_task(self) -> Task:
        """Wait for the round to close; the next task is of kind "train" or "final"."""
        done = self._current().round
        task = self._received(self._next())
        up, down = self._client.bytes_up - self._up, self._client.bytes_down - self._down
        self.stats = RoundStats(done, up, down, time.monotonic() - self._began)
        return task

    def exchange(
        self,
        arrays: Arrays,
        result: LocalResult,
        *,
        extras: Arrays | None = None,
        held_back: tuple[str, ...] = (),
    ) -> Task:
        """`submit`, then `next_task`."""
        self.submit(arrays, result, extras=extras, held_back=held_back)
        return self.next_task()

    def report(self, metrics: Mapping[str, float | Summary], num_examples: int) -> None:
        """The score of the model that arrived last, on this site's own validation data: of the global one, or of the
        one that `next_to_score` gave."""
        version = self._to_score.version if self._to_score else None
        self._client.report(self._scored(metrics, num_examples, version))
        self._to_score = None

    def report_together(self, metrics: Mapping[str, float | Summary], num_examples: int) -> tuple[Metrics, bool]:
        """`report`, then wait for the other sites: (metrics of all together, whether the run ends with this model)."""
        return self._client.report(self._scored(metrics, num_examples), wait=True)

    def tunnel(self, accept: Callable[[Stream], None], lost: Callable[[], None]) -> Tunnel:
        """Streams to other sites through the server; the caller closes it."""
        return self._client.tunnel(accept, lost)

    def sealed(self, stream: Stream) -> SecureStream:
        """A stream that the server cannot read; call its `meet` first. Sends this end's key, signed where the sites
        have certificates."""
        return SecureStream(stream, self.name, self._rules.stream_identity())

    def best(self) -> Task:
        """After the "final" task: the best round's model, once all sites have reported on the last one."""
        self._keep_final()
        with self._allowed():
            return self._filters.received(self._client.next_task(best=True))

    def next_to_score(self) -> Task | None:
        """Where the job wants cross-site evaluation, after the "final" task and its report: another model to evaluate
        on this site's own validation data and then to `report` on; without a report it counts as one without metrics.

        The global model (where it has no report yet), then every site's own; None when there is none left. A site that
        calls this has registered with `cross_evaluates`.
        """
        if not self.settings.cross_site:
            return None
        if self._to_score is not None:
            self.report({}, 1)
        self._keep_final()
        task = self._client.next_task(evaluate=True)
        if task.kind != "evaluate":
            return None
        with self._allowed():
            self._to_score = self._filters.received(task)
        return self._to_score

    def cross_evaluate(self, evaluate: Callable[[Arrays], tuple[Mapping[str, float | Summary], int]]) -> None:
        """All that `next_to_score` gives, one after the other.

        evaluate(arrays) -> (metrics on this site's own validation data, how many examples they are of); the arrays
        are valid for the call.
        """
        while task := self.next_to_score():
            self.report(*evaluate(task.arrays))

    def finish(
        self,
        export: Callable[[str], None] | None = None,
        load: Callable[[Arrays], None] | None = None,
    ) -> None:
        """The normal end, after a "final" task. Leaves the run.

        One site of a simulation also writes the results: export(folder) is called for runs/<job>/model with the
        model as it is, and, given `load`, for runs/<job>/best with the best round's weights loaded; the final
        weights are loaded back afterwards.
        """
        final = self._current()
        if export is None and self._filters.encrypts and self._kit.simulated and final.config.get("export"):
            write_tensors(Path(self._kit.run, "model", "model.safetensors"), final.arrays)  # the server cannot
            write_tensors(Path(self._kit.run, "best", "model.safetensors"), self.best().arrays)
        if export is not None and self._kit.simulated and final.config.get("export"):
            export(str(Path(self._kit.run, "model")))
            if load is not None:
                load(self.best().arrays)
                export(str(Path(self._kit.run, "best")))
                load(self._current().arrays)
        self._end("all rounds are done", early=False)

    def leave(self, reason: str) -> None:
        """An early end (a local early stop, an error): the quorum decides whether the run goes on."""
        self._end(reason, early=True)

    def hand_over(self) -> None:
        """End this attempt without leaving the run: another attempt of this site goes on in its place."""
        self.closed = True
        if self._swarm is not None:
            self._swarm.close()
        self._client.close()

    def _next(self) -> Task:
        return self._swarm.next_task() if self._swarm is not None else self._client.next_task()

    def _end(self, reason: str, *, early: bool) -> None:
        if not self.closed:
            self.closed = True
            if self._swarm is not None:
                self._swarm.close()
            self._client.leave(self._rules.leaving(reason, early=early), early=early)
            self._client.close()

    def _keep_final(self) -> None:
        """Other models are about to come into the buffer that the final one lies in: whoever is to export it needs a
        copy."""
        final = self._current()
        if not self._kept_final and self._kit.simulated and final.config.get("export"):
            copies = {name: np.copy(array) for name, array in final.arrays.items()}
            self._task, self._kept_final = replace(final, arrays=copies), True

    @property
    def round_seed(self) -> int | None:
        """What this round's random states begin from, of every framework that the script uses; None where the job does
        not ask for exact restarts."""
        return None if self._points is None else round_seed(self.settings.seed, self.name, self._current())

    @property
    def exchanges_all(self) -> bool:
        """Whether all that an adapter gives is meant to travel, rather than what patterns admit."""
        return isinstance(self.settings.exchange, str) and not self.settings.keep_local

    def _save_point(self, done: Task | None, arrays: Arrays) -> None:
        """This site's state after the work for `done`, whose result is `arrays`."""
        if self._points is not None and self._snapshot is not None:
            held_back = dict(self._filters.held_back(arrays))
            state = {"turn": self.turn, "held_back": held_back, "own": self._snapshot.save()}
            self._points.save(done, state)

    def _load_point(self, points: RestartPoints, task: Task) -> None:
        state = points.before(task)
        if state is not None and self._snapshot is not None:
            self.turn = state["turn"]
            self._filters.restore(state["held_back"])
            self._snapshot.load(state["own"])

    def _current(self) -> Task:
        if self._task is None or self.closed:
            raise ConfigError("this session has no task: it has not started, or it has ended", where=self.name)
        return self._task

    def _scored(self, metrics: Mapping[str, float | Summary], num_examples: int, version: int | None = None) -> Report:
        """version: of the model that was scored; None: the one that arrived last."""
        version = self._current().version if version is None else version
        report = Report(self.job, version, self.name, metrics, num_examples)
        with self._allowed():
            sent = self._filters.report(report)
            self._rules.report(sent)
        return sent

    def _home(self) -> Home:
        """Where this site's filters keep what they must remember."""
        folder = self._kit.credentials or self._kit.folder
        shared = Path(self._kit.run, "sites") if self._kit.simulated else None
        return Home(self.name, self.job, Path(folder) if folder else None, budget=self._rules.budget, shared=shared)

    def _received(self, task: Task) -> Task:
        with self._allowed():
            if self._rules.received(task):
                self._filters.set_own(self._rules.filters, self._rules.budget)
            self._task = self._filters.received(task)
        counts = self.turn > 0 or self.attempt == 1 or self._points is not None
        waited = task.kind == "train" and task.config.get("drawn") and counts
        self.turn = self.turn + 1 if waited else task.round
        return self._task

    def _send(self, update: Update, filtered: Callable[[Update], Update], inspected: Inspected | None = None) -> str:
        """The one way out for arrays. inspected: what is known of those of `update`."""
        with self._allowed():
            self._rules.may_travel([*update.arrays, *update.extras], update.round)
            sent = filtered(update)
            self._rules.outgoing(sent)
            if self._swarm is not None and update.round > 0:  # the tensors go to the round's aggregator
                sent = self._swarm.receipt(sent)
        return self._client.submit(sent, inspected)

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        """Where the policy or a filter says no, the site leaves with that reason: the others need not wait for it."""
        try:
            yield
        except FederationError as error:
            self.leave(error.what)
            raise

    def _update(self, task: Task, arrays: Arrays, result: LocalResult, extras: Arrays) -> Update:
        return Update(
            job=self.job,
            round=task.round,
            stage=task.stage,
            site=self.name,
            attempt=self.attempt,
            base_version=task.version,
            arrays=arrays,
            num_examples=int(result.num_examples),
            local_steps=result.local_steps,
            metrics=result.metrics,
            extras=extras,
            content=self._content,
            encoding=self._encoding,
        )
