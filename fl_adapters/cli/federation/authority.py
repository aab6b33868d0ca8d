"""Commands `fl-adapters authority ...`: the passphrase of the authority's key, and the change to a new root."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_adapters.cli.federation.connection import connected
from fl_adapters.cli.federation.passphrase import fresh, open_authority, present
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.kits import StartupKit


def passphrase(folder: Path, file: Path | None, new_file: Path | None, remove: bool, as_json: bool) -> int:
    """Set, change or remove the passphrase of the authority's key."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.passphrase import change
        from fl_runtime.trust.provisioning.lock import changing

        if remove and new_file is not None:
            raise ConfigError("--remove and --new-file exclude each other", fix="pass one of them")
        new = b"" if remove else fresh(new_file)
        with changing(folder):
            authority = Authority(folder)
            change(folder, present(file), new)
        text = "its key has no passphrase any more" if remove else "its key has the new passphrase"
        _show(as_json, [f"{folder}: {text}"], {"authority": authority.fingerprint, "encrypted": not remove})
    return 0


def rotate(folder: Path, kit_folder: Path | None, file: Path | None, as_json: bool) -> int:
    """Make a new root, or go on with the rotation that has begun; with an admin's kit, have it handed out."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.provisioning.lock import changing
        from fl_runtime.trust.roots.rotation import PACKAGE, begin, not_heard

        kit = _admin(kit_folder)
        with changing(folder):
            authority = begin(open_authority(folder, file))
        standing = _hand_out(kit, folder)
        lines = [f"the new root: {authority.fingerprint}", f"the old root: {_retiring(authority)}"]
        missing = not_heard(authority, standing.get("taken_up", {}))
        if kit is None:
            lines.append(f"copy {folder / PACKAGE} to the server and run `fl-adapters authority install` there")
        lines.append(_who_is_missing(missing))
        _show(as_json, lines, _fields(authority, standing, missing))
    return 0


def finish(folder: Path, kit_folder: Path | None, without: Sequence[str], file: Path | None, as_json: bool) -> int:
    """Retire the old root, if everybody who is not in `without` has taken up the new one."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.provisioning.lock import changing
        from fl_runtime.trust.roots.rotation import PACKAGE

        kit = _admin(kit_folder)
        with changing(folder):
            authority = _finished(open_authority(folder, file), kit, kit_folder, without)
        standing = _hand_out(kit, folder)
        lines = [f"the root: {authority.fingerprint}", "the old root does not count any more, and its key is deleted"]
        if kit is None:
            lines.append(f"copy {folder / PACKAGE} to the server and run `fl-adapters authority install` there")
        _show(as_json, lines, _fields(authority, standing, []))
    return 0


def _finished(
    authority: Authority, kit: StartupKit | None, kit_folder: Path | None, without: Sequence[str]
) -> Authority:
    """End the rotation, if everybody has taken up the new root. Returns the authority as it is then."""
    from fl_runtime.trust.roots.rotation import finish, not_heard, past_statements

    for name in without:
        authority.project.participant(name)
    statements = past_statements(authority.folder)
    if authority.is_rotating:
        standing = _standing(kit)
        if kit is not None and statements and standing["number"] < statements[-1].number:
            raise ConfigError(
                "the server does not know the new root yet",
                where=kit.address,
                fix=f"run `fl-adapters authority rotate --authority {authority.folder} --kit {kit_folder}` first",
            )
        _check_heard(not_heard(authority, standing.get("taken_up", {})), without, kit)
    return finish(authority) if authority.is_rotating or not statements else authority


