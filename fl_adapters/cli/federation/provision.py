"""Commands `fl-adapters provision` and `unpack`: make and unpack startup kits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_adapters.cli.federation.cert import admin_kit, how_to_tell_server, push
from fl_adapters.cli.federation.passphrase import given, present
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.identity import Identity
    from fl_runtime.trust.kits import StartupKit
    from fl_runtime.trust.provisioning.making import MadeKit

PASSWORD_VARIABLE = "FL_ADAPTERS_PASSWORD"
"""Environment variable that may hold the password of zips."""

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
        from fl_runtime.trust.project import read_project
        from fl_runtime.trust.provisioning.lock import changing
        from fl_runtime.trust.provisioning.making import AUTHORITY, kit_of, make_kit, opened_with
        from fl_runtime.trust.roots.outside import OUTSIDE

        if as_zip:  # before anything is written: this needs pyzipper
            from fl_runtime.trust.provisioning.archive import new_password

        sender = admin_kit(admin)
        new_project = read_project(project)
        for name in again:
            new_project.participant(name)
            if there := kit_of(out, name):
                raise ConfigError(
                    f"there is a kit of {name} already", where=str(there), fix="move it away, and run this again"
                )
        kits: dict[str, dict[str, Any]] = {}
        unmade: dict[str, list[str]] = {}
        with changing(out / AUTHORITY, create=True):
            before_names = _names(out / AUTHORITY)
            authority = opened_with(out, new_project, present(passphrase), partial(given, passphrase))
            _show_removed(console, before_names, authority)
            _revoke_earlier(console, authority, again)
            listed = _contents(authority.folder / "members.json")
            before, outside = _contents(authority.folder / OUTSIDE), authority.signed_outside()
            for identity in new_project.participants():
                if kit_of(out, identity.name):
                    continue
                if issued := list(authority.counting(identity.name)):
                    unmade[identity.name] = [f"{item.serial:x}" for item in issued]
                    _show_unmade(console, identity, out, f"{issued[-1].not_after:%Y-%m-%d}")
                    continue
                secret = (password or new_password()) if as_zip else ""
                kit = make_kit(out, authority, identity, password=secret, with_key=not without_keys)
                kits[identity.name] = _show_kit(
                    console, kit
                )  # at once: should a later kit fail, this one can be opened
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


def _names(authority_folder: Path) -> list[str]:
    """Names of the participants of an authority's project; none before there is one."""
    from fl_runtime.trust.project import read_project

    path = authority_folder / "project.yml"
    return [identity.name for identity in read_project(path).participants()] if path.exists() else []


def _show_removed(console: Console, before: Sequence[str], authority: Authority) -> None:
    """Name the participants whom the new project file leaves out, such as those that were added in the dashboard."""
    now = {identity.name for identity in authority.project.participants()}
    for name in before:
        if name not in now:
            _print(
                console,
                f"{name} is not in the project file, so it is no member any more; if that is not meant, add it there "
                "and run this again",
            )


def _hand_out_members(
    console: Console, authority: Authority, out: Path, sender: StartupKit | None, before: bytes
) -> None:
    """Sign who takes part now, and bring it to the server: by an admin's call, or into kits that lie in `out`."""
    from fl_runtime.trust.authority import signed_members
    from fl_runtime.trust.project import MEMBERS, read_members
    from fl_runtime.trust.provisioning.making import hand_out_members

    in_kit = hand_out_members(out, authority)
    members = signed_members(authority)
    if sender is not None:
        push(authority, sender)
        sites = read_members(members, authority.project.federation, MEMBERS, None).sites
        _print(console, f"the server has the list of members: {len(sites)} sites")
    elif before and before != members and not in_kit:
        _print(console, f"the list of members has changed; {how_to_tell_server(authority.folder)}")


def _revoke_earlier(console: Console, authority: Authority, names: Sequence[str]) -> None:
    """Revoke the certificates of participants who get another kit. First, so that a broken run leaves no second one."""
    for name in names:
        if revoked := authority.revoke_certificates(list(authority.counting(name))):
            _print(console, f"{name}: certificates revoked: {len(revoked)}. {how_to_tell_server(authority.folder)}")


def _show_kit(console: Console, kit: MadeKit) -> dict[str, Any]:
    """Print where a kit is, and its password. Returns that as JSON fields."""
    _print(console, f"{kit.identity}: {kit.path}")
    if kit.password:
        _print(console, f"    password: {kit.password}")
    if kit.awaits_outside:
        _print(console, "    has no certificate yet: put that of its own authority there with `cert install`")
    password = {"password": kit.password} if kit.password else {}
    return {"identity": str(kit.identity), "kit": str(kit.path), **password}


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
        from fl_runtime.trust.kits import read_unsigned
        from fl_runtime.trust.provisioning.archive import read_archive

        folder = out or archive.with_suffix("")
        read_archive(archive, folder, password)
        identity, _ = read_unsigned(folder)
        console.print(f"{identity}: {folder}", highlight=False, soft_wrap=True)
        if as_json:
            show_json({"kit": str(folder), "identity": identity.uri})
    return 0
