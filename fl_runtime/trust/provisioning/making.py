"""Making the kits of a project's participants: one kit each, as a folder or as an encrypted zip."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fl_runtime.errors import ConfigError
from fl_runtime.trust.authority import Authority, save_project, signed_members
from fl_runtime.trust.files import write_file
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import KIT_FILE, write_kit
from fl_runtime.trust.project import MEMBERS, Project

AUTHORITY = "authority"
"""Name of the authority's folder among the kits."""

_PARTIAL = ".partial"  # folder for kits that are being made, so that half a kit is never taken for one


@dataclass(frozen=True)
class MadeKit:
    """A kit that was just made.

    Attributes:
        identity: Its participant.
        path: The kit's folder, or its zip file.
        password: Opens the zip file; "" for a folder.
        awaits_outside: Whether the participant puts a certificate of its own authority there.
    """

    identity: Identity
    path: Path
    password: str = field(repr=False)
    awaits_outside: bool


def kit_of(out: Path, name: str) -> Path | None:
    """Return where a participant's kit lies among the kits: its folder, else its zip file, else None.

    Args:
        out: Folder of the kits.
        name: Name of the participant.
    """
    places = (out / name, archive_of(out, name))
    return next((place for place in places if place.exists()), None)


def archive_of(out: Path, name: str) -> Path:
    """Return the path of a participant's zip file among the kits.

    Args:
        out: Folder of the kits.
        name: Name of the participant.
    """
    return out / f"{name}.zip"


def opened_with(out: Path, project: Project, present: Callable[[], bytes], fresh: Callable[[], bytes]) -> Authority:
    """Open the authority among the kits and give it a project, or create it.

    Args:
        out: Folder of the kits; created if missing.
        project: The project, as it is to be from now on.
        present: Returns the passphrase of an existing key.
        fresh: Returns the passphrase of a new key; b"" for a key that is not encrypted.

    Returns:
        The authority.

    Raises:
        ConfigError: If the authority is that of another federation.
        StoreError: If a file cannot be written.
    """
    folder = out / AUTHORITY
    if not (folder / "ca.key").exists():
        out.mkdir(parents=True, exist_ok=True, mode=0o755)
        return Authority.create(folder, project, fresh())
    authority = Authority(folder, present)
    if authority.project.federation != project.federation:
        raise ConfigError(
            f"{folder} is the authority of {authority.project.federation}, not of {project.federation}",
            fix="choose another folder with --out",
        )
    save_project(folder, project)
    return authority.reopened()


def make_kit(
    out: Path, authority: Authority, identity: Identity, *, password: str = "", with_key: bool = True
) -> MadeKit:
    """Make the kit of a participant who has none.

    Args:
        out: Folder of the kits.
        authority: The authority, whose folder is locked, see `lock.changing`.
        identity: The participant.
        password: Password of the zip file to make; "" for a folder.
        with_key: Whether to make its private key and certificate, unless those come from an outside authority.

    Returns:
        The kit.

    Raises:
        ConfigError: If the participant has a kit.
        StoreError: If a file cannot be written. Nothing is left of the kit then but a certificate, if one was issued.
    """
    if (there := kit_of(out, identity.name)) is not None:
        raise ConfigError(
            f"there is a kit of {identity.name} already", where=str(there), fix="move it away, and run this again"
        )
    awaits_outside = identity.name in authority.project.outside_holders()
    partial, kit = out / _PARTIAL / identity.name, out / identity.name
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_kit(partial, authority, identity, with_key=with_key and not awaits_outside)
        if password:
            from fl_runtime.trust.provisioning.archive import write_archive

            kit = archive_of(out, identity.name)
            write_archive(kit, partial, password)
        else:
            partial.rename(kit)
    finally:
        shutil.rmtree(out / _PARTIAL, ignore_errors=True)
    return MadeKit(identity, kit, password, awaits_outside)


def hand_out_members(out: Path, authority: Authority) -> bool:
    """Sign who takes part now, and write the list into the kits of servers that lie among the kits.

    Args:
        out: Folder of the kits.
        authority: The authority.

    Returns:
        Whether a server's kit lies there.

    Raises:
        StoreError: If a file cannot be written.
    """
    members = signed_members(authority)
    kits = [out / name for name in authority.project.server.names if (out / name / KIT_FILE).is_file()]
    for kit in kits:
        path = kit / MEMBERS
        if not path.exists() or path.read_bytes() != members:
            write_file(path, members)
    return bool(kits)
