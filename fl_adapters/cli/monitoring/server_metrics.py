"""The metrics of a federation's server, in the text format of Prometheus."""

from __future__ import annotations

import shutil
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fl_adapters.cli.monitoring.health import Health
from fl_adapters.cli.monitoring.page import MonitoringPages
from fl_runtime.server.federation.archive import JobState
from fl_runtime.server.federation.federation import FederationServer
from fl_runtime.types import Event
from fl_runtime.version import VERSION

_PRESENT_S = 10.0  # a site that waits calls again at once; this bridges the moments between two calls
_ROUND_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_STATUSES = ("used", "carried", "late")


class RoundMetrics:
    """Listener that counts rounds, updates and bytes of all jobs since the server was started.

    Labels are the federation's sites and a fixed set of words, never the names of jobs or of metrics, so that their
    number does not grow with time.
    """

    def __init__(self, sites: tuple[str, ...], registry: CollectorRegistry) -> None:
        """Register the counters.

        Args:
            sites: Names of the federation's sites.
            registry: Where the counters are shown.
        """
        self._sites = frozenset(sites)
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
        for site in sites:
            self._up.labels(site)
            self._down.labels(site)

    def __call__(self, event: Event) -> None:
        """Count an event of a job."""
        data, site = event.data, event.site if event.site in self._sites else "other"
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
    """Reads queue, sites, refusals and disk of a server at each request for the page."""

    def __init__(self, server: FederationServer, sites: tuple[str, ...], folder: Path, health: Health) -> None:
        """Prepare the collector.

        Args:
            server: The server.
            sites: Names of the federation's sites.
            folder: The server's data folder.
            health: Its checks.
        """
        self._server, self._sites, self._folder, self._health = server, sites, folder, health

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, with the values of this moment."""
        info = GaugeMetricFamily("fl_adapters_build_info", "Version of the server; always 1.", labels=["version"])
        info.add_metric([VERSION], 1)
        yield info
        healthy = 0 if self._health.faults() else 1
        yield GaugeMetricFamily("fl_adapters_healthy", "1 if /healthz finds nothing wrong, else 0.", healthy)
        states = Tally(record.state for record in self._server.queue.records())
        jobs = GaugeMetricFamily("fl_adapters_jobs", "Jobs by state; `queued` is the queue's length.", labels=["state"])
        for state in get_args(JobState):
            jobs.add_metric([state], states[state])
        yield jobs
        silent = self._server.silent_s()
        present = GaugeMetricFamily("fl_adapters_site_present", "1 while a site is connected, else 0.", labels=["site"])
        for site in self._sites:
            present.add_metric([site], float(silent.get(site, _PRESENT_S) < _PRESENT_S))
        yield present
        refused = CounterMetricFamily("fl_adapters_calls_refused", "Calls refused, by error.", labels=["error"])
        for error, count in sorted(self._server.refusals().items()):
            refused.add_metric([error], count)
        yield refused
        with suppress(OSError):  # /healthz tells it
            usage = shutil.disk_usage(self._folder)
            yield GaugeMetricFamily("fl_adapters_disk_free_bytes", "Free bytes at the data folder.", usage.free)
            yield GaugeMetricFamily("fl_adapters_disk_size_bytes", "Size of the data folder's disk.", usage.total)


class ServerMetrics:
    """The page of metrics of one server.

    Attributes:
        rounds: Listener for the events of every job.
    """

    def __init__(self, sites: tuple[str, ...]) -> None:
        """Make the page. It lacks the server's state until `serve`.

        Args:
            sites: Names of the federation's sites.
        """
        self._sites, self._registry = sites, CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.rounds = RoundMetrics(sites, self._registry)

    def serve(self, address: str, server: FederationServer, folder: Path) -> MonitoringPages:
        """Serve the pages of a server that has been made.

        Args:
            address: Where to, see `MonitoringPages`.
            server: The server.
            folder: Its data folder.

        Returns:
            The pages, for the caller to close.

        Raises:
            ConfigError: The address cannot be listened on.
        """
        health = Health(folder, lambda: str(server.queue.halted or ""))
        self._registry.register(StateCollector(server, self._sites, folder, health))
        return MonitoringPages(address, self.page, health.faults)

    def page(self) -> bytes:
        """Return the metrics in the text format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry)
