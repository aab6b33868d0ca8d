"""scikit-learn's preprocessing and estimators, fitted over all sites: equal to a fit on all rows together."""

from __future__ import annotations

from fl_adapters.extras import needs_extra

with needs_extra("sklearn", "scikit-learn"):
    from .classification.bayes import GaussianNB, MultinomialNB
    from .classification.centroid import NearestCentroid
    from .classification.discriminant import LinearDiscriminantAnalysis
    from .clustering.kmeans import KMeans
    from .clustering.minibatch import MiniBatchKMeans
    from .clustering.mixture import GaussianMixture
    from .decomposition.components import PCA, TruncatedSVD
    from .federated import as_sklearn
    from .federation import over
    from .linear.least_squares import LinearRegression, Ridge
    from .linear.logistic import LogisticRegression
    from .linear.poisson import PoissonRegressor
    from .linear.svc import LinearSVC
    from .preprocessing.encoding import LabelEncoder, OneHotEncoder, OrdinalEncoder
    from .preprocessing.imputing import SimpleImputer
    from .preprocessing.quantiles import KBinsDiscretizer, QuantileTransformer
    from .preprocessing.scaling import MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler
    from .preprocessing.target import TargetEncoder
    from .preprocessing.text import CountVectorizer, TfidfTransformer, TfidfVectorizer
    from .selection import GridSearchCV, cross_val_score

__all__ = [
    "PCA",
    "CountVectorizer",
    "GaussianMixture",
    "GaussianNB",
    "GridSearchCV",
    "KBinsDiscretizer",
    "KMeans",
    "LabelEncoder",
    "LinearDiscriminantAnalysis",
    "LinearRegression",
    "LinearSVC",
    "LogisticRegression",
    "MaxAbsScaler",
    "MinMaxScaler",
    "MiniBatchKMeans",
    "MultinomialNB",
    "NearestCentroid",
    "OneHotEncoder",
    "OrdinalEncoder",
    "PoissonRegressor",
    "QuantileTransformer",
    "Ridge",
    "RobustScaler",
    "SimpleImputer",
    "StandardScaler",
    "TargetEncoder",
    "TfidfTransformer",
    "TfidfVectorizer",
    "TruncatedSVD",
    "as_sklearn",
    "cross_val_score",
    "over",
]
