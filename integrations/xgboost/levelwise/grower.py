"""Grows trees level by level: one sum of histograms over the sites for each level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_runtime.types import Array

from .bins import Bins
from .splits import Regularisation, Splits, best_splits

_ROOT_PARENT = 2147483647
_ABOVE_ALL = np.float32(2e38)  # the upper end of the last bin; values of data are below
Sum = Callable[[Array], Array]


@dataclass
class Tree:
    """A tree that grows. The attributes are lists with an entry for each node, named as in XGBoost's documents."""

    left_children: list[int] = field(default_factory=list)
    right_children: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    split_indices: list[int] = field(default_factory=list)
    split_conditions: list[float] = field(default_factory=list)
    default_left: list[int] = field(default_factory=list)
    base_weights: list[float] = field(default_factory=list)
    loss_changes: list[float] = field(default_factory=list)
    sum_hessian: list[float] = field(default_factory=list)

    def add_leaf(self, parent: int, value: float, weight: float, hessian: float) -> int:
        """Add a leaf and return its number.

        Args:
            parent: Number of its parent.
            value: Its value.
            weight: The same before the learning rate.
            hessian: Sum of the hessians of its rows.
        """
        self.left_children.append(-1)
        self.right_children.append(-1)
        self.parents.append(parent)
        self.split_indices.append(0)
        self.split_conditions.append(value)
        self.default_left.append(0)
        self.base_weights.append(weight)
        self.loss_changes.append(0.0)
        self.sum_hessian.append(hessian)
        return len(self.parents) - 1

    def leaves(self) -> list[float]:
        """Return the values of the leaves."""
        return [v for v, left in zip(self.split_conditions, self.left_children, strict=True) if left < 0]

    def document(self, number: int, features: int) -> dict[str, Any]:
        """Return the tree as a part of XGBoost's model document.

        Args:
            number: Number of the tree in the model.
            features: Number of features of the model.
        """
        nodes = len(self.parents)
        return {
            "base_weights": np.array(self.base_weights, np.float32),
            "categories": np.empty(0, np.int32),
            "categories_nodes": np.empty(0, np.int32),
            "categories_segments": np.empty(0, np.int64),
            "categories_sizes": np.empty(0, np.int64),
            "default_left": np.array(self.default_left, np.uint8),
            "id": number,
            "left_children": np.array(self.left_children, np.int32),
            "loss_changes": np.array(self.loss_changes, np.float32),
            "parents": np.array(self.parents, np.int32),
            "right_children": np.array(self.right_children, np.int32),
            "split_conditions": np.array(self.split_conditions, np.float32),
            "split_indices": np.array(self.split_indices, np.int32),
            "split_type": np.zeros(nodes, np.uint8),
            "sum_hessian": np.array(self.sum_hessian, np.float32),
            "tree_param": {
                "num_deleted": "0",
                "num_feature": str(features),
                "num_nodes": str(nodes),
                "size_leaf_vector": "1",
            },
        }


@dataclass
class _Open:
    """A node that may be split: the number of its tree, its number there, and this site's rows in it."""

    tree: int
    node: int
    rows: Array


