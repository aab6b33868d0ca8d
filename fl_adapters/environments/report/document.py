"""An HTML document built as a tree: every text is made printable and escaped, and nothing in it can be a script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from typing import TypeAlias
from xml.etree import ElementTree

from fl_runtime.text import printable

Content: TypeAlias = "ElementTree.Element | str | None"
_TEXT_CHARS = 4_000_000
SERIES = 8
"""Number of colours of style.css for series."""


def tag(kind: str, /, *content: Content | Iterable[Content], **attributes: str | float) -> ElementTree.Element:
    """Make an element.

    Args:
        kind: Name of the element, in HTML or SVG.
        content: Texts and elements in it; None stands for nothing.
        attributes: Its attributes. `class_` stands for class, and `_` in other names for `-`.

    Returns:
        The element.
    """
    made = ElementTree.Element(kind, {_attribute(key): _number(value) for key, value in attributes.items()})
    for item in content:
        for part in [item] if item is None or isinstance(item, (str, ElementTree.Element)) else item:
            _append(made, part)
    return made


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Content]], numbers_from: int = 1, *, wrap: bool = False
) -> ElementTree.Element:
    """Make a table that scrolls by itself where the page is narrow.

    Args:
        columns: Headings of the columns.
        rows: A content for each column.
        numbers_from: Index of the first column that is set to the right, as numbers are.
        wrap: Whether the texts of a cell take several lines, for columns of sentences.

    Returns:
        The element.
    """

    def cells(kind: str, row: Sequence[Content]) -> list[ElementTree.Element]:
        return [tag(kind, cell, **({"class_": "n"} if at >= numbers_from else {})) for at, cell in enumerate(row)]

    head = tag("thead", tag("tr", cells("th", columns)))
    body = tag("tbody", [tag("tr", cells("td", row)) for row in rows])
    return tag("div", tag("table", head, body), class_="scroll wrap" if wrap else "scroll")


def filled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table without those that are empty in all rows.

    Args:
        columns: Headings of the columns.
        rows: A text for each column; "" for an empty cell.

    Returns:
        The headings and the rows that are left.
    """
    used = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return [columns[at] for at in used], [[row[at] for at in used] for row in rows]


def document(title: str, *content: Content | Iterable[Content]) -> str:
    """Make a whole document. It needs no network, has no scripts, and is dark where the reader's system is.

    Args:
        title: Title of the page.
        content: What is in its body.

    Returns:
        The HTML text.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # nothing of the page may load or run anything, whatever it holds
        tag("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        tag("title", title),
        tag("style", resources.files("fl_adapters.environments.report").joinpath("style.css").read_text("utf-8")),
    )
    page = tag("html", head, tag("body", *content), lang="en")
    return as_text(page)


def as_text(page: ElementTree.Element) -> str:
    """Return the text of a whole HTML document.

    Args:
        page: Its element `html`.
    """
    return "<!doctype html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def _append(parent: ElementTree.Element, part: Content) -> None:
    if part is None:
        return
    if isinstance(part, ElementTree.Element):
        parent.append(part)
        return
    part = printable(part, _TEXT_CHARS, lines=True)
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + part
    else:
        parent.text = (parent.text or "") + part


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _number(value: str | float) -> str:
    return printable(value, _TEXT_CHARS, lines=True) if isinstance(value, str) else f"{value:.6g}"
