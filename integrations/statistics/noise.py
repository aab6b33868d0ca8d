"""Noise on the counts of a table, for sites whose policy asks for it. All that is told is made of the noisy counts.

Adding or removing one row changes one cell of each column by 1, and the number of rows. With k columns, each cell gets
noise from the two-sided geometric distribution of scale (k + 1) / epsilon, so that one call is epsilon-differentially
private for a row: Ghosh, Roughgarden and Sundararajan 2009, "Universally utility-maximizing privacy mechanisms".
Categories are told from a noisy count on, below which a category that one row alone has stays but with probability
DELTA: Korolova et al. 2009, "Releasing search queries and clicks privately".
"""

from __future__ import annotations

import math

import numpy as np

from fl_adapters.loop.order import Array
from fl_runtime.filters.noise import uniform
from fl_runtime.types import StatisticsRules

from .columns import Column, Table
from .protection import is_allowed

DELTA = 1e-6
CELLS = 32
"""Number of cells between the bounds of a column of numbers."""


def with_noise(table: Table, rules: StatisticsRules) -> Table:
    """Return a table that holds noisy counts in place of a site's own.

    Args:
        table: The site's table.
        rules: What the site allows; its epsilon is not None.

    Returns:
        A table with the columns that may be told. Columns of numbers without bounds are skipped.
    """
    noisy = Table()
    told = []
    for name, column in table.columns.items():
        if not is_allowed(name, rules):
            continue
        if column.kind != "categorical" and name not in rules.bounds:
            noisy.skipped[name] = "has no bounds in its policy, which adds noise"
        else:
            told.append(column)
    noisy.skipped.update(table.skipped)
    scale = (len(told) + 1) / (rules.epsilon or math.inf)
    noisy.rows = _positive(_noisy(np.array([float(table.rows)]), scale))
    for column in told:
        if column.kind == "categorical":
            found = _categories(column, scale)
        else:
            found = _numbers(column, rules.bounds[column.name], scale)
        noisy.columns[column.name] = found
    noisy.add_products()
    return noisy


def _numbers(column: Column, bounds: tuple[float, float], scale: float) -> Column:
    """A column of the middles of cells between the bounds; values outside count in the first or the last cell."""
    low, high = bounds
    edges = np.linspace(low, high, CELLS + 1)
    values, weights = column.values()
    cell = np.clip(np.searchsorted(edges, values, "right") - 1, 0, CELLS - 1)
    counts = _noisy(np.r_[np.bincount(cell, weights, CELLS), float(column.missing)], scale)
    middles = edges[:-1] / 2 + edges[1:] / 2
    return Column.of_numbers(column.name, middles, np.maximum(counts[:-1], 0.0), _positive(counts[-1:]))


def _categories(column: Column, scale: float) -> Column:
    threshold = 1 + scale * math.log(1 / (2 * DELTA))
    names = list(column.categories)
    others = float(column.count - sum(column.categories.values()))
    own = [float(column.categories[name]) for name in names]
    counts = _noisy(np.array([*own, others, float(column.missing)]), scale)
    shown = {name: int(count) for name, count in zip(names, counts, strict=False) if count >= threshold}
    total = max(_positive(counts[:-1]), sum(shown.values()))
    return Column.of_categories(column.name, shown, total, _positive(counts[-1:]))


def _positive(counts: Array) -> int:
    """The sum of counts, at least 0."""
    return max(0, int(counts.sum()))


def _noisy(counts: Array, scale: float) -> Array:
    """Add two-sided geometric noise, which may leave counts below 0."""
    ratio = math.exp(-1 / scale) if scale else 0.0
    if not ratio:
        return counts
    one, other = (np.floor(np.log(uniform(len(counts))) / math.log(ratio)) for _ in range(2))
    return counts + one - other