class Grower:
    """Grows the trees of a boosting round, one for each output of the model, all of them level by level.

    Args:
        bins: The bins of all sites.
        placed: Bin of each value of this site, as `Bins.place` returns it.
        penalty: Parameters of trees.
        max_depth: Largest depth; 0 for no limit.
    """

    def __init__(self, bins: Bins, placed: Array, penalty: Regularisation, max_depth: int) -> None:
        self._bins, self._placed = bins, placed
        self._penalty, self._max_depth = penalty, max_depth

    def grow(self, gradients: Array, scales: Array, sum_over_sites: Sum) -> tuple[list[Tree], Array]:
        """Grow one tree for each output.

        Args:
            gradients: Quantised gradients and hessians of this site's rows: whole numbers, float64
                [outputs, rows, 2].
            scales: What one unit of both stands for, powers of 2, float64 [2].
            sum_over_sites: Sums an array of whole numbers over all sites. It is called once for each level.

        Returns:
            The trees, and the value that each adds to each row of this site, float32 [outputs, rows].
        """
        outputs, rows = gradients.shape[:2]
        values = np.empty((outputs, rows), np.float32)
        trees = [Tree() for _ in range(outputs)]
        every = np.arange(rows)
        level = [_Open(tree, 0, every) for tree in range(outputs)]
        own = self._histograms(level, gradients)
        summed = sum_over_sites(np.concatenate([own.reshape(-1), gradients.sum(axis=1).reshape(-1)]))
        histograms = summed[: own.size].reshape(own.shape) * scales
        totals = summed[own.size :].reshape(outputs, 2) * scales
        for tree, value, weight, total in zip(
            trees, self._penalty.leaf(totals), self._penalty.weight(totals), totals, strict=True
        ):
            tree.add_leaf(_ROOT_PARENT, float(value), float(weight), float(total[1]))
        depth = 0
        while level:
            splits = best_splits(histograms, totals, self._bins, self._penalty)
            split = np.flatnonzero(splits.gain)
            for number in np.flatnonzero(splits.gain == 0):
                _settle(trees, [level[number]], values)
            children, totals = self._divide(trees, level, splits, split, totals)
            depth += 1
            if depth == self._max_depth or not children:
                _settle(trees, children, values)
                break
            level = children
            own = self._histograms(children[::2], gradients)
            left = sum_over_sites(own.reshape(-1)).reshape(own.shape) * scales
            right = histograms[split] - left
            histograms = np.stack([left, right], axis=1).reshape(-1, *left.shape[1:])
        return trees, values

    def _histograms(self, level: Sequence[_Open], gradients: Array) -> Array:
        """Sum this site's gradients in each node and bin, float64 [nodes, bins, 2]."""
        found = np.empty((len(level), self._bins.total, 2))
        rows = np.concatenate([node.rows for node in level])
        slot = np.repeat(np.arange(len(level)), [len(node.rows) for node in level])
        part = np.concatenate([gradients[node.tree][node.rows] for node in level])
        for feature, (begin, end) in enumerate(zip(self._bins.starts[:-1], self._bins.starts[1:], strict=True)):
            width = int(end - begin) + 1  # one more for missing values
            where = slot * width + self._placed[feature][rows]
            for kind in range(2):
                sums = np.bincount(where, part[:, kind], len(level) * width)
                found[:, begin:end, kind] = sums.reshape(len(level), width)[:, :-1]
        return found

    def _divide(
        self, trees: Sequence[Tree], level: Sequence[_Open], splits: Splits, split: Array, totals: Array
    ) -> tuple[list[_Open], Array]:
        """Split nodes of a level. Returns the children, left and right in turn, and their sums."""
        children: list[_Open] = []
        left = splits.left[split]
        sums = np.stack([left, totals[split] - left], axis=1)
        leaves = self._penalty.leaf(sums)
        for number, pair, values in zip(split.tolist(), sums, leaves, strict=True):
            node, feature, last = level[number], int(splits.feature[number]), int(splits.bin[number])
            tree, cuts = trees[node.tree], self._bins.cuts[feature]
            missing_left = bool(splits.default_left[number])
            places = self._placed[feature][node.rows]
            goes_left = places <= last if last >= 0 else np.zeros(len(places), bool)
            if missing_left:
                goes_left |= places > len(cuts)
            tree.split_indices[node.node] = feature
            tree.split_conditions[node.node] = float(_condition(cuts, last))
            tree.default_left[node.node] = int(missing_left)
            tree.loss_changes[node.node] = float(splits.gain[number])
            tree.base_weights[node.node] = float(self._penalty.weight(pair.sum(axis=0)))
            for side, rows in enumerate((node.rows[goes_left], node.rows[~goes_left])):
                value = float(values[side])
                child = tree.add_leaf(node.node, value, value, float(pair[side, 1]))
                (tree.right_children if side else tree.left_children)[node.node] = child
                children.append(_Open(node.tree, child, rows))
        return children, sums.reshape(-1, 2)


def _condition(cuts: Array, last: int) -> np.float32:
    """Return the value below which rows go left if `last` is the last bin of the left child."""
    if last < 0:
        return np.float32(-_ABOVE_ALL)
    return np.float32(cuts[last]) if last < len(cuts) else _ABOVE_ALL


def _settle(trees: Sequence[Tree], leaves: Sequence[_Open], values: Array) -> None:
    """Note the value of each row of these leaves."""
    for leaf in leaves:
        values[leaf.tree, leaf.rows] = trees[leaf.tree].split_conditions[leaf.node]
