"""The result of `describe`: a document that is the same at every site."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fl_runtime.errors import ConfigError
from fl_runtime.text import parse_json

if TYPE_CHECKING:
    import pandas

FORMAT = 1
_BY_LEVEL = ("quantiles", "value_error")


@dataclass(frozen=True)
class Histogram:
    """How many values lie in each bin.

    Attributes:
        edges: Edges of the bins, one more than bins. A bin holds its lower edge; the last one holds both.
        counts: Number of values in each bin, as far as the sites tell it.
        other: Number of values outside the bins, or in bins that a site keeps back because they hold too few rows.
        uncertain: Bound on the number of values that may belong to a neighbouring bin, because a site that has more
            than 65,536 different values keeps several of them in one cell. 0 if the counts are exact.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    other: int = 0
    uncertain: int = 0


@dataclass(frozen=True)
class Numeric:
    """Statistics of a column of numbers. None stands for what is not defined, such as the mean of no values.

    Attributes:
        count: Number of values.
        missing: Number of rows without a value.
        mean: Mean.
        std: Standard deviation, divided by the count less 1.
        min: Smallest value; where sites must group rows, the mean of a site's smallest group.
        max: Largest value, likewise.
        quantiles: Level -> quantile, interpolated linearly between two values as NumPy does.
        rank_error: Bound on the error of the quantiles' levels that grouping at the sites makes: the quantile at level
            q lies between the exact ones at q - rank_error and q + rank_error.
        value_error: Level -> bound on the error of its value from cells that hold several values; 0 if exact.
        histogram: The histogram; None without values.
        sites: Number of sites whose values are in it.
    """

    count: int
    missing: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    quantiles: Mapping[float, float | None]
    rank_error: float = 0.0
    value_error: Mapping[float, float] = field(default_factory=dict)
    histogram: Histogram | None = None
    sites: int = 1


@dataclass(frozen=True)
class Categorical:
    """Statistics of a column of texts or booleans.

    Attributes:
        count: Number of values.
        missing: Number of rows without a value.
        categories: Text -> number of rows, the most frequent first, as far as the sites tell it.
        other: Number of rows in categories that a site keeps back.
        sites: Number of sites whose values are in it.
    """

    count: int
    missing: int
    categories: Mapping[str, int]
    other: int = 0
    sites: int = 1


@dataclass(frozen=True)
class Absence:
    """What a site does not take part in, and why.

    Attributes:
        site: Name of the site.
        feature: Name of the column; "" if the site stays out altogether.
        reason: Why, as the end of a sentence.
    """

    site: str
    feature: str
    reason: str


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site.

    Attributes:
        rows: Number of rows.
        features: Name of a column -> its statistics.
    """

    rows: int
    features: Mapping[str, Numeric | Categorical]


@dataclass(frozen=True)
class Statistics:
    """Statistics over all sites. It is the same at every site.

    Attributes:
        rows: Number of rows of the sites that take part.
        sites: Names of these sites.
        features: Name of a column -> its statistics, in the order of the tables.
        correlations: Column -> column -> Pearson's correlation over the rows that have both; None where undefined.
        absences: What sites do not take part in, and why.
        per_site: Site -> its own statistics, of the sites that allow it.
        noise: Site -> the epsilon of the noise that it has added to all that it sent.
    """

    rows: int
    sites: tuple[str, ...]
    features: Mapping[str, Numeric | Categorical]
    correlations: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    absences: tuple[Absence, ...] = ()
    per_site: Mapping[str, SiteStatistics] = field(default_factory=dict)
    noise: Mapping[str, float] = field(default_factory=dict)

    def to_json(self, indent: int | None = 1) -> str:
        """Return the document as JSON.

        Args:
            indent: Spaces before what is inside; None for one line.

        Returns:
            A text without NaN or infinity: what is not defined is null.
        """
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """Return the statistics of a document that `to_json` has made.

        Args:
            text: The document.

        Returns:
            The statistics.

        Raises:
            ConfigError: It is no such document.
        """
        try:
            fields = parse_json(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("it has another format number")
            per_site = {name: SiteStatistics(own["rows"], _features(own)) for name, own in fields["per_site"].items()}
            absences = tuple(Absence(**absence) for absence in fields["absences"])
            made = {"sites": tuple(fields["sites"]), "features": _features(fields)}
            return cls(**{**fields, **made, "absences": absences, "per_site": per_site})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"this is no document of statistics: {error}",
                where="Statistics.from_json",
                fix="use to_json to make one",
            ) from None

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row for each column of the data.

        Returns:
            The table; its columns are those of `DataFrame.describe`, and "missing".

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("to_pandas needs pandas", where="Statistics", fix="pip install pandas") from None
        rows = {name: _row(feature) for name, feature in self.features.items()}
        return pandas.DataFrame.from_dict(rows, orient="index")


def _features(fields: Mapping[str, Any]) -> dict[str, Numeric | Categorical]:
    return {name: _feature(own) for name, own in fields["features"].items()}


def _feature(fields: dict[str, Any]) -> Numeric | Categorical:
    if "categories" in fields:
        return Categorical(**fields)
    histogram = fields.pop("histogram")
    if histogram is not None:
        edges, counts = tuple(histogram.pop("edges")), tuple(histogram.pop("counts"))
        histogram = Histogram(edges, counts, **histogram)
    for name in _BY_LEVEL:
        fields[name] = {float(level): value for level, value in fields[name].items()}
    return Numeric(**fields, histogram=histogram)


def _row(feature: Numeric | Categorical) -> dict[str, Any]:
    row: dict[str, Any] = {"count": feature.count, "missing": feature.missing}
    if isinstance(feature, Numeric):
        quantiles = {f"{level * 100:g}%": value for level, value in feature.quantiles.items()}
        return row | {"mean": feature.mean, "std": feature.std, "min": feature.min, **quantiles, "max": feature.max}
    top = next(iter(feature.categories), None)
    return row | {"top": top, "freq": None if top is None else feature.categories[top]}
