"""Commands `fl-adapters provision` and `unpack`: make and unpack startup kits."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_adapters.cli.federation.cert import admin_kit, how_to_tell_server, push
from fl_adapters.cli.federation.passphrase import given, open_authority
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.identity import Identity
    from fl_runtime.trust.kits import StartupKit
    from fl_runtime.trust.project import Project

PASSWORD_VARIABLE = "FL_ADAPTERS_PASSWORD"
"""Environment variable that may hold the password of zips."""

_PARTIAL = ".partial"  # folder for kits that are being made, so that half a kit is never taken for one


_TELL_KITS = (
    "the outside authorities have changed: `fl-adapters authority install {file} --kit KIT` puts them in force in the "
    "kits of the server and of the sites"
)


def provision(
    project: Path,
    out: Path,
    as_zip: bool,
    password: str,
    without_keys: bool,
    again: Sequence[str],
    passphrase: Path | None,
    admin: Path | None,
    as_json: bool,
) -> int:
    """Make kits for all participants who have neither a kit in `out` nor a certificate, and the authority if needed.

    Participants in `again` get another kit, and their certificates are revoked. The server gets the list of members by
    a call with the kit of `admin`, or in its own kit if that is in `out`.
    """
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.kits import write_kit
        from fl_runtime.trust.project import read_project
        from fl_runtime.trust.roots.outside import OUTSIDE

        if as_zip:  # before anything is written: this needs pyzipper
            from fl_runtime.trust.archive import new_password, write_archive

        sender = admin_kit(admin)
        new_project = read_project(project)
        for name in again:
            new_project.participant(name)
            if _has_kit(out / name):
                raise ConfigError(
                    f"there is a kit of {name} already", where=str(out / name), fix="move it away, and run this again"
                )
        authority = _authority(out, new_project, passphrase)
        _revoke_earlier(console, authority, again)
        listed = _contents(authority.folder / "members.json")
        before, outside = _contents(authority.folder / OUTSIDE), authority.signed_outside()
        kits: dict[str, dict[str, Any]] = {}
        unmade: dict[str, list[str]] = {}
        for identity in new_project.participants():
            kit = out / identity.name
            if _has_kit(kit):
                continue
            if issued := list(authority.counting(identity.name)):
                unmade[identity.name] = [f"{item.serial:x}" for item in issued]
                _show_unmade(console, identity, out, f"{issued[-1].not_after:%Y-%m-%d}")
                continue
            partial = out / _PARTIAL / identity.name
            shutil.rmtree(partial, ignore_errors=True)
            has_other = identity.name in new_project.outside_holders()
            write_kit(partial, authority, identity, with_key=not (without_keys or has_other))
            kits[identity.name] = made = {"identity": str(identity), "kit": str(kit)}
            if as_zip:
                path = kit.with_name(f"{kit.name}.zip")
                made |= {"kit": str(path), "password": password or new_password()}
                write_archive(path, partial, made["password"])
                shutil.rmtree(partial)
            else:
                partial.rename(kit)
            _show_kit(console, made)  # at once: should a later kit fail, nobody could open this one
            if has_other:
                _print(console, "    has no certificate yet: put that of its own authority there with `cert install`")
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
        if before and outside != before:
            _print(console, _TELL_KITS.format(file=authority.folder / OUTSIDE))
        _hand_out_members(console, authority, out, sender, listed)
        _show_end(console, bool(kits or unmade), authority.fingerprint)
        if as_json:
            fields = {"federation": new_project.federation, "authority": authority.fingerprint}
            show_json({**fields, "kits": kits, "unmade": unmade})
    return 0


def _contents(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _hand_out_members(
    console: Console, authority: Authority, out: Path, sender: StartupKit | None, before: bytes
) -> None:
    """Sign who takes part now, and bring it to the server: by an admin's call, or into kits that lie in `out`."""
    from fl_runtime.trust.authority import signed_members
    from fl_runtime.trust.files import write_file
    from fl_runtime.trust.project import MEMBERS, read_members

    members = signed_members(authority)
    kits = [out / name for name in authority.project.server.names if (out / name / "kit.json").is_file()]
    for kit in kits:
        if _contents(kit / MEMBERS) != members:
            write_file(kit / MEMBERS, members)
    if sender is not None:
        push(authority, sender)
        sites = read_members(members, authority.project.federation, MEMBERS, None).sites
        _print(console, f"the server has the list of members: {len(sites)} sites")
    elif before and before != members and not kits:
        _print(console, f"the list of members has changed; {how_to_tell_server(authority.folder)}")


def _has_kit(kit: Path) -> bool:
    return kit.exists() or kit.with_name(f"{kit.name}.zip").exists()


def _authority(out: Path, project: Project, passphrase: Path | None) -> Authority:
    """Open the authority in `out`/authority with the new project, or create it."""
    from fl_runtime.trust.authority import Authority, save_project

    folder = out / "authority"
    if not (folder / "ca.key").exists():
        out.mkdir(parents=True, exist_ok=True, mode=0o755)
        return Authority.create(folder, project, given(passphrase))
    authority = open_authority(folder, passphrase)
    if authority.project.federation != project.federation:
        raise ConfigError(
            f"{folder} is the authority of {authority.project.federation}, not of {project.federation}",
            fix="choose another folder with --out",
        )
    save_project(folder, project)
    return open_authority(folder, passphrase)


def _revoke_earlier(console: Console, authority: Authority, names: Sequence[str]) -> None:
    """Revoke the certificates of participants who get another kit. First, so that a broken run leaves no second one."""
    for name in names:
        if revoked := authority.revoke_certificates(list(authority.counting(name))):
            _print(console, f"{name}: certificates revoked: {len(revoked)}. {how_to_tell_server(authority.folder)}")


def _show_kit(console: Console, kit: dict[str, Any]) -> None:
    _print(console, f"{kit['identity']}: {kit['kit']}")
    if "password" in kit:
        _print(console, f"    password: {kit['password']}")


def _show_unmade(console: Console, identity: Identity, out: Path, until: str) -> None:
    _print(
        console,
        f"{identity}: has a certificate until {until}, so no second kit was made. If its kit is lost, "
        f"`fl-adapters provision ... --out {out} --again {identity.name}` makes another and revokes that certificate",
    )


def _show_end(console: Console, any_shown: bool, fingerprint: str) -> None:
    if not any_shown:
        _print(console, "every participant has a kit already")
    _print(console, f"the authority's fingerprint: {fingerprint}")
    _print(console, "keep the folder `authority` secret: whoever has its key can pose as any participant")


def _print(console: Console, text: str) -> None:
    """Print a line whole, whatever the width of the terminal."""
    console.print(text, highlight=False, soft_wrap=True)


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
