"""Commands `fl-adapters provision` and `unpack`: make and unpack startup kits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fl_adapters.cli.federation.passphrase import given, open_authority
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def provision(
    project: Path,
    out: Path,
    as_zip: bool,
    password: str,
    without_keys: bool,
    passphrase: Path | None,
    as_json: bool,
) -> int:
    """Make kits for all participants without one in `out`, and the authority in `out`/authority if there is none."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.errors import ConfigError
        from fl_runtime.trust.authority import Authority, save_project
        from fl_runtime.trust.kits import write_kit
        from fl_runtime.trust.project import read_project

        if as_zip:  # before anything is written: this needs pyzipper
            from fl_runtime.trust.archive import new_password, write_archive

        new_project = read_project(project)
        folder = out / "authority"
        if (folder / "ca.key").exists():
            authority = open_authority(folder, passphrase)
            if authority.project.federation != new_project.federation:
                raise ConfigError(
                    f"{folder} is the authority of {authority.project.federation}, not of {new_project.federation}",
                    fix="choose another folder with --out",
                )
            save_project(folder, new_project)
            authority = open_authority(folder, passphrase)
        else:
            authority = Authority.create(folder, new_project, given(passphrase))
        kits: dict[str, dict[str, Any]] = {}
        for identity in new_project.participants():
            kit = out / identity.name
            if kit.exists() or (as_zip and kit.with_name(f"{kit.name}.zip").exists()):
                continue
            write_kit(kit, authority, identity, with_key=not without_keys)
            kits[identity.name] = {"identity": str(identity), "kit": str(kit)}
            if as_zip:
                import shutil

                kit_password = password or new_password()
                path = kit.with_name(f"{kit.name}.zip")
                write_archive(path, kit, kit_password)
                shutil.rmtree(kit)
                kits[identity.name] |= {"kit": str(path), "password": kit_password}
        _show(console, kits, authority.fingerprint)
        if as_json:
            show_json({"federation": new_project.federation, "authority": authority.fingerprint, "kits": kits})
    return 0


def _show(console: Console, kits: dict[str, dict[str, Any]], fingerprint: str) -> None:
    table = Table("participant", "kit", *(["password"] if any("password" in kit for kit in kits.values()) else []))
    for kit in kits.values():
        table.add_row(kit["identity"], kit["kit"], *([kit["password"]] if "password" in kit else []))
    console.print(table if kits else "every participant has a kit already")
    console.print(f"the authority's fingerprint: {fingerprint}", highlight=False, soft_wrap=True)
    console.print(
        "keep the folder `authority` secret: whoever has its key can pose as any participant", highlight=False
    )


def unpack(archive: Path, out: Path | None, password: str, as_json: bool) -> int:
    """Unpack an encrypted kit. Returns exit status 0."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.archive import read_archive
        from fl_runtime.trust.kits import read_unsigned

        folder = out or archive.with_suffix("")
        read_archive(archive, folder, password)
        identity, _ = read_unsigned(folder)
        console.print(f"{identity}: {folder}", highlight=False, soft_wrap=True)
        if as_json:
            show_json({"kit": str(folder), "identity": identity.uri})
    return 0
