"""The metrics of a site daemon, in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fl_adapters.cli.monitoring.common_metrics import CommonMetrics
from fl_adapters.cli.monitoring.health import Health, certificate_fault, disk_fault
from fl_adapters.cli.site.activity import Activity
from fl_adapters.cli.site.feed import Contact
from fl_adapters.cli.site.jobs import Phase
from fl_adapters.cli.site.records import JobState
from fl_runtime.transport.waiting import SILENCE_S
from fl_runtime.trust.audit import AuditLog

_STUCK_S = 60.0  # the daemon looks at its jobs five times a second
_OUTCOMES: tuple[JobState, ...] = ("finished", "left", "refused", "ended")


def _answers(contact: Contact) -> bool:
    """Whether the server answers. It gives a sign of life more often than it may be silent."""
    return contact.answered_at is not None and time.time() - contact.answered_at < SILENCE_S


def _contact_fault(contact: Contact) -> str:
    """Return that the server does not answer; "" if it does."""
    if _answers(contact):
        return ""
    if contact.answered_at is None:
        return "not connected: the server has not answered yet"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(contact.answered_at))
    return f"not connected: the server has not answered since {since}"


@dataclass(frozen=True, eq=False)
class _SiteCollector(Collector):
    """Reads connection, jobs and transfers of a daemon at each request for the page."""

    activity: Activity
    contact: Contact

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, with the values of this moment."""
        yield GaugeMetricFamily(
            "fl_adapters_connected", "1 while the server answers this daemon, else 0.", int(_answers(self.contact))
        )
        answered_at = self.contact.answered_at
        if answered_at is not None:
            about = "When the server has answered last, in seconds since the epoch."
            yield GaugeMetricFamily("fl_adapters_last_contact_timestamp_seconds", about, answered_at)
        standing = self.activity.standing
        if standing is not None:
            jobs = GaugeMetricFamily("fl_adapters_site_jobs", "Jobs that have not ended here.", labels=["state"])
            for phase in get_args(Phase):
                jobs.add_metric([phase.replace(" ", "_")], standing.phases[phase])
            yield jobs
            yield GaugeMetricFamily("fl_adapters_slots", "Jobs that may run at a time.", standing.slots)
            yield GaugeMetricFamily("fl_adapters_slots_free", "Slots that no job occupies.", standing.slots_free)
        ended = CounterMetricFamily("fl_adapters_site_jobs_ended", "Jobs that have ended here.", labels=["outcome"])
        for outcome in _OUTCOMES:
            ended.add_metric([outcome], self.activity.ended[outcome])
        yield ended
        about = "Scripts that were started again after they had died."
        yield CounterMetricFamily("fl_adapters_script_restarts", about, self.activity.restarts)
        about = "Bytes of updates that scripts have sent."
        yield CounterMetricFamily("fl_adapters_site_sent_bytes", about, self.activity.bytes_up)
        about = "Bytes of tasks that scripts have received."
        yield CounterMetricFamily("fl_adapters_site_received_bytes", about, self.activity.bytes_down)


class SiteMetrics:
    """The pages of one site daemon.

    Attributes:
        health: The checks of `/healthz`.
    """

    def __init__(self, kit: Path, state: Path, activity: Activity, contact: Contact, audit: AuditLog) -> None:
        """Make the pages.

        Args:
            kit: Folder of the site's startup kit.
            state: Folder of the daemon's state.
            activity: What the daemon does.
            contact: Its contact with the server.
            audit: The site's audit log.
        """
        jobs = state / "jobs"

        def is_stuck() -> str:
            standing = activity.standing
            silent_s = 0.0 if standing is None else time.monotonic() - standing.at
            return f"the daemon has not looked at its jobs for {silent_s:.0f} s" if silent_s > _STUCK_S else ""

        def jobs_fault() -> str:  # the folder is made for the first job, and may be a disk of its own
            return disk_fault(jobs, "results of jobs") if jobs.exists() else ""

        self.health = Health(
            (
                is_stuck,
                lambda: disk_fault(state, "records of jobs"),
                jobs_fault,
                audit.fault,
                lambda: certificate_fault(kit),
                lambda: _contact_fault(contact),
            )
        )
        self._registry = CommonMetrics(kit, {"state": state, "jobs": jobs}, self.health).registry()
        self._registry.register(_SiteCollector(activity, contact))

    def page(self) -> bytes:
        """Return the metrics in the text format of Prometheus, version 0.0.4."""
        return generate_latest(self._registry)
