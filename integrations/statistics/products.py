"""Sums of products of columns over the rows in which both have a value: for means, deviations and correlations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.order import Array


@dataclass(frozen=True)
class Products:
    """Sums for each pair of columns i and j, over the rows in which both have a value, less a centre of each column.

    Attributes:
        count: Number of such rows [columns, columns].
        total: Sum of the values of column i.
        square: Sum of the squares of column i.
        product: Sum of the products of columns i and j.
        centre: What was subtracted from each column [columns].
    """

    count: Array
    total: Array
    square: Array
    product: Array
    centre: Array

    @classmethod
    def empty(cls, columns: int) -> Products:
        """Return sums of no rows."""
        count, total, square, product = (np.zeros((columns, columns)) for _ in range(4))
        return cls(count, total, square, product, np.zeros(columns))

    def plus(self, values: Array) -> Products:
        """Return the sums with further rows.

        Args:
            values: Rows [rows, columns], NaN where a value is missing.
        """
        there = ~np.isnan(values)
        centre = self.centre.copy()
        for column in np.flatnonzero((np.diag(self.count) == 0) & there.any(axis=0)):
            present = values[there[:, column], column]
            centre[column] = np.partition(present, len(present) // 2)[len(present) // 2]  # so that constants give 0
        away, mask = np.where(there, values - centre, 0.0), there.astype(np.float64)
        return Products(
            self.count + mask.T @ mask,
            self.total + away.T @ mask,
            self.square + (away**2).T @ mask,
            self.product + away.T @ away,
            centre,
        )

    def around(self, centre: Array) -> Products:
        """Return the sums of the same rows less another centre."""
        by = self.centre - centre
        rows, columns = by[:, None], by[None, :]
        return Products(
            self.count,
            self.total + rows * self.count,
            self.square + 2 * rows * self.total + rows**2 * self.count,
            self.product + columns * self.total + rows * self.total.T + rows * columns * self.count,
            centre,
        )

    def select(self, columns: Sequence[int], kept: npt.NDArray[np.bool_]) -> Products:
        """Return the sums of some columns.

        Args:
            columns: Number of each column, in the order that they are to have; -1 for a column of zeros.
            kept: Mask of the pairs that are kept [len(columns), len(columns)]; others get zeros.
        """
        number = np.array(columns, np.int64)
        there = number >= 0
        mask, pick = kept & there[:, None] & there[None, :], np.ix_(number, number)
        if not len(self.centre):
            return Products.empty(len(number))
        parts = (self.count, self.total, self.square, self.product)
        count, total, square, product = (np.where(mask, part[pick], 0.0) for part in parts)
        return Products(count, total, square, product, np.where(there, self.centre[number], 0.0))

    def mean(self) -> Array:
        """Return the mean of each column, NaN where there is no value."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.centre + np.diag(self.total) / np.diag(self.count)

    def std(self) -> Array:
        """Return the standard deviation of each column, divided by the count less 1; NaN for fewer than two values."""
        count, total = np.diag(self.count), np.diag(self.total)
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = (np.diag(self.square) - total**2 / count) / (count - 1)
            found = np.sqrt(np.maximum(variance, 0.0))
        rounding = 4 * np.finfo(np.float64).eps * np.abs(np.nan_to_num(self.mean()))
        return np.where(count < 2, np.nan, np.where(found <= rounding, 0.0, found))

    def correlations(self) -> Array:
        """Return Pearson's correlations [columns, columns], NaN where one is not defined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            shared = self.product - self.total * self.total.T / self.count
            own = np.maximum(self.square - self.total**2 / self.count, 0.0)
            found = np.clip(shared / np.sqrt(own * own.T), -1.0, 1.0)
        constant = ~(self.std() > 0)
        return np.where((self.count < 2) | constant[:, None] | constant[None, :], np.nan, found)
