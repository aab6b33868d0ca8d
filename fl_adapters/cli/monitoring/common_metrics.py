"""The metrics that servers and site daemons share, in the text format of Prometheus."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fl_adapters.cli.monitoring.health import Health, certificate_end
from fl_runtime.errors import FederationError
from fl_runtime.version import VERSION


@dataclass(frozen=True, eq=False)
class CommonMetrics(Collector):
    """Reads version, health, certificate and disks at each request for the page.

    Attributes:
        kit: Folder of the startup kit.
        folders: Folders whose disks are watched, by the value of the label `folder`.
        health: The checks of `/healthz`.
    """

    kit: Path
    folders: Mapping[str, Path]
    health: Health

    def registry(self) -> CollectorRegistry:
        """Return a registry with these metrics and those of the process."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, with the values of this moment."""
        info = GaugeMetricFamily("fl_adapters_build_info", "Version of fl-adapters; always 1.", labels=["version"])
        info.add_metric([VERSION], 1)
        yield info
        healthy = 0 if self.health.faults() else 1
        yield GaugeMetricFamily("fl_adapters_healthy", "1 if /healthz finds nothing wrong, else 0.", healthy)
        with suppress(OSError, FederationError):  # /healthz tells it
            end = certificate_end(self.kit).timestamp()
            about = "When the certificate expires, in seconds since the epoch."
            yield GaugeMetricFamily("fl_adapters_certificate_expiry_timestamp_seconds", about, end)
        free = GaugeMetricFamily(
            "fl_adapters_disk_free_bytes", "Free bytes on the disk of a folder.", labels=["folder"]
        )
        size = GaugeMetricFamily("fl_adapters_disk_size_bytes", "Size of the disk of a folder.", labels=["folder"])
        for name, folder in self.folders.items():
            with suppress(OSError):  # /healthz tells it
                usage = shutil.disk_usage(folder)
                free.add_metric([name], usage.free)
                size.add_metric([name], usage.total)
        yield free
        yield size
