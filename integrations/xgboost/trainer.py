"""Private attributes of XGBoost that have no public access. Checked in XGBoost 3.2.0."""

from __future__ import annotations

import xgboost


def set_booster(estimator: xgboost.XGBModel, booster: xgboost.Booster) -> None:
    """Make `booster` the trained model of a scikit-learn estimator."""
    estimator._Booster = booster


def min_delta(stopper: xgboost.callback.EarlyStopping) -> float:
    """Return the least improvement that counts for this early stopping."""
    return float(stopper._min_delta)
