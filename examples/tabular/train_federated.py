"""Trains two pipelines that predict who earns more than 50,000 dollars a year, and saves their scores in --scores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sklearn.compose import make_column_selector, make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from xgboost import XGBClassifier

from data import load
from fl_adapters.sklearn import LogisticRegression, OneHotEncoder, SimpleImputer, StandardScaler  # noqa: F811
from fl_adapters.xgboost import FederatedXGBClassifier as XGBClassifier  # noqa: F811


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder of the data set, or breast_cancer")
    parser.add_argument("--shard", help="part to train on, such as 2/5 (default: the site's own, else all)")
    parser.add_argument("--scores", default="scores.json")
    args = parser.parse_args()

    data = load(args.data, args.shard)
    columns = make_column_transformer(
        (
            make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler()),
            make_column_selector(dtype_include="number"),
        ),
        (
            make_pipeline(
                SimpleImputer(strategy="most_frequent"),
                OneHotEncoder(min_frequency=20, handle_unknown="infrequent_if_exist", sparse_output=False),
            ),
            make_column_selector(dtype_exclude="number"),
        ),
    )
    trees = XGBClassifier(n_estimators=60, max_depth=4, learning_rate=0.2, n_jobs=1)
    trees.set_params(federated={"mode": "histogram"})
    scores = {"rows": len(data.train.y)}
    for name, model in (("logistic", LogisticRegression(max_iter=2000)), ("trees", trees)):
        pipeline = make_pipeline(columns, model).fit(data.train.x, data.train.y)
        scores[name] = roc_auc_score(data.test.y, pipeline.predict_proba(data.test.x)[:, 1])
        print(f"{name}: AUC {scores[name]:.4f} on {data.name}")
    Path(args.scores).write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
