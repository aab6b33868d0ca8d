"""Generalised linear models over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import linear_model

from fl_runtime.errors import ConfigError

from ..federated import Federated, opened
from ..federation import Array, Federation
from ..trainer import validated
from ..weights import checked_weights
from .design import Design
from .logistic import warn_unless_converged
from .newton import Limits, Penalty, minimize


class PoissonRegressor(Federated, linear_model.PoissonRegressor):
    """`sklearn.linear_model.PoissonRegressor` fitted over all sites: the optimum over all rows together.

    It is found by Newton's method to nearly full precision, whatever `solver` and `tol` say.
    """

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y, accept_sparse=["csc", "csr"], dtype=[np.float64, np.float32], y_numeric=True)
        y = np.asarray(y, np.float64)
        given = checked_weights(sample_weight, X)
        weights = np.ones(len(y)) if given is None else given
        sums = {
            "rows": np.array([weights.sum()]),
            "y": np.array([weights @ y]),
            "bad": np.array([(y < 0).sum()], float),
        }
        totals = {name: float(value[0]) for name, value in federation.sum(sums).items()}
        if totals["bad"] or totals["y"] <= 0:
            raise ConfigError(
                "some values of y are negative" if totals["bad"] else "all values of y are 0",
                where="PoissonRegressor.fit",
                fix="give counts: y of 0 and more",
            )
        design = Design(X, float(self.fit_intercept))
        squares, start = np.full(design.width, self.alpha * totals["rows"]), np.zeros(design.width)
        if self.fit_intercept:
            squares[-1], start[-1] = 0.0, np.log(totals["y"] / totals["rows"])

        def at(point: Array, second: bool) -> dict[str, Array]:
            score = design.scores(point[None])[:, 0]
            mean = np.exp(score)
            loss, slope = weights @ (mean - y * score), weights * (mean - y)
            found = {"loss": np.array([loss]), "gradient": design.pull(slope[:, None]).ravel()}
            return found | ({"hessian": design.curve(weights * mean)} if second else {})

        penalty = Penalty(squares, np.zeros_like(squares))
        found, progress = minimize(federation, start, at, penalty, Limits(self.max_iter, totals["rows"]))
        warn_unless_converged(progress, self)
        self.n_iter_ = progress.iterations
        self.coef_ = (found[:-1] if self.fit_intercept else found).astype(X.dtype)
        self.intercept_ = X.dtype.type(found[-1]) if self.fit_intercept else 0.0
        return self
