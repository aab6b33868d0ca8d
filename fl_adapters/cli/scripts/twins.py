"""Names of frameworks, and what has their place in `fl_adapters`. Frameworks need not be installed to know them."""

from __future__ import annotations

_ESTIMATORS = (
    *("PCA", "CountVectorizer", "GaussianMixture", "GaussianNB", "GridSearchCV", "KBinsDiscretizer", "KMeans"),
    *("LabelEncoder", "LinearDiscriminantAnalysis", "LinearRegression", "LinearSVC", "LogisticRegression"),
    *("MaxAbsScaler", "MinMaxScaler", "MiniBatchKMeans", "MultinomialNB", "NearestCentroid", "OneHotEncoder"),
    *("OrdinalEncoder", "PoissonRegressor", "QuantileTransformer", "Ridge", "RobustScaler", "SimpleImputer"),
    *("StandardScaler", "TargetEncoder", "TfidfTransformer", "TfidfVectorizer", "TruncatedSVD", "cross_val_score"),
)

TWINS = {
    "xgboost": {
        "train": "train",
        "XGBClassifier": "FederatedXGBClassifier",
        "XGBRanker": "FederatedXGBRanker",
        "XGBRegressor": "FederatedXGBRegressor",
    },
    "sklearn": {name: name for name in _ESTIMATORS},
}
"""Package -> its name -> the name in the package of `fl_adapters`."""
