"""Access to what is private in scikit-learn, and to what has another name in another version of it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.utils import check_array

_FINITE = (
    "ensure_all_finite" if "ensure_all_finite" in inspect.signature(check_array).parameters else "force_all_finite"
)


def validated(estimator: Any, X: Any, y: Any = "no_validation", *, finite: bool | str = True, **checks: Any) -> Any:
    """Check X (and y) as scikit-learn's own `fit` does, and note number and names of the features.

    Args:
        estimator: The estimator; gets `n_features_in_` and, for tables with names, `feature_names_in_`.
        X: Rows of this site.
        y: Targets, if they are to be checked too.
        finite: True, False or "allow-nan".
        **checks: Arguments of `sklearn.utils.check_array` or `check_X_y`.

    Returns:
        X as an array, or the pair of X and y.
    """
    checks[_FINITE] = finite
    try:
        from sklearn.utils.validation import validate_data  # from 1.6 on
    except ImportError:
        return estimator._validate_data(X, y, **checks)
    return validate_data(estimator, X, y, **checks)


def checked_column(column: Any) -> Any:
    """Return one column of a table as scikit-learn's encoders see it."""
    return check_array(column, ensure_2d=False, dtype=None, **{_FINITE: False})


def note_features(estimator: Any, X: Any) -> None:
    """Note number and names of the features of X, unchecked."""
    estimator._check_feature_names(X, reset=True) if hasattr(estimator, "_check_feature_names") else _note(estimator, X)


def _note(estimator: Any, X: Any) -> None:
    from sklearn.utils.validation import validate_data

    validate_data(estimator, X, skip_check_array=True)


def validate_params(estimator: Any) -> None:
    """Raise scikit-learn's own error for arguments of a wrong type or value."""
    if hasattr(estimator, "_parameter_constraints"):
        estimator._validate_params()


def counting(plain: type, counts: Sequence[Any] | None, rows: int) -> type:
    """Return an encoder class that takes infrequent categories from these counts, not from the rows it is fitted on.

    Args:
        plain: Class of scikit-learn.
        counts: Counts of each feature's categories over all sites; None if none are needed.
        rows: Number of rows at all sites.
    """

    class Counting(plain):
        """The encoder with the counts of all sites."""

        def _identify_infrequent(self, category_count: Any, n_samples: int, col_idx: int) -> Any:
            assert counts is not None
            everywhere = np.asarray(counts[col_idx])[: len(category_count)]  # a missing value, left out, is the last
            return super()._identify_infrequent(everywhere, rows, col_idx)

    return Counting


def likely_dimension(variance: Any, rows: int) -> int:
    """Return the number of components that `PCA(n_components="mle")` takes."""
    from sklearn.decomposition._pca import _infer_dimension

    return int(_infer_dimension(variance, rows))


@cache
def discriminants_count_classes() -> bool:
    """Return whether the solver "svd" of this scikit-learn divides by the rows less the classes, as older ones do."""
    rows = np.array([[-1.0], [1.0], [9.0], [11.0]])  # two classes of variance 1 by the rows, 2 by the rows less 2
    fitted = LinearDiscriminantAnalysis().fit(rows, [0, 0, 1, 1])
    return bool(np.isclose(abs(fitted.scalings_[0, 0]), np.sqrt(0.5)))


def set_components(estimator: Any, components: int) -> None:
    """Note how many columns `transform` of a LinearDiscriminantAnalysis returns."""
    estimator._max_components = estimator._n_features_out = components
