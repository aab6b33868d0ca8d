"""Gradients of the objectives that mode "levelwise" knows, as whole numbers of an agreed unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_runtime.types import Array

OBJECTIVES = ("reg:squarederror", "binary:logistic", "multi:softprob", "multi:softmax")
_MOST_UNITS_BITS = 22
"""A gradient is at most 2^22 units: exact in float32, and sums over two billion rows in float64."""


@dataclass(frozen=True)
class Objective:
    """An objective, with what is needed to agree on units of its gradients.

    Attributes:
        name: Name in XGBoost.
        labels: Label of each row, float64.
        weights: Weight of each row, float64.
        classes: Number of classes; 1 for an objective with one output.
    """

    name: str
    labels: Array
    weights: Array
    classes: int

    def gradients(self, margins: Array) -> Array:
        """Return gradients and hessians.

        Args:
            margins: Predictions before the link function, float32 [outputs, rows].

        Returns:
            float64 [outputs, rows, 2].
        """
        wide = margins.astype(np.float64)
        if self.name == "reg:squarederror":
            gradient, hessian = wide - self.labels, np.ones_like(wide)
        elif self.name == "binary:logistic":
            chance = _sigmoid(wide)
            gradient, hessian = chance - self.labels, chance * (1 - chance)
        else:
            exponentials = np.exp(wide - wide.max(axis=0, initial=-np.inf))
            chance = exponentials / exponentials.sum(axis=0)
            own = np.arange(self.classes)[:, None] == self.labels
            gradient, hessian = chance - own, 2 * chance * (1 - chance)
        return np.stack([gradient * self.weights, hessian * self.weights], axis=-1)

    def largest(self, margins: Array) -> tuple[float, float]:
        """Return bounds of this site's gradients, before any tree, and of its weights.

        Args:
            margins: As for `gradients`.
        """
        weight = float(self.weights.max(initial=0.0))
        if self.name != "reg:squarederror":
            return weight, weight
        return float(np.abs(self.gradients(margins)[..., 0]).max(initial=0.0)), weight


@dataclass
class Units:
    """What one unit of a quantised gradient and hessian stands for: powers of 2, the same at all sites.

    Both follow from bounds that the sites have agreed on and from the trees since, so no site tells its largest
    gradient in a round.

    Attributes:
        gradient: Bound of the gradients of all sites.
        weight: Bound of the weights of all sites.
        grows: Whether leaves move the gradients, as those of squared error.
    """

    gradient: float
    weight: float
    grows: bool

    @property
    def scales(self) -> Array:
        """One unit of gradients and of hessians, float64 [2]."""
        bounds = np.array([self.gradient, self.weight])
        return np.asarray(np.exp2(np.ceil(np.log2(np.maximum(bounds, 2.0**-100))) - _MOST_UNITS_BITS))

    def quantised(self, gradients: Array) -> Array:
        """Return gradients as whole numbers of units, rounded to the nearest, float64."""
        return np.rint(gradients / self.scales)

    def move(self, leaf: float) -> None:
        """Take account of a new tree.

        Args:
            leaf: Its largest absolute leaf value.
        """
        if self.grows:
            self.gradient += leaf * self.weight


def power_above(value: float) -> int:
    """Return the exponent of the smallest power of 2 that a value does not exceed, from -100 to 127."""
    return int(np.clip(np.ceil(np.log2(max(value, 2.0**-100))), -100, 127))


def objective_of(name: str, columns: dict[str, Any], rows: int, classes: int) -> Objective:
    """Return an objective over this site's rows.

    Args:
        name: One of `OBJECTIVES`.
        columns: What `rows_of` returned.
        rows: Number of rows.
        classes: Number of classes, 1 for objectives without.
    """
    weights = columns.get("weight")
    return Objective(
        name,
        np.asarray(columns.get("label", np.zeros(rows)), np.float64),
        np.ones(rows) if weights is None else np.asarray(weights, np.float64),
        classes,
    )


def _sigmoid(margins: Array) -> Array:
    small = np.exp(-np.abs(margins))
    return np.where(margins >= 0, 1 / (1 + small), small / (1 + small))
