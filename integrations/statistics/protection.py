"""What of a site's table may leave it: no count of fewer rows than the site allows."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.order import Array
from fl_runtime.types import StatisticsRules

from .columns import MOST_CATEGORIES, Column, Table

NO_SUCH_COLUMN = "it has no such column"


def reason_to_stay_out(table: Table, rules: StatisticsRules) -> str:
    """Return why a site takes no part at all, as the end of a sentence; "" if it does."""
    if not rules.allowed:
        return "its policy allows no statistics"
    if table.rows < max(1, rules.smallest_count):
        return "it has no rows" if rules.smallest_count <= 1 else f"it has fewer than {rules.smallest_count} rows"
    return ""


def is_allowed(name: str, rules: StatisticsRules) -> bool:
    """Return whether a site's policy allows a column."""
    return rules.features is None or any(fnmatchcase(name, pattern) for pattern in rules.features)


def reason_to_keep_back(column: Column | None, name: str, table: Table, rules: StatisticsRules) -> str:
    """Return why a site keeps back a column, as the end of a sentence; "" if it does not."""
    if not is_allowed(name, rules):
        return "its policy does not allow this column"
    if column is None:
        return f"the column {table.skipped[name]}" if name in table.skipped else NO_SUCH_COLUMN
    if column.too_large:
        return "the column holds values beyond 1e60"
    if 0 < column.count < rules.smallest_count:
        return f"it has fewer than {rules.smallest_count} values there"
    return ""


def pooled(counts: Array, least: int, outside: float = 0.0) -> tuple[Array, int]:
    """Put counts below `least` together, so that neither they nor what is left of the total is below it.

    Args:
        counts: Number of rows in each cell.
        least: Least number of rows that may be told.
        outside: Number of rows in no cell.

    Returns:
        The counts, 0 where a cell is in the pool; and the number of rows in the pool or in no cell.
    """
    shown = np.where(counts >= least, counts, 0.0)
    pool = float(counts.sum() - shown.sum()) + outside
    while 0 < pool < least and shown.any():
        smallest = int(np.argmin(np.where(shown > 0, shown, np.inf)))
        pool += float(shown[smallest])
        shown[smallest] = 0.0
    return shown, int(pool)


def shared_pairs(count: Array, least: int) -> npt.NDArray[np.bool_]:
    """Return for which pairs of columns [columns, columns] products may be told.

    Neither the rows with both values nor those with one of them alone may be fewer than `least`, unless there are none.

    Args:
        count: Number of rows with a value in both columns [columns, columns].
        least: Least number of rows that may be told.
    """
    alone = np.diag(count)[:, None] - count
    enough = (alone == 0) | (alone >= least)
    return np.asarray((count >= least) & enough & enough.T)


def pooled_categories(column: Column, least: int) -> tuple[dict[str, int], int]:
    """Return the categories of a column that may be told, and the number of rows in all others."""
    if column.too_many:
        return {}, column.count
    names, counts = list(column.categories), np.array(list(column.categories.values()), np.float64)
    if len(names) > MOST_CATEGORIES:
        least = max(least, int(np.sort(counts)[-MOST_CATEGORIES]) + 1)
    shown, other = pooled(counts, least)
    return {name: int(count) for name, count in zip(names, shown, strict=True) if count}, other


def grouped(values: Array, weights: Array, least: int) -> tuple[Array, Array, float]:
    """Group neighbouring values until each group stands for at least `least` rows.

    A group gets the mean of its rows, or a value that at least `least` of them have.

    Args:
        values: Sorted values.
        weights: How many rows have each.
        least: Least number of rows of a group.

    Returns:
        Values and weights of the groups, and the number of rows of the largest group of different values; 0 without.
    """
    if least <= 1 or not len(values) or weights.min() >= least:
        return values, weights, 0.0
    starts, inside = [0], 0.0
    for number, weight in enumerate(weights):
        if inside >= least:
            starts.append(number)
            inside = 0.0
        inside += weight
    if inside < least and len(starts) > 1:
        starts.pop()
    ends = [*starts[1:], len(values)]
    pairs = list(zip(starts, ends, strict=True))
    found = np.array([_middle(values[a:b], weights[a:b], least) for a, b in pairs])
    sizes = np.add.reduceat(weights, starts)
    return found, sizes, max((float(size) for size, (a, b) in zip(sizes, pairs, strict=True) if b - a > 1), default=0.0)


def _middle(values: Array, weights: Array, least: int) -> float:
    heaviest = int(np.argmax(weights))
    if weights[heaviest] >= least:
        return float(values[heaviest])
    centre = values[0]
    return float(centre + np.average(values - centre, weights=weights))
