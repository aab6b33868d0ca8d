"""Histograms of scores from which the area under a curve can be computed over the data of all sites."""

from __future__ import annotations

import numpy as np

from fl_runtime.types import Array

MAX_BINS = 16_384
"""Largest number of bins of one site's histogram."""


def score_histogram(scores: Array, positive: Array, weights: Array) -> dict[int, tuple[float, float]]:
    """Count the weight of both classes in bins of the score.

    A bin is named by the bits of a float32 score, as a whole number of the same order. Histograms of several sites are
    merged by adding the weights of equal bins, whatever the scale of their scores. Up to `MAX_BINS` different scores
    have a bin each, so nothing is lost. Of more, scores that hold much weight keep a bin of their own, and the others
    are grouped with their neighbours into bins of similar weight, each named by its middle score. A bin of several
    scores holds at most 12 / `MAX_BINS` of either class, so an area changes by less than 1e-3.

    Args:
        scores: Scores of the examples, [n]; compared as float32, without NaN.
        positive: Whether each example is of the positive class, bool [n].
        weights: Weight of each example, [n], at least 0.

    Returns:
        Bin -> (weight of the negatives, weight of the positives), in ascending order of the score.
    """
    bits = np.asarray(scores, np.float32).view(np.int32).astype(np.int64)
    names, bin_of = np.unique(np.where(bits >= 0, bits, -(bits & 0x7FFFFFFF)), return_inverse=True)
    parts = [np.bincount(bin_of, weights * chosen, len(names)) for chosen in (~positive, positive)]
    if len(names) > MAX_BINS:
        negatives, positives = (part / (part.sum() or 1.0) for part in parts)
        shares = negatives + positives
        heavy = shares > 4 * shares.sum() / MAX_BINS  # at most a quarter of the bins
        light = np.where(heavy, 0.0, shares)
        group = ((np.cumsum(light) - light / 2) / (light.sum() or 1.0) * (MAX_BINS // 2)).astype(int)
        new = np.diff(group, prepend=-1) != 0
        new |= heavy
        new[1:] |= heavy[:-1]
        starts = np.flatnonzero(new)
        ends = np.append(starts[1:], len(names))
        parts = [np.add.reduceat(part, starts) for part in parts]
        names = names[(starts + ends - 1) // 2]
    rows = zip(names.tolist(), parts[0].tolist(), parts[1].tolist(), strict=True)
    return {name: (negative, positive_weight) for name, negative, positive_weight in rows}
