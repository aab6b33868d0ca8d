"""Exact order statistics over all sites, from counts alone.

Floats are mapped to integers of 64 bits in the same order. Each round adds counts of the next few bits among the values
that share the bits known so far, so the value at a rank is found digit by digit and no site sends a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_MOST_COUNTS = 1 << 17  # numbers in one message
_TOP = np.uint64(1 << 63)
Array = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint64]


class Summing(Protocol):
    """Sums over all sites, such as those of `fl_adapters.sums`."""

    def sum(self, arrays: Mapping[str, Array], /) -> Mapping[str, Array]:
        """Return the sums over all sites.

        Args:
            arrays: Name -> array of finite numbers, with the same names and shapes at all sites.

        Returns:
            Name -> float64 array with the same bits at all sites.
        """
        ...


def to_bits(values: Array) -> Bits:
    """Map floats to integers in the same order; both zeros become one."""
    bits = (np.ascontiguousarray(values, np.float64) + 0.0).view(np.uint64)
    return np.where(bits & _TOP, ~bits, bits | _TOP)


def from_bits(bits: Bits) -> Array:
    """Map the integers of `to_bits` back to floats."""
    return np.where(bits & _TOP, bits & ~_TOP, ~bits).view(np.float64)


def present(table: Any) -> list[Array]:
    """Return the columns of a dense array as float64, without missing values."""
    columns = np.asarray(table, np.float64).T
    return [column[~np.isnan(column)] for column in columns]


def value_counts(
    federation: Summing, columns: Sequence[Array], weights: Sequence[Array] | None = None
) -> npt.NDArray[np.int64]:
    """Return how many values each column has at all sites; `weights` says how often each value occurs."""
    own = [float(len(c)) for c in columns] if weights is None else [float(np.sum(w)) for w in weights]
    return federation.sum({"count": np.array(own)})["count"].astype(np.int64)


def at_ranks(
    federation: Summing,
    columns: Sequence[Array],
    ranks: Sequence[Sequence[int]],
    weights: Sequence[Array] | None = None,
) -> list[Array]:
    """Return the values at ranks of the sorted values of all sites.

    Args:
        federation: The federation.
        columns: This site's values of each feature, no NaN among them.
        ranks: For each feature the ranks, from 0, each below the number of its values at all sites.
        weights: How often each of the values occurs, whole numbers; None for once.

    Returns:
        For each feature the values at its ranks.
    """
    often = [None] * len(columns) if weights is None else weights
    inside = [(to_bits(column), times) for column, times in zip(columns, often, strict=True)]  # may be at a rank
    owner = np.repeat(np.arange(len(ranks)), [len(r) for r in ranks])
    left = np.array([rank for r in ranks for rank in r], np.int64)
    order = np.lexsort((left, owner))  # so that equal prefixes stand side by side
    owner, left = owner[order], left[order]
    prefix = np.zeros(len(left), np.uint64)
    known = 0
    while known < 64 and len(left):
        first = np.flatnonzero(np.diff(owner, prepend=-1) | (prefix != np.roll(prefix, 1)))
        member = np.repeat(np.arange(len(first)), np.diff(first, append=len(left)))
        bits = int(np.clip(np.log2(_MOST_COUNTS / len(first)), 1, 64 - known))
        counts = []
        for column in range(len(columns)):
            counted, kept, weighted = _digits(*inside[column], prefix[first[owner[first] == column]], known, bits)
            inside[column] = kept, weighted
            counts.append(counted)
        total = federation.sum({"counts": np.concatenate(counts).astype(float)})["counts"].astype(np.int64)
        below = np.cumsum(total, axis=1)
        before = np.concatenate([[0], np.cumsum(below[:-1, -1])])  # so that one search finds the digits of all groups
        place = np.searchsorted((below + before[:, None]).ravel(), left + before[member], "right")
        digit = place - (member << bits)
        left -= np.where(digit > 0, below[member, np.maximum(digit - 1, 0)], 0)
        prefix = (prefix << np.uint64(bits)) | digit.astype(np.uint64)
        known += bits
    found = np.empty(len(left))
    found[order] = from_bits(prefix)
    return np.split(found, np.cumsum([len(r) for r in ranks])[:-1])


def _digits(
    values: Bits, weights: Array | None, prefixes: Bits, known: int, bits: int
) -> tuple[npt.NDArray[np.int64], Bits, Array | None]:
    """Count the values that begin with each of the sorted prefixes by their next `bits` bits.

    Returns:
        Counts [prefixes, 2 ** bits], and the values that begin with one of the prefixes, with their weights.
    """
    group = np.zeros(len(values), np.int64)
    if known and len(prefixes):
        starts = values >> np.uint64(64 - known)
        group = np.minimum(np.searchsorted(prefixes, starts), len(prefixes) - 1)
        kept = prefixes[group] == starts
        values, group, weights = values[kept], group[kept], None if weights is None else weights[kept]
    if not len(prefixes):
        return np.zeros((0, 1 << bits), np.int64), values[:0], None if weights is None else weights[:0]
    digits = (values >> np.uint64(64 - known - bits)) & np.uint64((1 << bits) - 1)
    flat = np.bincount((group << bits) + digits.astype(np.int64), weights, len(prefixes) << bits)
    return flat.astype(np.int64).reshape(len(prefixes), -1), values, weights


def extremes(federation: Summing, columns: Sequence[Array]) -> tuple[Array, Array]:
    """Return the smallest and the largest value of each feature, NaN where there is none."""
    counts = value_counts(federation, columns)
    found = at_ranks(federation, columns, [[0, int(n) - 1] if n else [] for n in counts])
    pairs = np.array([pair if len(pair) else (np.nan, np.nan) for pair in found]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def medians(federation: Summing, columns: Sequence[Array]) -> Array:
    """Return the median of each feature, NaN where there is no value."""
    counts = value_counts(federation, columns)
    found = at_ranks(federation, columns, [[(int(n) - 1) // 2, int(n) // 2] if n else [] for n in counts])
    return np.array([pair.mean() if len(pair) else np.nan for pair in found])


def quantiles(
    federation: Summing,
    columns: Sequence[Array],
    levels: Sequence[Array],
    method: str = "linear",
    weights: Sequence[Array] | None = None,
) -> list[Array]:
    """Return quantiles of each feature, as `numpy.quantile` gives them for the values of all sites.

    Args:
        federation: The federation.
        columns: This site's values of each feature, no NaN among them.
        levels: Levels from 0 to 1 for each feature.
        method: Method of `numpy.quantile`.
        weights: How often each of the values occurs, whole numbers; None for once.

    Returns:
        For each feature the quantiles, NaN where there is no value.
    """
    counts = value_counts(federation, columns, weights)
    places = [
        _positions(int(n), np.asarray(q, float), method) if n else np.zeros(0)
        for n, q in zip(counts, levels, strict=True)
    ]
    ranks = [np.concatenate([np.floor(place), np.ceil(place)]).astype(np.int64).tolist() for place in places]
    found = at_ranks(federation, columns, ranks, weights)
    result = []
    for values, place, q in zip(found, places, levels, strict=True):
        low, high = values[: len(place)], values[len(place) :]
        result.append(between(low, high, place - np.floor(place)) if len(place) else np.full(len(q), np.nan))
    return result


def _positions(count: int, levels: Array, method: str) -> Array:
    """Where the quantiles lie among `count` sorted values: between two ranks."""
    if method == "linear":
        return np.asarray(levels * (count - 1), float)
    return np.asarray(np.quantile(np.arange(count, dtype=float), levels, method=method))  # type: ignore[call-overload]


def between(low: Array, high: Array, share: Array) -> Array:
    """Interpolate between values with NumPy's rounding.

    Args:
        low: Values below.
        high: Values above.
        share: How far each result is from `low`, 0 to 1.
    """
    step = high - low
    return np.where(share >= 0.5, high - step * (1 - share), low + step * share)
