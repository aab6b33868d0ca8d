"""What the estimators need of a federation, and how `fit` finds it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fl_runtime.errors import HandshakeError, QuorumError

Array = npt.NDArray[np.float64]

_LONGEST_TEXT = 200
_IGNORED = ("copy", "copy_X", "copy_x", "n_jobs", "verbose", "random_state")
_MOST_NAMES = 1000  # names of features that are compared one by one
_TEXTS_A_CALL = 50_000


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
    steady = SameSites(federation) if hasattr(federation, "sites_in_last_sum") else federation
    token = _SHARED.set(steady)
    try:
        yield
    finally:
        _SHARED.reset(token)


def current() -> Federation | None:
    """Return the federation of the surrounding `over` block, or None outside of one."""
    return _SHARED.get()


class SameSites:
    """A federation whose sums and unions are all of the same sites; another one of them is an error.

    Args:
        inner: What `fl_adapters.sums` gives.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._sites: tuple[str, ...] = ()

    @property
    def site(self) -> SitePlace:
        """Which of the sites this process is."""
        place: SitePlace = self._inner.site
        return place

    def sum(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the sums over all sites."""
        totals: Mapping[str, Array] = self._inner.sum(arrays)
        self._check()
        return totals

    def union(self, texts: Sequence[str]) -> list[str]:
        """Return the sorted union of all sites' texts."""
        found: list[str] = self._inner.union(texts)
        self._check()
        return found

    def _check(self) -> None:
        now = tuple(self._inner.sites_in_last_sum)
        before, self._sites = self._sites or now, now
        if now != before:
            missing = sorted(set(before) ^ set(now))
            raise QuorumError(
                f"{' and '.join(missing)} took part in some sums of this fit and not in others",
                where="fl_adapters.sklearn",
                fix="start the run again with all sites, and let the job wait for them (min_sites, deadline_s)",
            )


def large_union(federation: Federation, texts: Sequence[str]) -> list[str]:
    """Return the union of any number of texts, in several calls where one would be too large.

    Args:
        federation: The federation.
        texts: Texts of this site.

    Returns:
        Each text of any site once, in no order.
    """
    total = federation.sum({"texts": np.array([len(texts)], float)})["texts"][0]
    calls = 1 + int(total // _TEXTS_A_CALL)
    parts: list[list[str]] = [[] for _ in range(calls)]
    for text in texts:
        parts[zlib.crc32(text.encode("utf-8", "surrogatepass")) % calls].append(text)
    return [text for part in parts for text in federation.union(part)]


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
