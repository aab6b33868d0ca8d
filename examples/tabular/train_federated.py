"""Trains two pipelines that predict who earns more than 50,000 dollars a year, and prints their scores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sklearn.compose import ColumnTransformer, make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from xgboost import XGBClassifier

from data import load
from fl_adapters.sklearn import LogisticRegression, OneHotEncoder, SimpleImputer, StandardScaler  # noqa: F811
from fl_adapters.xgboost import FederatedXGBClassifier as XGBClassifier  # noqa: F811


def columns(numbers: Any) -> ColumnTransformer:
    """What comes before a model: `numbers` for the columns of numbers; the columns of texts become indicators."""
    texts = make_pipeline(
        SimpleImputer(strategy="most_frequent"),
        OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False),
    )
    return make_column_transformer(
        (numbers, make_column_selector(dtype_include="number")),
        (texts, make_column_selector(dtype_exclude="number")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the data set, or breast_cancer")
    parser.add_argument("--shard", help="part to train on, such as 2/5 (default: the site's own, else all)")
    parser.add_argument("--scores", help="file to save the scores in")
    args = parser.parse_args()

    data = load(args.data, args.shard)
    trees = XGBClassifier(n_estimators=80, max_depth=4, learning_rate=0.1, min_child_weight=10, n_jobs=1)
    trees.set_params(federated={"mode": "histogram", "quantile_rows": 3})
    numbers = SimpleImputer(strategy="median", add_indicator=True)
    logistic = LogisticRegression(max_iter=2000)
    pipelines = {
        "logistic": make_pipeline(columns(make_pipeline(numbers, StandardScaler())), logistic),
        "trees": make_pipeline(columns(numbers), trees),
    }
    scores = {"rows": len(data.train.y)}
    for name, pipeline in pipelines.items():
        pipeline.fit(data.train.x, data.train.y)
        scores[name] = roc_auc_score(data.test.y, pipeline.predict_proba(data.test.x)[:, 1])
        print(f"{name}: AUC {scores[name]:.4f} on {data.name}")
    if args.scores:
        Path(args.scores).write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
