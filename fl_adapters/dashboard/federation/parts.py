"""Parts of pages about a federation: where the connection stands, and times."""

from __future__ import annotations

import time
from xml.etree.ElementTree import Element

from fl_adapters.dashboard.federation.connection import Seen
from fl_adapters.environments.report.document import tag


def standing(seen: Seen) -> list[Element]:
    """Return what a page says of a server that does not answer; nothing while it does.

    Args:
        seen: What is known of the federation.
    """
    if seen.fault is None:
        return [] if seen.federation else [tag("p", "Waiting for the server's first answer.")]
    old = f"What is shown is of {clock(seen.since)}. " if seen.since else ""
    made = [tag("p", tag("strong", seen.fault.what, class_="bad"))]
    made += [tag("p", f"What to do: {seen.fault.fix}.")] if seen.fault.fix else []
    return [*made, tag("p", f"{old}The dashboard asks again by itself.", class_="soft")]


def clock(seconds: float) -> str:
    """Return a moment in local time; "" for 0.

    Args:
        seconds: The moment, in seconds since the epoch.
    """
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""
    except (ValueError, OverflowError, OSError):
        return ""
