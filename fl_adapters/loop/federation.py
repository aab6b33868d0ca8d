"""A federation as code that stands on sums sees it: the same sites in every call, and unions of any number of texts."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fl_runtime.errors import QuorumError

Array = npt.NDArray[np.float64]

_TEXTS_A_CALL = 50_000

Site = TypeVar("Site", bound=Hashable)


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

    def sum(self, arrays: Mapping[str, Array], *, integers: bool = False) -> Mapping[str, Array]:
        """Return the sums over all sites.

        Args:
            arrays: Name -> array of finite numbers, with the same names and shapes at all sites.
            integers: Whether all values are whole numbers.

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

    def sum(self, arrays: Mapping[str, Array], *, integers: bool = False) -> Mapping[str, Array]:
        """Return the sums over all sites."""
        totals: Mapping[str, Array] = self._inner.sum(arrays, integers=integers)
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
                f"{' and '.join(missing)} took part in some sums and not in others",
                where="fl_adapters.sums",
                fix="start the run again with all sites, and let the job wait for them (min_sites, deadline_s)",
            )


def of_same_sites(federation: Any) -> Federation:
    """Return a federation whose sums and unions are all of the same sites.

    Args:
        federation: What `fl_adapters.sums` gives, or a federation that is one already.
    """
    found: Federation = SameSites(federation) if hasattr(federation, "sites_in_last_sum") else federation
    return found


def left_out(min_cohorts: Mapping[Site, int]) -> dict[Site, str]:
    """Return which sites stay out because fewer sites take part than their policies ask for, until that holds for none.

    Args:
        min_cohorts: Each site that would take part -> least number of sites that its policy asks for.

    Returns:
        Site -> why, as the end of a sentence.
    """
    left, out = dict(min_cohorts), dict[Site, str]()
    while few := [site for site, needed in left.items() if needed > len(left)]:
        for site in few:
            out[site] = f"its policy asks for at least {left.pop(site)} sites"
    return out


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
