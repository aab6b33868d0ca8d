"""The arguments of `describe`, checked: what all sites must ask alike."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from fl_runtime.errors import ConfigError

Bins = int | tuple[float, ...]
_MOST_BINS, _MOST_LEVELS = 1000, 100
_LONGEST_TEXT = 200
_WHERE = "describe"


@dataclass(frozen=True)
class Question:
    """What is asked of the columns.

    Attributes:
        features: Names of the columns; None for all.
        categorical: Names of numeric columns that hold categories.
        bins: Number of bins, or their edges, of the histograms of columns that `own_bins` does not name.
        own_bins: Column -> the same for this column.
        levels: Levels of the quantiles, sorted.
        correlations: Whether correlations are asked for.
    """

    features: tuple[str, ...] | None
    categorical: tuple[str, ...]
    bins: Bins
    own_bins: Mapping[str, Bins] = field(default_factory=dict)
    levels: tuple[float, ...] = ()
    correlations: bool = True

    def bins_of(self, column: str) -> Bins:
        """Return the number of bins of a column, or their edges."""
        return self.own_bins.get(column, self.bins)

    def facts(self) -> dict[str, str]:
        """Return what must be equal at all sites: name of an argument -> a short text."""
        values = {
            "features": self.features,
            "categorical": sorted(self.categorical),
            "bins": (self.bins, sorted(self.own_bins.items())),
            "quantiles": self.levels,
            "correlations": self.correlations,
        }
        return {name: _short(repr(value)) for name, value in values.items()}


def ask(
    features: Sequence[str] | None,
    categorical: Sequence[str],
    bins: int | Sequence[float] | Mapping[str, int | Sequence[float]],
    quantiles: Sequence[float],
    correlations: bool,
    default_bins: int,
) -> Question:
    """Check the arguments of `describe`.

    Args:
        features: As `describe` got it, as are all but the last.
        categorical: Names of columns.
        bins: For all columns, or for some by name.
        quantiles: Levels.
        correlations: Whether correlations are asked for.
        default_bins: Number of bins of columns that `bins` does not name.

    Returns:
        The checked arguments.

    Raises:
        ConfigError: An argument cannot work.
    """
    named = {str(name): _bins(value) for name, value in bins.items()} if isinstance(bins, Mapping) else {}
    return Question(
        None if features is None else _names("features", features),
        _names("categorical", categorical),
        default_bins if isinstance(bins, Mapping) else _bins(bins),
        named,
        _levels(quantiles),
        bool(correlations),
    )


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument}={names!r} is no list of names", where=_WHERE, fix=f'pass {argument}=["age"]')
    return tuple(dict.fromkeys(names))


def _levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    try:
        levels = sorted({float(level) for level in quantiles})
    except (TypeError, ValueError):
        levels = [math.nan]
    if len(levels) > _MOST_LEVELS or not all(0 <= level <= 1 for level in levels):
        raise ConfigError(
            f"quantiles={quantiles!r} are no levels", where=_WHERE, fix=f"pass up to {_MOST_LEVELS} numbers from 0 to 1"
        )
    return tuple(levels)


def _bins(bins: Any) -> Bins:
    if isinstance(bins, int) and not isinstance(bins, bool) and 1 <= bins <= _MOST_BINS:
        return bins
    try:
        edges = tuple(float(edge) for edge in bins)
    except (TypeError, ValueError):
        edges = ()
    ordered = all(a < b for a, b in pairwise(edges)) and all(map(math.isfinite, edges))
    if not 2 <= len(edges) <= _MOST_BINS + 1 or not ordered:
        raise ConfigError(
            f"bins={bins!r} are neither a number of bins nor edges",
            where=_WHERE,
            fix=f"pass 1 to {_MOST_BINS}, or the edges in increasing order",
        )
    return edges


def _short(text: str) -> str:
    if len(text) <= _LONGEST_TEXT and text.isprintable():
        return text
    return f"{text[:40]!a}... ({hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]})"
