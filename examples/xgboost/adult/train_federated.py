"""Trains trees that predict who earns more than 50,000 dollars a year, and saves them in --output."""

from __future__ import annotations

import argparse

from xgboost import DMatrix, train

from data import load
from fl_adapters.xgboost import train  # noqa: F811 (in place of the one above)

PARAMS = {
    "objective": "binary:logistic",
    "eval_metric": ["logloss", "auc"],
    "tree_method": "hist",
    "max_depth": 4,
    "eta": 0.1,
    "min_child_weight": 10,
    "colsample_bytree": 0.5,
    "nthread": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the data set, or breast_cancer")
    parser.add_argument("--shard", help="part to train on, such as 2/5 (default: the site's own, else all)")
    parser.add_argument("--rounds", type=int, default=80)
    parser.add_argument("--output", default="model.ubj")
    parser.add_argument("--mode", default="histogram")
    args = parser.parse_args()

    data = load(args.data, args.shard)
    dtrain = DMatrix(data.train.x, data.train.y, enable_categorical=True)
    dtest = DMatrix(data.test.x, data.test.y, enable_categorical=True)
    booster = train(
        PARAMS,
        dtrain,
        num_boost_round=args.rounds,
        evals=[(dtest, "test")],
        verbose_eval=10,
        mode=args.mode,
    )
    booster.save_model(args.output)


if __name__ == "__main__":
    main()
