"""Linear support vector classification over all sites."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import svm
from sklearn.utils.multiclass import check_classification_targets

from .. import categories
from ..federated import Federated, opened, refuse
from ..federation import Array, Federation
from ..leading import Ask, lead
from ..trainer import validated
from ..weights import checked_weights
from .design import Design
from .least_squares import check_width
from .logistic import known_classes, row_weights, warn_unless_converged
from .newton import Limits, Penalty, Progress, newton, together


class LinearSVC(Federated, svm.LinearSVC):
    """`sklearn.svm.LinearSVC` fitted over all sites: the optimum over all rows together.

    It is found by Newton's method to nearly full precision, whatever `dual` and `tol` say.
    """

    def _check_federated(self) -> None:
        if self.loss != "squared_hinge":
            refuse(self, "loss", "has no derivative where Newton's method needs one", 'give "squared_hinge"')
        if self.multi_class != "ovr":
            refuse(self, "multi_class", "is not fitted over all sites", 'give "ovr"')

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        with opened(self, X) as federation:
            if federation is None:
                return super().fit(X, y, sample_weight)
            return self._fit_on(federation, X, y, sample_weight)

    def _fit_on(self, federation: Federation, X: Any, y: Any, sample_weight: Any) -> Any:
        X, y = validated(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_width(self, X.shape[1])
        check_classification_targets(y)
        self.classes_ = known_classes(federation, y, self)
        labels = categories.codes(y, self.classes_)
        weights = row_weights(federation, self.class_weight, self.classes_, labels, checked_weights(sample_weight, X))
        rows = float(federation.sum({"rows": np.array([weights.sum()])})["rows"][0])
        design = Design(X, float(self.intercept_scaling) if self.fit_intercept else 0.0)
        numbers = np.arange(len(self.classes_))
        sides = np.where(labels[:, None] == (numbers[1:] if len(numbers) == 2 else numbers), 1.0, -1.0)
        found, progress = self._solve(federation, design, sides, self.C * weights, self.C * rows)
        warn_unless_converged(progress, self)
        self.n_iter_ = progress.iterations
        self.coef_ = found[:, :-1] if self.fit_intercept else found
        self.intercept_ = self.intercept_scaling * found[:, -1] if self.fit_intercept else 0.0
        return self

    def _solve(
        self, federation: Federation, design: Design, sides: Array, weights: Array, scale: float
    ) -> tuple[Array, Progress]:
        """One coefficient vector for each column of `sides`, and the progress of the slowest."""
        outputs, width = sides.shape[1], design.width
        lasso = self.penalty == "l1"
        penalty = Penalty(np.full(width, float(not lasso)), np.full(width, float(lasso)))
        shape = (outputs, width + 2)  # two further numbers carry the progress to all sites

        def answer(point: Array) -> dict[str, Array]:
            short = np.maximum(1.0 - sides * design.scores(point[:, :-2]), 0.0)
            bent = [design.curve(2 * weights * (short[:, n] > 0)) for n in range(outputs)]
            return {
                "loss": weights @ short**2,
                "gradient": design.pull(-2 * weights[:, None] * sides * short),
                "hessian": np.stack(bent),
            }

        def drive(ask: Ask) -> Array:
            steps = [Progress() for _ in range(outputs)]
            limits = Limits(self.max_iter, scale)
            searches = [newton(np.zeros(width), penalty, limits, step) for step in steps]

            def at(points: list[Array]) -> list[dict[str, Array]]:
                totals = ask(np.hstack([np.stack(points), np.zeros((outputs, 2))]))
                names = ("gradient", "hessian")
                return [
                    {"loss": totals["loss"][n : n + 1], **{name: totals[name][n] for name in names}}
                    for n in range(outputs)
                ]

            coef = np.stack(together(searches, at))
            return np.hstack([coef, [[step.iterations, step.converged] for step in steps]])

        found = lead(federation, np.zeros(shape), answer, drive)
        return found[:, :-2], Progress(int(found[:, -2].max()), bool(found[:, -1].all()))
