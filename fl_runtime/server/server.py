"""The server of one job as one object, to be embedded in a process such as that of `fl-adapters simulate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fl_runtime.aggregation import make_strategy
from fl_runtime.aggregation.metrics.pooling import to_json
from fl_runtime.errors import AbortedError, ConfigError, PermissionDeniedError
from fl_runtime.filters import check_budgets, check_filters
from fl_runtime.secure_sum.requirements import check_secure_sum
from fl_runtime.server.courses.virtual import VirtualSites
from fl_runtime.server.records.events import Events
from fl_runtime.server.records.results import RunResult
from fl_runtime.server.trainings.training import TrainingOptions
from fl_runtime.server.trainings.trainings import Trainings
from fl_runtime.store.lock import FolderLock
from fl_runtime.store.stores import FolderStore, Store
from fl_runtime.transport.base import Service
from fl_runtime.transport.turns import MEMORY_MIB
from fl_runtime.transport.waiting import Clock, SystemClock
from fl_runtime.types import Listener, RunSettings, Strategy

_THREADS_PER_SITE = 4  # presence, a waiting Next, streams, and a call of the process that takes over
_SPARE_THREADS = 8
_GRACE_S = 0.5


class Server:
    """The server of one job: it runs the job in its folder, from the beginning or from where its journals stand.

    Threads of its own do all the work. Its methods may be called from any thread.

    Attributes:
        service: The service that a transport serves, such as the memory transport of tests.
        trainings: The job's trainings: one, unless the sites' scripts train more than once.

    Example:
        ```python
        server = Server(settings, Path("runs/job"), {"site-1": "secret 1", "site-2": "secret 2"})
        address = server.start()
        server.wait()
        server.export(Path("runs/job/model"))
        server.close()
        ```
    """

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        tokens: Mapping[str, str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        listeners: Sequence[Listener] = (),
        share: bool = False,
        record: bool = False,
        strategy: Strategy | None = None,
        virtual: VirtualSites | None = None,
        clock: Clock | None = None,
        store: Store | None = None,
        memory_mib: int = MEMORY_MIB,
    ) -> None:
        """Open the job's folder, and recover the runs whose journals are there.

        Args:
            settings: The job's settings.
            folder: Folder of the job. The server's part of it is the folder `server` in it. Further trainings of the
                sites' scripts have the folders 2, 3, and so on in it.
            tokens: Secret of every site, by its name. Who sends the secret is the site.
            host: Address to serve on.
            port: Port to serve on, or 0 for a free one.
            listeners: Called with each event of the job, one at a time and in order.
            share: True if all sites run on this machine, for the same user. Large payloads then stay in files that both
                sides map, and only messages about them cross the socket.
            record: True to write history.csv, events.jsonl and TensorBoard files into the folder of each training.
            strategy: A strategy to use in place of the one that `settings` name, such as a workflow of one's own.
            virtual: The sites, if they have no processes that call the server.
            clock: Measures absences and timeouts; None for this machine's.
            store: Keeps journals and tensors; None to keep them in the job's folder.
            memory_mib: The server's own memory over gRPC, beside mapped files, in MiB; at least 128. Large transfers
                take turns to stay below it.

        Raises:
            ConfigError: The settings cannot work, or the folder holds a run with other settings.
            StoreError: The folder is in use by another server, cannot be written, or is damaged.
        """
        check_settings(settings, strategy)
        self._lock = FolderLock(folder / "server")
        self._host, self._port, self._tokens, self._memory_mib = host, port, dict(tokens), memory_mib
        self._events = Events(listeners)
        options = TrainingOptions(share, strategy, virtual, clock or SystemClock(), store or FolderStore())
        try:
            self.trainings = Trainings(settings, folder, self._events, options, record=record)
            self._finished = self.trainings.newest.over_before
        except BaseException:
            self._events.close()
            self._lock.close()
            raise
        self.service: Service = self.trainings
        self._stop_serving: Callable[[float], None] | None = None

    def start(self) -> str:
        """Serve over gRPC and begin the run.

        Returns:
            The address that sites connect to, as "host:port".

        Raises:
            ConfigError: The port is in use.
        """
        from fl_runtime.transport.grpc import GrpcServer, tokens_to_names

        threads = _THREADS_PER_SITE * len(self._tokens) + _SPARE_THREADS
        authenticate, sites = tokens_to_names(self._tokens), len(self._tokens)
        server = GrpcServer(self.service, authenticate, threads, sites, memory_mib=self._memory_mib)
        address = server.start(self._host, self._port)
        self._stop_serving = server.stop
        self.begin()
        return address

    def begin(self) -> None:
        """Begin the run without serving over gRPC. Something else must serve `service`."""
        self.trainings.begin()

    def site_left(self, name: str, reason: str) -> None:
        """Tell the job that a site's process is known to be dead, or has ended.

        Args:
            name: Name of the site.
            reason: Why it is dead, for the events and error messages.
        """
        self.trainings.site_left(name, reason)

    def refuse(self, name: str, reason: str, training: int = 1, attempt: int | None = None) -> bool:
        """Note that a site takes part no more. It speaks for a process that has ended, or that it does not start.

        Args:
            name: Name of the site.
            reason: Why, for the events and error messages.
            training: Training that the process joined last, from 1.
            attempt: Number of the process there; None if the site has started none.

        Returns:
            False if another process of the site takes part, which goes on.
        """
        return self.trainings.refuse(name, reason, training, attempt)

    def expel(self, name: str, reason: str) -> None:
        """Exclude a site that may not take part any more. Its calls under way are refused.

        Args:
            name: Name of the site.
            reason: Why, for the events and for the site's error.
        """
        error = PermissionDeniedError(
            f"{name} may not take part any more: {reason}",
            where=f"rule certificate: {reason}",
            fix="join again with a new certificate",
        )
        self.trainings.expel(name, error)

    def state(self) -> dict[str, Any]:
        """Where the newest training stands, for people to read.

        Returns:
            JSON values: `phase`, `training` (its number), `round` (under way, or closed last), `rounds` (None before
            the handshake), `newest` (the round that was closed last, with its metrics), `sites` (name to state),
            `versions` (name to version of fl-adapters, of sites that have registered), `connected` (names of the sites
            whose processes are connected now), and `error` (None unless the run failed).
        """
        training = self.trainings.newest
        state, membership, scores = training.run.state, training.run.membership, training.run.scoring.scores
        with state.lock:
            members, now = membership.members.values(), membership.clock.now()
            newest = state.results[-1].round if state.results else 0
            return {
                "phase": state.phase,
                "training": training.number,
                "round": state.open_round.round if state.open_round else len(state.results),
                "rounds": None if state.plan.strategy.open_ended else state.plan.rounds,
                "newest": {"round": newest, "metrics": to_json(scores.of(newest))} if newest else None,
                "sites": {member.name: state.standing_of(member, now) for member in members},
                "versions": {m.name: m.registration.version for m in members if m.registration},
                "connected": [member.name for member in members if member.attending > 0],
                "error": state.error.to_wire() if state.error else None,
            }

    def is_present(self, site: str) -> bool:
        """Return whether a process of a site takes part in the newest training at this moment."""
        run = self.trainings.newest.run
        with run.state.lock:
            return site in run.membership.joined()

    @property
    def training_count(self) -> int:
        """Number of trainings so far: one, unless the sites' scripts train more than once."""
        return self.trainings.count

    @property
    def finished(self) -> bool:
        """True if the job had ended well before this server was made, so that there is nothing to continue."""
        return self._finished

    def abort(self, reason: str) -> None:
        """End the job with an AbortedError that every site gets.

        Args:
            reason: The message of that error.
        """
        self.trainings.fail(AbortedError(reason))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the job is done or has failed, and its listeners have been called with all events.

        The job is done once its last training has ended, and no site's script can begin another one.

        Args:
            timeout_s: How long to wait, in seconds; None for as long as it takes.

        Returns:
            True once the job has ended, False after the timeout.
        """
        return self.trainings.wait(timeout_s) and self.delivered(timeout_s)

    def delivered(self, timeout_s: float | None = None) -> bool:
        """Wait until the listeners have been called with all events so far. Must not be called by a listener.

        Args:
            timeout_s: How long to wait, in seconds; None for as long as it takes.

        Returns:
            True once they have, False after the timeout.
        """
        return self._events.delivered(timeout_s)

    def result(self, training: int = 1) -> RunResult:
        """The rounds of a training so far, with the validation metrics that sites have reported.

        Args:
            training: Number of the training, from 1 to `training_count`.

        Returns:
            A snapshot; it does not change while the run goes on. Its error is that of the job.
        """
        return self.trainings.result(training)

    def export(self, folder: Path, which: Literal["final", "best"] = "final", *, training: int = 1) -> Path | None:
        """Write a global model as `folder`/model.safetensors, or in the strategy's own format.

        Args:
            folder: Folder to write to; it is made if it does not exist.
            which: The newest model, or the best one so far.
            training: Number of the training, from 1 to `training_count`.

        Returns:
            The file, or None if there is no such model.

        Raises:
            StoreError: The file cannot be written.
        """
        return self.trainings.export(training, folder, which)

    def close(self) -> None:
        """Stop serving and deliver the last events. Nothing touches the job's files any more when it returns.

        A job that has not ended can be continued later, by another server for the same folder.
        """
        if self._stop_serving:
            self._stop_serving(_GRACE_S)
        self.trainings.close()
        self._events.close()
        self.trainings.close_histories()
        self._lock.close()


def check_settings(settings: RunSettings, strategy: Strategy | None = None) -> None:
    """Check the settings of a job before it is started.

    Args:
        settings: The job's settings.
        strategy: A strategy to use in place of the one that `settings` name.

    Raises:
        ConfigError: The settings cannot work.
    """
    if strategy is None and settings.strategy:  # without one in the job, the sites may name it
        strategy = make_strategy(settings.strategy)
    check_filters(settings.filters, settings.optimizer_state, strategy)
    check_secure_sum(settings, strategy)
    if not settings.sites or len(set(settings.sites)) != len(settings.sites):
        raise ConfigError(f"the sites of a job need distinct names, not {list(settings.sites)}")
    if settings.min_sites > len(settings.sites):
        raise ConfigError(
            f"min_sites is {settings.min_sites}, but the job has {len(settings.sites)} sites",
            fix="lower min_sites or add sites",
        )
    check_budgets(settings.filters, settings, strategy)
