"""An audit log after a restoration from a backup: which of two logs goes on, and the line that says so."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

from fl_runtime.errors import StoreError
from fl_runtime.trust.audit.lines import (
    BEGIN,
    COUNTER_FILE,
    HEAD_FILE,
    LOG_FILE,
    LineMark,
    checked_line,
    next_mark,
)
from fl_runtime.trust.audit.log import AuditLog
from fl_runtime.trust.identity import Identity

RESTORED = "data restored from a backup"
"""Action of the line that is written after a restoration."""


def restore_log(copy: Path, kit: Path, who: Identity, made_at: float) -> str:
    """Go on with the longer one of a kit's log and its copy in a backup, and put the restoration on it.

    A log that lines were added to since the backup stays as it is. A kit that has no log, or an earlier state of the
    one in the backup, gets that of the backup. If neither continues the other, the kit's stays.

    Args:
        copy: Folder of the copy, as `AuditLog.copy_to` has made it; it may have none.
        kit: Folder of the server's kit, which signs the log.
        who: The server.
        made_at: When the backup was made, in seconds since the epoch.

    Returns:
        Which log goes on, as a human-readable message.

    Raises:
        StoreError: If a file cannot be read or written.
    """
    try:
        present, saved = _marks(kit / LOG_FILE), _marks(copy / LOG_FILE)
        if saved[-1] in present:
            newer = len(present) - 1 - present.index(saved[-1])
            log = f"that of the kit, which has {newer} lines since the backup"
        elif present[-1] in saved:
            for name in (LOG_FILE, HEAD_FILE, COUNTER_FILE):
                shutil.copyfile(copy / name, kit / name)
            log = f"that of the backup, with {saved[-1].number} lines; later ones are lost"
        else:
            log = f"that of the kit; the one in the backup, which ends with line {saved[-1].number}, is another"
    except OSError as error:
        raise StoreError(
            f"the audit log cannot be restored: {error.strerror}", where=str(error.filename), fix="check the disk"
        ) from None
    time = datetime.fromtimestamp(made_at, UTC).isoformat(timespec="seconds")
    AuditLog(kit, kit).write(RESTORED, who, made_at=time, line_then=saved[-1].to_json(), log=log)
    return log


def _marks(log: Path) -> list[LineMark]:
    """The marks of all lines, after that of the beginning."""
    marks = [BEGIN]
    if log.exists():
        with log.open("rb") as file:
            for line in file:
                marks.append(next_mark(checked_line(line, marks[-1])[1], marks[-1]))
    return marks
