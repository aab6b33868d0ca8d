"""Commands `fl-adapters cert ...`: request, sign, install, renew, revoke and list certificates."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fl_adapters.cli.federation.connection import connected
from fl_adapters.cli.federation.passphrase import open_authority
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra

if TYPE_CHECKING:
    from rich.console import Console

    from fl_runtime.trust.authority import Authority
    from fl_runtime.trust.identity import Identity


def request(kit: Path, as_json: bool) -> int:
    """Make a new key in the kit, and a request to have it signed."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.certificates import fingerprint, read_request
        from fl_runtime.trust.kits import make_request
        from fl_runtime.trust.working_kit import working_kit

        path = make_request(working_kit(kit))
        _, key = read_request(path.read_bytes(), str(path))
        shown = fingerprint(key)
        _print_result(
            as_json,
            f"send {path} to the certificate authority; the private key stays here\n"
            f"the key's fingerprint: {shown}\n"
            "read it out to the authority by another way, such as the telephone: it signs this key only",
            request=str(path),
            fingerprint=shown,
        )
    return 0


def sign(
    request_file: Path,
    authority_folder: Path,
    out: Path | None,
    days: float | None,
    expected: str,
    keep_earlier: bool,
    passphrase: Path | None,
    as_json: bool,
) -> int:
    """Sign a request, if the project knows its participant and the fingerprint is that of the participant's key.

    Certificates of the participant's earlier keys are revoked, unless `keep_earlier`.
    """
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.certificates import fingerprint, read_request
        from fl_runtime.trust.files import read_file, write_file
        from fl_runtime.trust.provisioning.lock import changing

        claimed, key = read_request(read_file(request_file, "signing request"), str(request_file))
        shown = fingerprint(key)
        _compare(
            str(_known(open_authority(authority_folder, passphrase), claimed, request_file)),
            shown,
            expected,
            request_file,
        )
        with changing(authority_folder):
            authority = open_authority(authority_folder, passphrase)
            known = _known(authority, claimed, request_file)
            path = out or request_file.with_name(f"{known.name}.pem")
            earlier = [item for item in authority.counting(known.name) if item.fingerprint != shown]
            write_file(path, authority.issue(known, key, days=days))
            if earlier and not keep_earlier:
                authority.revoke_certificates(earlier)
        lines = [f"{known}: {path}; install it with `fl-adapters cert install`"]
        if earlier and keep_earlier:
            lines.append(f"{len(earlier)} of its earlier certificates, for another key, count as well (--keep-earlier)")
        elif earlier:
            lines.append(
                f"{len(earlier)} of its earlier certificates, for another key, {'is' if len(earlier) == 1 else 'are'} "
                f"revoked now. When {known.name} has installed the new one: {how_to_tell_server(authority_folder)}"
            )
        _print_result(
            as_json,
            "\n".join(lines),
            certificate=str(path),
            fingerprint=shown,
            **{"kept" if keep_earlier else "revoked": [f"{item.serial:x}" for item in earlier]},
        )
    return 0


def _known(authority: Authority, claimed: Identity, request_file: Path) -> Identity:
    """Return who asks for a certificate, by the project. Raises ConfigError if the request names somebody else."""
    from fl_runtime.errors import ConfigError

    known = authority.project.participant(claimed.name)
    if claimed != known:
        raise ConfigError(
            f"the request names {claimed}, the project {known}",
            where=str(request_file),
            fix="make the request with a startup kit of this federation, or correct the project file",
        )
    return known


def _compare(who: str, shown: str, expected: str, request_file: Path) -> None:
    """Compare the fingerprint of a request with `expected`, or ask at the terminal whether it is the right one."""
    from fl_runtime.errors import ConfigError
    from fl_runtime.trust.certificates import same_fingerprint

    if expected:
        if not same_fingerprint(shown, expected):
            raise ConfigError(
                f"the request is for the key {shown}, not for {expected}",
                where=str(request_file),
                fix=f"ask {who} for the fingerprint by telephone; if it differs, somebody has changed the request",
            )
        return
    if not sys.stdin.isatty():
        raise ConfigError(
            f"nobody has compared the fingerprint of the key in this request: {shown}",
            where=str(request_file),
            fix=f"ask {who} for the fingerprint that `cert request` showed, and pass it as --fingerprint",
        )
    typer.echo(f"{who} asks for a certificate for the key\n    {shown}", err=True)
    if not typer.confirm("Ask them to read out their fingerprint by telephone. Is it the same?", err=True):
        raise ConfigError("the request was not signed", where=str(request_file), fix="ask for a new request")


def how_to_tell_server(authority_folder: Path) -> str:
    """Return what to do so that the server gets the newest lists of revoked certificates and of members."""
    return (
        f"tell the server with `fl-adapters cert crl --authority {authority_folder} --kit KIT` (the kit of a project "
        f"admin), or copy {authority_folder / 'crl.pem'} and members.json beside it into the server's kit"
    )


