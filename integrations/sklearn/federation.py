"""What the estimators need of a federation, and how `fit` finds it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from fl_adapters.loop.federation import Array, Federation, large_union, of_same_sites
from fl_runtime.errors import HandshakeError

__all__ = ["Array", "Federation", "compare", "current", "description", "large_union", "of_same_sites", "over"]

_LONGEST_TEXT = 200
_IGNORED = ("copy", "copy_X", "copy_x", "n_jobs", "verbose", "random_state")
_MOST_NAMES = 1000  # names of features that are compared one by one


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
    token = _SHARED.set(of_same_sites(federation))
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
    facts = dict(_flat(description(estimator, features)))
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


def description(estimator: Any, features: Sequence[str] | int | None) -> dict[str, str | list[str]]:
    """Return what must be equal at all sites: name -> text, or list of texts.

    Args:
        estimator: What is being fitted.
        features: Names of the columns, or their number; None if there are no columns.
    """
    facts: dict[str, str | list[str]] = {"estimator": type(estimator).__name__}
    if features is not None:
        facts["number of features"] = str(features if isinstance(features, int) else len(features))
    if features is not None and not isinstance(features, int):
        facts["features"] = list(features)
    for name, value in sorted(estimator.get_params(deep=False).items()):
        if name not in _IGNORED:
            facts[f"argument {name}"] = _described(value)
    return facts


def _flat(facts: Mapping[str, str | list[str]]) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, str):
            yield name, value
        elif len(value) > _MOST_NAMES:
            yield name, _described(value)
        else:
            yield from ((f"{name}[{number}]", repr(entry)) for number, entry in enumerate(value))


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
