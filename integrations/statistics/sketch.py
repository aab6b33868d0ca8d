"""The values of a column in bounded memory, in one pass: exact up to a number of distinct values, then in cells."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.order import Array, Bits, from_bits, to_bits

MOST_CELLS = 1 << 16
"""Number of distinct values up to which a sketch is exact."""


class Sketch:
    """Counts of values. Beyond `MOST_CELLS` distinct ones, neighbouring values share a cell.

    A cell holds the floats that begin with the same bits, in the order of `fl_adapters.loop.order.to_bits`. So cells
    have about the same width relative to the values, and sketches of the same values in other chunks are the same.
    """

    def __init__(self) -> None:
        self._keys: Bits = np.empty(0, np.uint64)
        self._counts: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._shift = 0

    def add(self, values: Array, counts: npt.NDArray[np.int64] | None = None) -> None:
        """Count values.

        Args:
            values: Finite values, float64, one dimension.
            counts: How often each of them occurs, if they are sorted and different; None for once.
        """
        if not len(values):
            return
        if counts is None:
            found, often = np.unique(to_bits(values) >> np.uint64(self._shift), return_counts=True)
        else:
            found, often = to_bits(values) >> np.uint64(self._shift), counts
        self._keys, self._counts = _merged(np.concatenate([self._keys, found]), np.concatenate([self._counts, often]))
        while len(self._keys) > MOST_CELLS:
            self._shift += 1
            self._keys, self._counts = _merged(self._keys >> np.uint64(1), self._counts)

    @property
    def shift(self) -> int:
        """How many of the last bits of a value are not known; 0 as long as the sketch is exact."""
        return self._shift

    def cells(self) -> tuple[Array, Array]:
        """Return the middle of each cell, sorted, and how many values it holds."""
        low, high = _bounds(self._keys, self._shift)
        return low / 2 + high / 2 if self._shift else low, self._counts.astype(np.float64)


def cell_bounds(values: Array, shift: int) -> tuple[Array, Array]:
    """Return the smallest and the largest float of the cells in which values lie.

    Args:
        values: Finite values.
        shift: How many of the last bits of a value the cells leave open.
    """
    return _bounds(to_bits(values) >> np.uint64(shift), shift)


def _bounds(keys: Bits, shift: int) -> tuple[Array, Array]:
    largest = np.finfo(np.float64).max
    first, rest = keys << np.uint64(shift), np.uint64((1 << shift) - 1)
    low, high = np.nan_to_num(from_bits(first), nan=-largest), np.nan_to_num(from_bits(first | rest), nan=largest)
    return np.clip(low, -largest, largest), np.clip(high, -largest, largest)


def _merged(keys: Bits, counts: npt.NDArray[np.int64]) -> tuple[Bits, npt.NDArray[np.int64]]:
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    return keys[first], np.add.reduceat(counts, first)
