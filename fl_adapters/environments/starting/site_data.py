"""Where the data of each site lie: `north=a.csv,south=b.csv`, or a pattern with the name of the site in it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from fl_adapters.job import check_names
from fl_adapters.participant.identity import is_address, place_of_data
from fl_runtime.errors import ConfigError, did_you_mean
from fl_runtime.text import by_number

DataOfSites: TypeAlias = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]
"""A pattern such as "parts/{site}.csv", or name of each site -> path or address of its data."""

_SITE = "{site}"
_FIX = "write north=a.csv,south=b.csv, or a pattern with {site} in it, in quotes: 'parts/{site}.csv'"


def parse_data(words: Sequence[str]) -> DataOfSites | None:
    """Read the values of the option `--data`.

    Args:
        words: The values, such as "north=a.csv,south=b.csv" or "parts/{site}.csv".

    Returns:
        A pattern, or the paths by site; None without any value.

    Raises:
        ConfigError: A value is neither, or a site is named twice.
    """
    if len(words) == 1 and _SITE in words[0]:
        return words[0]
    found: dict[str, str] = {}
    for part in (part.strip() for word in words for part in word.split(",")):
        name, equals, path = part.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--data {part!r} does not say whose data they are", where="--data", fix=_FIX)
        if name in found:
            fix = "give every site its own name and path"
            raise ConfigError(f"--data names the site {name!r} twice", where="--data", fix=fix)
        found[name] = path
    return found or None


def parse_sites(text: str) -> int | tuple[str, ...]:
    """Read the value of the option `--sites`: a number of sites, or names such as "north,south"."""
    return int(text) if text.lstrip("-").isdigit() else tuple(name.strip() for name in text.split(","))


def names_of(data: DataOfSites | None) -> tuple[str, ...] | None:
    """Return the sites whose data these are, in the order in which they are named, or in that of their numbers.

    Args:
        data: Where the data lie.

    Returns:
        The names; None if there are no data, or a pattern is an address, whose names cannot be listed.

    Raises:
        ConfigError: No file matches the pattern, or a name cannot be that of a site.
    """
    if isinstance(data, Mapping):
        _check_any(data)
        return check_names(tuple(data))
    pattern = _pattern(data)
    if pattern is None or is_address(pattern):
        return None
    names = _matches(os.path.abspath(pattern))
    if not names:
        fix = "check the path: {site} stands for the name of each site"
        raise ConfigError(f"no file matches {pattern}", where=f"data, in {Path.cwd()}", fix=fix)
    return check_names(names)


def places_of(data: DataOfSites | None, sites: Iterable[str]) -> dict[str, str]:
    """Return where the data of each site lie.

    Args:
        data: Where the data lie.
        sites: Names of the sites.

    Returns:
        Site -> path without `..`, or address. Empty without data.

    Raises:
        ConfigError: Sites and data have different names, or a path does not exist.
    """
    sites = tuple(sites)
    if isinstance(data, Mapping):
        _check_any(data)
        _check_same(sites, tuple(data))
        given = {site: os.fspath(data[site]) for site in sites}
    elif (pattern := _pattern(data)) is not None:
        given = {site: pattern.replace(_SITE, site) for site in sites}
    else:
        return {}
    fix = "check the path; relative ones count from the working directory"
    return {site: place_of_data(path, where=f"data of {site}", fix=fix) for site, path in given.items()}


def _pattern(data: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None) -> str | None:
    if data is None or isinstance(data, Mapping):
        return None
    pattern = os.fspath(data)
    if _SITE not in pattern:
        raise ConfigError(f"every site would read {pattern!r}, the same data", where="data", fix=_FIX)
    return os.path.expanduser(pattern)


def _matches(pattern: str) -> tuple[str, ...]:
    """Return the names that stand for {site} in the paths that are there, `site-2` before `site-10`."""
    first, *rest = pattern.split(_SITE)
    name = r"(?P<site>[^/]+)"
    shape = re.compile(re.escape(first) + name + "(?P=site)".join(map(re.escape, rest)))
    paths = glob.iglob("*".join(map(glob.escape, (first, *rest))))
    names = {found["site"] for path in paths if (found := shape.fullmatch(path))}
    return tuple(sorted(names, key=by_number))


def _check_any(data: Mapping[str, object]) -> None:
    if not data:
        raise ConfigError("data are given for no site", where="data", fix=_FIX)


def _check_same(sites: Sequence[str], named: Sequence[str]) -> None:
    """Raise ConfigError if the data are not those of the sites of the run."""
    for site in sites:
        if site not in named:
            listed = f"data are given for {', '.join(named)}"
            raise ConfigError(
                f"the site {site!r} has no data",
                where="data",
                fix=f"{did_you_mean(site, named)}{listed}; leave the sites out, and those are the sites",
            )
    for name in named:
        if name not in sites:
            fix = f"{did_you_mean(name, sites)}the sites of the run are {', '.join(sites)}"
            raise ConfigError(f"data are given for {name!r}, which is not a site of the run", where="data", fix=fix)
