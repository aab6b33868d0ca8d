"""A result on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from .result import Categorical, Numeric, Statistics

_MOST_ROWS = 60


def show(found: Statistics, files: Mapping[str, Path], out: TextIO) -> None:
    """Print the main numbers of each column, what is left out, and where the files are.

    Args:
        found: What `describe` has found.
        files: What each file is -> its path.
        out: Where to print.
    """
    console = Console(file=out, markup=False, emoji=False)
    console.print(f"{found.rows:,} rows of {', '.join(found.sites) or 'no site'}", highlight=False, soft_wrap=True)
    shown = list(found.features.items())[:_MOST_ROWS]
    if numbers := [(name, feature) for name, feature in shown if isinstance(feature, Numeric)]:
        table = _table("column", "count", "missing", "mean", "std", "min", "50%", "max")
        for name, feature in numbers:
            values = (feature.mean, feature.std, feature.min, feature.quantiles.get(0.5), feature.max)
            shown_values = ("" if value is None else f"{value:.4g}" for value in values)
            table.add_row(name, f"{feature.count:,}", f"{feature.missing:,}", *shown_values)
        console.print(table)
    if categories := [(name, feature) for name, feature in shown if isinstance(feature, Categorical)]:
        table = _table("column", "count", "missing", "most frequent")
        for name, texts in categories:
            table.add_row(name, f"{texts.count:,}", f"{texts.missing:,}", _most_frequent(texts))
        console.print(table)
    if len(found.features) > _MOST_ROWS:
        console.print(f"{len(found.features) - _MOST_ROWS} more columns", highlight=False)
    for absence in found.absences[:_MOST_ROWS]:
        what = f"column {absence.feature} of {absence.site}" if absence.feature else absence.site
        console.print(f"not in it: {what}: {absence.reason}", highlight=False, soft_wrap=True)
    for name, path in files.items():
        console.print(f"{name:8} {path}", highlight=False, soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None)
    for heading in headings:
        left = heading in ("column", "most frequent")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    return table


def _most_frequent(feature: Categorical) -> str:
    texts = [f"{text[:30]} {count / feature.count:.0%}" for text, count in list(feature.categories.items())[:3]]
    return ", ".join(texts) + (", ..." if len(feature.categories) > 3 or feature.other else "")
