"""Text from elsewhere: made printable before it reaches a terminal, a log or a file."""

from __future__ import annotations

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
