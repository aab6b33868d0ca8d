"""The events of a job as lines for people: time, site, round, and what happened."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_adapters.environments.progress.text import event_text
from fl_runtime.text import parse_json, printable
from fl_runtime.trainings import EVENTS

_LINE_CHARS = 400


def event_files(folder: Path) -> list[Path]:
    """Return the files with the events of a job, in the order of its trainings.

    Args:
        folder: Folder of the job, with an events.jsonl for each training.
    """
    return [folder / EVENTS, *sorted(folder.glob(f"*/{EVENTS}"), key=lambda path: path.parent.name.zfill(9))]


def event_line(raw: str) -> str:
    """Return an event as a line for people; "" for one that cannot be read.

    Args:
        raw: The event, as JSON.
    """
    try:
        return _line(parse_json(raw))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError):
        return ""


def _line(event: Mapping[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return printable(f"{at} {event['site'] or 'server'}: {event_text(event)}", _LINE_CHARS)
