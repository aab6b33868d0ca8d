"""Small data for the XGBoost tests, dealt out unevenly, and models put together by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost

from fl_runtime.aggregation.tree_document import TreeModel

SIZES = (160, 70, 40)
SITES = tuple(f"site-{n}" for n in range(1, len(SIZES) + 1))
CUTS = np.cumsum((0, *SIZES))
COLUMNS = 5

_draw = np.random.default_rng(7)
X = _draw.normal(size=(sum(SIZES), COLUMNS)).astype(np.float32)
_score = X[:, 0] + X[:, 1] ** 2 - X[:, 2] * X[:, 3] + _draw.normal(scale=0.5, size=len(X))
REAL = _score.astype(np.float32)
BINARY = (_score > 0.6).astype(int)
CLASSES = np.digitize(_score, [0.0, 1.5])
RELEVANCE = np.digitize(_score, [0.0, 1.0, 2.0])
WEIGHTS = _draw.uniform(0.2, 3.0, size=len(X)).astype(np.float32)
QUERIES = np.arange(len(X)) // 10

BASE: dict[str, Any] = {"max_depth": 3, "eta": 0.5, "nthread": 1, "tree_method": "hist"}


def rows(index: int) -> slice:
    return slice(int(CUTS[index]), int(CUTS[index + 1]))


def matrix(index: int | None, label: Any = BINARY, x: Any = X, **columns: Any) -> xgboost.DMatrix:
    """One site's data; None: all rows."""
    mine = slice(None) if index is None else rows(index)
    part = x.iloc[mine] if hasattr(x, "iloc") else x[mine]
    columns = {name: value[mine] if isinstance(value, np.ndarray) else value for name, value in columns.items()}
    return xgboost.DMatrix(part, label[mine], **columns)


def document(federation: Any) -> bytearray:
    """The final global model."""
    return bytearray(TreeModel.from_arrays(federation_model(federation)).document())


def federation_model(federation: Any) -> Any:
    run = federation.server._run
    return run.model.blob.views()[0]


def margins(booster: xgboost.Booster, data: xgboost.DMatrix) -> Any:
    return np.asarray(booster.predict(data, output_margin=True), np.float64)


class Keeper(xgboost.callback.TrainingCallback):
    """Keeps the booster after every iteration that callbacks see."""

    def __init__(self) -> None:
        self.models: list[bytearray] = []
        self.log: Any = None

    def before_training(self, model: xgboost.Booster) -> xgboost.Booster:
        self.models.append(model.save_raw("ubj"))
        return model

    def after_iteration(self, model: xgboost.Booster, epoch: int, evals_log: Any) -> bool:
        self.models.append(model.save_raw("ubj"))
        self.log = evals_log
        return False
