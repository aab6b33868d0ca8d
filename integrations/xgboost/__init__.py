"""Federated XGBoost: `train` in place of `xgboost.train`, estimators for scikit-learn, and a callback."""

from __future__ import annotations

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
