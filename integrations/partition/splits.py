"""The ways to divide a data set among sites. The same arguments give the same parts, in every process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fl_adapters.job import check_names, site_names
from fl_adapters.participant.identity import site
from fl_runtime.errors import ConfigError
from fl_runtime.types import Array

from .parts import Partition
from .rows import count_rows, labelled, values_of

_TRIES = 100
_FEW = 20
Sites = int | Sequence[str] | None


def iid(data: Any, *, sites: Sites = None, label: Any = None, seed: int = 0) -> Partition:
    """Divide rows at random into parts of equal size, whose distributions are those of the whole.

    Args:
        data: An array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set.
        sites: Number of sites, or their names. Default: the sites of the simulation that the script runs in.
        label: Label of each row, or the name of its column, for the table and the picture.
        seed: Seed of the random numbers.

    Returns:
        The partition. Sizes differ by one row at most.

    Raises:
        ConfigError: The data cannot be divided among so many sites.
    """
    names, count = _sites(sites), _rows_for(data, sites)
    order = _random(seed).permutation(count)
    return _partition(data, names, np.array_split(order, len(names)), f"iid, seed {seed}", label)


def by_label(
    data: Any, label: Any, *, sites: Sites = None, alpha: float = 0.5, min_rows: int = 1, seed: int = 0
) -> Partition:
    """Give each site another mix of labels: the rows of a label are divided by shares from a Dirichlet distribution.

    This is the usual label skew of papers (Yurochkin et al. 2019, Hsu et al. 2019). Sizes differ as well.

    Args:
        data: An array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set.
        label: Label of each row, the name of its column, or of the attribute of a torch data set such as "targets".
        sites: Number of sites, or their names. Default: the sites of the simulation that the script runs in.
        alpha: How alike the sites are: 0.1 leaves most sites a few labels, 1 is uneven, and 100 nearly iid.
        min_rows: Least number of rows of a site. Shares are drawn again until every site has them.
        seed: Seed of the random numbers.

    Returns:
        The partition.

    Raises:
        ConfigError: There is no such label, it has a different value in most rows, or no draw gave each site its rows.
    """
    if not 0 < alpha < math.inf:
        raise ConfigError(f"alpha cannot be {alpha}", where="by_label", fix="give a number above 0, such as 0.5")
    names, count = _sites(sites), _rows_for(data, sites)
    labels, label_of_row = labelled(values_of(data, label, "label"))
    _check_few(labels, count, "label", "by_feature divides by a number, by_column by the values themselves")
    random = _random(seed)
    for _ in range(_TRIES):
        rows = _label_shares(label_of_row, len(labels), len(names), alpha, random)
        if min(map(len, rows)) >= min_rows:
            return _partition(data, names, rows, f"by label, alpha {alpha:g}, seed {seed}", label)
    raise ConfigError(
        f"in {_TRIES} draws a site had fewer than {min_rows} of {count} rows",
        where=f"by_label, alpha {alpha:g}",
        fix="take a larger alpha, fewer sites, or a smaller min_rows",
    )


def by_quantity(
    data: Any,
    *,
    sites: Sites = None,
    shares: Sequence[float] | None = None,
    alpha: float = 1.0,
    min_rows: int = 1,
    label: Any = None,
    seed: int = 0,
) -> Partition:
    """Give the sites different numbers of rows, drawn at random from the whole.

    Args:
        data: An array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set.
        sites: Number of sites, or their names. Default: the sites of the simulation that the script runs in.
        shares: Size of each site's part in relation to the others: [8, 1, 1]. Default: drawn with `alpha`.
        alpha: How alike the sizes are, if they are drawn from a Dirichlet distribution.
        min_rows: Least number of rows of a site.
        label: Label of each row, or the name of its column, for the table and the picture.
        seed: Seed of the random numbers.

    Returns:
        The partition. A site's number of rows differs from its share by less than one.

    Raises:
        ConfigError: There is not one share for each site, or a site has too few rows.
    """
    names, count = _sites(sites), _rows_for(data, sites)
    random = _random(seed)
    if shares is None:
        if not 0 < alpha < math.inf:
            raise ConfigError(f"alpha cannot be {alpha}", where="by_quantity", fix="give a number above 0, such as 1")
        given = _drawn_shares(random, len(names), alpha, count, min_rows)
        title = f"by quantity, alpha {alpha:g}, seed {seed}"
    else:
        given = _checked_shares(shares, names)
        title = f"by quantity {':'.join(f'{share:g}' for share in shares)}, seed {seed}"
    sizes = _whole(given, count)
    if min(sizes) < min_rows:
        fix = "take more equal shares, fewer sites, or a smaller min_rows"
        raise ConfigError(f"a site would have {min(sizes)} of {count} rows", where="by_quantity", fix=fix)
    order = random.permutation(count)
    return _partition(data, names, np.split(order, np.cumsum(sizes)[:-1]), title, label)


def by_feature(
    data: Any, feature: Any, *, sites: Sites = None, strictness: float = 1.0, label: Any = None, seed: int = 0
) -> Partition:
    """Give each site another range of a feature, such as an age: parts of equal size, whose inputs are shifted.

    Rows are ordered by `strictness * z + (1 - strictness) * noise`, where z is the feature with mean 0 and variance 1
    and the noise is normal.

    Args:
        data: An array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set.
        feature: Number of each row, the name of its column, or the number of a column of an array.
        sites: Number of sites, or their names. Default: the sites of the simulation that the script runs in.
        strictness: From 0, which is iid, to 1, where the ranges of the sites do not overlap.
        label: Label of each row, or the name of its column, for the table and the picture.
        seed: Seed of the random numbers.

    Returns:
        The partition. Sizes differ by one row at most.

    Raises:
        ConfigError: There is no such feature, or it has values that are no finite numbers.
    """
    if not 0 <= strictness <= 1:
        raise ConfigError(f"strictness cannot be {strictness}", where="by_feature", fix="give a number from 0 to 1")
    names, count = _sites(sites), _rows_for(data, sites)
    values = values_of(data, feature, "feature")
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise ConfigError(
            "the feature has values that are no finite numbers",
            where="feature",
            fix="fill or leave out those rows; for texts take by_column",
        )
    spread = float(values.std()) or 1.0
    noise = _random(seed).standard_normal(count)
    scores = strictness * (values - values.mean()) / spread + (1 - strictness) * noise
    order = np.lexsort((noise, scores))  # equal values in random order
    title = f"by feature, strictness {strictness:g}, seed {seed}"
    return _partition(data, names, np.array_split(order, len(names)), title, label)


def by_column(data: Any, column: Any, *, sites: Sites = None, label: Any = None) -> Partition:
    """Give each site the rows of its own values of a column, such as hospital or user: the natural partition.

    Args:
        data: An array, a list, a tuple of arrays, a pandas table, a data set of `datasets`, or a torch data set.
        column: Value of each row, or the name of its column.
        sites: Number of sites, or their names: each gets all rows of some values, the largest first, so that sizes are
            about equal. Default: a site for each value, named after it.
        label: Label of each row, or the name of its column, for the table and the picture.

    Returns:
        The partition. Nothing in it is random.

    Raises:
        ConfigError: There is no such column, or it has fewer values than there are sites.
    """
    count_rows(data)
    values, value_of_row = labelled(values_of(data, column, "column"))
    if sites is None:
        _check_few(values, len(value_of_row), "column", "give sites=5, so that a site has several values")
        names, owner = _named_after(values), np.arange(len(values))
    else:
        names = _sites(sites)
        if len(values) < len(names):
            fix = f"take at most {len(values)} sites"
            raise ConfigError(f"the column has {len(values)} values for {len(names)} sites", where="column", fix=fix)
        owner = _dealt(np.bincount(value_of_row), len(names))
    rows = [np.flatnonzero(owner[value_of_row] == number) for number in range(len(names))]
    return _partition(data, names, rows, "by column", label)


def _sites(sites: Sites) -> tuple[str, ...]:
    return site_names(site().count if sites is None else sites)


def _rows_for(data: Any, sites: Sites) -> int:
    count, wanted = count_rows(data), len(_sites(sites))
    if count < wanted:
        fix = "take fewer sites, or more rows"
        raise ConfigError(f"{count} rows cannot be divided among {wanted} sites", where="sites", fix=fix)
    return count


def _random(seed: int) -> np.random.Generator:
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"seed cannot be {seed!r}", where="seed", fix="give a whole number from 0 on")
    return np.random.default_rng(seed)


def _check_few(values: Sequence[str], rows: int, what: str, fix: str) -> None:
    if len(values) > max(_FEW, rows // 2):
        raise ConfigError(f"the {what} has {len(values)} different values in {rows} rows", where=what, fix=fix)


def _partition(data: Any, names: tuple[str, ...], rows: Sequence[Array], title: str, label: Any) -> Partition:
    labels, label_of_row = ((), None) if label is None else labelled(values_of(data, label, "label"))
    return Partition(names, tuple(np.sort(part) for part in rows), data, title, labels, label_of_row)


def _label_shares(
    label_of_row: Array, labels: int, sites: int, alpha: float, random: np.random.Generator
) -> list[Array]:
    """Rows of each site: those of every label in random order, cut at shares that are drawn for that label.

    Cuts are rounded from a random offset. So a site's expected number of rows is its share even where that is less than
    one row, as with many sites; rounding to the nearest row would leave the same sites out in every label.
    """
    parts: list[list[Array]] = [[] for _ in range(sites)]
    for label in range(labels):
        rows = random.permutation(np.flatnonzero(label_of_row == label))
        shares = random.dirichlet(np.full(sites, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(rows) + random.random()).astype(np.int64)
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def _drawn_shares(random: np.random.Generator, sites: int, alpha: float, rows: int, least: int) -> Array:
    """Shares of the sites, drawn until each has its rows; the last draw if that does not happen."""
    for _ in range(_TRIES):
        shares = random.dirichlet(np.full(sites, alpha))
        if min(_whole(shares, rows)) >= least:
            break
    return shares


def _checked_shares(shares: Sequence[float], names: Sequence[str]) -> Array:
    found = np.asarray(shares, np.float64)
    if found.shape != (len(names),) or not np.isfinite(found).all() or found.min() <= 0:
        raise ConfigError(
            f"shares cannot be {list(shares)}",
            where="by_quantity",
            fix=f"give a number above 0 for each of the {len(names)} sites",
        )
    return found / found.sum()


def _whole(shares: Array, rows: int) -> list[int]:
    """Whole numbers near `shares * rows` with the sum `rows`: the largest remainders are rounded up."""
    exact = shares * rows
    sizes = np.floor(exact).astype(np.int64)
    missing = rows - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1
    return [int(size) for size in sizes]


def _dealt(sizes: Array, sites: int) -> Array:
    """For each value the number of its site: the most frequent first, each to the site with the fewest rows so far."""
    owner, filled = np.zeros(len(sizes), np.int64), np.zeros(sites, np.int64)
    for value in np.argsort(-sizes, kind="stable"):
        owner[value] = filled.argmin()
        filled[owner[value]] += sizes[value]
    return owner


def _named_after(values: Sequence[str]) -> tuple[str, ...]:
    """Names of sites for values of a column, with "-" for what cannot be in the name of a folder."""
    names: list[str] = []
    for value in values:
        plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in value).strip("._-")[:60]
        plain = plain or "site"
        taken = sum(name == plain or name.startswith(f"{plain}_") for name in names)
        names.append(f"{plain}_{taken + 1}" if plain in names else plain)
    return check_names(names)
