"""Statistics of single sites, which every site learns through sums: one vector for each site that allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fl_adapters.loop.federation import Array, Federation

from .agreement import Plan
from .question import Question
from .result import Categorical, Histogram, Numeric, SiteStatistics
from .totals import Alone, Share, Totals, add_up


def tell_each_other(
    federation: Federation, plan: Plan, own: Share, question: Question, total: Totals
) -> dict[str, SiteStatistics]:
    """Return the statistics of each site that allows it.

    Args:
        federation: The federation.
        plan: Who takes part in what.
        own: What this site contributes.
        question: The arguments of `describe`.
        total: The statistics over all sites, whose bins those of single sites have.

    Returns:
        Site -> its statistics, the same at every site.
    """
    edges = {
        name: np.array(feature.histogram.edges)
        for name, feature in total.features.items()
        if isinstance(feature, Numeric) and feature.histogram is not None
    }
    found = {}
    for site in plan.per_site:
        part = plan.alone(site)
        length = sum(_length(part, question, edges, name) for name in part.kinds) + 1
        vector = np.zeros(length)
        if site == federation.site.name:
            inside = {name: edges[name] for name in part.of_kind("numeric") if name in edges}
            vector = _to_vector(part, add_up(Alone(federation.site), part, own.of(part), question, inside), edges)
        found[site] = _from_vector(federation.sum({"values": vector})["values"], part, question, edges)
    return found


def _length(part: Plan, question: Question, edges: Mapping[str, Array], name: str) -> int:
    if part.kinds[name] == "categorical":
        return 2 + len(part.categories[name])
    return 3 + 8 + 3 * len(question.levels) + (len(edges[name]) + 1 if name in edges else 0)


def _to_vector(part: Plan, totals: Totals, edges: Mapping[str, Array]) -> Array:
    numbers: list[float] = [totals.rows]
    for name, feature in totals.features.items():
        numbers += [feature.count, feature.missing]
        if isinstance(feature, Categorical):
            numbers += [feature.categories.get(text, 0) for text in part.categories[name]]
            continue
        numbers.append(feature.rank_error)
        for value in (feature.mean, feature.std, feature.min, feature.max, *feature.quantiles.values()):
            numbers += [0.0, 0.0] if value is None else [1.0, value]
        numbers += feature.value_error.values()
        if name in edges:
            histogram = feature.histogram or Histogram((), (0,) * (len(edges[name]) - 1))
            numbers += [*histogram.counts, histogram.other, histogram.uncertain]
    return np.array(numbers, np.float64)


def _from_vector(vector: Array, part: Plan, question: Question, edges: Mapping[str, Array]) -> SiteStatistics:
    numbers = iter(vector.tolist())
    rows = int(next(numbers))
    features: dict[str, Numeric | Categorical] = {}
    for name, kind in part.kinds.items():
        if kind == "categorical":
            features[name] = _categorical(numbers, part.categories[name])
        else:
            features[name] = _numeric(numbers, question, edges.get(name))
    return SiteStatistics(rows, features)


def _categorical(numbers: Iterator[float], texts: object) -> Categorical:
    count, missing = int(next(numbers)), int(next(numbers))
    counts = {str(text): int(next(numbers)) for text in texts}  # type: ignore[attr-defined]
    known = dict(sorted(((t, n) for t, n in counts.items() if n), key=lambda pair: (-pair[1], pair[0])))
    return Categorical(count, missing, known, count - sum(known.values()))


def _numeric(numbers: Iterator[float], question: Question, edges: Array | None) -> Numeric:
    count, missing, rank_error = int(next(numbers)), int(next(numbers)), next(numbers)
    mean, std, low, high = (_optional(numbers) for _ in range(4))
    quantiles = {level: _optional(numbers) for level in question.levels}
    errors = {level: next(numbers) for level in question.levels}
    histogram = None
    if edges is not None:
        counts = tuple(int(next(numbers)) for _ in range(len(edges) - 1))
        histogram = Histogram(tuple(map(float, edges)), counts, int(next(numbers)), int(next(numbers)))
    return Numeric(count, missing, mean, std, low, high, quantiles, rank_error, errors, histogram)


def _optional(numbers: Iterator[float]) -> float | None:
    known, value = next(numbers), next(numbers)
    return value if known else None
