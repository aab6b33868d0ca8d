"""Metrics over the validation data of all sites, from sums."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fl_adapters.loop.order import Summing
from fl_runtime.aggregation.metrics.pooling import area_under_curve, area_under_precision_recall
from fl_runtime.types import Array, Metrics, Summary

_CELL_BITS = 16
"""Margins are compared by their sign, exponent and seven binary digits when areas under curves are computed."""
_AREAS = {"auc": area_under_curve, "aucpr": area_under_precision_recall}


def pooled(federation: Summing, own: Mapping[str, float | Summary]) -> Metrics:
    """Return each metric over all sites.

    Args:
        federation: Sums over all sites.
        own: This site's metrics, by the same names at all sites.

    Returns:
        Name -> metric; NaN where no site has rows for it.
    """
    summaries = {name: s if isinstance(s, Summary) else Summary("mean", s, 1.0) for name, s in own.items()}
    totals = federation.sum({name: _summands(summary) for name, summary in summaries.items()})
    return {name: _metric(summary.kind, totals[name]) for name, summary in summaries.items()}


def _summands(summary: Summary) -> Array:
    if summary.kind in _AREAS:
        return _cells(summary)
    value = summary.value**2 if summary.kind == "root_mean" else summary.value
    return np.array([value * summary.weight, summary.weight]) if summary.weight else np.zeros(2)


def _cells(summary: Summary) -> Array:
    """The weights of both classes in cells of the margin, float64 [cells, 2]."""
    cells = np.zeros((1 << _CELL_BITS, 2))
    bins = np.array(list(summary.histogram), np.int64)
    weights = np.array(list(summary.histogram.values()), np.float64).reshape(-1, 2)
    np.add.at(cells, (bins + (1 << 31)) >> (32 - _CELL_BITS), weights)
    return cells


def _metric(kind: str, totals: Array) -> float:
    if kind in _AREAS:
        held = np.flatnonzero(totals.any(axis=1)).tolist()
        return _AREAS[kind]({cell: (float(totals[cell, 0]), float(totals[cell, 1])) for cell in held})
    if not totals[1]:
        return math.nan
    mean = float(totals[0] / totals[1])
    return math.sqrt(mean) if kind == "root_mean" else mean
