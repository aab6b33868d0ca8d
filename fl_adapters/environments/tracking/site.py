"""Tracking of a site's own part in a run, on its own machine, where the site's policy says so."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fl_adapters.environments.tracking.targets import make_trackers
from fl_adapters.environments.tracking.tracking import Tracking
from fl_runtime.aggregation.metrics.pooling import plain
from fl_runtime.trust.identity import Identity
from fl_runtime.types import Event, Settings, Summary


class SiteTracking:
    """Trackers that get a site's own metrics, as they are before any filter, and nothing of other sites.

    Args:
        targets: The targets that the site's policy names.
        site: The site.
        job: The job's settings, as the site has them from the server.

    Raises:
        ConfigError: A target names no tool, or the tool's package is missing or not set up.
    """

    def __init__(self, targets: Sequence[str], site: Identity, job: Settings) -> None:
        name = str(job["name"])
        identity = hashlib.sha256(f"{site.uri} {name}".encode()).hexdigest()[:32]
        self._site = site.name
        self._tracking = Tracking(make_trackers(targets, must_answer=False), name, identity, job)
        self._tracking(Event("started", time.time()))

    def add(self, round: int, metrics: Mapping[str, float | Summary]) -> None:
        """Send metrics of this site, as `site/NAME/METRIC`. Never blocks.

        Args:
            round: The round of the update, or of the global model that was evaluated.
            metrics: Values by name.
        """
        self._tracking(Event("report", time.time(), round, self._site, {"metrics": plain(metrics)}))
        self._tracking.flush()

    def close(self, folder: Path, *, early: bool) -> None:
        """Tell the trackers that the site's part has ended, and wait for them for a bounded time.

        Args:
            folder: Folder with the models that the site keeps.
            early: Whether the site has left before the end.
        """
        self._tracking.close("failed" if early else "finished", folder)
