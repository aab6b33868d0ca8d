"""Common cut points of features, merged from the sites' quantile summaries, for training on histograms.

A summary holds, for each feature, some points in ascending order and the weight that each represents. Merging sorts the
points of all sites. The error in rank of a cut is at most the weight of one point of each site.

A point stands for several rows, so values that few rows of a site share have none. Where enough rows of all sites
together have such values, the feature also gets cuts from a public grid, in place of the bins that its points leave
free. The grid depends on no data: 0, powers of two, and the steps between them that there is room for.

No library replaces this: `datasketches` (KLL, t-digest) is compiled, its sketches are opaque bytes that the server
would have to deserialize, and KLL is randomised, so sites would not get the same cuts in every run. What is left here
is one sort and one search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array, Arrays

POINTS = ("points", "point_weights", "point_ends", "levels", "max_bin")
REST = ("rest", "min_rows")
"""Further arrays of a summary, which earlier versions do not send."""

CUTS = ("cuts", "cut_ends", "levels")

_MAX_ROWS = 2**48
_MAX_EXPONENT = 40
_STEPS = ((1.0, 0), (1.5, 2), (1.25, 4), (1.75, 4))
"""Steps between two powers of two, each with its place in the order: that of so many further powers."""


@dataclass(frozen=True)
class QuantileSummary:
    """The quantile summary of one site.

    Attributes:
        points: For each feature, its points, ascending, float32.
        weights: For each feature, the weight of each point, float64.
        levels: For each feature, its number of categories; 0 for a numeric feature.
        max_bin: Largest number of bins of a feature.
        rest: Number of rows below zero, and of other rows, whose values no point describes, int64 [features, 2].
        min_rows: Fewest rows, over all sites, for which undescribed values get cuts.
    """

    points: tuple[Array, ...]
    weights: tuple[Array, ...]
    levels: Array
    max_bin: int
    rest: Array
    min_rows: int

    @classmethod
    def from_arrays(cls, extras: Arrays) -> QuantileSummary:
        """Read a summary from the extras of an update, without copying.

        Args:
            extras: The arrays named in `POINTS` and `REST`; they may come from a hostile peer.

        Returns:
            The summary; its arrays are views.

        Raises:
            ProtocolError: If the arrays are not a valid summary.
        """
        try:
            points, weights, ends, levels, (max_bin,) = (extras[name] for name in POINTS)
            cuts = [0, *ends.tolist()]
            features = list(pairwise(cuts))
            split = tuple(points[a:b] for a, b in features)
            rest = extras.get("rest", np.zeros(2 * len(features), np.int64)).reshape(len(features), 2)
            (min_rows,) = extras.get("min_rows", np.ones(1, np.int64))
            valid = (
                cuts == sorted(cuts)
                and cuts[-1] == len(points) == len(weights)
                and len(levels) == len(features)
                and 2 <= max_bin <= 65_536
                and bool(np.all(np.isfinite(points)) and np.all(np.isfinite(weights)) and np.all(weights >= 0))
                and all(bool(np.all(np.diff(part) > 0)) for part in split)
                and bool(np.all((levels >= 0) & (levels < 2**24)))
                and bool(np.all((rest >= 0) & (rest <= _MAX_ROWS)) and min_rows >= 1)
            )
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise ProtocolError("these arrays are not a quantile summary")
        return cls(split, tuple(weights[a:b] for a, b in features), levels, int(max_bin), rest, int(min_rows))

    def to_arrays(self) -> dict[str, Array]:
        """Return the summary as the arrays named in `POINTS` and `REST`."""
        return {
            "points": np.concatenate([*self.points, np.empty(0, np.float32)]).astype(np.float32),
            "point_weights": np.concatenate([*self.weights, np.empty(0)]).astype(np.float64),
            "point_ends": np.cumsum([len(p) for p in self.points], dtype=np.int64),
            "levels": self.levels.astype(np.int64),
            "max_bin": np.array([self.max_bin], np.int64),
            "rest": self.rest.astype(np.int64).reshape(-1),
            "min_rows": np.array([self.min_rows], np.int64),
        }


def check_cuts(cuts: Arrays, features: int) -> None:
    """Check the cut points that a server sends to a site, before bins are made of them.

    Args:
        cuts: The arrays of the task.
        features: Number of features of the site's data.

    Raises:
        ProtocolError: They are not what `merged` returns for so many features.
    """
    try:
        values, ends, levels = (cuts[name] for name in CUTS)
        bounds = [0, *ends.tolist()]
        valid = (
            len(ends) == len(levels) == features
            and bounds == sorted(bounds)
            and bounds[-1] == len(values)
            and bool(np.all(np.isfinite(values)) and np.all((levels >= 0) & (levels < 2**24)))
            and all(bool(np.all(np.diff(values[a:b]) > 0)) for a, b in pairwise(bounds))
        )
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ProtocolError(
            f"the server sends no cut points for the bins of {features} features", fix="ask the server's operator"
        )


def merged(summaries: Sequence[QuantileSummary]) -> dict[str, Array]:
    """Compute the cut points of every feature.

    Args:
        summaries: The summaries of all sites.

    Returns:
        The arrays named in `CUTS`: the cuts of one feature after the other (float32), the end of each feature in them,
        and the numbers of categories. A feature has at most max_bin - 1 cuts, ascending. A value belongs to the bin
        below the first cut that is greater.

    Raises:
        ProtocolError: If the sites have different numbers of features or different max_bin.
    """
    first = summaries[0]
    if any((len(s.points), s.max_bin) != (len(first.points), first.max_bin) for s in summaries):
        raise ProtocolError("the sites' quantile summaries differ in their number of features or in max_bin")
    rest = np.sum([s.rest for s in summaries], axis=0, dtype=np.float64)
    enough = np.asarray(rest >= max(s.min_rows for s in summaries))
    cuts = []
    for feature, (negative, positive) in enumerate(enough.tolist()):
        own = _cuts(
            np.concatenate([s.points[feature] for s in summaries]),
            np.concatenate([s.weights[feature] for s in summaries]),
            first.max_bin,
        )
        free = first.max_bin - 1 - len(own)
        cuts.append(np.union1d(own, _grid(free, negative=negative, positive=positive)))
    return {
        "cuts": np.concatenate([*cuts, np.empty(0, np.float32)]).astype(np.float32),
        "cut_ends": np.cumsum([len(c) for c in cuts], dtype=np.int64),
        "levels": np.max([s.levels for s in summaries], axis=0).astype(np.int64),
    }


@cache
def _grid(size: int, *, negative: bool, positive: bool) -> Array:
    """The first `size` cuts of the public grid, on the sides of zero that are wanted; float32, ascending."""
    sides = [sign for sign, wanted in ((-1.0, negative), (1.0, positive)) if wanted]
    steps = [
        (abs(exponent) + cost, abs(exponent), sign * step * 2.0**exponent)
        for exponent in range(-_MAX_EXPONENT, _MAX_EXPONENT + 1)
        for step, cost in _STEPS
        for sign in sides
    ]
    chosen = [(-1, 0, 0.0), *sorted(steps)] if sides else []
    return np.sort(np.array([cut for *_, cut in chosen[: max(size, 0)]], np.float32))


def _cuts(points: Array, weights: Array, max_bin: int) -> Array:
    values, where = np.unique(points, return_inverse=True)
    if len(values) <= max_bin:
        return values[1:]
    below = np.cumsum(np.bincount(where, weights, len(values)))
    targets = below[-1] * np.arange(1, max_bin) / max_bin
    chosen = np.unique(np.searchsorted(below, targets) + 1)
    cuts: Array = values[chosen[chosen < len(values)]]
    return cuts
