"""Federated XGBoost: `train` in place of `xgboost.train`, estimators for scikit-learn, and a callback."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("xgboost", "XGBoost or a package that its adapter needs"):
    from .callback import FederatedCallback
    from .estimators import FederatedXGBClassifier, FederatedXGBRanker, FederatedXGBRegressor
    from .training import train

__all__ = [
    "FederatedCallback",
    "FederatedXGBClassifier",
    "FederatedXGBRanker",
    "FederatedXGBRegressor",
    "train",
]
