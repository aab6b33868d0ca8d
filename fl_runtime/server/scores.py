"""Metrics of a run: means over sites, and which round is the best."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from fl_runtime.types import Metrics


def weighted_means(parts: Iterable[tuple[Metrics, int]]) -> dict[str, float]:
    """Mean of every metric, weighted by numbers of examples, over the sites that reported it."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for metrics, num_examples in parts:
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value * num_examples
            weights[name] = weights.get(name, 0) + num_examples
    return {name: sums[name] / weights[name] for name in sums if weights[name]}


class Scores:
    """Metrics per round: those of the sites' updates, and those of their reports on the resulting global model."""

    def __init__(self, best_metric: str, best_mode: Literal["min", "max"]) -> None:
        self._metric = best_metric
        self._sign = 1.0 if best_mode == "min" else -1.0
        self._training: dict[int, dict[str, float]] = {}
        self._reports: dict[int, dict[str, tuple[Metrics, int]]] = {}
        self._settled: set[int] = set()

    def trained(self, round: int, metrics: Metrics) -> None:
        self._training[round] = dict(metrics)

    def report(self, version: int, site: str, metrics: Metrics, num_examples: int) -> None:
        self._reports.setdefault(version, {})[site] = (metrics, num_examples)

    def reported(self, version: int) -> set[str]:
        return set(self._reports.get(version, {}))

    def of(self, round: int) -> dict[str, float]:
        """All metrics of a round; a report on its model outranks a training metric of the same name."""
        return self._training.get(round, {}) | weighted_means(self._reports.get(round, {}).values())

    def settle(self, version: int) -> bool:
        """Mark a version as scored for good; False if it was already."""
        if version in self._settled:
            return False
        self._settled.add(version)
        return True

    def better(self, challenger: int, champion: int | None) -> bool:
        """Whether a round's model beats the best one so far. Without the metric the later round wins."""
        if champion is None:
            return True
        new, old = self.of(challenger).get(self._metric), self.of(champion).get(self._metric)
        if new is None or math.isnan(new):
            return old is None or math.isnan(old)
        return old is None or math.isnan(old) or self._sign * new < self._sign * old
