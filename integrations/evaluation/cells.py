"""The smallest cell: what a site puts together so that no number of fewer rows leaves it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .inputs import Numbers


def pooled_groups(cells: Numbers, least: int) -> npt.NDArray[np.bool_]:
    """Return which groups a site puts together into one, so that every number is 0 or at least `least`.

    That holds for the group of those too, which is what is left of the site's totals without all others.

    Args:
        cells: Number of rows in each cell of each group [groups, cells].
        least: Least number of rows in a cell that is not empty.

    Returns:
        True for each group that is put together with others.
    """
    pooled = np.array(_small(cells, least).any(axis=1), np.bool_)
    rows = cells.sum(axis=1)
    while pooled.any() and not pooled.all() and _small(cells[pooled].sum(axis=0), least).any():
        pooled[np.argmin(np.where(pooled, np.inf, rows))] = True
    return pooled


def tiles(counts: Numbers, least: int) -> tuple[Numbers, Numbers]:
    """Put neighbouring cells of a sorted histogram together until each tile has at least `least` rows.

    Args:
        counts: Number of rows in each cell.
        least: Least number of rows of a tile.

    Returns:
        The rows of each tile in its first cell, and the same rows in its last cell. A total below `least` is one tile
        of all cells.
    """
    if least <= 1:
        return counts, counts
    low, high = np.zeros_like(counts), np.zeros_like(counts)
    start, inside, last = 0, 0.0, None
    for cell in np.flatnonzero(counts):
        first = cell if not inside and counts[cell] >= least else start
        inside += counts[cell]
        if inside >= least:
            low[first] += inside
            high[cell] += inside
            start, inside, last = int(cell) + 1, 0.0, (first, int(cell))
    if inside and last is None:
        low[0], high[-1] = inside, inside
    elif inside and last is not None:  # the rest joins the tile before it
        rows = high[last[1]] + inside
        low[last[0]] += inside
        high[last[1]] = 0.0
        high[-1] += rows
    return low, high


def spread(counts: Numbers, least: int) -> Numbers:
    """Return a histogram in which each tile's rows are spread evenly over its cells."""
    if least <= 1:
        return counts
    low, high = tiles(counts, least)
    even = np.zeros_like(counts)
    for first, end in zip(np.flatnonzero(low), np.flatnonzero(high), strict=True):
        even[first : end + 1] += low[first] / (end + 1 - first)
    return even


def _small(cells: Numbers, least: int) -> npt.NDArray[np.bool_]:
    small: npt.NDArray[np.bool_] = (cells > 0) & (cells < least)
    return small
