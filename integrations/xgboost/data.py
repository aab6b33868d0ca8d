"""Contents of a DMatrix: its rows for another process, and the quantile summary that may leave the site."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost

from fl_runtime.aggregation.metrics.quantiles import QuantileSummary
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

_POINTS_PER_BIN = 4


def rows_of(data: xgboost.DMatrix) -> dict[str, Array]:
    """Take everything that training needs out of a DMatrix.

    Args:
        data: The matrix.

    Returns:
        The features in CSR form ("data" float32; "indices", "indptr" and "shape" int64), and the columns that the
        matrix has beside them, such as "label" and "weight", float32.

    Raises:
        ConfigError: For a matrix that does not keep its values.
    """
    if isinstance(data, xgboost.QuantileDMatrix):
        raise ConfigError(
            "a QuantileDMatrix has bins of its own, and no values to put into the bins of all sites",
            where="train(...): dtrain",
            fix="pass a plain xgboost.DMatrix",
        )
    sparse = data.get_data()
    arrays: dict[str, Array] = {
        "data": np.asarray(sparse.data, np.float32),
        "indices": np.asarray(sparse.indices, np.int64),
        "indptr": np.asarray(sparse.indptr, np.int64),
        "shape": np.array([data.num_row(), data.num_col()], np.int64),
    }
    for name in ("label", "weight", "base_margin", "label_lower_bound", "label_upper_bound", "feature_weights"):
        values = np.asarray(data.get_float_info(name), np.float32)
        if len(values):
            arrays[name] = values
    groups = np.asarray(data.get_uint_info("group_ptr"), np.int64)
    if len(groups):
        arrays["group"] = np.diff(groups)
    return arrays


def summary(
    rows: dict[str, Array], kinds: list[str] | None, max_bin: int, min_rows: int, noise: float
) -> QuantileSummary:
    """Summarise every feature by weighted points, from which the server computes the bins of all sites.

    There are at most four points per bin. A point stands for at least `min_rows` rows: it is a value that so many rows
    share, or the mean of neighbouring values. Remaining rows are counted with a neighbouring point, and once more by
    their sign, so that the server can tell whether the sites together have enough of them for cuts of their own.

    Args:
        rows: What `rows_of` returned.
        kinds: Types of the features as XGBoost names them, "c" for categories; None if unknown.
        max_bin: Number of bins.
        min_rows: Fewest rows that a point may stand for.
        noise: Random shift of each point, as a share of the distance to its neighbours, from 0 to 1.

    Returns:
        The summary.
    """
    count, columns = rows["shape"].tolist()
    weights = rows.get("weight")
    weights = np.ones(count) if weights is None or "group" in rows else weights.astype(np.float64)
    row_of = np.repeat(np.arange(count), np.diff(rows["indptr"]))
    order = np.argsort(rows["indices"], kind="stable")
    ends = np.cumsum(np.bincount(rows["indices"], minlength=columns))
    points, shares, levels = [], [], np.zeros(columns, np.int64)
    rest = np.zeros((columns, 2), np.int64)
    draw = np.random.default_rng()
    for feature in range(columns):
        chosen = order[ends[feature - 1] if feature else 0 : ends[feature]]
        values = rows["data"][chosen]
        if kinds is not None and kinds[feature] == "c":
            levels[feature] = int(values.max()) + 1 if len(values) else 0
            values = values[:0]
        finite = np.isfinite(values)
        row_weights = weights[row_of[chosen[: len(values)]]][finite]
        point, weight, rest[feature] = _points(values[finite], row_weights, max_bin, min_rows)
        points.append(_moved(point, noise, draw) if noise else point)
        shares.append(weight)
    return QuantileSummary(tuple(points), tuple(shares), levels, max_bin, rest, max(min_rows, 1))


def _points(values: Array, weights: Array, max_bin: int, min_rows: int) -> tuple[Array, Array, tuple[int, int]]:
    """(points in ascending order, their weights, number of rows (below zero, others) that no point describes)."""
    distinct, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    size = max(min_rows, len(values) / (_POINTS_PER_BIN * max_bin))
    common = counts >= size
    runs = np.cumsum(common | np.roll(common, 1))  # a value that many rows share forms its own group
    ranks = np.floor((np.cumsum(counts) - counts / 2) / size)
    starts = np.flatnonzero((np.diff(runs, prepend=-1) != 0) | (np.diff(ranks, prepend=-1) != 0))
    if len(starts) == 0:
        return np.empty(0, np.float32), np.empty(0), (0, 0)
    group = np.repeat(np.arange(len(starts)), np.diff([*starts, len(distinct)]))
    rows = np.bincount(group, counts)
    total = np.bincount(where, weights, len(distinct))
    weight = np.bincount(group, total)
    mean = np.bincount(group, distinct.astype(np.float64) * counts) / rows
    shared = np.flatnonzero(rows >= min_rows)
    undescribed = counts * (rows[group] < min_rows)
    rest = int(undescribed[distinct < 0].sum()), int(undescribed[distinct >= 0].sum())
    if len(shared) == 0:
        return np.empty(0, np.float32), np.empty(0), rest
    heir = np.maximum(np.searchsorted(shared, np.arange(len(starts)), side="right") - 1, 0)
    point, same = np.unique(mean[shared].astype(np.float32), return_inverse=True)
    return point, np.bincount(same[heir], weight, len(point)), rest


def _moved(points: Array, noise: float, draw: Any) -> Array:
    gaps = np.diff(points.astype(np.float64))
    left, right = np.concatenate([gaps[:1], gaps]), np.concatenate([gaps, gaps[-1:]])
    shift = draw.uniform(-noise, noise, len(points))
    return np.unique((points + np.where(shift < 0, shift * left, shift * right) / 2).astype(np.float32))
