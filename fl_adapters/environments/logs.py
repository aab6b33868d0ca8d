"""Reads the end of logs; of a process's log, with the cause of the error that ended it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("The above exception was the direct cause of", "During handling of the above exception")
_IGNORED = "Exception ignored in"
_CAUSE_LINES = 6
_CHUNK_BYTES = 131_072


def tail(log: Path, lines: int = 20) -> list[str]:
    """Return the last lines of a log, without trailing blank ones.

    A traceback of chained exceptions shows its root cause first, often far above the last line. Where that lies
    outside of the last lines, its last frame and its text come before them.

    Args:
        log: The log. At most 128 KiB are read from its end.
        lines: Most lines to return.

    Returns:
        The lines; empty if there is no log.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _CHUNK_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    rows = text.rstrip().splitlines()
    cause = _root_cause(rows)
    if cause is None or cause.frame >= len(rows) - lines:
        return rows[-lines:]
    shown = [rows[cause.header], *rows[cause.frame : min(cause.end, cause.frame + _CAUSE_LINES)], "..."]
    return [*shown, *rows[-(lines - len(shown)) :]]


def last_error(rows: Sequence[str]) -> str:
    """Return the line of a log that names its error: the root cause of the last traceback, else the last line.

    Args:
        rows: Lines of a log, as `tail` returns them.

    Returns:
        The line, such as "KeyError: 'label'"; "" for an empty log.
    """
    cause = _root_cause(rows)
    return rows[cause.error] if cause else (list(rows[-1:]) or [""])[0]


@dataclass(frozen=True)
class _Cause:
    """Lines of a traceback: its header, the last frame, the line that names the exception, and the line after it."""

    header: int
    frame: int
    error: int
    end: int


def _root_cause(rows: Sequence[str]) -> _Cause | None:
    """The first exception in the last chain of a log, or None if there is no traceback."""
    headers = [i for i, row in enumerate(rows) if row.endswith(_TRACEBACK)]
    while headers and _text_before(rows, headers[-1]).startswith(_IGNORED):  # at the exit of the interpreter
        headers.pop()
    while len(headers) > 1 and _text_before(rows, headers[-1]).startswith(_CHAINED):
        headers.pop()
    if not headers:
        return None
    header = headers[-1]
    texts = {i: _text(rows[i], rows[header]) for i in range(header + 1, len(rows))}
    error = next((i for i, text in texts.items() if not text.startswith((" ", "\t"))), len(rows) - 1)
    frames = [i for i, text in texts.items() if i < error and re.match(r'\s+File "', text)]
    end = next((i for i, text in texts.items() if i > error and not text.strip()), len(rows))
    return _Cause(header, max(frames, default=error), error, end)


def _text_before(rows: Sequence[str], header: int) -> str:
    """The last line above a traceback that is not blank."""
    above = (_text(row, rows[header]) for row in reversed(rows[:header]))
    return next((text for text in above if text.strip()), "")


def _text(row: str, header: str) -> str:
    """A line without what a launcher such as torchrun puts before each line of its process."""
    return row.removeprefix(header.removesuffix(_TRACEBACK))
