"""Trees by `fl_adapters.xgboost.train`, for the chaos suite: sampled rows and columns, a falling learning rate.

usage: xgboost_site.py bagging|cyclic
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import xgboost
from site_notes import acknowledged, final

from fl_adapters import site
from fl_adapters.xgboost import train

ROWS, COLUMNS = 2000, 20


def matrix(seed: int, rows: int = ROWS) -> xgboost.DMatrix:
    x = np.random.default_rng(seed).normal(size=(rows, COLUMNS)).astype(np.float32)
    return xgboost.DMatrix(x, (x[:, 0] + x[:, 1] ** 2 > 0.5).astype(int))


class Rounds(xgboost.callback.TrainingCallback):
    """Notes each finished round of one iteration."""

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        acknowledged(epoch + 1)
        return False


def main() -> None:
    params = {"max_depth": 4, "objective": "binary:logistic", "subsample": 0.6, "colsample_bynode": 0.5, "nthread": 1}
    falling = xgboost.callback.LearningRateScheduler(lambda iteration: 0.3 * 0.98**iteration)
    booster = train(
        params,
        matrix(site().index),
        100,
        mode=sys.argv[1],
        evals=[(matrix(99, 200), "test")],
        verbose_eval=False,
        callbacks=[falling, Rounds()],
    )
    final({"model.ubj": bytes(booster.save_raw("ubj"))})


if __name__ == "__main__":
    main()
