"""Commands `fl-adapters server backup` and `server restore`: copies of a server's data folder."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.federation.server import data_folder
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra

if TYPE_CHECKING:
    from fl_runtime.store.backup import Backup


def back_up(out: Path, kit_folder: Path, data: Path | None, as_json: bool) -> int:
    """Make a backup. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.store.backup import back_up
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.working_kit import working_kit

        source = data_folder(kit_folder, data)
        kit = read_kit(working_kit(kit_folder, source), kind="server")
        _show(back_up(source, out.resolve(), kit.identity.federation), "backed up", source, as_json)
    return 0


def restore(folder: Path, kit_folder: Path, data: Path | None, as_json: bool) -> int:
    """Make a data folder from a backup. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.store.backup import restore
        from fl_runtime.trust.kits import read_kit

        kit = read_kit(kit_folder, kind="server")
        target = data_folder(kit.folder, data)
        _show(restore(folder.resolve(), target, kit.identity.federation), "restored", target, as_json)
    return 0


def _show(backup: Backup, what: str, data: Path, as_json: bool) -> None:
    made = f"{datetime.fromtimestamp(backup.made_at, UTC):%Y-%m-%d %H:%M} UTC"
    text = f"{what} {len(backup.jobs)} jobs of {backup.federation}, {backup.nbytes / 1e6:.1f} MB"
    console_for(as_json).print(
        f"{text}: {backup.folder} of {made}, data folder {data}", highlight=False, soft_wrap=True
    )
    if as_json:
        show_json(
            {
                "backup": str(backup.folder),
                "data": str(data),
                "federation": backup.federation,
                "made_at": backup.made_at,
                "jobs": list(backup.jobs),
                "bytes": backup.nbytes,
            }
        )
