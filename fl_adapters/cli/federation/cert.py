"""Commands `fl-adapters cert ...`: request, sign, install, renew, revoke and list certificates."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from fl_adapters.cli.federation.passphrase import open_authority
from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def request(kit: Path, as_json: bool) -> int:
    """Make a new key in the kit, and a request to have it signed."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.kits import make_request

        path = make_request(kit)
        _print_result(
            as_json, f"send {path} to the certificate authority; the private key stays here", request=str(path)
        )
    return 0


def sign(
    request_file: Path,
    authority_folder: Path,
    out: Path | None,
    days: float | None,
    passphrase: Path | None,
    as_json: bool,
) -> int:
    """Sign a request, if the project knows its participant."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.errors import ConfigError
        from fl_runtime.trust.certificates import read_request
        from fl_runtime.trust.files import read_file, write_file

        authority = open_authority(authority_folder, passphrase)
        claimed, key = read_request(read_file(request_file, "signing request"), str(request_file))
        known = authority.project.participant(claimed.name)
        if claimed != known:
            raise ConfigError(
                f"the request names {claimed}, the project {known}",
                where=str(request_file),
                fix="make the request with a startup kit of this federation, or correct the project file",
            )
        path = out or request_file.with_name(f"{known.name}.pem")
        write_file(path, authority.issue(known, key, days=days))
        _print_result(as_json, f"{known}: {path}; install it with `fl-adapters cert install`", certificate=str(path))
    return 0


def install(certificate: Path, kit: Path, as_json: bool) -> int:
    """Install a signed or renewed certificate into its kit. Running processes use it at once."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.files import read_file
        from fl_runtime.trust.kits import install as install_in_kit

        installed = install_in_kit(kit, read_file(certificate, "certificate"), str(certificate))
        text = f"{installed.identity}: valid until {installed.not_after:%Y-%m-%d %H:%M} UTC"
        _print_result(as_json, text, **_facts(installed, "valid"))
    return 0


def renew(
    names: Sequence[str], authority_folder: Path, out: Path, days: float | None, passphrase: Path | None, as_json: bool
) -> int:
    """Make new certificates for the same keys: those of `names`, else all that expire soon."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.files import write_file

        authority = open_authority(authority_folder, passphrase)
        due = list(names) or [name for name, item in _newest(authority).items() if item.expires_soon]
        renewed = {}
        for name in due:
            path = out / f"{name}.pem"
            write_file(path, authority.renew(name, days=days))
            renewed[name] = str(path)
        text = "\n".join(f"{name}: {path}" for name, path in renewed.items()) or "no certificate expires soon"
        _print_result(as_json, text, renewed=renewed)
    return 0


def revoke(name: str, authority_folder: Path, kit: Path | None, passphrase: Path | None, as_json: bool) -> int:
    """Revoke all certificates of a participant; with an admin's kit, tell the server at once."""
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.control import ControlClient
        from fl_runtime.trust.kits import read_kit

        admin = None if kit is None else read_kit(kit, kind="admin")
        authority = open_authority(authority_folder, passphrase)
        revoked, crl = authority.revoke(name)
        answer: dict[str, Any] = {}
        if admin is not None:
            control = ControlClient.of_kit(admin.folder, admin.address)
            try:
                answer = control.ask("Revoke", crl=crl.decode())
            finally:
                control.close()
        next_step = (
            "the server refuses them now" if admin else f"copy {authority.folder / 'crl.pem'} to the server's kit"
        )
        serials = [f"{item.serial:x}" for item in revoked]
        _print_result(
            as_json,
            f"{name}: certificates revoked: {len(revoked)}; {next_step}",
            serials=serials,
            server=answer or None,
        )
    return 0


def listing(authority_folder: Path, as_json: bool) -> int:
    """List every certificate that was signed, with its state."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.authority import Authority

        authority = Authority(authority_folder)
        revoked, newest = authority.revoked(), _newest(authority)
        rows = []
        for item in authority.issued():
            state = "valid"
            if item.serial in revoked:
                state = f"revoked {revoked[item.serial]}"
            elif item.not_after < datetime.now(UTC):
                state = "expired"
            elif newest[item.identity.name].serial != item.serial:
                state = "replaced"
            elif item.expires_soon:
                state = "ends soon"
            rows.append(_facts(item, state))
        table = Table("name", "who", "valid until", "days left", "state", "serial")
        for row in rows:
            table.add_row(
                row["name"],
                row["who"],
                row["not_after"][:10],
                f"{row['days_left']:.0f}",
                row["state"],
                row["serial"][:12],
            )
        console.print(table)
        if as_json:
            show_json({"authority": authority.fingerprint, "certificates": rows})
    return 0


def _newest(authority: Any) -> dict[str, Any]:
    """The newest certificate of each participant that is not revoked, by name."""
    revoked = authority.revoked()
    return {item.identity.name: item for item in authority.issued() if item.serial not in revoked}


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
    }


def _print_result(as_json: bool, text: str, **fields: Any) -> None:
    """Print a line for people, and with `as_json` the fields as JSON."""
    console_for(as_json).print(text, highlight=False, soft_wrap=True)
    if as_json:
        show_json(fields)
