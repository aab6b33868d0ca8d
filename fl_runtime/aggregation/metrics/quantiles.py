"""Cut points for all sites from the sites' quantile summaries: how features are put into bins before training.

A summary is, per feature, a few points in ascending order and the weight that each stands for (see the adapter for
what a point is). The merge is a weighted quantile sketch with the points as they are: its error in rank is at most the
weight of one point of each site.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array, Arrays

POINTS = ("points", "point_weights", "point_ends", "levels", "max_bin")
CUTS = ("cuts", "cut_ends", "levels")


@dataclass(frozen=True)
class Summary:
    """points, weights: one array per feature. levels: per feature, how many categories; 0 for numbers."""

    points: tuple[Array, ...]
    weights: tuple[Array, ...]
    levels: Array
    max_bin: int

    @classmethod
    def from_arrays(cls, extras: Arrays) -> Summary:
        """Views of `extras`. ProtocolError if they hold no summary."""
        try:
            points, weights, ends, levels, (max_bin,) = (extras[name] for name in POINTS)
            cuts = [0, *ends.tolist()]
            features = list(pairwise(cuts))
            split = tuple(points[a:b] for a, b in features)
            good = (
                cuts == sorted(cuts)
                and cuts[-1] == len(points) == len(weights)
                and len(levels) == len(features)
                and 2 <= max_bin <= 65_536
                and bool(np.all(np.isfinite(points)) and np.all(np.isfinite(weights)) and np.all(weights >= 0))
                and all(bool(np.all(np.diff(part) > 0)) for part in split)
                and bool(np.all((levels >= 0) & (levels < 2**24)))
            )
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise ProtocolError("this is no quantile summary")
        return cls(split, tuple(weights[a:b] for a, b in features), levels, int(max_bin))

    def to_arrays(self) -> dict[str, Array]:
        return {
            "points": np.concatenate([*self.points, np.empty(0, np.float32)]).astype(np.float32),
            "point_weights": np.concatenate([*self.weights, np.empty(0)]).astype(np.float64),
            "point_ends": np.cumsum([len(p) for p in self.points], dtype=np.int64),
            "levels": self.levels.astype(np.int64),
            "max_bin": np.array([self.max_bin], np.int64),
        }


def merged(summaries: Sequence[Summary]) -> dict[str, Array]:
    """Cut points of every feature: "cuts" float32, one feature after the other, "cut_ends", and "levels".

    At most max_bin - 1 a feature, ascending. A value belongs to the bin below the first cut that is greater.
    """
    first = summaries[0]
    if any((len(s.points), s.max_bin) != (len(first.points), first.max_bin) for s in summaries):
        raise ProtocolError("the sites' quantile summaries are not of the same features and max_bin")
    cuts = [
        _cuts(
            np.concatenate([s.points[feature] for s in summaries]),
            np.concatenate([s.weights[feature] for s in summaries]),
            first.max_bin,
        )
        for feature in range(len(first.points))
    ]
    return {
        "cuts": np.concatenate([*cuts, np.empty(0, np.float32)]).astype(np.float32),
        "cut_ends": np.cumsum([len(c) for c in cuts], dtype=np.int64),
        "levels": np.max([s.levels for s in summaries], axis=0).astype(np.int64),
    }


def _cuts(points: Array, weights: Array, max_bin: int) -> Array:
    values, where = np.unique(points, return_inverse=True)
    if len(values) <= max_bin:
        return values[1:]
    below = np.cumsum(np.bincount(where, weights, len(values)))
    targets = below[-1] * np.arange(1, max_bin) / max_bin
    chosen = np.unique(np.searchsorted(below, targets) + 1)
    cuts: Array = values[chosen[chosen < len(values)]]
    return cuts
