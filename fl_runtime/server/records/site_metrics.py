"""Which metrics of a run others may see: where a policy keeps its site's own, pooled ones of several sites alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fl_runtime.aggregation.metrics.pooling import weighted_means
from fl_runtime.server.records.events import Emitter
from fl_runtime.types import CohortRules, Metrics, Update

_OF_ONE_SITE = ("update", "report", "cross_score")
_COUNTS = ("num_examples", "local_steps")


class ShownMetrics:
    """Decides which metrics of a run are shown, by what the policies of its sites ask for.

    As soon as one site keeps its metrics, those of no site are shown alone: from all rows but one and the mean, the
    last row follows. A pooled metric is then shown if at least two sites report it, or as many as `min_cohort` of one
    of them asks for.

    Attributes:
        hidden: Names of pooled metrics that came from too few sites.
    """

    def __init__(self, rules: Mapping[str, CohortRules]) -> None:
        """Make the object.

        Args:
            rules: What each site asks for, by name. It may change during the run.
        """
        self._rules = rules
        self.hidden: dict[str, None] = {}
        self._told = 0

    @property
    def pooled_alone(self) -> bool:
        """Whether metrics and numbers of examples of single sites are kept from everybody else."""
        return any("metrics" in rules.stays for rules in list(self._rules.values()))

    def too_few(self, reporters: Mapping[str, Collection[str]]) -> set[str]:
        """Find the metrics that too few sites report for their pooled value to be shown.

        Args:
            reporters: Name of each metric -> the sites that report it.

        Returns:
            The names of these metrics.
        """
        if not self.pooled_alone:
            return set()
        asked = {site: rules.min_cohort for site, rules in list(self._rules.items())}
        few = {
            name for name, sites in reporters.items() if len(sites) < max(2, *(asked.get(site, 1) for site in sites))
        }
        self.hidden |= dict.fromkeys(sorted(few))
        return few

    def of_updates(self, updates: Iterable[Update]) -> Metrics:
        """Return the mean metrics of updates, weighted by their numbers of examples, without those of too few sites.

        Args:
            updates: The updates. The result depends on their order in its last bits.

        Returns:
            The means by name.
        """
        parts = list(updates)
        few = self.too_few(reporters_of((update.site, update.metrics) for update in parts))
        return weighted_means(
            ({n: v for n, v in update.metrics.items() if n not in few}, update.num_examples) for update in parts
        )

    def newly_hidden(self) -> list[str]:
        """Return the names of metrics that have been hidden since the last call."""
        names = list(self.hidden)[self._told :]
        self._told += len(names)
        return names


def reporters_of(parts: Iterable[tuple[str, Iterable[str]]]) -> dict[str, set[str]]:
    """Return which sites report each metric.

    Args:
        parts: Pairs of a site and the names of its metrics.

    Returns:
        Metric name -> names of sites.
    """
    reporters: dict[str, set[str]] = {}
    for site, names in parts:
        for name in names:
            reporters.setdefault(name, set()).add(site)
    return reporters


class DiscreetEvents:
    """Passes events on, without the metrics of single sites where these are kept."""

    def __init__(self, events: Emitter, shown: ShownMetrics) -> None:
        """Make the emitter.

        Args:
            events: Where the events go.
            shown: Says which metrics are shown.
        """
        self._events, self._shown = events, shown

    def emit(self, kind: str, round: int = 0, site: str = "", **data: Any) -> None:
        """Queue an event; see `Emitter`."""
        if kind == "steps" and self._shown.pooled_alone:  # its steps would tell its number of examples
            return
        if (kind in _OF_ONE_SITE or kind == "round_finished") and self._shown.pooled_alone:
            data = {name: value for name, value in data.items() if name not in _COUNTS}
            # rounds whose sites differ by one would tell its number of examples
            data |= dict.fromkeys(_COUNTS) if kind == "round_finished" else {"metrics": {}}
        self._events.emit(kind, round, site, **data)
