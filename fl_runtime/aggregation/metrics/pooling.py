"""Pooled metrics: the value of a metric on the data of all sites together.

Plain numbers are averaged. Metrics that are not means of the sites' values, such as AUC, are pooled from summaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Metrics, Summary

_KINDS = ("mean", "root_mean", "auc", "aucpr")
_MAX_BINS = 2**16
_MAX_WEIGHT = 2.0**63  # far more than the rows of any site, and sums of it stay finite


def pooled(parts: Iterable[tuple[Mapping[str, float | Summary], int]]) -> dict[str, float]:
    """Pool every metric over the sites that reported it.

    Args:
        parts: The metrics and the number of examples of each site. A plain number is weighted by the latter. The result
            depends on the order, so pass the same order for the same bits.

    Returns:
        Metric name -> pooled value; NaN if it is NaN at a site whose weight is not 0. A metric without any weight is
        left out.
    """
    by_name: dict[str, list[Summary]] = {}
    for metrics, num_examples in parts:
        for name, value in metrics.items():
            summary = value if isinstance(value, Summary) else Summary("mean", value, num_examples)
            by_name.setdefault(name, []).append(summary)
    values = {name: _pooled_or_nan(summaries) for name, summaries in by_name.items()}
    return {name: value for name, value in values.items() if value is not None}


def plain(metrics: Mapping[str, float | Summary]) -> dict[str, float]:
    """Return a site's own values of its metrics as plain numbers, which may be NaN."""
    return {name: m.value if isinstance(m, Summary) else m for name, m in metrics.items()}


def to_json(metrics: Mapping[str, float | Summary]) -> dict[str, Any]:
    """Return metrics as JSON values; "nan", "inf" and "-inf" stand for what JSON has no number for."""
    return {name: _summary_json(m) if isinstance(m, Summary) else _number_json(m) for name, m in metrics.items()}


def from_json(fields: object) -> dict[str, float | Summary]:
    """Read metrics from JSON values.

    Args:
        fields: What `to_json` made; it may come from a hostile peer.

    Returns:
        The metrics; plain numbers may be NaN or infinite.

    Raises:
        ProtocolError: If it is not a JSON object of numbers and summaries.
    """
    try:
        assert isinstance(fields, dict)
        return {str(k)[:200]: _summary(v) if isinstance(v, dict) else float(v) for k, v in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OverflowError):
        raise ProtocolError("metrics are not a JSON object of numbers and summaries") from None


def area_under_curve(histogram: Mapping[int, tuple[float, float]]) -> float:
    """Compute the area under the ROC curve.

    Args:
        histogram: Score bin -> (weight of negatives, weight of positives). Pairs within a bin count half.

    Returns:
        The area; NaN if there is only one class.
    """
    below, area = 0.0, 0.0
    positives = sum(p for _, p in histogram.values())
    for score in sorted(histogram):
        negative, positive = histogram[score]
        area += positive * (below + negative / 2)
        below += negative
    return area / (below * positives) if below and positives else math.nan


def area_under_precision_recall(histogram: Mapping[int, tuple[float, float]]) -> float:
    """Compute the area under the precision-recall curve.

    Source of the interpolation between bins: Davis and Goadrich 2006, "The relationship between Precision-Recall and
    ROC curves".

    Args:
        histogram: Score bin -> (weight of negatives, weight of positives).

    Returns:
        The area; NaN if there is only one class.
    """
    total = sum(p for _, p in histogram.values())
    if not total or total == sum(n + p for n, p in histogram.values()):
        return math.nan
    true = false = area = 0.0
    for score in sorted(histogram, reverse=True):
        negative, positive = histogram[score]
        if positive:
            slope = 1.0 + negative / positive
            offset = (false - negative / positive * true) / total
            recall, previous = (true + positive) / total, true / total
            step = recall - previous
            if offset:
                step -= offset / slope * math.log((slope * recall + offset) / (slope * previous + offset))
            area += step / slope
        true, false = true + positive, false + negative
    return area


def _pooled_or_nan(parts: list[Summary]) -> float | None:
    """Pool one metric. Numbers of extreme size that a site may send make it NaN, and never an error of the run."""
    try:
        return _pooled(parts)
    except (ArithmeticError, ValueError):
        return math.nan


def _pooled(parts: list[Summary]) -> float | None:
    kind = parts[0].kind
    parts = [part for part in parts if part.kind == kind and part.weight]
    if not parts:
        return None
    if kind in ("auc", "aucpr"):
        if any(math.isnan(part.value) and not part.histogram for part in parts):
            return math.nan  # a model that diverged has no scores to sort
        return (area_under_curve if kind == "auc" else area_under_precision_recall)(_merged(parts))
    weight = sum(part.weight for part in parts)
    if kind == "root_mean":
        return math.sqrt(sum(part.value**2 * part.weight for part in parts) / weight)
    return sum(part.value * part.weight for part in parts) / weight


def _merged(parts: list[Summary]) -> dict[int, tuple[float, float]]:
    totals: dict[int, tuple[float, float]] = {}
    for part in parts:
        for score, (negative, positive) in part.histogram.items():
            total = totals.get(score, (0.0, 0.0))
            totals[score] = (total[0] + negative, total[1] + positive)
    return totals


def _summary_json(summary: Summary) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": summary.kind, "value": _number_json(summary.value), "weight": summary.weight}
    if summary.histogram:
        fields["histogram"] = [[score, *weights] for score, weights in summary.histogram.items()]
    return fields


def _number_json(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _summary(fields: Mapping[str, Any]) -> Summary:
    kind, value, weight = fields["kind"], float(fields["value"]), float(fields["weight"])
    rows = fields.get("histogram", [])
    histogram = {int(score): (float(negative), float(positive)) for score, negative, positive in rows}
    weights = [weight, *(w for pair in histogram.values() for w in pair)]
    if kind not in _KINDS or len(histogram) > _MAX_BINS or not all(0 <= w <= _MAX_WEIGHT for w in weights):
        raise ValueError
    return Summary(kind, value, weight, histogram)


def weighted_means(parts: Iterable[tuple[Metrics, int]]) -> dict[str, float]:
    """Average every metric over the sites that reported it, weighted by their numbers of examples."""
    return pooled(parts)
