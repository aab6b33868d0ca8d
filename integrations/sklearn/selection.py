"""Cross-validation and grid search over all sites: each fold is fitted and scored by all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn import model_selection
from sklearn.metrics import check_scoring

from fl_runtime.errors import ConfigError

from .federated import Federated, opened, refuse
from .federation import Federation, over


class GridSearchCV(Federated, model_selection.GridSearchCV):
    """`sklearn.model_selection.GridSearchCV` over all sites: all of them choose the same parameters.

    Each site splits its own rows into folds. A model is fitted by all sites without their k-th folds, and its score is
    the mean of the sites' scores on their k-th folds, weighted by their rows.

    Example:
        ```python
        search = GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0, 10.0]}).fit(X, y)
        ```
    """

    def _check_federated(self) -> None:
        if self.n_jobs not in (None, 1):
            refuse(self, "n_jobs", "would fit in another order at each site", "leave it out")

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, **params)
            given = self.get_params(deep=False)
            scoring = given["scoring"]
            self.set_params(scoring=pooled(federation, self.estimator, scoring), error_score="raise")
            try:
                with over(federation):
                    super().fit(X, y, **params)
            finally:
                self.set_params(scoring=scoring, error_score=given["error_score"])
            self.scorer_ = _local(self.estimator, scoring)
            return self


def cross_val_score(
    estimator: Any,
    X: Any,
    y: Any = None,
    *,
    groups: Any = None,
    scoring: Any = None,
    cv: Any = None,
    params: Mapping[str, Any] | None = None,
) -> Any:
    """Score an estimator by cross-validation over all sites, as `sklearn.model_selection.cross_val_score` does.

    Args:
        estimator: Estimator of this package, or a pipeline with some.
        X: Rows of this site.
        y: Their targets.
        groups: Group of each row, for splitters that need them.
        scoring: Name of a score, or a function of estimator, X and y. Default: the estimator's own score.
        cv: Splitter, or number of folds; the same number of folds at all sites.
        params: Further arguments of `fit`.

    Returns:
        The score of each fold: the mean of the sites' scores, weighted by their rows of the fold.

    Raises:
        ConfigError: An argument cannot be federated, or a score is not a number.
        HandshakeError: The sites do not fit the same.

    Example:
        ```python
        scores = cross_val_score(LogisticRegression(), X, y, cv=5, scoring="roc_auc")
        ```
    """
    given = {"groups": groups, "cv": cv, "params": dict(params or {})}
    asked = GridSearchCV(estimator, {}, scoring=scoring, cv=cv)
    with opened(asked, X) as federation:
        if federation is None:
            return model_selection.cross_val_score(estimator, X, y, scoring=scoring, **given)
        together = pooled(federation, estimator, scoring)
        with over(federation):
            return model_selection.cross_val_score(estimator, X, y, scoring=together, error_score="raise", **given)


def pooled(federation: Federation, estimator: Any, scoring: Any) -> Any:
    """Return a scorer whose scores are means over all sites, weighted by rows; of several scores, a dict of scorers.

    Args:
        federation: The federation.
        estimator: What will be scored.
        scoring: A score as scikit-learn takes it.
    """
    local = _local(estimator, scoring)
    if isinstance(local, Mapping):
        return {name: _Pooled(federation, scorer) for name, scorer in local.items()}
    return _Pooled(federation, local)


class _Pooled:
    """Scorer of scikit-learn's form, called by all sites for the same model."""

    def __init__(self, federation: Federation, scorer: Any) -> None:
        self._federation, self._scorer = federation, scorer

    def __call__(self, estimator: Any, X: Any, y: Any = None, **params: Any) -> float:
        rows = float(X.shape[0] if hasattr(X, "shape") else len(X))
        score = float(self._scorer(estimator, X, y, **params))
        if not np.isfinite(score):
            raise ConfigError(
                f"the score of {rows:.0f} rows of this site is {score}",
                where="scoring",
                fix="take a score that every fold of every site has, or fewer folds",
            )
        totals = self._federation.sum({"score": np.array([score * rows]), "rows": np.array([rows])})
        return float(totals["score"][0] / totals["rows"][0])


def _local(estimator: Any, scoring: Any) -> Any:
    """This site's scorer, or scorers by their names."""
    if isinstance(scoring, Mapping):
        return {name: check_scoring(estimator, one) for name, one in scoring.items()}
    if isinstance(scoring, list | tuple | set):
        return {name: check_scoring(estimator, name) for name in scoring}
    return check_scoring(estimator, scoring)
