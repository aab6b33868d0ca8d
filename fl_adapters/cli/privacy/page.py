"""Pages of tables, as text and as one HTML file without scripts or links to elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fl_adapters.environments.report.document import document, table, tag

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
    return document(title, tag("h1", title), [tag("section", _content(section)) for section in sections])


def _content(section: Section) -> Iterator[Element]:
    yield tag("h2", section.title)
    yield from (tag("p", line) for line in section.text.splitlines() if line)
    if section.columns and section.rows:
        yield table(section.columns, section.rows, numbers_from=len(section.columns), wrap=True)
    elif section.columns:
        yield tag("p", "none")


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
