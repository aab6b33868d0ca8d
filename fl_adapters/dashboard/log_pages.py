"""Pages of logs of any length: the newest lines, with links to older and newer ones. Only what is shown is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.requests import Request

from fl_adapters.dashboard.page import link, live
from fl_adapters.environments.report.document import Content, tag
from fl_runtime.text import printable

_PAGE_BYTES = 2**17
_PAGE_LINES = 500
_LINE_CHARS = 4000
_MOST_DIGITS = 16


@dataclass(frozen=True)
class LogPage:
    """Lines of a log that follow each other.

    Attributes:
        lines: The lines, the oldest first. A line longer than a page is cut.
        begin: Where the first one begins in the log, in bytes.
        end: Where the last one ends.
        size: Size of the log.
    """

    lines: tuple[str, ...]
    begin: int
    end: int
    size: int


def read_page(files: Sequence[Path], *, before: int | None = None, after: int | None = None) -> LogPage:
    """Read a page of a log: its last lines, those before a place, or those after one.

    Args:
        files: Files that make up the log, the oldest first. One that cannot be read is empty.
        before: Where the last line ends.
        after: Where the first line begins, in place of `before`.

    Returns:
        The lines: at most 500, and at most 128 KiB.
    """
    sizes = [_size(path) for path in files]
    size = sum(sizes)
    if after is not None:
        start = min(after, size)
        stop = min(start + _PAGE_BYTES, size)
        lines = _read(files, sizes, start, stop).splitlines(keepends=True)
        if stop < size and len(lines) > 1 and not lines[-1].endswith(b"\n"):
            lines.pop()
        lines = lines[:_PAGE_LINES]
        return LogPage(tuple(map(_text, lines)), start, start + sum(map(len, lines)), size)
    stop = size if before is None else min(before, size)
    start = max(0, stop - _PAGE_BYTES)
    lines = _read(files, sizes, start, stop).splitlines(keepends=True)
    if start and len(lines) > 1:
        lines = lines[1:]  # the first one begins before what was read
    lines = lines[-_PAGE_LINES:]
    return LogPage(tuple(map(_text, lines)), stop - sum(map(len, lines)), stop, size)


def log_view(request: Request, files: Sequence[Path], label: str, line: Callable[[str], str] = str) -> list[Content]:
    """Make the view of a log: the lines that the address asks for, and links to older and newer ones.

    Args:
        request: The request. Its query may have `before` or `after`, as the links do.
        files: Files that make up the log, the oldest first.
        label: What the log is, for screen readers.
        line: Returns a line as it is shown; "" for one to leave out.

    Returns:
        The view. The newest lines are live.
    """
    before, after = _place(request.url.query, "before"), _place(request.url.query, "after")
    found = read_page(files, before=before, after=after)
    rows = [printable(text, _LINE_CHARS) for text in map(line, found.lines) if text]
    shown = tag("pre", "\n".join(rows) or "Nothing yet.", class_="log", tabindex="0", role="region", aria_label=label)
    return [live("log", shown, _links(request.url.path, found))]


def log_version(path: str, files: Sequence[Path]) -> str:
    """Return a text that changes with the newest lines of a log; "" for a page of older ones, which stay.

    Args:
        path: Path and query of the page.
        files: Files that make up the log.
    """
    query = urlsplit(path).query
    if _place(query, "before") is not None or _place(query, "after") is not None:
        return ""
    return " ".join(str(_size(path)) for path in files)


def _links(path: str, shown: LogPage) -> Content:
    """The navigation between pages, if the log has more than one."""
    links = {}
    if shown.begin:
        links["Older lines"] = f"{path}?before={shown.begin}"
    if shown.end < shown.size:
        links["Newer lines"] = f"{path}?after={shown.end}"
        links["Newest lines"] = path
    items = [tag("li", link(name, address)) for name, address in links.items()]
    return tag("nav", tag("ul", items), class_="tabs", aria_label="Pages of the log") if items else None


def _place(query: str, name: str) -> int | None:
    text = parse_qs(query).get(name, [""])[0]
    return int(text) if text.isascii() and text.isdecimal() and len(text) < _MOST_DIGITS else None


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _read(files: Sequence[Path], sizes: Sequence[int], start: int, stop: int) -> bytes:
    """Read a range of files as if they were one. A file that has shrunk meanwhile is filled up with blanks."""
    parts = []
    for path, size in zip(files, sizes, strict=True):
        first, last = max(0, start), min(size, stop)
        if first < last:
            parts.append(_part(path, first, last - first))
        start, stop = start - size, stop - size
    return b"".join(parts)


def _part(path: Path, start: int, count: int) -> bytes:
    data = b""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(start, os.SEEK_SET)
        data = file.read(count)
    return data.ljust(count)


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\r\n")
