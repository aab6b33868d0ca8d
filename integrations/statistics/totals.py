"""The numbers of a plan, from sums over its sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fl_adapters.loop.federation import Array, Federation, SitePlace
from fl_adapters.loop.order import at_ranks, between

from .agreement import Plan
from .columns import MOST_CATEGORIES, Column, Table
from .products import Products
from .protection import grouped, pooled, pooled_categories, shared_pairs
from .question import Question
from .result import Categorical, Histogram, Numeric
from .sketch import cell_bounds


@dataclass(frozen=True)
class Totals:
    """Statistics over the sites of a plan.

    Attributes:
        rows: Number of rows.
        features: Column -> its statistics.
        correlations: Column -> column -> Pearson's correlation.
    """

    rows: int
    features: Mapping[str, Numeric | Categorical]
    correlations: Mapping[str, Mapping[str, float | None]]


class Alone:
    """A federation of one site: its sums are its own values.

    Args:
        site: Which of the sites this process is.
    """

    def __init__(self, site: SitePlace) -> None:
        self.site = site

    def sum(self, arrays: Mapping[str, Array], *, integers: bool = False) -> Mapping[str, Array]:
        """Return the values of this site."""
        return arrays

    def union(self, texts: Sequence[str]) -> list[str]:
        """Return the texts of this site, sorted."""
        return sorted(set(texts))


class Share:
    """What a site contributes to the columns of a plan: zeros where it takes no part.

    Args:
        table: The site's table.
        plan: The plan.
        site: Name of the site.
        least: Least number of rows that may be told.
    """

    def __init__(self, table: Table, plan: Plan, site: str, least: int) -> None:
        self.table, self.site, self.least = table, site, least
        self.rows = table.rows if site in plan.sites else 0
        self.columns: dict[str, Column | None] = {
            name: table.columns[name] if site in members else None for name, members in plan.members.items()
        }
        order = {name: number for number, name in enumerate(table.columns)}
        numeric = [order[name] if self.columns[name] else -1 for name in plan.of_kind("numeric")]
        every = table.products.select(numeric, np.ones((len(numeric), len(numeric)), bool))
        self.products = every.select(range(len(numeric)), shared_pairs(every.count, least))
        self.values, self.weights, self.largest_groups = [], [], []
        for name in plan.of_kind("numeric"):
            values, weights, largest = grouped(*self.cells(name), least)
            self.values.append(values)
            self.weights.append(weights)
            self.largest_groups.append(largest)

    def of(self, plan: Plan) -> Share:
        """Return what this site contributes to another plan."""
        return Share(self.table, plan, self.site, self.least)

    def cells(self, name: str) -> tuple[Array, Array]:
        """Return the values of a numeric column, and how often each occurs."""
        column = self.columns[name]
        return column.values() if column is not None else (np.zeros(0), np.zeros(0))

    def histogram(self, name: str, edges: Array) -> tuple[Array, int, float]:
        """Return the counts of the bins, the number of other values, and of those that may be in the next bin."""
        values, weights = self.cells(name)
        column = self.columns[name]
        bin_of = np.searchsorted(edges, values, "right") - 1
        bin_of = np.where(values == edges[-1], len(edges) - 2, bin_of)
        inside = (bin_of >= 0) & (bin_of < len(edges) - 1)
        counts = np.bincount(bin_of[inside], weights[inside], len(edges) - 1).astype(np.float64)
        shown, other = pooled(counts, self.least, float(weights[~inside].sum()))
        if column is None or not column.sketch.shift:
            return shown, other, 0.0
        low, high = cell_bounds(values, column.sketch.shift)
        unsure = np.searchsorted(edges, low, "right") != np.searchsorted(edges, high, "right")
        return shown, other, float(weights[unsure].sum())

    def categories(self, name: str, texts: Sequence[str]) -> tuple[Array, int]:
        """Return how often each text occurs, and the number of rows with others."""
        column = self.columns[name]
        if column is None:
            return np.zeros(len(texts)), 0
        counts, other = pooled_categories(column, self.least)
        return np.array([counts.get(text, 0) for text in texts], np.float64), other


def add_up(
    federation: Federation,
    plan: Plan,
    own: Share,
    question: Question,
    edges: Mapping[str, Array] | None = None,
) -> Totals:
    """Add what the sites contribute.

    Args:
        federation: The federation.
        plan: Who takes part in what.
        own: What this site contributes.
        question: The arguments of `describe`.
        edges: Column -> edges of the histogram; None finds them, where `bins` is a number.

    Returns:
        The statistics, the same at every site.
    """
    names, numeric = list(plan.kinds), plan.of_kind("numeric")
    columns = [own.columns[name] for name in names]
    first = federation.sum(
        {
            "rows": np.array([float(own.rows)]),
            "count": np.array([0.0 if c is None else c.count for c in columns]),
            "missing": np.array([0.0 if c is None else c.missing for c in columns]),
            "total": np.diag(own.products.total) + own.products.centre * np.diag(own.products.count),
        }
    )
    count = dict(zip(names, map(int, first["count"]), strict=True))
    missing = dict(zip(names, map(int, first["missing"]), strict=True))
    of_numeric = np.array([float(count[name]) for name in numeric])
    products = _products(federation, own.products, first["total"] / np.maximum(of_numeric, 1.0), question)
    order = _order_statistics(federation, plan, own, count, question.levels)
    if edges is None:
        edges = {name: _edges(question, name, found) for name, found in order.items() if count[name]}
    counts = _Counts.of(federation, plan, own, edges)
    features: dict[str, Numeric | Categorical] = {}
    mean, std = products.mean(), products.std()
    for name in names:
        members = len(plan.members[name])
        if name in plan.categories:
            texts = counts.categories[name]
            features[name] = Categorical(count[name], missing[name], texts, count[name] - sum(texts.values()), members)
            continue
        number, found = numeric.index(name), order[name]
        features[name] = Numeric(
            count[name],
            missing[name],
            _known(mean[number]),
            _known(std[number]),
            found.low,
            found.high,
            found.quantiles,
            float(counts.largest_groups[number]) / max(count[name] - 1, 1),
            found.errors,
            counts.histograms.get(name),
            members,
        )
    return Totals(int(first["rows"][0]), features, _correlations(products, numeric) if question.correlations else {})


def _products(federation: Federation, own: Products, centre: Array, question: Question) -> Products:
    """Sums of products over all sites, around their common mean so that large means cost no digits."""
    near = own.around(centre)
    parts = {"count": near.count, "total": near.total, "square": near.square, "product": near.product}
    if question.correlations:
        found = federation.sum(parts)
        return Products(found["count"], found["total"], found["square"], found["product"], centre)
    found = federation.sum({name: np.diag(part) for name, part in parts.items()})
    count, total, square, product = (np.diag(found[name]) for name in parts)
    return Products(count, total, square, product, centre)


@dataclass(frozen=True)
class _Order:
    """Smallest value, quantiles and largest value of a column, and bounds on the errors of the quantiles."""

    low: float | None = None
    high: float | None = None
    quantiles: Mapping[float, float | None] = field(default_factory=dict)
    errors: Mapping[float, float] = field(default_factory=dict)


def _order_statistics(
    federation: Federation, plan: Plan, own: Share, counts: Mapping[str, int], levels: Sequence[float]
) -> dict[str, _Order]:
    numeric = plan.of_kind("numeric")
    every = np.array([0.0, *levels, 1.0])
    places = [every * (counts[name] - 1) if counts[name] else np.zeros(0) for name in numeric]
    ranks = [np.concatenate([np.floor(place), np.ceil(place)]).astype(np.int64).tolist() for place in places]
    found = at_ranks(federation, own.values, ranks, own.weights) if numeric else []
    result = {}
    for name, values, place in zip(numeric, found, places, strict=True):
        if not len(place):
            result[name] = _Order(quantiles=dict.fromkeys(levels), errors=dict.fromkeys(levels, 0.0))
            continue
        below, above = values[: len(place)], values[len(place) :]
        low, *quantiles, high = between(below, above, place - np.floor(place)).tolist()
        errors = np.maximum(_widths(below, plan.shifts[name]), _widths(above, plan.shifts[name])).tolist()[1:-1]
        result[name] = _Order(
            low, high, dict(zip(levels, quantiles, strict=True)), dict(zip(levels, errors, strict=True))
        )
    return result


def _widths(values: Array, shift: int) -> Array:
    """Widths of the cells in which values lie: bounds on their errors."""
    low, high = cell_bounds(values, shift)
    return high - low


def _edges(question: Question, name: str, found: _Order) -> Array:
    bins = question.bins_of(name)
    if not isinstance(bins, int):
        return np.array(bins)
    low, high = found.low or 0.0, found.high or 0.0
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


@dataclass(frozen=True)
class _Counts:
    """Counts over all sites.

    Attributes:
        histograms: Numeric column -> histogram.
        categories: Categorical column -> text -> number of rows, the most frequent first.
        largest_groups: Sum over the sites of the sizes of their largest groups of values, for each numeric column.
    """

    histograms: Mapping[str, Histogram]
    categories: Mapping[str, Mapping[str, int]]
    largest_groups: Array

    @classmethod
    def of(cls, federation: Federation, plan: Plan, own: Share, edges: Mapping[str, Array]) -> _Counts:
        bins = [own.histogram(name, edges[name]) for name in edges]
        texts = [own.categories(name, plan.categories[name])[0] for name in plan.categories]
        found = federation.sum(
            {
                "bins": _joined([counts for counts, _, _ in bins]),
                "other": np.array([float(other) for _, other, _ in bins]),
                "uncertain": np.array([unsure for _, _, unsure in bins]),
                "texts": _joined(texts),
                "groups": np.array(own.largest_groups),
            }
        )
        starts = np.cumsum([0, *(len(edges[name]) - 1 for name in edges)])
        histograms = {
            name: Histogram(
                tuple(map(float, edges[name])),
                tuple(map(int, found["bins"][starts[number] : starts[number + 1]])),
                int(found["other"][number]),
                int(found["uncertain"][number]),
            )
            for number, name in enumerate(edges)
        }
        ends = np.cumsum([len(plan.categories[name]) for name in plan.categories])
        parts = np.split(found["texts"], ends[:-1]) if len(ends) else []
        categories = {
            name: _most_frequent(plan.categories[name], part) for name, part in zip(plan.categories, parts, strict=True)
        }
        return cls(histograms, categories, found["groups"])


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0)


def _most_frequent(texts: Sequence[str], counts: Array) -> dict[str, int]:
    pairs = sorted(((int(count), text) for text, count in zip(texts, counts, strict=True)), key=lambda p: (-p[0], p[1]))
    return {text: count for count, text in pairs[:MOST_CATEGORIES] if count}


def _correlations(products: Products, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    found = products.correlations()
    return {one: {other: _known(found[i, j]) for j, other in enumerate(names) if i != j} for i, one in enumerate(names)}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
