"""The last lines of an audit log, for people who read it. `verification.py` tells whether a log is whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_runtime.errors import StoreError
from fl_runtime.text import parse_json
from fl_runtime.trust.audit.lines import LOG_FILE

_READ_BYTES = 2**19
_PROOFS = ("before", "seal", "digest")  # which prove a line to programs that have the whole log
_UNREADABLE: Mapping[str, Any] = {"action": "a line that cannot be read", "outcome": "damaged"}


@dataclass(frozen=True)
class AuditLines:
    """Lines of an audit log that follow each other.

    Attributes:
        entries: Fields of each line, without digests. The oldest comes first.
        begin: Where the first of them begins in the file, in bytes.
        end: Where the last of them ends, in bytes.
    """

    entries: tuple[Mapping[str, Any], ...]
    begin: int
    end: int


def lines_before(folder: Path, count: int, end: int | None = None) -> AuditLines:
    """Read the last lines of a log, or those before them.

    Args:
        folder: Folder of audit.jsonl.
        count: Most lines to read. There may be fewer, since at most 512 KiB are read.
        end: Where the last line ends, in bytes: the `begin` of lines that were read before. None for the end.

    Returns:
        The lines.

    Raises:
        StoreError: The log cannot be read.
    """
    data, end = _read(folder, None, end)
    lines = data.splitlines(keepends=True)
    if end > len(data) and len(lines) > 1:
        lines = lines[1:]  # the first one begins before what was read
    if lines and not lines[-1].endswith(b"\n"):
        end -= len(lines.pop())  # which is being written
    lines = lines[-count:] if count > 0 else []
    return AuditLines(tuple(map(_entry, lines)), end - sum(map(len, lines)), end)


def lines_after(folder: Path, begin: int) -> AuditLines:
    """Read the lines that were added to a log.

    Args:
        folder: Folder of audit.jsonl.
        begin: Where the first of them begins, in bytes: the `end` of lines that were read before.

    Returns:
        The lines, as far as 512 KiB hold them.

    Raises:
        StoreError: The log cannot be read.
    """
    data, _ = _read(folder, begin, None)
    lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
    return AuditLines(tuple(map(_entry, lines)), begin, begin + sum(map(len, lines)))


def _read(folder: Path, begin: int | None, end: int | None) -> tuple[bytes, int]:
    """Read from `begin`, or up to `end`. Returns the bytes, and where they end in the file."""
    path = folder / LOG_FILE
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            stop = size if end is None else max(0, min(end, size))
            start = max(0, stop - _READ_BYTES) if begin is None else min(begin, size)
            file.seek(start)
            data = file.read(min(stop - start, _READ_BYTES))
            return data, start + len(data)
    except OSError as error:
        raise StoreError(
            f"the audit log cannot be read: {error.strerror}", where=str(path), fix="check the disk"
        ) from None


def _entry(line: bytes) -> Mapping[str, Any]:
    try:
        fields = parse_json(line)
    except ValueError:
        return _UNREADABLE
    return {key: fields[key] for key in fields if key not in _PROOFS} if isinstance(fields, dict) else _UNREADABLE
