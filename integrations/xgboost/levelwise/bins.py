"""Bins of features that all sites share, found from counts alone, and the bin of each value of this site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from fl_adapters.loop.federation import Federation
from fl_runtime.types import Array

from .large_sums import summed

_KEY_BITS = 32
_FIRST_BITS = 12
"""Sign, exponent and three binary digits of a value: what the first counts tell apart."""
_NEXT_BITS = 6
"""Further digits that each later count tells apart, at most."""
_MOST_COUNTS = 1 << 18
"""Most numbers in one sum."""
_CELLS_PER_BIN = 4
_TOP = np.uint32(1 << 31)
Keys = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Bins:
    """The bins of every feature.

    Attributes:
        cuts: For each feature its cut points, ascending, float32. A value belongs to the bin below the first cut that
            is greater, so n cuts make n + 1 bins.
    """

    cuts: tuple[Array, ...]

    @cached_property
    def starts(self) -> Array:
        """Place of each feature's first bin in a histogram of all features, and the number of all bins, int64."""
        return np.cumsum([0, *(len(cuts) + 1 for cuts in self.cuts)], dtype=np.int64)

    @property
    def total(self) -> int:
        """Number of bins of all features together."""
        return int(self.starts[-1])

    def place(self, columns: Sequence[tuple[Array, Array]], rows: int) -> Array:
        """Put the values of this site into the bins.

        Args:
            columns: For each feature the numbers of the rows that have a value, and these values.
            rows: Number of rows.

        Returns:
            Number of the bin, uint16 [features, rows]; for a missing value the number of bins of the feature.
        """
        placed = np.empty((len(self.cuts), rows), np.uint16)
        for feature, ((where, values), cuts) in enumerate(zip(columns, self.cuts, strict=True)):
            placed[feature] = len(cuts) + 1
            placed[feature, where] = np.searchsorted(cuts, values, side="right")
        return placed


def columns_of(data: Array, indices: Array, indptr: Array, features: int) -> list[tuple[Array, Array]]:
    """Return, for each feature of a matrix in CSR form, the rows that have a value, and the values."""
    row_of = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    order = np.argsort(indices, kind="stable")
    ends = np.cumsum(np.bincount(indices, minlength=features))
    chosen = [order[begin:end] for begin, end in pairwise([0, *ends.tolist()])]
    return [(row_of[entries], data[entries]) for entries in chosen]


def agree_on_bins(federation: Federation, columns: Sequence[Array], max_bin: int, min_rows: int) -> Bins:
    """Find bins that hold about as many rows each, over all sites together.

    Values are counted in cells. A cell holds the floats that begin with the same bits, and only cells with many rows
    are divided further, so no value is known more closely than by a cell of `min_rows` rows of all sites. All rows
    count the same, whatever their weight.

    Args:
        federation: Sums counts over all sites.
        columns: This site's values of each feature, float32, finite.
        max_bin: Largest number of bins of a feature.
        min_rows: A cell of so many rows or fewer is not divided, except into those of `_FIRST_BITS`.

    Returns:
        The bins, the same at all sites.
    """
    own = [np.sort(_keys(values)) for values in columns]
    owner = np.arange(len(own))  # of the cells that are divided next
    first = np.zeros(len(own), np.uint64)  # smallest key of each
    known, step = 0, _FIRST_BITS
    limit = np.zeros(len(own))
    done: list[tuple[Array, Array, Array]] = []
    while len(owner):
        width = 1 << (_KEY_BITS - known - step)
        edges = first[:, None] + np.arange((1 << step) + 1, dtype=np.uint64) * np.uint64(width)
        counts = summed(federation, "counts", _counted(own, owner, edges), _MOST_COUNTS)
        if known == 0:
            limit = np.maximum(counts.sum(axis=1) / (_CELLS_PER_BIN * max_bin), min_rows)
        known += step
        large = (counts > limit[owner][:, None]) & (known < _KEY_BITS)
        ended = (counts > 0) & ~large
        owners = np.broadcast_to(owner[:, None], counts.shape)
        done.append((owners[ended], edges[:, :-1][ended], counts[ended]))
        owner, first = owners[large], edges[:, :-1][large]
        step = int(np.clip(np.log2(_MOST_COUNTS / max(len(owner), 1)), 1, min(_NEXT_BITS, _KEY_BITS - known or 1)))
    return Bins(tuple(_chosen(cells, max_bin) for cells in _by_feature(done, len(own))))


def _keys(values: Array) -> Keys:
    """Map float32 values to whole numbers in the same order; both zeros become one."""
    bits = (np.ascontiguousarray(values, np.float32) + np.float32(0)).view(np.uint32)
    return np.where(bits & _TOP, ~bits, bits | _TOP)


def _values(keys: Keys) -> Array:
    """Map the numbers of `_keys` back to float32 values."""
    return np.where(keys & _TOP, keys & ~_TOP, ~keys).view(np.float32)


def _counted(own: Sequence[Keys], owner: Array, edges: Array) -> Array:
    """Count this site's sorted keys between neighbouring edges, float64 [cells, parts]."""
    counts = np.empty((len(edges), edges.shape[1] - 1))
    for feature, keys in enumerate(own):
        cells = owner == feature
        counts[cells] = np.diff(np.searchsorted(keys.astype(np.uint64), edges[cells]), axis=1)
    return counts


def _by_feature(done: Sequence[tuple[Array, Array, Array]], features: int) -> list[tuple[Array, Array]]:
    """Return (smallest keys, counts) of the cells of each feature, ascending."""
    owner, first, counts = (np.concatenate(parts) for parts in zip(*done, strict=True))
    order = np.lexsort((first, owner))
    ends = np.searchsorted(owner[order], np.arange(features + 1))
    return [(first[order][begin:end], counts[order][begin:end]) for begin, end in pairwise(ends)]


def _chosen(cells: tuple[Array, Array], max_bin: int) -> Array:
    """Return the cut points of a feature: between all its cells, or those at quantiles of the rows."""
    first, counts = cells
    if len(first) <= max_bin:
        return _values(first[1:].astype(np.uint32))
    below = np.cumsum(counts)
    chosen = np.unique(np.searchsorted(below, below[-1] * np.arange(1, max_bin) / max_bin) + 1)
    return _values(first[chosen[chosen < len(first)]].astype(np.uint32))
