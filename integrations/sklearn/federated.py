"""What all estimators of this package share: where `fit` runs, and how a fitted one becomes scikit-learn's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

import fl_adapters
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_runtime.errors import ConfigError

from .federation import Federation, compare, current, description, of_same_sites
from .trainer import validate_params


class Federated:
    """First base of every estimator here, before the class of scikit-learn that it extends.

    A fitted one is pickled and copied into files as the object of scikit-learn that it equals.
    """

    def _check_federated(self) -> None:
        """Refuse arguments that cannot be federated."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if is_fitted(self):
            return as_sklearn(self).__reduce_ex__(1)  # from 2 on, pickle insists on the class of `self`
        return super().__reduce_ex__(protocol)

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin


def is_fitted(estimator: Any) -> bool:
    """Return whether an estimator has what `fit` sets: names that end with an underscore."""
    return any(name.endswith("_") and not name.startswith("_") for name in vars(estimator))


def plain_class(estimator: Any) -> Any:
    """Return the class of scikit-learn that an estimator of ours extends."""
    return next(base for base in type(estimator).__mro__ if base.__module__.startswith("sklearn."))


def as_sklearn(estimator: Any) -> Any:
    """Return scikit-learn's own object in place of one of this package.

    Args:
        estimator: An estimator, or a `Pipeline`, `ColumnTransformer` or search that holds some.

    Returns:
        The same with all estimators of this package replaced, fitted where it was. Arrays are shared, not copied.

    Example:
        ```python
        joblib.dump(as_sklearn(pipeline), "pipeline.joblib")  # opens where fl-adapters is not installed
        ```
    """
    if isinstance(estimator, list | tuple) and type(estimator) in (list, tuple):
        return type(estimator)(map(as_sklearn, estimator))
    if type(estimator) is dict:
        return {name: as_sklearn(value) for name, value in estimator.items()}
    if not isinstance(estimator, BaseEstimator):
        return estimator
    own: Any = plain_class(estimator) if isinstance(estimator, Federated) else type(estimator)
    plain = own.__new__(own)
    plain.__dict__.update({name: as_sklearn(value) for name, value in vars(estimator).items()})
    return plain


def adopt(estimator: Any, fitted: Any) -> None:
    """Take over what `fit` has set in another estimator of the same class."""
    arguments = fitted.get_params(deep=False)
    estimator.__dict__.update({name: value for name, value in vars(fitted).items() if name not in arguments})


def plain_copy(estimator: Any, **arguments: Any) -> Any:
    """Return an unfitted object of scikit-learn's own class with the same arguments.

    Args:
        estimator: Estimator of this package.
        **arguments: Arguments that are to be different.
    """
    return plain_class(estimator)(**{**estimator.get_params(deep=False), **arguments})


@contextmanager
def opened(estimator: Any, X: Any = None) -> Iterator[Federation | None]:
    """Give the federation to fit over, after checking that all sites fit the same; None outside a federation.

    Args:
        estimator: What is being fitted.
        X: This site's rows; None if what is fitted has no columns.

    Yields:
        The federation, or None.
    """
    shared, features = current(), _features(X)
    if shared is None and current_kit() is None:
        open_session(Options(), framework="scikit-learn")  # says once that there is no kit
        yield None
        return
    estimator._check_federated()
    validate_params(estimator)
    if shared is not None:
        compare(shared, estimator, features)
        yield shared
        return
    with fl_adapters.sums(agree=description(estimator, features)) as federation:
        yield of_same_sites(federation)


def _features(X: Any) -> list[str] | int | None:
    columns = getattr(X, "columns", None)
    if columns is not None:
        return [str(name) for name in columns]
    shape = getattr(X, "shape", None) or np.shape(X)
    return int(shape[1]) if X is not None and len(shape) == 2 else None


def refuse(estimator: Any, argument: str, reason: str, fix: str) -> None:
    """Raise the error for an argument that cannot be federated.

    Args:
        estimator: The estimator that has the argument.
        argument: The argument's name.
        reason: Why it cannot be federated, as the end of a sentence.
        fix: What to give instead.

    Raises:
        ConfigError: Always.
    """
    value = getattr(estimator, argument, None)
    shown = f"{argument}={value!r}" if hasattr(estimator, argument) else argument
    raise ConfigError(f"{shown} {reason}", where=f"{type(estimator).__name__}.fit", fix=fix)


def refuse_partial_fit(estimator: Any) -> None:
    """Raise the error for `partial_fit` in a federation; do nothing outside of one.

    Args:
        estimator: The estimator.

    Raises:
        ConfigError: In a federation.
    """
    if current() is not None or current_kit() is not None:
        raise ConfigError(
            "partial_fit does not know when the other sites call it",
            where=f"{type(estimator).__name__}.partial_fit",
            fix="call fit with all rows of this site",
        )
