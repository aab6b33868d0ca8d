"""The events of a job as lines for people: time, site, round, and what happened."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_adapters.environments import logs
from fl_adapters.environments.progress.text import event_text
from fl_runtime.text import parse_json, printable
from fl_runtime.types.trainings import EVENTS

_READ_BYTES = 2**20
_LINE_CHARS = 400


def last_lines(folder: Path, most: int) -> list[str]:
    """Return the last events of a job, one line each.

    Args:
        folder: Folder of the job, with an events.jsonl for each training.
        most: Largest number of lines.

    Returns:
        The lines, the oldest first; as many as the last 1 MiB of each training holds.
    """
    lines: deque[tuple[float, str]] = deque(maxlen=most)
    for file in [folder / EVENTS, *sorted(folder.glob(f"*/{EVENTS}"), key=lambda path: path.parent.name.zfill(9))]:
        for raw in logs.last_lines(file, _READ_BYTES):
            try:
                event = parse_json(raw)
                lines.append((float(event["time"]), _line(event)))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError):
                continue
    return [text for _, text in sorted(lines)]


def _line(event: Mapping[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    return printable(f"{at} {event['site'] or 'server'}: {event_text(event)}", _LINE_CHARS)
