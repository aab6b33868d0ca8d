"""The columns of a site's table, read chunk by chunk in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import narwhals as nw
import numpy as np

from fl_adapters.loop.order import Array
from fl_runtime.errors import ConfigError
from fl_runtime.text import printable

from .products import Products
from .sketch import Sketch

Kind = Literal["numeric", "categorical", "empty"]
MOST_COLUMNS = 2000
MOST_CATEGORIES = 1000
_MOST_DISTINCT = 100_000  # from here on a column holds names or numbers of cases, which are no categories
_NAME_CHARS, _TEXT_CHARS = 200, 200
_CELLS_AT_ONCE = 1_000_000
_LARGEST = 1e60  # so that squares of the values of all sites can be added
_WHERE = "describe"


class Column:
    """What is known of one column after any number of chunks.

    Attributes:
        kind: "numeric", "categorical", or "empty" as long as no value was there.
        count: Number of values.
        missing: Number of rows without a value. Infinite numbers count as missing.
        sketch: The values of a numeric column.
        categories: How often each text of a categorical column occurs.
        too_many: Whether there were so many distinct texts that they are not counted any more.
        too_large: Whether a value was so large that squares cannot be added.
    """

    def __init__(self, name: str, *, categorical: bool) -> None:
        self.name, self._categorical = name, categorical
        self.kind: Kind = "empty"
        self.count = self.missing = 0
        self.sketch = Sketch()
        self.categories: Counter[str] = Counter()
        self.too_many = self.too_large = False
        self._low, self._high = math.inf, -math.inf

    @classmethod
    def of_numbers(cls, name: str, values: Array, counts: Array, missing: int) -> Column:
        """Return a column of numbers, each of which occurs so often."""
        made = cls(name, categorical=False)
        made.kind, made.count, made.missing = "numeric", int(counts.sum()), missing
        made.sketch.add(values[counts > 0], counts[counts > 0].astype(np.int64))
        return made

    @classmethod
    def of_categories(cls, name: str, categories: Mapping[str, int], count: int, missing: int) -> Column:
        """Return a column with so many values, of which some categories are known."""
        made = cls(name, categorical=True)
        made.kind, made.count, made.missing = "categorical", count, missing
        made.categories.update(categories)
        return made

    def add(self, series: Any) -> Array | None:
        """Take the rows of a chunk; return them as float64 with NaN for missing ones if the column is numeric."""
        if series.dtype.is_numeric() and not self._categorical:
            values = np.array(series.cast(nw.Float64).to_numpy(), np.float64)
            self.add_numbers(values)
            return values
        known = series.drop_nulls()
        if series.dtype.is_float():
            known = known.filter(~known.is_nan())
        self._count("categorical", len(known), len(series))
        if len(known) and not self.too_many:
            self._add_texts(known)
        return None

    def add_numbers(self, values: Array) -> None:
        """Take numbers, float64; those that are not finite become NaN in place."""
        values[~np.isfinite(values)] = np.nan
        there = values[~np.isnan(values)]
        self._count("numeric", len(there), len(values))
        if len(there):
            self._low, self._high = min(self._low, float(there.min())), max(self._high, float(there.max()))
        self.too_large = max(-self._low, self._high) > _LARGEST
        self.sketch.add(there)

    def values(self) -> tuple[Array, Array]:
        """Return the values of a numeric column, sorted, and how often each occurs: exact ones, or middles of cells.

        The smallest and the largest value are exact.
        """
        middles, weights = self.sketch.cells()
        if self.sketch.shift and len(middles):
            middles = np.clip(middles, self._low, self._high)
            weights[0] -= 1
            weights[-1] -= 1
            middles, weights = np.r_[self._low, middles, self._high], np.r_[1.0, weights, 1.0]
        return middles[weights > 0], weights[weights > 0]

    def _count(self, kind: Kind, there: int, rows: int) -> None:
        if there and self.kind not in ("empty", kind):
            raise ConfigError(
                f"the column {self.name!r} holds numbers in one chunk and something else in another",
                where=_WHERE,
                fix=f"read it with one type, or pass categorical=[{self.name!r}]",
            )
        self.kind = kind if there else self.kind
        self.count += there
        self.missing += rows - there

    def _add_texts(self, series: Any) -> None:
        try:
            counted = series.value_counts(name="fl_adapters_count")
        except TypeError:
            raise _no_text("unhashable", self.name) from None
        names, counts = counted[counted.columns[0]].to_list(), counted["fl_adapters_count"].to_list()
        for value, count in zip(names, counts, strict=True):
            if count:  # categories of pandas that no row has are counted, too
                self.categories[_text(value, self.name)] += int(count)
        if len(self.categories) > _MOST_DISTINCT:
            self.too_many = True
            self.categories.clear()


class Table:
    """A site's table after one pass over its chunks.

    Attributes:
        rows: Number of rows.
        columns: Name -> column, in the table's order.
        names: Names of all columns of the data, also of those that are not described.
        skipped: Name -> why a column has no statistics.
        products: Sums for each pair of columns, in the order of `columns`.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.columns: dict[str, Column] = {}
        self.names: list[str] = []
        self.skipped: dict[str, str] = {}
        self.products = Products.empty(0)
        self._names: list[str] = []

    def add(self, frame: Any, features: Sequence[str] | None, categorical: Sequence[str]) -> None:
        """Take the rows of a chunk, a data frame of narwhals."""
        if not self._names:
            self._begin(frame, features, categorical)
        if missing := [name for name in self._names if name not in frame.columns]:
            raise ConfigError(
                f"a later chunk has no column {missing[0]!r}", where=_WHERE, fix="give all chunks the same columns"
            )
        step = max(1, _CELLS_AT_ONCE // max(1, len(self.columns)))
        for start in range(0, len(frame), step):
            part = frame[start : start + step]
            values = np.full((len(part), len(self.columns)), np.nan)
            for number, column in enumerate(self.columns.values()):
                found = column.add(part[column.name])
                if found is not None and not column.too_large:
                    values[:, number] = found
            self.products = self.products.plus(values)
            self.rows += len(part)

    @classmethod
    def of_arrays(cls, columns: Mapping[str, Array], rows: int) -> Table:
        """Return a table of columns of numbers, float64, with NaN for missing ones."""
        made = cls()
        made.rows, made.products = rows, Products.empty(len(columns))
        for name, values in columns.items():
            made.columns[name] = Column(name, categorical=False)
            made.columns[name].add_numbers(values)
        if columns:
            made.products = made.products.plus(np.stack(list(columns.values()), axis=1))
        return made

    def add_products(self) -> None:
        """Set the products of each column with itself, from the values of the columns."""
        self.products = Products.empty(len(self.columns))
        for number, column in enumerate(self.columns.values()):
            if column.kind == "numeric" and column.count:
                values, weights = column.values()
                centre = float(values[len(values) // 2])
                self.products.centre[number] = centre
                for part, power in zip((self.products.total, self.products.square), (1, 2), strict=True):
                    part[number, number] = float(((values - centre) ** power) @ weights)
                self.products.count[number, number] = float(weights.sum())
                self.products.product[number, number] = self.products.square[number, number]

    def _begin(self, frame: Any, features: Sequence[str] | None, categorical: Sequence[str]) -> None:
        self.names = list(frame.columns)
        wanted = frame.columns if features is None else [name for name in features if name in frame.columns]
        for name in wanted:
            if not isinstance(name, str) or not 0 < len(name) <= _NAME_CHARS or not name.isprintable():
                raise ConfigError(
                    f"{name!r} is no name of a column",
                    where=_WHERE,
                    fix=f"use printable texts of at most {_NAME_CHARS} characters",
                )
            dtype = frame[name].dtype
            if dtype.is_numeric() or dtype in (nw.Boolean, nw.String, nw.Categorical, nw.Enum, nw.Object, nw.Unknown):
                self.columns[name] = Column(name, categorical=name in categorical)
            elif features is not None:
                raise ConfigError(
                    f"the column {name!r} has the type {dtype}, which has no statistics here",
                    where=_WHERE,
                    fix="turn it into numbers, such as days since a date, or leave it out of features=",
                )
            else:
                self.skipped[name] = f"has the type {dtype}"
        if len(self.columns) > MOST_COLUMNS:
            raise ConfigError(
                f"the table has {len(self.columns)} columns; the limit is {MOST_COLUMNS}",
                where=_WHERE,
                fix="choose some with features=[...]",
            )
        self.products = Products.empty(len(self.columns))
        self._names = list(self.columns)


def read_table(data: Any, features: Sequence[str] | None, categorical: Sequence[str]) -> Table:
    """Read a table, or chunks of one, in one pass.

    Args:
        data: A data frame that narwhals knows (pandas, Polars, Arrow), or an iterable of such frames.
        features: Names of the columns to describe; None for all.
        categorical: Names of numeric columns that hold categories.

    Returns:
        What is known of the table.

    Raises:
        ConfigError: The data are something else, or a column cannot be described.
    """
    table = Table()
    try:
        for frame in _frames(data):
            table.add(frame, features, categorical)
    except nw.exceptions.NarwhalsError as error:
        raise ConfigError(f"the table cannot be read: {error}", where=_WHERE, fix="see the message") from error
    return table


def _frames(data: Any) -> Iterator[Any]:
    frame = _frame(data)
    if frame is not None:
        yield frame
        return
    if isinstance(data, str | bytes | dict) or not isinstance(data, Iterable):
        raise _no_table(data)
    for chunk in data:
        frame = _frame(chunk)
        if frame is None:
            raise _no_table(chunk)
        yield frame


def _frame(data: Any) -> Any:
    native = nw.from_native(data, pass_through=True)
    if isinstance(native, nw.LazyFrame):
        raise ConfigError("the table is lazy", where=_WHERE, fix="pass table.collect(), or chunks of it")
    return native if isinstance(native, nw.DataFrame) else _batch(data)


def _batch(data: Any) -> Any:
    """A record batch of Arrow, as its readers yield them, as a frame."""
    if type(data).__name__ != "RecordBatch" or not type(data).__module__.startswith("pyarrow"):
        return None
    import pyarrow

    return nw.from_native(pyarrow.Table.from_batches([data]), eager_only=True)


def _no_table(data: Any) -> ConfigError:
    return ConfigError(
        f"describe got a {type(data).__name__}, which is no table",
        where=_WHERE,
        fix="pass a data frame of pandas, Polars or Arrow, or an iterable of such frames",
    )


def _text(value: Any, name: str) -> str:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)  # integers become floats at a site where one is missing
    if not isinstance(value, str | bool | int | float):
        raise _no_text(type(value).__name__, name)
    text = printable(str(value), _TEXT_CHARS)
    return text if len(text) <= _TEXT_CHARS else f"{text[: _TEXT_CHARS - 3]}..."


def _no_text(kind: str, name: str) -> ConfigError:
    return ConfigError(
        f"the column {name!r} holds {kind} values, which are no texts, numbers or booleans",
        where=_WHERE,
        fix="turn them into texts first, in the same way at every site",
    )
