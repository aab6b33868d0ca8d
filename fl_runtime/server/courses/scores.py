"""Metrics of a run: of all sites together, and which round is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from fl_runtime.aggregation.metrics.pooling import pooled
from fl_runtime.types import Metrics, Summary


class Scores:
    """Metrics per round: those of the sites' updates, and those of their reports on the resulting global model."""

    def __init__(self, best_metric: str = "loss", best_mode: Literal["min", "max"] = "min") -> None:
        self.rank_by(best_metric, best_mode)
        self._training: dict[int, Metrics] = {}
        self._reports: dict[int, dict[str, tuple[Mapping[str, float | Summary], int]]] = {}
        self._settled: set[int] = set()

    def rank_by(self, best_metric: str, best_mode: Literal["min", "max"]) -> None:
        self._metric = best_metric
        self._sign = 1.0 if best_mode == "min" else -1.0

    def trained(self, round: int, metrics: Metrics) -> None:
        if metrics:
            self._training[round] = metrics

    def report(self, version: int, site: str, metrics: Mapping[str, float | Summary], num_examples: int) -> None:
        self._reports.setdefault(version, {})[site] = (metrics, num_examples)

    def reported(self, version: int) -> set[str]:
        return set(self._reports.get(version, {}))

    def by_site(self, version: int) -> dict[str, Mapping[str, float | Summary]]:
        """What each site has reported on a version."""
        return {site: metrics for site, (metrics, _) in self._reports.get(version, {}).items()}

    def of(self, round: int) -> dict[str, float]:
        """All metrics of a round; a report on its model outranks a training metric of the same name."""
        reports = self._reports.get(round, {})
        return dict(self._training.get(round, {})) | pooled(reports[site] for site in sorted(reports))

    def settle(self, version: int) -> bool:
        """Mark a version as scored for good; False if it was already."""
        if version in self._settled:
            return False
        self._settled.add(version)
        return True

    def settled(self, version: int) -> bool:
        return version in self._settled

    def patience_spent(self, version: int, patience: int, min_delta: float) -> bool:
        """Whether `patience` rounds up to `version` have brought nothing better than what was before them.

        Rounds without the metric count as no better; without it in any round there is nothing to lose patience with.
        """
        best, since = None, 0
        for number in range(1, version + 1):
            value = self.of(number).get(self._metric)
            since += 1
            if value is not None and not math.isnan(value):
                value = self._sign * value
                if best is None or value < best - min_delta:
                    best, since = value, 0
        return best is not None and since >= patience

    def better(self, challenger: int, champion: int | None) -> bool:
        """Whether a round's model beats the best one so far. Without the metric the later round wins."""
        if champion is None:
            return True
        new, old = self.of(challenger).get(self._metric), self.of(champion).get(self._metric)
        if new is None or math.isnan(new):
            return old is None or math.isnan(old)
        return old is None or math.isnan(old) or self._sign * new < self._sign * old
