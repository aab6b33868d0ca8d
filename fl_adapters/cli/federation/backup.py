"""Commands `fl-adapters server backup` and `server restore`: copies of a server's data folder and audit log."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.federation.server import data_folder
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from fl_runtime.store.backup import Backup
    from fl_runtime.trust.kits import StartupKit


def back_up(out: Path, kit_folder: Path, data: Path | None, as_json: bool) -> int:
    """Make a backup. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.store.backup import back_up
        from fl_runtime.trust.audit import AuditLog
        from fl_runtime.trust.kits import read_kit
        from fl_runtime.trust.working_kit import working_kit

        source = data_folder(kit_folder, data)
        kit = read_kit(working_kit(kit_folder, source), kind="server")
        lists = _installers(kit)

        def copy_kit(folder: Path) -> None:
            log = AuditLog(kit.folder, kit.folder)
            log.write("backup made", kit.identity, folder=str(out))
            log.copy_to(folder)
            for name in lists:
                if (kit.folder / name).exists():
                    shutil.copyfile(kit.folder / name, folder / name)

        _show(back_up(source, out.resolve(), kit.identity.federation, copy_kit), "backed up", source, as_json)
    return 0


def restore(folder: Path, kit_folder: Path, data: Path | None, as_json: bool) -> int:
    """Make a data folder from a backup. Returns exit status 0."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.store.backup import KIT_PART, restore
        from fl_runtime.trust.kits import check_kind, read_kit, read_unsigned
        from fl_runtime.trust.working_kit import working_kit

        target = data_folder(kit_folder, data)
        identity, _ = read_unsigned(kit_folder)  # a working kit would lie in the folder that must be empty
        check_kind(identity, "server", kit_folder)
        backup = restore(folder.resolve(), target, identity.federation)
        kit = read_kit(working_kit(kit_folder, target), kind="server")
        log = _restore_kit(target / KIT_PART, kit, backup.made_at)
        shutil.rmtree(target / KIT_PART, ignore_errors=True)
        console_for(as_json).print(f"the audit log goes on with {log}", highlight=False, soft_wrap=True)
        _show(backup, "restored", target, as_json)
    return 0


def _installers(kit: StartupKit) -> dict[str, Callable[[Path], object]]:
    """Name of each file that changes in a server's kit, beside its audit log -> what puts a copy of it into the kit.

    Something newer in the kit stays.
    """
    from fl_runtime.server.federation.renewals import RENEWALS
    from fl_runtime.server.federation.roots import HANDED_OUT, install_package
    from fl_runtime.trust.kits import CRL, known_roots
    from fl_runtime.trust.project import MEMBERS, Members
    from fl_runtime.trust.revocation import RevocationList
    from fl_runtime.trust.roots.rotation import read_package

    def roots() -> bytes:
        return known_roots(kit.folder).roots

    return {
        HANDED_OUT: lambda file: install_package(kit.folder, read_package(file)),
        CRL: lambda file: RevocationList(kit.folder / CRL, roots).install(file.read_bytes()),
        MEMBERS: lambda file: Members(kit.folder, kit.identity.federation, roots, kit.sites).install(file.read_bytes()),
        RENEWALS: lambda file: (kit.folder / RENEWALS).exists() or shutil.copyfile(file, kit.folder / RENEWALS),
    }


def _restore_kit(part: Path, kit: StartupKit, made_at: float) -> str:
    """Put what a backup has of the server's kit into the kit. Returns which audit log goes on."""
    from fl_runtime.trust.audit.restored import restore_log

    for name, install in _installers(kit).items():
        if (part / name).exists():
            try:
                install(part / name)
            except ConfigError as error:
                print(f"{name} of the backup was not taken: {error.what}", file=sys.stderr, flush=True)
    return restore_log(part, kit.folder, kit.identity, made_at)


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
