"""Pages of tables, as text and as one HTML file without scripts or links to elsewhere."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem } p { margin: .3rem 0 .6rem; max-width: 60rem }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #ddd }
th { background: #f4f4f4 } @media print { body { margin: 0; max-width: none } }
"""
_WIDTH = 160


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, sentences, and a table.

    Attributes:
        title: The heading.
        text: Sentences below it.
        columns: Headings of the table; none for a section without a table.
        rows: The table, a text for each column. Without rows the page says "none".
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def as_html(title: str, sections: Sequence[Section]) -> str:
    """Return a page as HTML.

    Args:
        title: Title of the page.
        sections: Its parts. Every text is escaped.

    Returns:
        A whole document.
    """
    parts = [f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in section.text.splitlines() if line]
        if section.columns and section.rows:
            rows = [_row("th", section.columns), *(_row("td", row) for row in section.rows)]
            parts.append("<table>" + "\n".join(rows) + "</table>")
        elif section.columns:
            parts.append("<p>none</p>")
    return "\n".join([*parts, "</body></html>\n"])


def as_text(title: str, sections: Sequence[Section]) -> str:
    """Return a page as text of at most 160 columns.

    Args:
        title: Title of the page.
        sections: Its parts.

    Returns:
        The lines of the page.
    """
    from rich.console import Console
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, markup=False, emoji=False, highlight=False, color_system=None)
    console.print(f"{title}\n{'=' * len(title)}")
    for section in sections:
        console.print(f"\n{section.title}\n{'-' * len(section.title)}")
        if section.text:
            console.print(section.text)
        if section.columns and section.rows:
            table = Table(box=None, pad_edge=False)
            for column in section.columns:
                table.add_column(column, overflow="fold")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        elif section.columns:
            console.print("none")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _row(cell: str, values: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in values) + "</tr>"
