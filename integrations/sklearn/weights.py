"""Weights of rows and of classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.utils.class_weight import compute_class_weight

from fl_runtime.errors import ConfigError

from .federation import Array


def checked_weights(sample_weight: Any, X: Any) -> Array | None:
    """Return the weights of the rows as float64, or None if there are none.

    Args:
        sample_weight: One weight for all rows, a weight for each row, or None.
        X: The rows.

    Raises:
        ConfigError: The weights do not fit the rows.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight, np.float64)
    if weights.ndim == 0:
        return np.full(X.shape[0], float(weights))
    if weights.shape != (X.shape[0],) or not np.isfinite(weights).all():
        raise ConfigError(
            f"sample_weight has the shape {weights.shape} for {X.shape[0]} rows, or values that are not finite",
            where="fit",
            fix="give a finite weight for each row",
        )
    return weights


def class_weights(class_weight: Any, classes: Any, totals: Array) -> Array:
    """Return the weight of each class, as scikit-learn computes it for all rows.

    Args:
        class_weight: None, "balanced", or a dict from class to weight.
        classes: The classes.
        totals: Sum of the rows' weights of each class, over all sites.

    Raises:
        ConfigError: The dict names a class that no site has.
    """
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, Mapping):
        known = {value: number for number, value in enumerate(np.asarray(classes).tolist())}
        unknown = [name for name in class_weight if name not in known]
        if unknown and len(unknown) + len(known) > len(class_weight):
            raise ConfigError(
                f"class_weight names {unknown[0]!r}, a class that no site has",
                where="class_weight",
                fix=f"name some of {', '.join(map(repr, known))}",
            )
        return np.array([class_weight.get(name, 1.0) for name in known])
    return np.asarray(totals.sum() / (len(classes) * totals))


def counts_for_balance() -> bool:
    """Return whether this scikit-learn counts rows by their weights for `class_weight="balanced"`."""
    return "sample_weight" in inspect.signature(compute_class_weight).parameters
