"""Metrics of every global model: from training, and from the sites' reports; and which model is the best."""

from __future__ import annotations

from collections.abc import Mapping

from fl_runtime.aggregation.metrics.pooling import pooled
from fl_runtime.aggregation.metrics.ranking import Ranking
from fl_runtime.server.records.site_metrics import ShownMetrics, reporters_of
from fl_runtime.types import Metrics, Summary


class Scores:
    """Metrics per round: those of the sites' updates, and those of their reports on the resulting global model."""

    def __init__(self, shown: ShownMetrics) -> None:
        """Make an empty collection; `shown` says which metrics came from too few sites to count."""
        self._shown = shown
        self._training: dict[int, Metrics] = {}
        self._reports: dict[int, dict[str, tuple[Mapping[str, float | Summary], int]]] = {}
        self._settled: set[int] = set()

    def record_training(self, round: int, metrics: Metrics) -> None:
        """Keep the metrics of a round's updates."""
        if metrics:
            self._training[round] = metrics

    def report(self, version: int, site: str, metrics: Mapping[str, float | Summary], num_examples: int) -> None:
        """Keep a site's metrics of a model, in place of earlier ones of the same."""
        self._reports.setdefault(version, {})[site] = (metrics, num_examples)

    def reported(self, version: int) -> set[str]:
        """Names of the sites that have reported on a version."""
        return set(self._reports.get(version, {}))

    def by_site(self, version: int) -> dict[str, Mapping[str, float | Summary]]:
        """What each site has reported on a version."""
        return {site: metrics for site, (metrics, _) in self._reports.get(version, {}).items()}

    def of(self, round: int) -> dict[str, float]:
        """All metrics of a round that may be shown; a report on its model outranks a training metric of that name."""
        reports = self._reports.get(round, {})
        few = self._shown.too_few(reporters_of((site, metrics) for site, (metrics, _) in reports.items()))
        parts = [reports[site] for site in sorted(reports)]
        if few:
            parts = [({n: v for n, v in metrics.items() if n not in few}, count) for metrics, count in parts]
        return {n: v for n, v in self._training.get(round, {}).items() if n not in few} | pooled(parts)

    def settle(self, version: int) -> bool:
        """Mark a version's scores as final. Returns False if they already were."""
        if version in self._settled:
            return False
        self._settled.add(version)
        return True

    def settled(self, version: int) -> bool:
        """Whether a version's scores are final."""
        return version in self._settled

    def patience_spent(self, ranking: Ranking, version: int, patience: int, min_delta: float) -> bool:
        """Whether none of the last `patience` rounds up to `version` was better than those before, by `min_delta`.

        Rounds without the metric count as no better. A run in which no round has the metric is never out of patience.
        """
        best, since = None, 0
        for number in range(1, version + 1):
            cost = ranking.cost(self.of(number))
            since += 1
            if cost is not None and (best is None or cost < best - min_delta):
                best, since = cost, 0
        return best is not None and since >= patience

    def better(self, ranking: Ranking, challenger: int, champion: int | None) -> bool:
        """Whether a round's model beats the best one so far, if there is one. Without a score it never does."""
        new = ranking.cost(self.of(challenger))
        old = None if champion is None else ranking.cost(self.of(champion))
        return new is not None and (old is None or new < old)
