"""Logistic regression over all sites."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy import special
from sklearn import linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.multiclass import check_classification_targets

from fl_runtime.errors import ConfigError

from .. import categories
from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..trainer import validated
from ..weights import checked_weights, class_weights, counts_for_balance
from .design import Design
from .newton import Limits, Penalty, Progress, minimize


class LogisticRegression(Federated, linear_model.LogisticRegression):
    """`sklearn.linear_model.LogisticRegression` fitted over all sites: the optimum over all rows together.

    All solvers but "liblinear" have the same optimum, and it is found by Newton's method to nearly full precision,
    whatever `solver` and `tol` say. Above 2,000 parameters, L-BFGS is used.

    Example:
        ```python
        model = LogisticRegression(C=0.5).fit(X, y)  # this site's rows
        ```
    """

    def _check_federated(self) -> None:
        if self.solver == "liblinear":
            refuse(self, "solver", "penalises the intercept, which no other solver does", 'give "lbfgs"')
        if self.dual:
            refuse(self, "dual", "is for liblinear alone", "leave it out")
        if getattr(self, "multi_class", None) == "ovr":
            refuse(self, "multi_class", "is not fitted over all sites", "use OneVsRestClassifier(LogisticRegression())")

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_ = known_classes(federation, y, self)
        labels = categories.codes(y, self.classes_)
        weights = row_weights(federation, self.class_weight, self.classes_, labels, checked_weights(sample_weight, X))
        rows = float(federation.sum({"rows": np.array([weights.sum()])})["rows"][0])
        problem = LogisticLoss(Design(X, float(self.fit_intercept)), labels, weights, len(self.classes_))
        squares, sizes = self._strengths()
        penalised = np.ones((problem.outputs, problem.design.width))
        if self.fit_intercept:
            penalised[:, -1] = 0.0
        penalty = Penalty(squares * penalised.ravel(), sizes * penalised.ravel())
        start = np.zeros(penalised.size)
        null = None if problem.outputs == 1 else problem.null(rows)
        found, progress = minimize(federation, start, problem.at, penalty, Limits(self.max_iter, rows), null=null)
        warn_unless_converged(progress, self)
        coef = found.reshape(penalised.shape).astype(X.dtype)
        self.n_iter_ = np.array([progress.iterations], np.int32)
        self.coef_ = coef[:, :-1] if self.fit_intercept else coef
        self.intercept_ = coef[:, -1] if self.fit_intercept else np.zeros(len(coef), X.dtype)
        return self

    def _strengths(self) -> tuple[float, float]:
        """Factors of half the squares and of the absolute values, for the sum of the losses."""
        penalty, ratio, strength = getattr(self, "penalty", "deprecated"), self.l1_ratio or 0.0, 1.0 / self.C
        if penalty is None:
            strength = 0.0
        elif penalty in ("l1", "l2"):
            ratio = 1.0 if penalty == "l1" else 0.0
        return strength * (1 - ratio), strength * ratio


class LogisticLoss:
    """Loss of this site's rows, binary or multinomial.

    Args:
        design: The rows.
        labels: Number of each row's class.
        weights: Weight of each row.
        classes: Number of classes.
    """

    def __init__(self, design: Design, labels: Any, weights: Array, classes: int) -> None:
        self.design, self._weights, self._labels = design, weights, labels
        self.outputs = 1 if classes == 2 else classes
        self._truth = (labels[:, None] == np.arange(classes)).astype(np.float64)

    def at(self, point: Array, second: bool) -> dict[str, Array]:
        """Return loss, gradient and, if `second`, the Hessian at a point."""
        scores = self.design.scores(point.reshape(self.outputs, -1))
        if self.outputs == 1:
            scores = np.hstack([np.zeros_like(scores), scores])
        total = special.logsumexp(scores, axis=1, keepdims=True)
        chance = np.exp(scores - total)
        loss = self._weights @ (total[:, 0] - (scores * self._truth).sum(axis=1))
        slopes = (self._weights[:, None] * (chance - self._truth))[:, -self.outputs :]
        found = {"loss": np.array([loss]), "gradient": self.design.pull(slopes).ravel()}
        if second:
            found["hessian"] = self._hessian(chance[:, -self.outputs :])
        return found

    def _hessian(self, chance: Array) -> Array:
        width = self.design.width
        blocks = np.zeros((self.outputs, width, self.outputs, width))
        for a in range(self.outputs):
            for b in range(a + 1):
                block = self.design.curve(self._weights * chance[:, a] * (float(a == b) - chance[:, b]))
                blocks[a, :, b, :] = blocks[b, :, a, :] = block
        return blocks.reshape(self.outputs * width, -1)

    def null(self, rows: float) -> Array:
        """Products of the directions that add the same to all classes, which changes no loss."""
        same = np.full((self.outputs, self.outputs), rows / self.outputs)
        return np.kron(same, np.eye(self.design.width))


def known_classes(federation: Federation, y: Any, estimator: Any) -> Any:
    """Return the classes that any site has, sorted.

    Args:
        federation: The federation.
        y: Labels of this site.
        estimator: For the error.

    Raises:
        ConfigError: All sites together have one class.
    """
    classes = categories.unions(federation, [np.asarray(y)], ["y"])[0]
    if len(classes) < 2:
        raise ConfigError(
            f"all rows of all sites are of the class {classes[0] if len(classes) else 'none'!r}",
            where=f"{type(estimator).__name__}.fit",
            fix="give rows of at least two classes",
        )
    return classes


def row_weights(federation: Federation, class_weight: Any, classes: Any, labels: Any, weights: Array | None) -> Array:
    """Return the weight of each row: its own times that of its class, from the classes' counts at all sites."""
    own = np.ones(len(labels)) if weights is None else weights
    counted = own if counts_for_balance() else np.ones(len(labels))
    totals = federation.sum({"classes": np.bincount(labels, counted, len(classes)).astype(float)})["classes"]
    return np.asarray(own * class_weights(class_weight, classes, totals)[labels])


def warn_unless_converged(progress: Progress, estimator: Any) -> None:
    """Warn as scikit-learn does if a solver has used up its iterations."""
    if not progress.converged:
        text = f"{type(estimator).__name__} has not converged in {progress.iterations} iterations; raise max_iter"
        warnings.warn(text, ConvergenceWarning, stacklevel=4)