def status(folder: Path, kit_folder: Path | None, as_json: bool) -> int:
    """Show the trusted roots; with an admin's kit, also who has taken up the newest statement."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.roots.rotation import not_heard

        authority = Authority(folder)
        standing = _standing(_admin(kit_folder))
        missing = not_heard(authority, standing.get("taken_up", {}))
        lines = [f"the root: {authority.fingerprint}"]
        if authority.is_rotating:
            lines = [f"the new root: {authority.fingerprint}", f"the old root: {_retiring(authority)}"]
        if standing:
            lines.append(_who_is_missing(missing))
        _show(as_json, lines, _fields(authority, standing, missing))
    return 0


def install(package_file: Path, kit_folder: Path, as_json: bool) -> int:
    """Take up roots.json or outside.json in a kit, by hand. The kit of the server hands new roots out from then on."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.server.federation.roots import install_package
        from fl_runtime.trust.files import read_file
        from fl_runtime.trust.kits import install_outside, known_roots, read_unsigned, take_up_roots
        from fl_runtime.trust.roots.kit_roots import root_fingerprints
        from fl_runtime.trust.roots.outside import OUTSIDE
        from fl_runtime.trust.roots.rotation import read_package
        from fl_runtime.trust.roots.statements import offered
        from fl_runtime.trust.working_kit import working_kit

        kit_folder = working_kit(kit_folder)
        identity, _ = read_unsigned(kit_folder)
        if package_file.name == OUTSIDE:
            version = install_outside(kit_folder, read_file(package_file, "outside authorities"), str(package_file))
            text = f"{identity}: version {version} of the outside authorities is in force"
            _show(as_json, [text], {"identity": identity.uri, "outside": version})
            return 0
        package = read_package(package_file)
        if identity.kind == "server":
            number = install_package(kit_folder, package)
        else:
            number = take_up_roots(kit_folder, offered(package, identity.name, 0))
        roots = root_fingerprints(known_roots(kit_folder).roots)
        lines = [f"{identity}: {'nothing new' if number is None else 'new roots taken up'}", *roots]
        _show(as_json, lines, {"identity": identity.uri, "new": number is not None, "roots": roots})
    return 0


def _admin(kit_folder: Path | None) -> StartupKit | None:
    """Read the kit of a project admin. Raises ConfigError for that of somebody else."""
    from fl_runtime.trust.kits import read_kit

    if kit_folder is None:
        return None
    kit = read_kit(kit_folder, kind="admin")
    if kit.identity.role != "project-admin":
        raise ConfigError(
            f"this is the kit of {kit.identity}", where=str(kit_folder), fix="pass the kit of a project admin"
        )
    return kit


def _standing(kit: StartupKit | None) -> Mapping[str, Any]:
    """Ask the server who has taken up which statement."""
    if kit is None:
        return {}
    with connected(kit) as control:
        return control.ask("HandOutRoots")


def _hand_out(kit: StartupKit | None, folder: Path) -> Mapping[str, Any]:
    """Send the authority's package to the server, take it up in the admin's own kit, and ask who has."""
    from fl_runtime.trust.roots.rotation import PACKAGE, read_package

    if kit is None:
        return {}
    with connected(kit) as control:
        control.ask("HandOutRoots", package=read_package(folder / PACKAGE))
    return _standing(kit)


def _check_heard(missing: Sequence[str], without: Sequence[str], kit: StartupKit | None) -> None:
    left = [name for name in missing if name not in without]
    if left and kit is None:
        raise ConfigError(
            "without an admin's kit, nobody can tell who has taken up the new root",
            fix="pass --kit, or name everybody whom you have asked with --without: " + ", ".join(left),
        )
    if left:
        raise ConfigError(
            f"these have not taken up the new root, and could not call any more: {', '.join(left)}",
            fix="wait until they have run, or called `fl-adapters status`; or leave them behind with "
            + " ".join(f"--without {name}" for name in left),
        )


def _who_is_missing(missing: Sequence[str]) -> str:
    if not missing:
        return "everybody has taken up the newest root"
    return f"not heard from yet: {', '.join(missing)}; each takes it up with its next call"


def _retiring(authority: Authority) -> str:
    from fl_runtime.trust.roots.kit_roots import root_fingerprints

    return root_fingerprints(authority.roots)[-1]


def _fields(authority: Authority, standing: Mapping[str, Any], missing: Sequence[str]) -> dict[str, Any]:
    """The state of a rotation as JSON fields."""
    from fl_runtime.trust.roots.kit_roots import root_fingerprints

    return {
        "authority": authority.fingerprint,
        "roots": root_fingerprints(authority.roots),
        "rotating": authority.is_rotating,
        "missing": list(missing),
        "server": dict(standing) or None,
    }


def _show(as_json: bool, lines: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Print lines for people, and with `as_json` the fields as JSON."""
    for line in lines:
        console_for(as_json).print(line, highlight=False, soft_wrap=True)
    if as_json:
        show_json(fields)
