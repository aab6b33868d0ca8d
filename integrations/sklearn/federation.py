"""What the estimators need of a federation, and how `fit` finds it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fl_runtime.errors import HandshakeError

Array = npt.NDArray[np.float64]

_LONGEST_TEXT = 200
_IGNORED = ("copy", "copy_X", "n_jobs", "verbose", "max_iter", "tol", "memory_level")


class SitePlace(Protocol):
    """Which of the sites this process is."""

    @property
    def name(self) -> str:
        """Name of this site."""
        ...

    @property
    def index(self) -> int:
        """Number of this site, from 0."""
        ...

    @property
    def count(self) -> int:
        """Number of sites that take part."""
        ...


class Federation(Protocol):
    """Sums and unions over all sites. Every site makes the same calls in the same order."""

    @property
    def site(self) -> SitePlace:
        """Which of the sites this process is."""
        ...

    def sum(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the sums over all sites.

        Args:
            arrays: Name -> array of finite numbers, with the same names and shapes at all sites.

        Returns:
            Name -> float64 array with the same bits at all sites.
        """
        ...

    def union(self, texts: Sequence[str]) -> list[str]:
        """Return the sorted union of all sites' texts.

        Args:
            texts: Texts of this site.

        Returns:
            Each text of any site once.
        """
        ...


_SHARED: ContextVar[Federation | None] = ContextVar("shared federation", default=None)


@contextmanager
def over(federation: Federation) -> Iterator[None]:
    """Fit all estimators of this block over one federation, in place of one run for each `fit`.

    Args:
        federation: What `fl_adapters.sums` gives.

    Yields:
        Nothing.

    Example:
        ```python
        with fl_adapters.sums() as federation, over(federation):
            pipeline.fit(X, y)
        ```
    """
    token = _SHARED.set(federation)
    try:
        yield
    finally:
        _SHARED.reset(token)


def current() -> Federation | None:
    """Return the federation of the surrounding `over` block, or None outside of one."""
    return _SHARED.get()


def compare(federation: Federation, estimator: Any, features: Sequence[str] | int | None) -> None:
    """Check that all sites fit the same estimator on the same features.

    Args:
        federation: The federation.
        estimator: What is being fitted.
        features: Names of the columns, or their number; None if there are no columns.

    Raises:
        HandshakeError: A site fits something else.
    """
    facts = dict(description(estimator, features))
    found: dict[str, list[str]] = {}
    for text in federation.union([f"{fact}={value}" for fact, value in facts.items()]):
        fact, _, value = text.partition("=")
        found.setdefault(fact, []).append(value)
    differing = [fact for fact in [*facts, *found] if found.get(fact) != [facts.get(fact)]]
    if not differing:
        return
    fact = differing[0]
    others = " and ".join(value for value in found[fact] if value != facts.get(fact))
    raise HandshakeError(
        f"the sites do not agree on {fact}: {facts.get(fact, 'nothing')} here, {others} at another site",
        where=f"{type(estimator).__name__}.fit",
        fix="give the same estimator with the same arguments the same columns in the same order at every site",
    )


def description(estimator: Any, features: Sequence[str] | int | None) -> Iterator[tuple[str, str]]:
    """Yield name and value of what must be equal at all sites."""
    yield "estimator", type(estimator).__name__
    if isinstance(features, int):
        yield "number of features", str(features)
    elif features is not None:
        yield "number of features", str(len(features))
        for number, name in enumerate(features):
            yield f"feature {number}", repr(name)
    for name, value in sorted(estimator.get_params(deep=False).items()):
        if name not in _IGNORED and name != "random_state":
            yield f"argument {name}", _described(value)


def _described(value: Any) -> str:
    """A short text that is equal where the values are equal."""
    if callable(value):
        return f"function {getattr(value, '__qualname__', type(value).__name__)}"
    if hasattr(value, "split") and not isinstance(value, str):
        return type(value).__name__  # a splitter, which may hold a fold for each row of the site
    text = repr(value.tolist()) if isinstance(value, np.ndarray) else repr(value)
    if len(text) <= _LONGEST_TEXT:
        return text
    return f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"
