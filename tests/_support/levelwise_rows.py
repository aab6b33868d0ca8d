"""Rows of a table with numbers, ages, indicators and gaps, at five sites of very different sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost

SIZES = (900, 30, 400, 5, 165)
CUTS = np.cumsum((0, *SIZES))
_draw = np.random.default_rng(11)
X = np.column_stack(
    [
        _draw.normal(size=CUTS[-1]),
        np.exp(3 * _draw.normal(size=CUTS[-1])),
        _draw.integers(17, 90, CUTS[-1]),
        _draw.random(CUTS[-1]) < 0.1,
        np.where(_draw.random(CUTS[-1]) < 0.7, 0.0, _draw.normal(size=CUTS[-1])),
        np.full(CUTS[-1], 2.5),
        np.where(_draw.random(CUTS[-1]) < 0.5, 1.0, np.nan),
    ]
).astype(np.float32)
X[_draw.random(X.shape) < 0.15] = np.nan
SCORE = np.nan_to_num(X[:, 0] + 0.01 * X[:, 2] * X[:, 3] - (X[:, 4] > 0)) + np.isnan(X[:, 1]) + np.isnan(X[:, 6])
SCORE += _draw.normal(scale=0.7, size=len(X))
WEIGHTS = _draw.uniform(0.2, 3.0, len(X)).astype(np.float32)
LABELS: dict[str, Any] = {
    "reg:squarederror": 100 * SCORE,
    "binary:logistic": (SCORE > 0.8).astype(int),
    "multi:softprob": np.digitize(SCORE, [0.3, 1.3]),
}


def rows(index: int | None) -> slice:
    """The rows of a site, or all of them for None."""
    return slice(None) if index is None else slice(int(CUTS[index]), int(CUTS[index + 1]))


def matrix(index: int | None, objective: str, part: slice = slice(None), **columns: Any) -> xgboost.DMatrix:
    """The data of a site, or of all sites for None; of those rows that `part` picks."""
    mine = rows(index)
    return xgboost.DMatrix(X[mine][part], LABELS[objective][mine][part], weight=WEIGHTS[mine][part], **columns)
