"""The best split of each node, from a histogram of gradients, as XGBoost's `hist` chooses it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fl_runtime.types import Array

from .bins import Bins

_LEAST_GAIN = np.float32(1e-6)
"""XGBoost splits no node for less."""


@dataclass(frozen=True)
class Regularisation:
    """Parameters that decide about splits and leaves.

    Attributes:
        eta: Learning rate.
        reg_lambda: L2 penalty on leaves.
        reg_alpha: L1 penalty on leaves.
        min_split_loss: Least gain of a split (gamma).
        min_child_weight: Least sum of hessians in a child.
        gain_from_weights: Whether gains are computed from the weights of leaves, as XGBoost does since 3.4. It changes
            the last bit, which decides between splits that gain almost the same.
    """

    eta: float = 0.3
    reg_lambda: float = 1.0
    reg_alpha: float = 0.0
    min_split_loss: float = 0.0
    min_child_weight: float = 1.0
    gain_from_weights: bool = False

    def with_eta(self, eta: float) -> Regularisation:
        """Return the same with another learning rate."""
        return replace(self, eta=eta)

    def gain(self, sums: Array) -> Array:
        """Return the gain of nodes.

        Args:
            sums: Sums of gradients and hessians, float64 [..., 2].

        Returns:
            float32 [...]; 0 where the sum of hessians is not above 0.
        """
        gradients, hessians = sums[..., 0], sums[..., 1]
        penalised = hessians + _float32(self.reg_lambda)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self.gain_from_weights:
                weight = self.weight(sums)
                square, wide = (weight * weight).astype(np.float64), weight.astype(np.float64)
                lasso = 2 * _float32(self.reg_alpha) * np.abs(wide)
                gain: Array = (-(2 * gradients * wide + penalised * square + lasso)).astype(np.float32)
            else:
                shrunk = self._shrunk(gradients)
                gain = (shrunk * shrunk).astype(np.float32) / penalised.astype(np.float32)
        return np.where(hessians > 0, gain, np.float32(0))

    def weight(self, sums: Array) -> Array:
        """Return the weight of nodes, before the learning rate; arguments and result as those of `gain`."""
        hessians = sums[..., 1]
        enough = hessians > 0
        if not self.gain_from_weights:
            enough &= hessians >= np.float32(self.min_child_weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = -self._shrunk(sums[..., 0]) / (hessians + _float32(self.reg_lambda))
        return np.where(enough, weight, 0.0).astype(np.float32)

    def leaf(self, sums: Array) -> Array:
        """Return the values of leaves, float32; arguments as those of `gain`."""
        return np.asarray(self.weight(sums) * np.float32(self.eta), np.float32)

    def _shrunk(self, gradients: Array) -> Array:
        return np.sign(gradients) * np.maximum(np.abs(gradients) - _float32(self.reg_alpha), 0.0)


def _float32(value: float) -> float:
    """A parameter as XGBoost holds it."""
    return float(np.float32(value))


@dataclass(frozen=True)
class Splits:
    """The best split of each of n nodes.

    Attributes:
        gain: How much it gains, float32 [n]; 0 for a node that stays a leaf.
        feature: Number of its feature, int64 [n].
        bin: The last bin that goes left, int64 [n]; -1 if all values go right, and missing ones left.
        default_left: Whether missing values go left, bool [n].
        left: Sums of gradients and hessians of the left child, float64 [n, 2].
    """

    gain: Array
    feature: Array
    bin: Array
    default_left: Array
    left: Array


def best_splits(histograms: Array, totals: Array, bins: Bins, penalty: Regularisation) -> Splits:
    """Choose the best split of each node.

    Ties are decided as in XGBoost: the first feature, then missing values to the right, then the first bin in the
    direction in which bins are added to the side without missing values.

    Args:
        histograms: Sums of gradients and hessians for each node and bin, float64 [nodes, bins.total, 2].
        totals: The same of each node, with rows whose value is missing, float64 [nodes, 2].
        bins: The bins.
        penalty: Parameters of trees.

    Returns:
        The splits.
    """
    nodes = len(totals)
    best = Splits(
        np.zeros(nodes, np.float32),
        np.zeros(nodes, np.int64),
        np.zeros(nodes, np.int64),
        np.zeros(nodes, bool),
        np.zeros((nodes, 2)),
    )
    own_gain = penalty.gain(totals)
    for feature, (begin, end) in enumerate(zip(bins.starts[:-1], bins.starts[1:], strict=True)):
        below = np.cumsum(histograms[:, begin:end], axis=1)
        present = below[:, -1]
        _keep_better(best, below, totals, own_gain, penalty, feature, default_left=False)
        missing = np.any(present != totals, axis=1)
        if missing.any():
            # from the last bin down: the left child has the missing rows, and all values below the bin
            above = present[:, None] - np.concatenate([np.zeros_like(below[:, :1]), below[:, :-1]], axis=1)
            left = (totals[:, None] - above)[:, ::-1]
            _keep_better(best, left, totals, own_gain, penalty, feature, default_left=True, among=missing)
    worth = (best.gain > _LEAST_GAIN) & (best.gain >= np.float32(penalty.min_split_loss))
    best.gain[~worth] = 0.0
    return best


def _keep_better(
    best: Splits,
    left: Array,
    totals: Array,
    own_gain: Array,
    penalty: Regularisation,
    feature: int,
    *,
    default_left: bool,
    among: Any = True,
) -> None:
    """Put the splits of a feature that gain more than the best ones in their place.

    Args:
        best: The best splits so far.
        left: Sums of the left child for each node and place, in the order of the search, float64 [nodes, places, 2].
        totals: Sums of each node.
        own_gain: Gain of each node without a split.
        penalty: Parameters of trees.
        feature: Number of the feature.
        default_left: Whether missing values go left, and the search from the last bin down.
        among: Nodes that are looked at.
    """
    right = totals[:, None] - left
    gain = (penalty.gain(left) + penalty.gain(right)) - own_gain[:, None]
    least = np.minimum(left[..., 1], right[..., 1])
    gain[(least < np.float32(penalty.min_child_weight)) | (least <= 0) | ~np.isfinite(gain)] = -np.inf
    place = np.argmax(gain, axis=1)
    every = np.arange(len(totals))
    better = (gain[every, place] > best.gain) & among
    best.gain[better] = gain[every, place][better]
    best.feature[better] = feature
    best.bin[better] = (left.shape[1] - 2 - place if default_left else place)[better]
    best.default_left[better] = default_left
    best.left[better] = left[every, place][better]
