"""The session of a site: join a run, register, exchange round by round, report, finish or leave.

Every adapter uses it. A session belongs to the process and not to the callback object, because frameworks pickle,
copy and replace callbacks, while connections and threads cannot follow. One thread at a time may call it. Calls block
for as long as the slowest site trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.departure import Departure, ScriptNote, folder_for_notes, trains_after
from fl_adapters.participant.gate import Gate
from fl_adapters.participant.identity import Site, own_data
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.local_result import LocalResult, UpdateHeader
from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.participant.outputs import RESTART, SiteHome, claimed_path, own_folder
from fl_adapters.participant.policy_gate import LeaveReason
from fl_adapters.participant.protocols.base import RoundProtocol
from fl_adapters.participant.protocols.choice import protocol_of
from fl_adapters.participant.restart import SiteRestart, round_seed
from fl_adapters.participant.results import Export, Results
from fl_runtime.capabilities import CROSS_EVALUATION, EXACT_RESTART, FINAL_SCORE, SUMS, SWARM
from fl_runtime.client import SiteClient
from fl_runtime.client.local_training import StepCount
from fl_runtime.client.meter import RoundStats, TransferMeter
from fl_runtime.client.site_client import Welcome
from fl_runtime.errors import ConfigError
from fl_runtime.filters.exclude import ExcludeVars
from fl_runtime.trainings import job_of
from fl_runtime.transport.base import Transport
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.trust.streams.secure_stream import SecureStream
from fl_runtime.types import MODEL_SETTINGS, MOST_ROUNDS, Arrays, Metrics, Report, Summary, Task, Terms
from fl_runtime.wire.finite import check_finite, check_weight, inspect
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.names import Facts

_FINISHED = "all rounds are done"


def session_capabilities(*, cross_evaluates: bool, restarts: bool, swarm: bool) -> frozenset[str]:
    """Return the capabilities that a session declares at the handshake, beside those of its adapter.

    Args:
        cross_evaluates: Whether the adapter evaluates the models of other sites after the last round.
        restarts: Whether the adapter can save and restore all of its state at round boundaries.
        swarm: Whether this site can aggregate a round itself.

    Returns:
        Names of capabilities.
    """
    declared = {CROSS_EVALUATION: cross_evaluates, EXACT_RESTART: restarts, SWARM: swarm}
    return frozenset(name for name, available in declared.items() if available)


class Session:
    """One process of a site in one run. The order of calls:

    1. `register`: the handshake.
    2. `start`: the first task.
    3. `submit` and `next_task`, or `exchange` for both, until a task of kind "final" arrives. `report` may follow
       each task.
    4. `results.best`, `results.next_to_score`, as far as the adapter supports them.
    5. `finish`. Or `leave`, at any time.

    Arrays of tasks are views of one buffer: they are valid until the next task arrives, and may be written to.

    Attributes:
        site: Name and index of this site, number of sites, and name of the job.
        settings: The settings that hold at this site.
        home: This site's own folder in the training.
        results: Export, best model and cross-site evaluation at the end of the run.
        rounds: Number of rounds of the run; 0 before `register`.
        local_round: Number of rounds this site has trained. Differs from `task.round` only when the server samples
            sites. Without a restart point, a restarted process starts from its first task's round.
        departure: How this site leaves the run.
        restart: Restart points of this site, in jobs with `exact_restart`; else None.
    """

    def __init__(
        self, kit: Kit, options: Options, framework: str, transport: Transport, before: Site | None = None
    ) -> None:
        """Join the run that the kit belongs to.

        Args:
            kit: The site's startup kit.
            options: The script's arguments.
            framework: Name of the training framework, such as "keras".
            transport: Connection to the server. The session closes it when it ends.
            before: The place of the script's training before, or None if this is its first.

        Raises:
            FederationError: The server cannot be reached or refuses the site, or the site's policy refuses the job.
        """
        self.rounds = 0
        self._protocol: RoundProtocol | None = None
        self._gate, data = Gate(kit, framework, self.leave), own_data(kit)
        local = kit.simulated and not kit.credentials  # a server with a certificate is elsewhere, whatever it says
        self._client = SiteClient(transport, kit.patience_s, own_patience=kit.own_patience, same_machine=local)
        welcome = self._join(kit, options, framework, before)
        job, training = str(welcome.settings["name"]), max(welcome.training, 1)
        self._kit = kit = kit.of_training(training)
        self.site = Site(welcome.site, welcome.index, welcome.count, job, data, training=training)
        trains_again = bool(welcome.training) and trains_after(training, welcome.settings.get("trainings"))
        self.departure = Departure(
            self._client,
            self._gate,
            kit,
            ScriptNote(job, welcome.attempt),
            trains_again=trains_again,
            registered=lambda: self.registered,
            on_close=self._close,
        )
        self.home = SiteHome(own_folder(kit, job), welcome.count, fresh=welcome.attempt == 1)
        self.results = Results(
            self._client,
            self._gate,
            kit,
            self.home.folder,
            cross_site=self.settings.cross_site,
            current_task=self._current,
            report=self.report,
        )
        self.local_round = 0
        points = self.home.folder / RESTART
        self.restart = SiteRestart(points, fresh=self.home.fresh) if self.settings.exact_restart else None
        self._task: Task | None = None
        self._header = UpdateHeader(job, welcome.site, welcome.attempt)
        self._meter = TransferMeter(self._client)
        self._gate.join(welcome.site, welcome.settings)
        with self._gate.leaving_on_refusal("join"):
            self._protocol = protocol_of(
                self._client, self._gate, kit, self._header, welcome.settings, self.settings, self.seal, self.home
            )

    @property
    def name(self) -> str:
        """Name of this site."""
        return self.site.name

    @property
    def job(self) -> str:
        """Name of the job."""
        return self.site.job

    @property
    def attempt(self) -> int:
        """Number of this process among those of the site in this run: 1, or more after a restart."""
        return self._header.attempt

    @property
    def closed(self) -> bool:
        """Whether this session has ended."""
        return self.departure.closed

    @property
    def registered(self) -> bool:
        """Whether the handshake is done."""
        return self.rounds > 0

    @property
    def stats(self) -> RoundStats:
        """Bytes and seconds of the last exchange."""
        return self._meter.stats

    @property
    def round_seed(self) -> int | None:
        """Seed for all random states of the current round, or None unless the job asks for exact restarts."""
        if self.restart is None:
            return None
        return round_seed(self.settings.seed, self.name, self._current(), self.site.training)

    @property
    def exchanges_all(self) -> bool:
        """Whether neither `exchange` nor `keep_local` has name patterns."""
        return isinstance(self.settings.exchange, str) and not self.settings.keep_local

    def output_dir(self, path: str) -> str:
        """Return where the framework's own output belongs.

        Args:
            path: Output folder that the script names.

        Returns:
            A folder below this site's own if the run has a folder, else `path`.

        Raises:
            ConfigError: The path is absolute, and another site of the simulation writes to it.
        """
        return claimed_path(Path(self._kit.run), self.name, path) if self._kit.run else path

    def register(
        self,
        state: Arrays,
        *,
        agreement: Facts,
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
            state: The tensors that will travel. Names, shapes and dtypes must be equal at all sites. Borrowed for
                the call.
            agreement: Further facts that must be equal at all sites: texts, and lists of names.
            rounds: Number of rounds in the trainer's own budget, used only if the job does not specify `rounds`.
            evaluates: Whether this site reports the score of every global model.
            cross_evaluates: Whether this site calls `results.next_to_score` after the last round.
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
        filters = self._gate.register(state, terms)
        relayed, masked = self.settings.plan.relayed, self.settings.secure_sum
        capabilities |= session_capabilities(cross_evaluates=cross_evaluates, restarts=restarts, swarm=relayed)
        if masked:  # scores leave with updates, so there are none of the last model
            evaluates, capabilities = False, capabilities - {FINAL_SCORE}
        with self._gate.recording("register"):
            facts = self.settings.declared({**agreement, **filters})
            declared, software = self._gate.declare(facts, self.settings.training_info)
            self.rounds = self._client.register(
                Manifest.of(state),
                agreement=declared,
                info=software,
                capabilities=capabilities,
                rounds=0 if self.settings.rounds else rounds or 0,
                evaluates=evaluates,
                terms=terms,
                rules=self._gate.cohort.rules,
            )
        self._header = replace(self._header, content=terms.content, encoding=encoding)
        return self.rounds

    def start(
        self,
        state: Callable[[], Arrays],
        extras: Arrays | None = None,
        snapshot: Snapshot | None = None,
        steps: Callable[[], StepCount | None] | None = None,
    ) -> Task:
        """Wait for the first task.

        Args:
            state: Returns this site's own tensors. Called only if the server asks this site for the initial model.
            extras: Arrays that travel beside them.
            snapshot: The adapter's state; required with `restarts`. With `exact_restart` it is saved before each
                upload. After a restart it is loaded before this call returns.
            steps: Returns how far the trainer is within the round, or None if it cannot tell now. Called by another
                thread while the site trains, at most once a second.

        Returns:
            A task of kind "train"; of kind "final" if the run is over already.
        """
        if self.restart is not None:
            self.restart.begin(snapshot, self.local_round)
        if self._protocol is not None:
            self._protocol.start()
        if (folder := folder_for_notes(self._kit)) is not None:
            self._client.training.leave_notes(folder, self.job, self.rounds if self.rounds < MOST_ROUNDS else 0)
        self._client.training.share(steps, self._gate.shares_progress)
        task = self._wait()
        point = self.restart.load(task) if self.restart is not None else None
        if point is not None:
            self.local_round, own_values = point
            self._gate.restore(own_values)
        if task.kind == "initial":
            update = self._header.update(task, state(), LocalResult(1, 0, {}), extras or {})
            self._client.submit(self._gate.send_initial(update))
            task = self._wait()
        return self._receive(task)

    def submit(
        self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None, held_back: tuple[str, ...] = ()
    ) -> str:
        """Send this round's update.

        Args:
            arrays: The trained tensors. Borrowed for the call.
            result: Number of examples, steps and metrics of the local training.
            extras: Arrays that travel beside the weights. Borrowed for the call.
            held_back: Patterns of agreed tensors that `arrays` leaves out, because this round does not change them.

        Returns:
            How the server counted the update: "used", "late", "carried", or "duplicate" (it is there already).

        Raises:
            UpdateRefusedError: Values are not finite, or `num_examples` is below 1. Raised before anything is sent.
            PermissionDeniedError, PrivacyBudgetError: The site's policy or a privacy budget does not allow the update.
        """
        task = self._current()
        where = f"update of {self.name}, round {task.round}"
        self._gate.check_registered(arrays, where)
        check_weight(result.num_examples, where)
        inspected = inspect(arrays, extras or {}, where)
        self._meter.begin()
        update = self._header.update(task, arrays, result, extras or {})
        if held_back:
            update = replace(update, encoding=json.dumps([ExcludeVars(held_back).settings()]))
        if self.restart is not None:
            self.restart.save(task, self.local_round, self._gate.own_values(arrays))
        sent = self._gate.send_update(update, task)
        if self._protocol is None:
            counted = self._client.submit(sent, inspected)
        else:
            with self._gate.leaving_on_refusal("send update", task.round):
                sent = self._protocol.outgoing(sent)
            counted = self._client.submit(sent)
        self._gate.tracking.add(task.round, result.metrics)
        return counted

    def next_task(self) -> Task:
        """Wait for the next task, which comes once the round has closed.

        Returns:
            The next task, of kind "train" or "final".
        """
        done = self._current().round
        task = self._receive(self._wait())
        self._meter.end(done)
        self.departure.note_bytes()
        return task

    def exchange(
        self, arrays: Arrays, result: LocalResult, *, extras: Arrays | None = None, held_back: tuple[str, ...] = ()
    ) -> Task:
        """Send this round's update and wait for the next task.

        Args:
            arrays: The trained tensors. Borrowed for the call.
            result: Number of examples, steps and metrics of the local training.
            extras: Arrays that travel beside the weights. Borrowed for the call.
            held_back: Patterns of agreed tensors that `arrays` leaves out; see `submit`.

        Returns:
            The next task, of kind "train" or "final".

        Raises:
            UpdateRefusedError, PermissionDeniedError, PrivacyBudgetError: As in `submit`.
        """
        self.submit(arrays, result, extras=extras, held_back=held_back)
        return self.next_task()

    def report(self, metrics: Mapping[str, float | Summary], num_examples: int) -> None:
        """Report the score of the last received model: a global one, or one from `results.next_to_score`.

        Args:
            metrics: Metrics on this site's own validation data.
            num_examples: Number of validation examples.
        """
        report = self._gated_report(metrics, num_examples, self.results.version_to_report())
        if self._protocol is None or not self._protocol.keeps(report):
            self._client.report(report)

    def report_together(self, metrics: Mapping[str, float | Summary], num_examples: int) -> tuple[Metrics, bool]:
        """Report the score of the current global model and wait for the reports of the other sites.

        Args:
            metrics: Metrics on this site's own validation data.
            num_examples: Number of validation examples.

        Returns:
            The metrics over the data of all sites, and whether the run ends with this model.
        """
        report = self._gated_report(metrics, num_examples, self._current().version)
        with self._gate.recording("metrics of all sites", self._current().round):
            return self._client.report(report, wait=True)

    def tunnel(self, accept: Callable[[Stream], None], lost: Callable[[], None]) -> Tunnel:
        """Open a tunnel for streams to other sites through the server.

        Args:
            accept: Called with every stream that another site opens, in a thread of the tunnel.
            lost: Called when the tunnel's connection has ended, in a thread of the tunnel.

        Returns:
            The tunnel. The caller closes it.
        """
        return self._client.tunnel(accept, lost)

    def seal(self, stream: Stream) -> SecureStream:
        """Encrypt a stream to another site, so that the server cannot read it.

        Args:
            stream: A stream of the tunnel. This side's public key is sent over it, signed if sites have certificates.

        Returns:
            The encrypted stream. Call `meet()` on it before sending.
        """
        return SecureStream(stream, self.name, self._gate.stream_identity())

    def finish(
        self, export: Export | None = None, load: Callable[[Arrays], None] | None = None, *, has_model: bool = True
    ) -> None:
        """Leave the run at its normal end, after the task of kind "final".

        In a simulation, one site also writes the results: the live model to runs/<job>/model, and the best round's
        weights, if there is a best round, to runs/<job>/best. Afterwards the live model holds the final weights again.

        Args:
            export: Writes the live model to a folder in the framework's format.
            load: Loads arrays into the live model; without it, the best model is not exported.
            has_model: Whether there is a model to write. A training of sums has none.
        """
        self._current()
        if has_model:
            self.results.write(export, load)
        self.departure.leave(LeaveReason.own(_FINISHED), early=False)

    def leave(self, reason: str | BaseException | LeaveReason) -> None:
        """Leave the run early. The job's quorum decides whether the others go on.

        The others see the whole reason in a simulation, and with `reasons: true` in the policy. Else they see the
        exception's class, or the public part of a `LeaveReason`; the whole reason goes to the site's audit log.

        Args:
            reason: Why: an exception, a text, or a `LeaveReason` whose public part may leave every site.
        """
        self.departure.leave(LeaveReason.of(reason), early=True)

    def _join(self, kit: Kit, options: Options, framework: str, before: Site | None) -> Welcome:
        """Join the run and set `settings`. If the site or the server refuses, the connection is closed."""
        try:
            with self._gate.recording("join"):
                follows = job_of(before.job) if before else ""
                welcome = self._client.join(kit.job, before.training + 1 if before else 1, follows)
                if before and not welcome.training:
                    raise _one_training(kit.server)
                job = welcome.settings
                if framework == SUMS:
                    job = {name: value for name, value in job.items() if name not in MODEL_SETTINGS}
                self.settings = SiteSettings.resolve(options, job)
        except BaseException:
            self._client.close()
            raise
        return welcome

    def _close(self) -> None:
        if self._protocol is not None:
            self._protocol.close()
        finished = self._task is not None and self._task.kind == "final"
        self._gate.tracking.close(Path(self._kit.run) if self._kit.run else self.home.folder, early=not finished)

    def _current(self) -> Task:
        if self._task is None or self.closed:
            raise ConfigError("this session has no task yet, or has ended", where=self.name, fix="call start() first")
        return self._task

    def _wait(self) -> Task:
        with self._gate.recording("next task"):
            return self._protocol.next_task() if self._protocol is not None else self._client.next_task()

    def _receive(self, task: Task) -> Task:
        self._task = self._gate.receive(task)
        if self.restart is not None:
            self.restart.task = task
        knows_count = self.local_round > 0 or self.attempt == 1 or self.restart is not None
        sampled = task.kind == "train" and task.config.get("drawn")
        self.local_round = self.local_round + 1 if sampled and knows_count else task.round
        return self._task

    def _gated_report(self, metrics: Mapping[str, float | Summary], num_examples: int, version: int) -> Report:
        report = self._gate.send_report(Report(self.job, version, self.name, metrics, num_examples))
        if version <= self.rounds:  # versions after that are other sites' models
            self._gate.tracking.add(version, metrics)
        return report


def _one_training(server: str) -> ConfigError:
    return ConfigError(
        "this script trains a second time, and the server holds one training a job",
        where=server,
        fix="upgrade fl-adapters at the server, or train once in a script",
    )
