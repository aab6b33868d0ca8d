"""Estimates by cross-validation how well trees tell tumours apart, and prints the score of each fold."""

from __future__ import annotations

import argparse

from sklearn.model_selection import KFold, cross_val_score
from xgboost import XGBClassifier

from data import load
from fl_adapters.xgboost import FederatedXGBClassifier as XGBClassifier  # noqa: F811 (in place of the one above)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", help="part to train on, such as 2/5 (default: the site's own, else all)")
    parser.add_argument("--folds", type=int, default=4)
    args = parser.parse_args()

    x, y = load(args.shard)
    model = XGBClassifier(n_estimators=20, max_depth=3, n_jobs=1)
    scores = cross_val_score(model, x, y, cv=KFold(args.folds), scoring="roc_auc")
    print("area under the ROC curve:", *(f"{score:.4f}" for score in scores))


if __name__ == "__main__":
    main()
