"""Text from elsewhere: made printable before it reaches a terminal, a log or a file, and JSON that is bounded."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_JSON_DEPTH = 32
MAX_METRIC_CHARS = 200
METRIC_NAMES = "use printable names of at most 200 characters that do not begin with one of = + - @"
"""What to do about a name that `is_metric_name` refuses."""
_FORMULA = tuple("=+-@\t\r")  # what a spreadsheet takes for the start of a formula


def printable(text: str, limit_chars: int = 10_000, *, lines: bool = False) -> str:
    """Return a text in which nothing can steer a terminal: control characters stand there as `\\x1b`.

    Args:
        text: Text that another participant, or a file of it, may have chosen.
        limit_chars: Length from which on the text is cut off, with "..." in place of the rest.
        lines: Whether line breaks and tabs stay.

    Returns:
        The text itself, if it is short and all of it is printable.
    """
    cut = text[:limit_chars]
    if not cut.isprintable():
        kept = "\n\t" if lines else ""
        cut = "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in cut)
    return cut if len(text) <= limit_chars else f"{cut}..."


def is_metric_name(name: object) -> bool:
    """Whether a metric can have this name: printable, at most 200 characters, and no formula for a spreadsheet."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_METRIC_CHARS
        and name.isprintable()
        and not name.startswith(_FORMULA)
    )


def parse_json(data: str | bytes, *, limit_chars: int = 2**24, depth: int = MAX_JSON_DEPTH) -> Any:
    """Read JSON that another participant, or a file of it, may have chosen.

    Args:
        data: The JSON text; bytes in UTF-8.
        limit_chars: Largest length of the text.
        depth: Largest number of lists and objects within each other.

    Returns:
        Its value. Every text in it can be encoded in UTF-8.

    Raises:
        ValueError: It is not JSON, too long, nested too deeply, or holds half of a surrogate pair.
    """
    if len(data) > limit_chars:
        raise ValueError(f"a JSON text has {len(data)} characters; the limit is {limit_chars}")
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(text)
    except RecursionError:
        raise ValueError("a JSON text is nested too deeply") from None
    if text.count("[") + text.count("{") > depth and _depth(value, depth) > depth:
        raise ValueError(f"a JSON text is nested more than {depth} levels deep")
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError
    return value


def by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them: `site-2` before `site-10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _depth(value: object, limit: int) -> int:
    """Return how deeply lists and objects are nested, or more than `limit`."""
    level, found = [value], 0
    while level and found <= limit:
        level = [
            item
            for outer in level
            if isinstance(outer, (list, dict))
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (list, dict))
        ]
        found += 1
    return found