def install(certificate: Path, kit: Path, key_file: Path | None, as_json: bool) -> int:
    """Install a signed or renewed certificate into its kit, with its key if that was made elsewhere."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.certificates import read_key
        from fl_runtime.trust.files import read_file
        from fl_runtime.trust.kits import install as install_in_kit
        from fl_runtime.trust.working_kit import working_kit

        key = None if key_file is None else read_key(read_file(key_file, "private key"), str(key_file))
        installed = install_in_kit(working_kit(kit), read_file(certificate, "certificate"), str(certificate), key)
        text = f"{installed.identity}: valid until {installed.not_after:%Y-%m-%d %H:%M} UTC"
        _print_result(as_json, text, **_facts(installed, "valid"))
    return 0


def renew(
    names: Sequence[str], authority_folder: Path, out: Path, days: float | None, passphrase: Path | None, as_json: bool
) -> int:
    """Make new certificates for the same keys: those of `names`, else all that expire soon."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.files import write_file
        from fl_runtime.trust.provisioning.lock import changing
        from fl_runtime.trust.provisioning.standings import newest

        renewed = {}
        with changing(authority_folder):
            authority = open_authority(authority_folder, passphrase)
            for name in list(names) or [name for name, item in newest(authority).items() if item.expires_soon]:
                path = out / f"{name}.pem"
                write_file(path, authority.renew(name, days=days))
                renewed[name] = str(path)
        text = "\n".join(f"{name}: {path}" for name, path in renewed.items()) or "no certificate expires soon"
        _print_result(as_json, text, renewed=renewed)
    return 0


def revoke(
    name: str, authority_folder: Path, kit: Path | None, outside: Path | None, passphrase: Path | None, as_json: bool
) -> int:
    """Revoke all certificates of a participant; with an admin's kit, tell the server, also if it was done before.

    With `outside`, the file of a certificate of an outside authority, revoke that one.
    """
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.provisioning.lock import changing

        admin = admin_kit(kit)
        with changing(authority_folder):
            authority = open_authority(authority_folder, passphrase)
            revoked = authority.revoke(name)[0] if outside is None else [_revoke_outside(authority, name, outside)]
            answer = push(authority, admin)
        what = f"{name}: certificates revoked: {len(revoked)}" if revoked else f"{name}: revoked before"
        next_step = "the server refuses them now" if admin else f"THE SERVER STILL ACCEPTS THEM: {_told(authority)}"
        _print_result(
            as_json, f"{what}; {next_step}", serials=[f"{item.serial:x}" for item in revoked], server=answer or None
        )
    return 0


def _revoke_outside(authority: Authority, name: str, file: Path) -> Any:
    """Revoke a participant's certificate of an outside authority."""
    from fl_runtime.trust.files import read_file

    return authority.revoke_outside(name, read_file(file, "certificate"))


def crl(authority_folder: Path, kit: Path | None, passphrase: Path | None, as_json: bool) -> int:
    """Sign the revocation list again; with an admin's kit, tell the server."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.provisioning.lock import changing
        from fl_runtime.trust.revocation import read_list

        admin = admin_kit(kit)
        with changing(authority_folder):
            authority = open_authority(authority_folder, passphrase)
            signed = read_list(authority.sign_list(), authority.pem, str(authority.folder / "crl.pem"))
            answer = push(authority, admin)
        next_step = "the server has it" if admin else _told(authority)
        text = f"revocation list {signed.number}, which counts until {signed.ends:%Y-%m-%d %H:%M} UTC; {next_step}"
        _print_result(
            as_json,
            text,
            number=signed.number,
            ends=signed.ends.isoformat(),
            serials=[f"{serial:x}" for serial in sorted(signed.serials)],
            server=answer or None,
        )
    return 0


def admin_kit(kit: Path | None) -> Any:
    """Read an admin's kit, before anything is signed; None without one."""
    from fl_runtime.trust.kits import read_kit

    return None if kit is None else read_kit(kit, kind="admin")


def _told(authority: Authority) -> str:
    return how_to_tell_server(authority.folder)


def push(authority: Authority, admin: Any) -> dict[str, Any]:
    """Send the authority's list to the server, with an admin's kit. Returns the server's answer."""
    from fl_runtime.errors import FederationError
    from fl_runtime.trust.authority import signed_members

    if admin is None:
        return {}
    try:
        with connected(admin) as control:
            return control.ask("Revoke", crl=authority.crl.decode(), members=signed_members(authority).decode())
    except FederationError as error:
        raise type(error)(
            f"the list is signed, but the server does not have it: {error.what}",
            where=error.where,
            fix=f"as soon as the server answers, run the same command again, or {_told(authority)}",
        ) from None


def listing(authority_folder: Path, as_json: bool) -> int:
    """List every certificate that was signed, with its state."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.provisioning.standings import standings

        authority = Authority(authority_folder)
        rows = [{**_facts(each.certificate, each.state), "counts": each.counts} for each in standings(authority)]
        for row in rows:
            until = f"until {row['not_after'][:16]} UTC, {row['days_left']:.0f} days"
            _print(console, f"{row['who']}: {row['state']} ({until})")
            _print(console, f"    serial {row['serial']}, fingerprint {row['fingerprint']}")
        if as_json:
            show_json({"authority": authority.fingerprint, "certificates": rows})
    return 0


def _facts(certificate: Any, state: str) -> dict[str, Any]:
    """A certificate as JSON fields."""
    return {
        "name": certificate.identity.name,
        "who": str(certificate.identity),
        "not_before": certificate.not_before.isoformat(),
        "not_after": certificate.not_after.isoformat(timespec="minutes"),
        "days_left": round(certificate.days_left(), 3),
        "state": state,
        "serial": f"{certificate.serial:x}",
        "fingerprint": certificate.fingerprint,
    }


def _print_result(as_json: bool, text: str, **fields: Any) -> None:
    """Print a line for people, and with `as_json` the fields as JSON."""
    _print(console_for(as_json), text)
    if as_json:
        show_json(fields)


def _print(console: Console, text: str) -> None:
    """Print a line whole, whatever the width of the terminal."""
    console.print(text, highlight=False, soft_wrap=True)
