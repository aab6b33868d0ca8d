"""Small data for the XGBoost tests, distributed unevenly, and models assembled by hand."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import numpy as np
import pandas as pd
import xgboost

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

BASE: dict[str, Any] = {"max_depth": 3, "eta": 0.5, "nthread": 1, "tree_method": "hist", "max_bin": 32}


CATEGORIES = pd.DataFrame(
    {
        "kind": pd.Categorical.from_codes(np.digitize(X[:, 0], [-1, -0.3, 0.3, 1]), list("abcde")),
        "grade": pd.Categorical.from_codes(np.digitize(X[:, 1], [-0.5, 0.5]), [10, 20, 30]),
        "size": X[:, 2],
    }
)
MISSING = np.where(np.random.default_rng(3).random(X.shape) < 0.3, np.nan, X).astype(np.float32)


def squared_log(margins: Any, data: xgboost.DMatrix) -> Any:
    labels = np.exp(data.get_label() / 4)
    shifted = np.maximum(margins, -0.9) + 1
    return (np.log(shifted) - np.log1p(labels)) / shifted, 1.0 / shifted**2


KINDS: dict[str, dict[str, Any]] = {
    "binary": {"objective": "binary:logistic"},
    "regression with weights": {"objective": "reg:squarederror", "label": REAL, "weight": WEIGHTS},
    "multiclass": {"objective": "multi:softprob", "num_class": 3, "label": CLASSES},
    "forests of classes": {
        "objective": "multi:softprob",
        "num_class": 3,
        "num_parallel_tree": 2,
        "subsample": 0.6,
        "label": CLASSES,
    },
    "two targets": {"objective": "reg:squarederror", "label": np.stack([REAL, REAL**2], 1)},
    "ranking": {"objective": "rank:ndcg", "label": RELEVANCE, "qid": QUERIES},
    "missing values": {"objective": "binary:logistic", "x": MISSING},
    "categories": {"objective": "binary:logistic", "max_cat_to_onehot": 1, "x": CATEGORIES, "enable_categorical": True},
    "dart": {"objective": "binary:logistic", "booster": "dart", "rate_drop": 0.5},
    "dart of classes": {
        "objective": "multi:softmax",
        "num_class": 3,
        "booster": "dart",
        "rate_drop": 0.4,
        "label": CLASSES,
    },
    "dropout without dart": {"objective": "binary:logistic", "rate_drop": 0.5},  # ignored before XGBoost 3.3
    "max_leaves": {"objective": "binary:logistic", "grow_policy": "lossguide", "max_leaves": 9, "max_depth": 0},
    "monotone": {"objective": "reg:squarederror", "label": REAL, "monotone_constraints": "(1,0,0,-1,0)"},
    "custom objective": {"label": REAL, "obj": squared_log, "base_score": 0.0},
    "absolute error": {"objective": "reg:absoluteerror", "label": REAL},
    "exact": {"objective": "binary:logistic", "tree_method": "exact"},
}
_DATA = ("label", "weight", "x", "qid", "enable_categorical")


def parts(kind: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Return the parameters, the data's columns and the custom objective of a kind of model."""
    given = dict(KINDS[kind])
    columns = {name: given.pop(name) for name in _DATA if name in given}
    obj = given.pop("obj", None)
    return BASE | {"seed_per_iteration": True} | given, columns, obj


def rows(index: int) -> slice:
    return slice(int(CUTS[index]), int(CUTS[index + 1]))


def matrix(index: int | None, label: Any = BINARY, x: Any = X, **columns: Any) -> xgboost.DMatrix:
    """Return one site's data, or all rows for None."""
    mine = slice(None) if index is None else rows(index)
    part = x.iloc[mine] if hasattr(x, "iloc") else x[mine]
    columns = {name: value[mine] if isinstance(value, np.ndarray) else value for name, value in columns.items()}
    return xgboost.DMatrix(part, label[mine], **columns)


def margins(booster: xgboost.Booster, data: xgboost.DMatrix) -> Any:
    return np.asarray(booster.predict(data, output_margin=True), np.float64)


class Keeper(xgboost.callback.TrainingCallback):
    """A callback that keeps a copy of the booster after every iteration."""

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


def logistic(dies_at: int = 0) -> Any:
    """A custom objective that kills its process in its `dies_at`-th call, or freezes it if that is negative."""
    calls = itertools.count(1)

    def logistic(margins: Any, data: xgboost.DMatrix) -> Any:
        if next(calls) == abs(dies_at):
            os.kill(os.getpid(), signal.SIGKILL if dies_at > 0 else signal.SIGSTOP)
        chance = 1 / (1 + np.exp(-margins))
        return chance - data.get_label(), np.maximum(chance * (1 - chance), 1e-6)

    return logistic
