"""The metrics of a federation's server, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fl_adapters.cli.monitoring.common_metrics import CommonMetrics
from fl_adapters.cli.monitoring.health import Health, certificate_fault, disk_fault
from fl_runtime.server.federation.archive import JobState
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.types import Event

_PRESENT_S = 10.0  # a site that waits calls again at once; this bridges the moments between two calls
_ROUND_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_STATUSES = ("used", "carried", "late")


class ServerState:
    """What this process is at the moment: the federation's server, or one that stands by.

    Args:
        shares_store: Whether other servers may serve in its place.

    Attributes:
        server: The server while it serves, else None.
    """

    def __init__(self, shares_store: bool) -> None:
        self.server: FederationServer | None = None
        self._shares_store = shares_store
        self._trouble = ""

    def report(self, trouble: str) -> None:
        """Note why the store that servers share cannot be used; "" if it can."""
        self._trouble = trouble

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the federation's sites as its list of members is now; none while another server serves."""
        return self.server.queue.sites if self.server else ()

    def text(self) -> str:
        """The page `/healthz` of a process that is well."""
        if self.server:
            return "ok"
        return "ok, standing by" if self._shares_store else "ok, starting"

    def store_fault(self) -> str:
        """Return why this process could not take over; "" if it could."""
        return f"the shared store cannot be used: {self._trouble}" if self._trouble else ""

    def queue_fault(self) -> str:
        """Return why no job can run any more; "" if jobs can, or if another server serves."""
        halted = self.server.queue.halted if self.server else None
        return f"no job can run: {halted}" if halted else ""

    def audit_fault(self) -> str:
        """Return what is wrong with the audit log; "" if nothing is, or if another server serves."""
        return self.server.audit_fault() if self.server else ""


class RoundMetrics:
    """Listener that counts rounds, updates and bytes of all jobs since the process was started.

    Labels are the federation's sites and a fixed set of words, never the names of jobs or of metrics, so that their
    number does not grow with time.
    """

    def __init__(self, state: ServerState, registry: CollectorRegistry) -> None:
        """Register the counters.

        Args:
            state: Knows the federation's sites.
            registry: Where the counters are shown.
        """
        self._state = state
        self._rounds = Counter("fl_adapters_rounds", "Rounds that ended with a new global model.", registry=registry)
        self._dropped = Counter("fl_adapters_rounds_dropped", "Rounds that were begun again.", registry=registry)
        self._seconds = Histogram(
            "fl_adapters_round_duration_seconds", "Duration of rounds.", registry=registry, buckets=_ROUND_S
        )
        self._up = Counter("fl_adapters_received_bytes", "Bytes of updates from sites.", ["site"], registry=registry)
        self._down = Counter("fl_adapters_sent_bytes", "Bytes of tasks sent to sites.", ["site"], registry=registry)
        self._updates = Counter(
            "fl_adapters_updates", "Updates by what became of them.", ["site", "status"], registry=registry
        )

    def begin(self) -> None:
        """Show a zero for every site that has not sent anything, since a counter that appears late looks like none."""
        for site in self._state.sites:
            self._up.labels(site)
            self._down.labels(site)

    def __call__(self, event: Event) -> None:
        """Count an event of a job."""
        data, site = event.data, event.site if event.site in self._state.sites else "other"
        if event.kind == "round_finished":
            self._rounds.inc()
            self._seconds.observe(data["seconds"])
        elif event.kind == "round_dropped":
            self._dropped.inc()
        elif event.kind == "task_sent":
            self._down.labels(site).inc(data["bytes"])
        elif event.kind == "update":
            self._up.labels(site).inc(data["bytes_up"])
            self._updates.labels(site, data["status"] if data["status"] in _STATUSES else "unused").inc()


class StateCollector(Collector):
    """Reads queue, sites and refusals of a server at each request for the page; nothing while it stands by."""

    def __init__(self, state: ServerState) -> None:
        """Prepare the collector.

        Args:
            state: What this process is at the moment.
        """
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, with the values of this moment."""
        server = self._state.server
        about = "1 while this process is the federation's server, 0 while it stands by."
        yield GaugeMetricFamily("fl_adapters_serving", about, 0 if server is None else 1)
        if server is None:
            return
        states = Tally(record.state for record in server.queue.records())
        jobs = GaugeMetricFamily("fl_adapters_jobs", "Jobs by state; `queued` is the queue's length.", labels=["state"])
        for state in get_args(JobState):
            jobs.add_metric([state], states[state])
        yield jobs
        silent = server.silent_s()
        present = GaugeMetricFamily("fl_adapters_site_present", "1 while a site is connected, else 0.", labels=["site"])
        for site in self._state.sites:
            present.add_metric([site], float(silent.get(site, _PRESENT_S) < _PRESENT_S))
        yield present
        refused = CounterMetricFamily("fl_adapters_calls_refused", "Calls refused, by error.", labels=["error"])
        for error, count in sorted(server.refusals().items()):
            refused.add_metric([error], count)
        yield refused


class ServerMetrics:
    """The pages of one server, which may serve and stand by in turn.

    Attributes:
        state: What the process is at the moment.
        health: The checks of `/healthz`.
        rounds: Listener for the events of every job.
    """

    def __init__(self, kit: Path, data: Path, *, shares_store: bool = False) -> None:
        """Make the pages of a process that does not serve yet.

        Args:
            kit: Folder of the server's startup kit.
            data: The server's data folder.
            shares_store: Whether other servers may serve in its place.
        """
        self.state = state = ServerState(shares_store)

        def data_fault() -> str:  # a server makes the folder when it begins to serve
            return disk_fault(data if data.exists() or state.server else data.parent, "journals")

        self.health = Health(
            (state.queue_fault, data_fault, state.audit_fault, lambda: certificate_fault(kit), state.store_fault)
        )
        self._registry = CommonMetrics(kit, {"data": data}, self.health).registry()
        self._registry.register(StateCollector(state))
        self.rounds = RoundMetrics(state, self._registry)

    @contextmanager
    def serving(self, server: FederationServer) -> Iterator[None]:
        """Show the state of a server for the block. The process stands by before and after it.

        Args:
            server: The server.
        """
        self.state.server = server
        try:
            yield
        finally:
            self.state.server = None

    def page(self) -> bytes:
        """Return the metrics in the text format of Prometheus, version 0.0.4."""
        self.rounds.begin()
        return generate_latest(self._registry)
