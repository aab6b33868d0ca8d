"""All access to what XGBoost keeps private: the running call of `xgboost.train`, boosters, callbacks, estimators.

No other file of this package uses a private attribute of XGBoost. Each access was checked in XGBoost 3.0.0, 3.2.0 and
3.4.1, the oldest and the newest releases that are tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import xgboost


def running_train() -> Mapping[str, Any] | None:
    """The local variables of the `xgboost.train` that calls this callback; None outside of it.

    XGBoost gives callbacks the booster alone, but the arguments of `train` are on the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # xgboost.training.train(params, dtrain, num_boost_round, evals, ...): XGBoost 3.0.0, 3.2.0 and 3.4.1
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") == "xgboost.training":
            return frame.f_locals
        frame = frame.f_back
    return None


def call_last(callback: xgboost.callback.TrainingCallback, arguments: Mapping[str, Any]) -> None:
    """Let a running `xgboost.train` call a callback after all others.

    Args:
        callback: The callback.
        arguments: What `running_train` returned, before the first iteration.
    """
    arguments["cb_container"].callbacks.append(callback)  # CallbackContainer: XGBoost 3.0.0, 3.2.0 and 3.4.1


def exchange_contents(one: xgboost.Booster, other: xgboost.Booster) -> None:
    """Let two booster objects exchange all that they hold, while whoever holds on to them keeps the objects."""
    one.handle, other.handle = other.handle, one.handle  # the C++ object: XGBoost 3.0.0, 3.2.0 and 3.4.1


def min_delta_of(stopper: xgboost.callback.EarlyStopping) -> float:
    """The smallest change that counts as an improvement."""
    return float(stopper._min_delta)  # XGBoost 3.0.0, 3.2.0 and 3.4.1


def set_booster(estimator: xgboost.XGBModel, booster: xgboost.Booster) -> None:
    """Give a scikit-learn estimator the booster that it predicts with, as its own `fit` does."""
    estimator._Booster = booster  # XGBoost 3.0.0, 3.2.0 and 3.4.1
